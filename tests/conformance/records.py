"""Outcomes on disk: one JSON file for each toolset and format; a run replaces the outcomes of the tests that it ran."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import threading
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tests.conformance.iotests import Outcome

Outcomes = dict[str, Outcome]
_WRITING = threading.Lock()


def load(path: Path) -> Outcomes:
    """Return the outcomes by test; none where the file does not exist."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())
    return {row["test"]: Outcome.from_json(row) for row in rows}


def record(path: Path, outcome: Outcome) -> None:
    """Replace the outcome of one test in the file. Safe against a kill, other threads and other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _WRITING, path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = load(path)
        held[outcome.test] = outcome
        _write(path, held)


def _write(path: Path, held: Outcomes) -> None:
    rows = [json.dumps(dataclasses.asdict(held[test])) for test in sorted(held)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    temporary.replace(path)


@dataclass(frozen=True, slots=True)
class Reasons:
    """Why tests do not pass, examined and written by hand: (name or pattern of combinations, test) → text."""

    entries: dict[tuple[str, str], str]

    @classmethod
    def read(cls, path: Path) -> Reasons:
        """Read reasons.toml. Raises ValueError where two reasons claim one test of one combination."""
        entries: dict[tuple[str, str], str] = {}
        for reason in tomllib.loads(path.read_text(encoding="utf-8")).get("reason", []):
            for combination in reason["on"]:
                for test in reason["tests"]:
                    if (combination, test) in entries:
                        raise ValueError(f"{path}: two reasons for {test} of {combination}")
                    entries[combination, test] = reason["text"]
        return cls(entries)

    def why(self, combination: str, test: str) -> str | None:
        """Return the reason, or None where nobody has examined the failure. A name goes before a pattern."""
        if (combination, test) in self.entries:
            return self.entries[combination, test]
        matching = (
            text for (pattern, name), text in self.entries.items() if name == test and fnmatchcase(combination, pattern)
        )
        return next(matching, None)


def test_lists(path: Path) -> dict[str, list[str]]:
    """Return the named lists of tests in lists.toml."""
    lists: dict[str, list[str]] = tomllib.loads(path.read_text(encoding="utf-8"))
    return lists
