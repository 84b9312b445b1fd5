"""The combinations of format and options that the iotests run on, and which outcomes of a run still count."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, get_args

from tests.conformance.iotests import Outcome
from tests.conformance.records import Outcomes

#: Which of the wanted tests a run starts: all; those without an outcome of the same tools; those that did not pass.
Choice = Literal["all", "remaining", "failed"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
#: Which tests a combination is for: all, or those that start image tools alone.
Scope = Literal["all", "tools"]
#: Words of Outcome.uses that stand for programs which are no image tools.
BESIDE = frozenset(("machine", "daemon", "nbd"))


@dataclass(frozen=True, slots=True)
class Combination:
    """A name for reports, a format, options for the creation of images ("" for none), and which tests it is for."""

    name: str
    image_format: str
    options: str = ""
    scope: Scope = "all"

    @property
    def plain(self) -> Combination:
        """The same format without options."""
        return Combination(self.image_format, self.image_format)


def read(path: Path) -> list[Combination]:
    """Return the combinations of matrix.toml. Raises ValueError where two have one name."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["combination"]
    made = [
        Combination(entry["name"], entry["format"], entry.get("options", ""), entry.get("scope", "all"))
        for entry in entries
    ]
    if wrong := {combination.scope for combination in made} - set(get_args(Scope)):
        raise ValueError(f"{path}: no scope {', '.join(wrong)}")
    if len({combination.name for combination in made}) != len(made):
        raise ValueError(f"{path}: two combinations have one name")
    return made


def named(combinations: Iterable[Combination], patterns: Sequence[str]) -> list[Combination]:
    """Return the combinations that one of the patterns ("qcow2", "qcow2-*") names; all of them without any pattern.

    Raises ValueError for a pattern that names none.
    """
    everything = list(combinations)
    for pattern in patterns:
        if not any(fnmatchcase(combination.name, pattern) for combination in everything):
            names = ", ".join(combination.name for combination in everything)
            raise ValueError(f"no combination {pattern!r}; there are: {names}")
    return [c for c in everything if not patterns or any(fnmatchcase(c.name, pattern) for pattern in patterns)]


def fingerprint(folder: Path) -> str:
    """Return a short hash of the Python sources below *folder*: outcomes of other sources do not count as done."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def chosen(tests: Iterable[str], held: Outcomes, choice: Choice, tools: str) -> list[str]:
    """Return the tests to start. *held* are the outcomes that are there, *tools* identifies the tools of this run."""
    if choice == "all":
        return list(tests)
    if choice == "failed":
        return [test for test in tests if test in held and held[test].status in ("fail", "timeout")]
    return [test for test in tests if test not in held or held[test].tools != tools]


def in_scope(combination: Combination, tests: Iterable[str], plain: Outcomes) -> list[str]:
    """Return those of *tests* that *combination* is for; *plain* are the outcomes of QEMU's tools without options.

    What does not pass there has nothing to show with options either.
    """
    if combination.scope == "all":
        return list(tests)
    passed = (test for test in tests if test in plain and plain[test].status == "pass")
    return [test for test in passed if not BESIDE & set(plain[test].uses)]


def inherited(plain: Outcomes, tests: Iterable[str]) -> list[Outcome]:
    """Return the outcomes that no option changes: what does not run on the plain format does not run with options either."""
    wanted = set(tests)
    return [outcome for test, outcome in plain.items() if test in wanted and outcome.status == "not run"]


def that_encrypt(folder: Path, tests: Iterable[str]) -> list[str]:
    """Return the tests whose own text speaks of encryption: the proof of encrypted qcow2 images."""
    word = re.compile(rb"encrypt", re.IGNORECASE)
    paths = {test: folder / test if (folder / test).is_file() else folder / "tests" / test for test in tests}
    return sorted(test for test, path in paths.items() if path.is_file() and word.search(path.read_bytes()))
