"""`make bench`: how fast cowhand is beside qemu-img, measured pairwise in one run.

Options: --quick (small and few), --rounds N, --data SIZE, --only WORD (rows whose name has it), --output json, --write-docs, --folder DIR.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import bulk_rows
import encrypted_rows
import nbd_rows
import random_rows
import report
import scattered_rows
import subcluster_rows
import table_rows
from inputs import MIB, Inputs
from measuring import Case, ProgramFailed, Row, measure

from cowhand.core.units import format_size, parse_size


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="cowhand beside qemu-img, measured pairwise")
    parser.add_argument(
        "--quick", action="store_true", help="128 MiB of data and 3 rounds: to see that everything runs"
    )
    parser.add_argument("--rounds", type=int, help="pairs for each row (default 10)")
    parser.add_argument(
        "--data", type=parse_size, help="bytes of data in the disk, which is twice as long (default 1G)"
    )
    parser.add_argument("--only", metavar="WORD", help="only the rows whose name has it")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    parser.add_argument("--write-docs", action="store_true", help="write docs/performance.md")
    parser.add_argument("--folder", type=Path, help="where images are made (default: a new folder for temporary files)")
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 10)
    args.data = args.data or (128 * MIB if args.quick else 1024 * MIB)
    args.mapped = "64G" if args.quick else "1T"
    return args


def all_cases(args: argparse.Namespace, inputs: Inputs) -> Generator[Case, None, None]:
    yield from bulk_rows.cases(inputs)
    yield from scattered_rows.cases(inputs)
    yield from encrypted_rows.cases(inputs)
    yield from table_rows.cases(inputs)
    size = 256 * MIB if args.quick else 1024 * MIB
    count = 20_000 if args.quick else 100_000
    yield from random_rows.cases(inputs, size, count)
    yield from subcluster_rows.cases(inputs, size, count)
    yield from nbd_rows.cases(inputs, size, count)


def run(args: argparse.Namespace, tell: Callable[[str], None]) -> list[Row]:
    folder = Path(tempfile.mkdtemp(prefix="cowhand-bench-", dir=args.folder))
    rows: list[Row] = []
    inputs = Inputs(folder, args.data, args.mapped)
    cases = all_cases(args, inputs)
    try:
        for case in cases:
            if args.only and args.only not in case.name:
                continue
            try:
                rows.append(measure(case, args.rounds, tell))
            except ProgramFailed as error:
                tell(f"{case.name}: not measured: {error}")
        rows.extend(table_rows.rows_alone(inputs, args.rounds, args.only or "", tell))
    finally:
        cases.close()  # ends what rows have started
        shutil.rmtree(folder)
    return rows


def main() -> int:
    args = arguments()
    rows = run(args, lambda line: print(line, file=sys.stderr, flush=True))
    settings = {"data": format_size(args.data), "rounds": args.rounds, "quick": args.quick}
    if args.output == "json":
        print(json.dumps(report.document(rows, settings), indent=2, ensure_ascii=False))
    else:
        print(report.text(rows))
    if args.write_docs:
        path = Path(__file__).parent.parent / "docs" / "performance.md"
        path.write_text(report.markdown(rows, settings), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
