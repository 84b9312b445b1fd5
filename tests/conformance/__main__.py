"""Run QEMU's iotests: ``python -m tests.conformance baseline|run|report|remaining``.

*baseline* uses QEMU's own tools, *run* uses cowhand's (after a baseline of the tests that have none on this machine) and
writes docs/conformance.md, *report* writes the page from the outcomes that are there, *remaining* says what is left to do.
Outcomes are kept from run to run; an interrupted run is continued by ``--only remaining``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conformance import iotests, matrix, records, report, source, toolset
from tests.conformance.iotests import Outcome, Runner
from tests.conformance.matrix import Combination

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "conformance"
#: QEMU's sources and the outcomes of its tools: the same for every working tree on one machine.
CACHE = Path(os.environ.get("COWHAND_CONFORMANCE_CACHE") or BUILD)
PAGE = ROOT / "docs" / "conformance.md"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; tests given by name and by list are joined."""
    known = matrix.read(HERE / "matrix.toml")
    names = ", ".join(combination.name for combination in known)
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("action", choices=("baseline", "run", "report", "remaining"))
    parser.add_argument("tests", nargs="*", metavar="TEST", help="names such as 031 or qsd-jobs; without any, all")
    parser.add_argument("--list", action="append", default=[], metavar="NAME", help="a list of lists.toml")
    parser.add_argument(
        "--format", action="append", default=[], metavar="NAME", help=f"combinations, also as patterns: {names}"
    )
    parser.add_argument("--only", choices=matrix.CHOICES, default="all", help="which tests to start (default all)")
    parser.add_argument("--jobs", "-j", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=180.0, help="time limit of one test (default 180)")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the report goes")
    options = parser.parse_intermixed_args(arguments)
    lists = records.test_lists(HERE / "lists.toml")
    for name in options.list:
        if name not in lists:
            parser.error(f"no list {name!r}; there are: {', '.join(lists)}")
        options.tests += lists[name]
    try:
        options.combinations = matrix.named(known, options.format)
    except ValueError as problem:
        parser.error(str(problem))
    return options


def outcomes_file(tools: str, combination: Combination) -> Path:
    """Return where outcomes are kept: QEMU's and ours, for each combination."""
    return (CACHE if tools == "qemu" else BUILD) / "outcomes" / f"{tools}-{combination.name}.json"


def make_tools(name: str) -> toolset.Toolset:
    """Return QEMU's or cowhand's tools, identified by version or by a hash of the sources."""
    sources = ROOT / "src"
    identity = reference() if name == "qemu" else matrix.fingerprint(sources)
    return toolset.make(name, BUILD / "bin" / name, sources, identity)


def reference() -> str:
    """Return the line in which QEMU's qemu-img names its version."""
    done = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def run(
    tools: toolset.Toolset, combination: Combination, tests: list[str], options: argparse.Namespace, folder: Path
) -> list[Outcome]:
    """Run tests with one toolset on one combination, printing a line for each, and record their outcomes."""
    logs = BUILD / "logs" / f"{tools.name}-{combination.name}"
    runner = Runner(folder, tools, combination.image_format, logs, options.seconds, combination.options)
    print(f"{combination.name} with {tools.name}'s tools: {len(tests)} tests, {options.jobs} at a time", flush=True)

    def show(outcome: Outcome) -> None:
        print(f"  {outcome.test:32} {outcome.status:8} {outcome.seconds:6.1f} s  {outcome.detail}", flush=True)
        records.record(outcomes_file(tools.name, combination), outcome)

    return runner.run_all(tests, options.jobs, show)


def run_baseline(combination: Combination, tests: list[str], options: argparse.Namespace, folder: Path) -> None:
    """Run QEMU's own tools on the tests that have no outcome with them, or that --only chooses in a baseline."""
    path = outcomes_file("qemu", combination)
    held = records.load(path)
    if combination.options:
        missing = [test for test in tests if test not in held]
        for outcome in matrix.inherited(records.load(outcomes_file("qemu", combination.plain)), missing):
            records.record(path, outcome)
        held = records.load(path)
    again = options.action == "baseline" and options.only != "remaining"
    wanted = matrix.chosen(tests, held, options.only, "") if again else [test for test in tests if test not in held]
    if wanted:
        run(make_tools("qemu"), combination, wanted, options, folder)


def wanted_tests(
    combination: Combination, available: list[str], options: argparse.Namespace, folder: Path
) -> list[str]:
    """Return the tests that were named, or all that the combination is for, which a baseline of the plain format tells."""
    if options.tests:
        return sorted(set(options.tests))
    if combination.scope != "all":
        run_baseline(combination.plain, available, argparse.Namespace(**{**vars(options), "action": "run"}), folder)
    return matrix.in_scope(combination, available, records.load(outcomes_file("qemu", combination.plain)))


