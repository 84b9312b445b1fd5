"""Collect the changelog fragments: print the next release's section, or write it to CHANGELOG.md."""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("security", "added", "changed", "fixed", "removed")
_NAME = re.compile(rf"[a-z0-9][a-z0-9-]*\.({'|'.join(KINDS)})\.md")


def fragments(folder: Path) -> dict[str, list[Path]]:
    """Return the fragments by kind. Raises ValueError for a file whose name is not SUBJECT.KIND.md."""
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for path in sorted(folder.glob("*.md")):
        if path.name == "README.md":
            continue
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path}: expected SUBJECT.KIND.md, where KIND is one of {', '.join(KINDS)}")
        found[match[1]].append(path)
    return found


def section(title: str, found: dict[str, list[Path]]) -> str:
    """Return the Markdown section of one release."""
    lines = [f"## {title}", ""]
    for kind, paths in found.items():
        if paths:
            lines += [f"### {kind.capitalize()}", ""]
            lines += ["- " + " ".join(path.read_text(encoding="utf-8").split()) for path in paths]
            lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Print or release; exit 1 when a fragment is misnamed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", metavar="X.Y.Z", help="write CHANGELOG.md and remove the fragments")
    options = parser.parse_args()
    try:
        found = fragments(ROOT / "changelog.d")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if options.release is None:
        print(section("Unreleased", found))
        return 0
    changelog = ROOT / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    new = section(f"{options.release} ({datetime.date.today()})", found)
    head, mark, rest = text.partition("\n## ")
    changelog.write_text(f"{head.rstrip()}\n\n{new}{mark}{rest}", encoding="utf-8")
    for paths in found.values():
        for path in paths:
            path.unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
