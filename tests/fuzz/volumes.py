"""What a fuzzed LUKS volume goes through: described, unlocked, read, written, and given another passphrase in place of the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from cowhand.block.disk import Disk
from cowhand.block.formats.luks import LuksNode
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.policy import UNTRUSTED
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import AccessDenied
from cowhand.crypto import effort, secrets, volume
from cowhand.drivers import REGISTRY
from tests.fuzz.exercise import PASSPHRASE, SECRET, Finding, Medium, Steps, read_all, remembered, write_and_read

_SECOND = "fuzz-second"
#: What headers may ask for here, so that no input takes minutes: the limit itself is a test's matter (tests/crypto).
_ITERATIONS = 1 << 17


def exercise(data: bytes) -> dict[str, str]:
    """Do everything with a volume of these bytes; return what each step answered, "ok" or an error's code."""
    steps = Steps()
    with _cheap(), remembered(), secrets.given({SECRET: PASSPHRASE, _SECOND: b"another passphrase"}):
        steps.attempt("describe", lambda: _describe(data))
        if steps.attempt("read", lambda: read_all(data, "luks")):
            steps.attempt("write", lambda: write_and_read(data, "luks"))
            steps.attempt("amend", lambda: _amend(data))
    return steps.answers


@contextmanager
def _cheap() -> Iterator[None]:
    """Bound what unlocking costs, and take the lowest number of iterations for new passphrases without trying the machine's speed."""
    with (
        mock.patch.object(effort, "MAX_EFFORT", _ITERATIONS),
        mock.patch.object(volume, "iterations_for", return_value=volume.MIN_ITERATIONS),
    ):
        yield


def _describe(data: bytes) -> None:
    opening = Opening(REGISTRY, UNTRUSTED, backing=False)
    root = opening.open({"driver": "luks", "file": MemoryNode(content=data), "read-only": True})
    with Disk(root) as disk:
        dict(disk.root.format_specific())


def _amend(data: bytes) -> None:
    with Medium(data) as medium:
        with medium.open("luks", writable=True) as disk:
            node = disk.root
            assert isinstance(node, LuksNode)
            before = disk.read(0, min(disk.size, 512))
            node.amend({"state": "active", "new-secret": _SECOND, "iter-time": 1})
            node.amend({"state": "inactive", "old-secret": SECRET})
        _same(medium, before)


def _same(medium: Medium, before: bytes) -> None:
    """The second passphrase opens the volume and the first does not."""
    if not before:
        return  # without data nothing is unlocked
    try:
        with medium.open("luks") as disk:
            disk.read(0, len(before))
    except AccessDenied:
        pass
    else:
        raise Finding("an erased passphrase still opens the volume")
    with secrets.given({SECRET: secrets.lookup(_SECOND)}), medium.open("luks") as disk:
        if disk.read(0, len(before)) != before:
            raise Finding("what the volume holds is another after its passphrase was changed")
