"""Error classes are a contract: a code that never changes its meaning, an exit code, an errno."""

from __future__ import annotations

import ast
import errno
import importlib
import re

import pytest

from cowhand.core.errors import CowhandError
from tests.house.source import sources

#: Exit codes with a meaning of their own in shells and in this project; documented in docs.
EXIT_CODES = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 63, 124, 130}


def error_classes() -> list[type[CowhandError]]:
    """Return every error class of the package, importing each module that defines an exception by its look."""
    for source in sources():
        if any(isinstance(node, ast.ClassDef) and node.bases for node in source.tree.body) and "errors" in ast.dump(
            source.tree
        ):
            importlib.import_module(source.module)
    found: dict[str, type[CowhandError]] = {}
    queue: list[type[CowhandError]] = [CowhandError]
    while queue:
        kind = queue.pop()
        if kind.__module__.startswith("cowhand."):
            found[kind.__qualname__] = kind
        queue += kind.__subclasses__()
    return list(found.values())


CLASSES = error_classes()


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in CLASSES]
    assert sorted(codes) == sorted(set(codes))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_class_declares_its_own_code_and_a_known_exit_code(kind: type[CowhandError]) -> None:
    assert "code" in vars(kind), "a code that is inherited is not unique"
    assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", kind.code)
    assert kind.exit_code in EXIT_CODES
    assert kind.default_errno in errno.errorcode
    assert kind.__doc__


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_instance_keeps_errno_and_renders_twice(kind: type[CowhandError]) -> None:
    error = kind("the message", qemu="QEMU's message", errno=errno.EXDEV, path="/disk", offset=0x200, hint="do this")
    assert error.errno == errno.EXDEV
    text = str(error)
    assert all(part in text for part in ("the message", "/disk", "0x200", "do this"))
    assert error.within("in the chain", qemu="Could not open '/disk'") is error
    assert error.qemu() == "Could not open '/disk': QEMU's message"
    assert "in the chain" in str(error)
