"""The rules of the house that import-linter cannot see. docs/architecture.md says why they exist."""

from __future__ import annotations

import ast
from functools import lru_cache

import pytest

from tests.house.source import PACKAGE, Source, imports, is_private, sources


def every(*wanted: Source) -> pytest.MarkDecorator:
    """Return a mark that runs a test once for each file."""
    return pytest.mark.parametrize("source", wanted or sources(), ids=lambda source: source.where)


DRIVER_ROOMS = ("cowhand.block.protocols", "cowhand.block.formats", "cowhand.block.filters")
#: Private by name only: the standard library documents them.
DOCUMENTED = {
    "_replace",
    "_asdict",
    "_fields",
    "_make",
    "_exit",
    "_getframe",
    "_generate_next_value_",
    "_missing_",
    "_value_",
}


@lru_cache
def rooms() -> frozenset[str]:
    """Return the names of all rooms."""
    return frozenset(source.room for source in sources())


def room_of(module: str) -> str:
    """Return the room that a module lies in; a package is its own room."""
    packages = rooms()
    return module if module in packages else module.rpartition(".")[0]


@every()
def test_private_names_are_imported_inside_their_room_only(source: Source) -> None:
    crossings = [
        f"{source.where}:{line}: {name} of {module}"
        for line, module, name in imports(source)
        if room_of(module) != source.room
        and ((name is not None and is_private(name)) or any(is_private(part) for part in module.split(".")))
    ]
    assert crossings == []


@lru_cache
def defined_private_names(room: str) -> frozenset[str]:
    """Return the private names that a room's files define: variables, attributes, functions, classes, slots, arguments."""
    names: set[str] = set()
    for source in sources():
        if source.room != room:
            continue
        for node in source.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # __slots__
                names.add(node.value)
    return frozenset(name for name in names if is_private(name))


@every()
def test_private_attributes_are_used_inside_their_room_only(source: Source) -> None:
    own = defined_private_names(source.room)
    crossings = [
        f"{source.where}:{node.lineno}: .{node.attr}"
        for node in source.nodes
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and node.attr not in own | DOCUMENTED
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and not (
            isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name) and node.value.func.id == "super"
        )
    ]
    assert crossings == []


@every(*(source for source in sources() if source.room == "cowhand.block"))
def test_block_layer_imports_no_driver(source: Source) -> None:
    named = [
        f"{source.where}:{line}: {module}" for line, module, _ in imports(source) if module.startswith(DRIVER_ROOMS)
    ]
    assert named == []


@every(*(source for source in sources() if not source.room.startswith("cowhand.cli")))
def test_library_does_not_print(source: Source) -> None:
    calls = [
        f"{source.where}:{node.lineno}"
        for node in source.nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("print", "input", "breakpoint")
    ]
    assert calls == []


@every()
def test_file_begins_with_what_it_is_for(source: Source) -> None:
    assert ast.get_docstring(source.tree), f"{source.where} has no docstring"


@every()
def test_no_room_is_called_utils(source: Source) -> None:
    assert not {"utils", "util", "helpers", "misc", "common"} & set(source.module.removeprefix(PACKAGE).split("."))
