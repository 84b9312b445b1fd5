"""docs/conformance.md: what passes, what does not and why, and what was not run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.conformance.iotests import Outcome
from tests.conformance.matrix import BESIDE, Combination
from tests.conformance.records import Outcomes, Reasons

INTRODUCTION = """\
# Conformance: QEMU's own tests

`make conformance` fetches QEMU's source package, runs its `tests/qemu-iotests` on this project's tools, and writes this page.
Nothing of these tests is kept here, and no test is known to the tools by name. Each test also runs with QEMU's own tools on the same
machine; what they do not pass there (a feature that the distribution left out, an accelerator, a privilege), and what calls none of
cowhand's tools, is listed apart and not counted. A test passes when its whole output equals QEMU's reference.
"""

NOT_EXAMINED = "not examined yet"


@dataclass(frozen=True, slots=True)
class Results:
    """Everything known about one combination of format and options: outcomes with QEMU's tools and with cowhand's."""

    combination: Combination
    reference: Outcomes
    own: Outcomes
    #: Words of Outcome.uses that stand for cowhand's tools.
    words: frozenset[str]
    #: Comparable tests of the plain format that this combination is not for.
    elsewhere: tuple[str, ...] = ()
    #: What outcomes of these very sources carry.
    identity: str = ""

    def comparable(self) -> list[str]:
        """Return the tests that QEMU's own tools pass here and that call at least one tool that cowhand has."""
        passed = (test for test, outcome in self.reference.items() if outcome.status == "pass")
        passed = (test for test in passed if test not in self.elsewhere)
        return sorted(test for test in passed if self.words.intersection(self.reference[test].uses))

    def not_comparable(self) -> list[Outcome]:
        """Return QEMU's outcomes of all other tests."""
        comparable = {*self.comparable(), *self.elsewhere}
        return [outcome for test, outcome in sorted(self.reference.items()) if test not in comparable]

    def select(self, *statuses: str) -> list[Outcome]:
        """Return cowhand's outcomes with these statuses, of the comparable tests only."""
        return [self.own[test] for test in self.comparable() if test in self.own and self.own[test].status in statuses]

    def earlier(self) -> list[str]:
        """Return the comparable tests whose outcome is one of other sources than these."""
        return [test for test in self.comparable() if test in self.own and self.own[test].tools != self.identity]

    def tools_alone(self) -> list[str]:
        """Return the comparable tests that start image tools only: no machine, no daemon, no NBD server."""
        return [test for test in self.comparable() if not BESIDE & set(self.reference[test].uses)]


def page(facts: dict[str, str], results: Iterable[Results], reasons: Reasons, encrypting: Iterable[str] = ()) -> str:
    """Return the page's Markdown. *encrypting* are tests that are listed apart as the proof of encryption."""
    everything = list(results)
    dates = sorted({outcome.date for result in everything for outcome in result.own.values() if outcome.date})
    lines = [INTRODUCTION, *(f"- {name}: {value}" for name, value in facts.items())]
    if dates:
        lines.append(f"- Results: {dates[0]}" + (f" to {dates[-1]}" if dates[-1] != dates[0] else ""))
    lines += ["", *_summary(everything), *_encryption(everything, set(encrypting))]
    for result in everything:
        lines += _section(result, reasons)
    return "\n".join(lines).rstrip("\n") + "\n"


def _summary(results: list[Results]) -> list[str]:
    lines = [
        "| images | options | comparable: pass with QEMU's tools | of these pass with cowhand's | share | fail | not run "
        "| image tools alone | run with these sources |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        passed = {outcome.test for outcome in result.select("pass")}
        alone = result.tools_alone()
        comparable = result.comparable()
        failed = result.select("fail", "timeout")
        lines.append(
            f"| {result.combination.name} | {_code(result.combination.options) or 'none'} | {len(comparable)} | {len(passed)} "
            f"| {_share(len(passed), len(comparable))} | {len(failed)} "
            f"| {len(comparable) - len(passed) - len(failed)} | {len(passed & set(alone))} of {len(alone)} "
            f"| {len(result.own.keys() & set(comparable)) - len(result.earlier())} |"
        )
    lines += ["", '"Image tools alone" are tests that start no virtual machine, storage daemon or NBD server.']
    if any(result.elsewhere for result in results):
        lines.append(
            "Combinations with options are for these: what else QEMU's own programs do runs without options only."
        )
    return [*lines, ""]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _encryption(results: list[Results], encrypting: set[str]) -> list[str]:
    """List the tests that encrypt images by themselves: no option of check makes the other tests do it."""
    lines = []
    for result in results:
        comparable = encrypting.intersection(result.comparable())
        if result.combination.options or not comparable:
            continue
        passed = comparable.intersection(outcome.test for outcome in result.select("pass"))
        line = f"- {result.combination.name}: {len(passed)} of {len(comparable)} pass: {_row(sorted(passed))}"
        lines.append(f"{line}; others: {_row(sorted(comparable - passed))}" if passed != comparable else line)
    return ["## Encryption", "", "Tests that create encrypted images or name them:", "", *lines, ""] if lines else []


def _section(result: Results, reasons: Reasons) -> list[str]:
    name = result.combination.name
    lines = [f"## {name}", ""]
    if earlier := result.earlier():
        lines += [f"Last run with earlier sources, not with these ({len(earlier)}): {_row(earlier)}", ""]
    lines += ["### Pass", "", _row(outcome.test for outcome in result.select("pass")), ""]
    failed = result.select("fail", "timeout")
    if failed:
        lines += ["### Fail", "", "| test | reason | first difference |", "|---|---|---|"]
        for outcome in failed:
            reason = reasons.why(name, outcome.test) or NOT_EXAMINED
            lines.append(f"| {outcome.test} | {reason} | {_code(outcome.detail)} |")
        lines.append("")
    lines += ["### Not run", ""]
    missing = [test for test in result.comparable() if test not in result.own]
    not_run = _grouped(result.select("not run"), lambda outcome: outcome.detail or "no reason given")
    lines += ([f"- Not started in this record: {_row(missing)}"] if missing else []) + not_run or ["none"]
    if result.elsewhere:
        lines.append(
            f"- Started without options only, since they start more than image tools: {_row(result.elsewhere)}"
        )
    if not result.reference:
        lines += ["- No run of QEMU's own tools in this record"]
    lines += ["", "### Not comparable here", ""]
    lines += _grouped(result.not_comparable(), _why_not_comparable) or ["none"]
    return [*lines, ""]


def _why_not_comparable(outcome: Outcome) -> str:
    if outcome.status == "pass":
        return "calls none of cowhand's tools"
    if outcome.status == "not run":
        # A path of the machine that ran it says nothing elsewhere.
        detail = re.sub(r" \(expected /[^)]*\)", "", outcome.detail)
        return f"QEMU's own run says: {detail or 'no reason given'}"
    return "no end within the time limit" if outcome.status == "timeout" else "fails with QEMU's own tools"


def _grouped(outcomes: Iterable[Outcome], key: Callable[[Outcome], str]) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for outcome in outcomes:
        groups[key(outcome)].append(outcome.test)
    return [f"- {reason}: {_row(tests)}" for reason, tests in sorted(groups.items())]


def _row(tests: Iterable[str]) -> str:
    return " ".join(tests) or "none"


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`" if text else ""
