"""Laying a header out anew: whatever sectors of a stage reach the medium, the header read from it is the old or the new one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from cowhand.block.formats.qcow2.create import create
from cowhand.block.formats.qcow2.ondisk import header as headers, layout as L
from cowhand.block.formats.qcow2.ondisk.header_stages import stages
from cowhand.block.protocols.memory import MemoryNode

SECTOR = 512
LONG = "a/" * 500 + "long.qcow2"


def made(cluster: int = 65536, **fields: Any) -> headers.Header:
    node = MemoryNode()
    create(node, 1 << 20, {"cluster_size": cluster})
    header = headers.parse(node.snapshot_bytes()[:cluster], "x")
    header.assign(fields)
    return header


def meaning(data: bytes) -> dict[str, Any]:
    """Return all that *data* says, but for the names of features."""
    header = headers.parse(data, "x")
    header.set(L.EXT_FEATURE_NAMES, None)
    found = {name: getattr(header, name) for name in header.__slots__}
    return {**found, "extensions": [(extension.kind, extension.data) for extension in header.extensions]}


def outcomes(before: bytes, after: bytes) -> set[bytes]:
    """Return every content that the medium may have on the way."""
    seen = {before}
    stable = bytearray(before)
    for stage in stages(before, after):
        pieces = []
        for offset, data in stage:
            new = bytearray(stable)
            new[offset : offset + len(data)] = data
            pieces += [
                (at, new[at : at + SECTOR])
                for at in range(0, len(new), SECTOR)
                if new[at : at + SECTOR] != stable[at : at + SECTOR]
            ]
        for count in range(len(pieces) + 1):
            for some in itertools.combinations(pieces, count):
                state = bytearray(stable)
                for at, data in some:
                    state[at : at + SECTOR] = data
                seen.add(bytes(state))
        for at, data in pieces:
            stable[at : at + SECTOR] = data
    assert stable == after
    return seen


NAMED = {"backing_name": "base.raw", "backing_format": "raw"}
CHANGES: dict[str, tuple[headers.Header, dict[str, Any]]] = {
    "a name": (made(), NAMED),
    "another name": (made(**NAMED), {"backing_name": "another.qcow2", "backing_format": "qcow2"}),
    "a longer name": (made(**NAMED), {"backing_name": LONG}),
    "a shorter name": (made(backing_name=LONG, backing_format="raw"), {"backing_name": "x"}),
    "no name": (made(**NAMED), {"backing_name": None, "backing_format": None}),
    "no format": (made(**NAMED), {"backing_format": None}),
    "an extension": (made(**NAMED), {"extensions": [headers.Extension(0x12345678, b"somebody's" * 9)]}),
    "small clusters": (made(cluster=4096, **NAMED), {"backing_name": LONG}),
    "one sector": (made(cluster=512, **NAMED), {"backing_name": "other"}),
    "an older version": (
        made(**NAMED), {"version": 2, "header_length": L.HEADER_V2_LENGTH, "compatible": 0, "autoclear": 0, "extensions": []},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_the_header_is_one_of_the_two_at_every_moment(what: str) -> None:
    header, change = CHANGES[what]
    before = header.encode()
    header.assign(change)
    after = header.encode()
    assert {str(meaning(state)) for state in outcomes(before, after)} == {str(meaning(before)), str(meaning(after))}


def test_what_has_no_room_for_the_name_twice_is_written_at_once() -> None:
    header = made(cluster=1024, backing_name="y" * 300)
    before = header.encode()
    header.assign({"backing_name": "x" * 800})
    after = header.encode()
    assert stages(before, after) == [[(0, after)]]