def commit() -> str:
    """Return the last commit that changed the sources, and whether they have changed since; nothing outside of a git clone."""
    ask = ["git", "-C", str(ROOT)]
    try:
        last = subprocess.run(
            [*ask, "log", "-1", "--format=%h, %cs", "--", "src"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run([*ask, "status", "--porcelain", "src"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "of no git clone"
    return last.stdout.strip() + (", and changes" if changes.stdout else "")


def facts(tools: toolset.Toolset) -> dict[str, str]:
    """Return what the outcomes depend on: the versions of everything that took part."""
    return {
        "cowhand's sources": commit(),
        "Reference": f"{reference()}; sources {source.installed_version() or 'of COWHAND_QEMU_SOURCE'}",
        "cowhand's tools": ", ".join(tools.own) or "none yet",
        "QEMU's beside them": ", ".join(sorted({program for program, _, _ in toolset.TOOLS.values()} - set(tools.own))),
        "Machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "Written": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def results_of(combination: Combination, tools: toolset.Toolset) -> report.Results:
    """Return what is recorded of a combination."""
    reference_run = records.load(outcomes_file("qemu", combination))
    own = records.load(outcomes_file("cowhand", combination))
    result = report.Results(combination, reference_run, own, tools.words(), identity=tools.identity)
    if combination.scope == "all":
        return result
    plain = records.load(outcomes_file("qemu", combination.plain))
    counted = report.Results(combination.plain, plain, {}, tools.words()).comparable()
    scope = set(matrix.in_scope(combination, counted, plain))
    return dataclasses.replace(result, elsewhere=tuple(test for test in counted if test not in scope))


def print_remaining(options: argparse.Namespace) -> int:
    """Print what has not passed with these sources; return how much that is."""
    tools = make_tools("cowhand")
    reasons = records.Reasons.read(HERE / "reasons.toml")
    left = 0
    for combination in options.combinations:
        result = results_of(combination, tools)
        never = [test for test in result.comparable() if test not in result.own]
        older = result.earlier()
        print(f"{combination.name}: {len(result.comparable())} comparable, {len(result.reference)} in the baseline")
        print(f"  never started ({len(never)}): {' '.join(never)}")
        print(f"  last started with other sources ({len(older)}): {' '.join(older)}")
        for outcome in result.select("fail", "timeout"):
            why = reasons.why(combination.name, outcome.test) or report.NOT_EXAMINED
            print(f"  {outcome.status} {outcome.test}: {outcome.detail} ({why})")
            left += 1
        left += len(never)
    return left


def write_page(path: Path) -> int:
    """Write the page from all outcomes; return how many failures nobody has given a reason for."""
    reasons = records.Reasons.read(HERE / "reasons.toml")
    tools = make_tools("cowhand")
    results = [results_of(combination, tools) for combination in matrix.read(HERE / "matrix.toml")]
    folder = source.iotests(CACHE / "source")
    encrypting = matrix.that_encrypt(folder, iotests.names(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    held = [outcome for result in results for outcome in result.own.values()]
    current = sum(outcome.tools == tools.identity for outcome in held)
    told = {**facts(tools), "Outcomes": f"{current} with these very sources, {len(held) - current} with earlier ones"}
    path.write_text(report.page(told, results, reasons, encrypting), encoding="utf-8")
    unexplained = 0
    for result in results:
        name = result.combination.name
        for outcome in result.select("fail", "timeout"):
            if reasons.why(name, outcome.test) is None:
                unexplained += 1
                print(f"no reason for {name} {outcome.test}: {outcome.detail}")
        for outcome in result.select("pass"):
            if (name, outcome.test) in reasons.entries:
                print(f"reasons.toml is out of date: {name} {outcome.test} passes")
    print(f"wrote {path}")
    return unexplained


def _end(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 1 where a test fails that reasons.toml does not explain, or 2 where nothing could be run."""
    options = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, _end)
    try:
        if options.action == "remaining":
            return int(print_remaining(options) > 0)
        if options.action == "report":
            return int(write_page(options.page) > 0)
        folder = source.iotests(CACHE / "source")
        available = iotests.names(folder)
        unknown = sorted(set(options.tests) - set(available))
        if unknown:
            raise source.SourceUnavailable(f"these sources have no test {', '.join(unknown)}")
        for combination in options.combinations:
            tests = wanted_tests(combination, available, options, folder)
            run_baseline(combination, tests, options, folder)
            if options.action == "run":
                tools = make_tools("cowhand")
                comparable = set(results_of(combination, tools).comparable())
                held = records.load(outcomes_file("cowhand", combination))
                wanted = matrix.chosen((t for t in tests if t in comparable), held, options.only, tools.identity)
                run(tools, combination, wanted, options, folder)
    except (source.SourceUnavailable, toolset.ToolMissing) as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; --only remaining goes on from here", file=sys.stderr)
        return 130
    return int(write_page(options.page) > 0) if options.action == "run" else 0


if __name__ == "__main__":
    raise SystemExit(main())
