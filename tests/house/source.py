"""The package's source as syntax trees, for tests of the house's rules."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "src"
PACKAGE = "cowhand"


@dataclass(frozen=True, slots=True)
class Source:
    """One file: its module name, its room (the package that it lies in), its tree, and all nodes of that."""

    path: Path
    module: str
    room: str
    tree: ast.Module
    nodes: tuple[ast.AST, ...] = field(repr=False, compare=False)

    @property
    def where(self) -> str:
        """The path as messages show it."""
        return str(self.path.relative_to(ROOT))


@lru_cache
def sources() -> tuple[Source, ...]:
    """Return every file of the package, sorted."""
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = ".".join(parts[:-1])
        module = room if parts[-1] == "__init__" else ".".join(parts)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        found.append(Source(path, module, room, tree, tuple(ast.walk(tree))))
    return tuple(found)


def is_private(name: str) -> bool:
    """Tell whether a name is private: one leading underscore, not a dunder, not the bare underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def imports(source: Source) -> list[tuple[int, str, str | None]]:
    """Return (line, module, name or None) of each import of the package's own modules, at any depth of the file."""
    found: list[tuple[int, str, str | None]] = []
    for node in source.nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = source.room.split(".")
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            found += [(node.lineno, base, alias.name) for alias in node.names]
    return [item for item in found if item[1] == PACKAGE or item[1].startswith(PACKAGE + ".")]
