"""Run QEMU's iotests: ``python -m tests.conformance baseline|run|report``.

*baseline* uses QEMU's own tools, *run* uses cowhand's (after a baseline of the tests that have none on this machine) and
writes docs/conformance.md, *report* writes the page from the outcomes that are there.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from tests.conformance import iotests, records, report, source, toolset
from tests.conformance.iotests import Outcome, Runner

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "conformance"
PAGE = ROOT / "docs" / "conformance.md"
FORMATS = ("qcow2", "raw")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; tests given by name and by list are joined."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("action", choices=("baseline", "run", "report"))
    parser.add_argument("tests", nargs="*", metavar="TEST", help="names such as 031 or qsd-jobs; without any, all")
    parser.add_argument("--list", action="append", default=[], metavar="NAME", help="a list of lists.toml")
    parser.add_argument("--format", action="append", metavar="FORMAT", help=f"default: {' and '.join(FORMATS)}")
    parser.add_argument("--jobs", "-j", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=180.0, help="time limit of one test (default 180)")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the report goes")
    options = parser.parse_intermixed_args(arguments)
    lists = records.test_lists(HERE / "lists.toml")
    for name in options.list:
        if name not in lists:
            parser.error(f"no list {name!r}; there are: {', '.join(lists)}")
        options.tests += lists[name]
    options.format = options.format or list(FORMATS)
    return options


def outcomes_file(tools: str, image_format: str) -> Path:
    """Return where outcomes are kept: QEMU's and ours, for each format."""
    return BUILD / "outcomes" / f"{tools}-{image_format}.json"


def run(
    tools_name: str, image_format: str, tests: list[str], options: argparse.Namespace, folder: Path
) -> list[Outcome]:
    """Run tests with one toolset on one format, printing a line for each, and record their outcomes."""
    tools = toolset.make(tools_name, BUILD / "bin" / tools_name)
    runner = Runner(folder, tools, image_format, BUILD / "logs" / f"{tools_name}-{image_format}", options.seconds)
    print(f"{image_format} with {tools_name}'s tools: {len(tests)} tests, {options.jobs} at a time", flush=True)

    def show(outcome: Outcome) -> None:
        print(f"  {outcome.test:32} {outcome.status:8} {outcome.seconds:6.1f} s  {outcome.detail}", flush=True)
        records.record(outcomes_file(tools_name, image_format), outcome)

    return runner.run_all(tests, options.jobs, show)


def facts(tools: toolset.Toolset) -> dict[str, str]:
    """Return what the outcomes depend on: the versions of everything that took part."""
    reference = subprocess.run(
        ["qemu-img", "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    return {
        "Reference": f"{reference}; sources {source.installed_version() or 'of COWHAND_QEMU_SOURCE'}",
        "cowhand's tools": ", ".join(tools.own) or "none yet",
        "QEMU's beside them": ", ".join(sorted({program for program, _, _ in toolset.TOOLS.values()} - set(tools.own))),
        "Machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "Written": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _results(image_format: str, tools: toolset.Toolset) -> report.FormatResults:
    reference = records.load(outcomes_file("qemu", image_format))
    return report.FormatResults(
        image_format, reference, records.load(outcomes_file("cowhand", image_format)), tools.words()
    )


def write_page(path: Path) -> int:
    """Write the page from all outcomes; return how many failures nobody has given a reason for."""
    reasons = records.Reasons.read(HERE / "reasons.toml")
    tools = toolset.make("cowhand", BUILD / "bin" / "cowhand")
    results = [_results(image_format, tools) for image_format in FORMATS]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.page(facts(tools), results, reasons), encoding="utf-8")
    unexplained = 0
    for result in results:
        for outcome in result.select("fail", "timeout"):
            if reasons.why(result.image_format, outcome.test) is None:
                unexplained += 1
                print(f"no reason for {result.image_format} {outcome.test}: {outcome.detail}")
        for outcome in result.select("pass"):
            if reasons.why(result.image_format, outcome.test) is not None:
                print(f"reasons.toml is out of date: {result.image_format} {outcome.test} passes")
    print(f"wrote {path}")
    return unexplained


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 1 where a test fails that reasons.toml does not explain, or 2 where nothing could be run."""
    options = parse_arguments(arguments)
    if options.action == "report":
        return int(write_page(options.page) > 0)
    try:
        folder = source.iotests(BUILD / "source")
        available = iotests.names(folder)
        unknown = sorted(set(options.tests) - set(available))
        if unknown:
            raise source.SourceUnavailable(f"these sources have no test {', '.join(unknown)}")
        tests = sorted(set(options.tests)) or available
        for image_format in options.format:
            known = {} if options.action == "baseline" else records.load(outcomes_file("qemu", image_format))
            missing = [test for test in tests if test not in known]
            if missing:
                run("qemu", image_format, missing, options, folder)
            if options.action == "run":
                comparable = _results(image_format, toolset.make("cowhand", BUILD / "bin" / "cowhand")).comparable()
                run("cowhand", image_format, [test for test in tests if test in comparable], options, folder)
    except (source.SourceUnavailable, toolset.ToolMissing) as problem:
        print(problem, file=sys.stderr)
        return 2
    return int(write_page(options.page) > 0) if options.action == "run" else 0


if __name__ == "__main__":
    raise SystemExit(main())
