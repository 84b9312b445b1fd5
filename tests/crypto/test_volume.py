"""LUKS volumes: hostile headers, key slots, and what a crash in the middle of changing a slot leaves."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest

from cowhand.core.errors import AccessDenied, CowhandError, IOFailed
from cowhand.crypto import luks, secrets, volume as volumes
from cowhand.crypto.sectors import SECTOR

_CHOICE = volumes.Choice("aes-128", "cbc", "plain64", hash="sha1", iter_time=1)
_SECRETS = {"a": b"first", "b": b"second"}


class MemoryStore:
    """A store that remembers its writes, flush by flush."""

    def __init__(self) -> None:
        self.data = bytearray(volumes.header_bytes(_CHOICE))
        self.epochs: list[list[tuple[int, bytes]]] = [[]]
        self.before = bytes(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        assert offset >= 0 and offset + len(data) <= len(self.data)
        self.data[offset : offset + len(data)] = data
        self.epochs[-1].append((offset, data))

    def flush(self) -> None:
        self.epochs.append([])

    def begin(self) -> None:
        self.before, self.epochs = bytes(self.data), [[]]

    def crashes(self, rng: random.Random) -> Iterator[bytes]:
        """Yield what may be on the medium: all epochs before one, and some sectors of that one's writes."""
        stable = bytearray(self.before)
        for epoch in self.epochs:
            pieces = [
                (begin, data[begin - offset : min(begin - begin % SECTOR + SECTOR, offset + len(data)) - offset])
                for offset, data in epoch
                for begin in [offset, *range(offset - offset % SECTOR + SECTOR, offset + len(data), SECTOR)]
            ]
            for part in (0.0, 0.3, 0.9, 1.0):
                torn = bytearray(stable)
                for begin, data in pieces:
                    if rng.random() < part:
                        torn[begin : begin + len(data)] = data
                yield bytes(torn)
            for offset, data in epoch:
                stable[offset : offset + len(data)] = data
        yield bytes(stable)


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    volumes.make(made, _CHOICE, b"first")
    return made


def _opened(data: bytes, passphrase: bytes) -> bytes | None:
    store = MemoryStore()
    store.data[:] = data
    try:
        return volumes.unlock(luks.parse(data, "x"), store, [passphrase], "x").key
    except AccessDenied:
        return None


def test_a_new_volume_opens_with_its_passphrase_alone(store: MemoryStore) -> None:
    assert _opened(bytes(store.data), b"first") is not None
    assert _opened(bytes(store.data), b"other") is None


@pytest.mark.parametrize(
    ("options", "force", "after"),
    [
        ({"state": "active", "new-secret": "b", "iter-time": 1}, False, (True, True)),
        ({"state": "active", "new-secret": "b", "keyslot": 0, "iter-time": 1}, True, (False, True)),
        ({"state": "inactive", "keyslot": 0}, True, (False, False)),
    ],
    ids=["add", "replace-the-only-one", "erase"],
)
def test_no_crash_loses_the_last_working_slot(
    options: dict[str, object], force: bool, after: tuple[bool, bool], store: MemoryStore, rng: random.Random
) -> None:
    header = luks.parse(bytes(store.data), "x")
    volume = volumes.unlock(header, store, [b"first"], "x")
    store.begin()
    with secrets.given(_SECRETS):
        volumes.amend(volume, store, options, force=force)
    for medium in store.crashes(rng):
        luks.parse(medium, "x")  # never a header that cannot be read
        if options["state"] == "active":
            assert volume.key in (_opened(medium, b"first"), _opened(medium, b"second"))
    assert tuple(_opened(bytes(store.data), word) == volume.key for word in (b"first", b"second")) == after


def test_an_erased_slot_keeps_nothing_of_its_material(store: MemoryStore) -> None:
    volume = volumes.unlock(luks.parse(bytes(store.data), "x"), store, [b"first"], "x")
    slot = volume.header.slots[0]
    before = store.read(slot.offset * SECTOR, volume.header.material_bytes)
    volumes.activate(volume, store, 5, b"second", 1)
    volumes.erase(volume, store, 0)
    after = store.read(slot.offset * SECTOR, volume.header.material_bytes)
    assert not any(before[at : at + 64] == after[at : at + 64] for at in range(0, len(before), 64))
    assert luks.parse(bytes(store.data), "x") == volume.header


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": "active"}, "'new-secret' is required"),
        ({"state": "active", "new-secret": "b", "keyslot": 0}, "Refusing to overwrite active keyslot 0"),
        ({"state": "active", "new-secret": "b", "keyslot": 8}, "between 0 and 7"),
        ({"state": "inactive"}, "To erase keyslot"),
        ({"state": "inactive", "keyslot": 0}, "only active keyslot 0"),
        ({"state": "inactive", "keyslot": 3}, "already erased"),
        ({"state": "inactive", "old-secret": "a"}, "All the active keyslots match"),
        ({"state": "inactive", "old-secret": "b"}, "No keyslots match"),
        ({"state": "inactive", "old-secret": "c"}, "No secret with id 'c'"),
        ({"state": "asleep"}, "does not accept value 'asleep'"),
    ],
)
def test_a_change_that_is_refused_writes_nothing(options: dict[str, object], message: str, store: MemoryStore) -> None:
    volume = volumes.unlock(luks.parse(bytes(store.data), "x"), store, [b"first"], "x")
    store.begin()
    with secrets.given(_SECRETS), pytest.raises(CowhandError, match=message):
        volumes.amend(volume, store, options, force=False)
    assert store.epochs == [[]]


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"SKUL", "magic"),
        (6, b"\0\2", "version 2"),
        (8, b"rot13\0", "'rot13' not supported"),
        (8, b"a" * 32, "cipher name is not NUL"),
        (40, b"cbc\0", "Unexpected cipher mode string"),
        (40, b"cbc-random\0", "IV generator 'random'"),
        (40, b"cbc-essiv\0", "Missing IV generator hash"),
        (72, b"sha7\0", "Hash algorithm 'sha7'"),
        (104, b"\0\0\0\1", "payload is overlapping"),
        (108, b"\xff\xff\xff\xff", "key size 4294967295"),
        (164, b"\0\0\0\0", "iteration count is zero"),
        (208, b"\0\0\0\1", "Keyslot 0 state"),
        (212, b"\0\0\0\0", "Keyslot 0 iteration count is zero"),
        (248, b"\0\0\0\1", "Keyslot 0 is overlapping with the LUKS header"),
        (248, b"\xff\xff\xff\xff", "Keyslot 0 is overlapping with the encrypted payload"),
        (252, b"\xff\xff\xff\xff", "stripes 4294967295"),
        (256 + 40, b"\0\0\0\x08", "Keyslots 0 and 1 are overlapping"),
    ],
)
def test_a_header_that_lies(offset: int, value: bytes, message: str, store: MemoryStore) -> None:
    data = bytearray(store.data[: luks.HEADER_BYTES])
    data[offset : offset + len(value)] = value
    with pytest.raises(CowhandError, match=message) as caught:
        luks.parse(bytes(data), "some.luks")
    assert caught.value.path == "some.luks"
    assert caught.value.offset is not None


def test_no_header_makes_the_parser_fail_otherwise(store: MemoryStore, rng: random.Random) -> None:
    parsed = 0
    for _ in range(500):
        data = bytearray(store.data[: rng.choice((0, 6, 207, luks.HEADER_BYTES, luks.HEADER_BYTES))])
        for _ in range(rng.randrange(1, 6)):
            if data:
                data[rng.randrange(len(data))] = rng.choice((0, 255, rng.randrange(256)))
        with contextlib.suppress(CowhandError):  # that and nothing else
            luks.parse(bytes(data), "x")
            parsed += 1
    assert 0 < parsed < 500, "nothing was refused, or everything"


@pytest.mark.parametrize("step", [2, 4])
def test_a_slot_whose_change_failed_does_not_count_as_the_one_that_is_left(store: MemoryStore, step: int) -> None:
    volume = volumes.unlock(luks.parse(bytes(store.data), "x"), store, [b"first"], "x")
    volumes.activate(volume, store, 1, b"second", 1)
    write, count = store.write, 0

    def failing(offset: int, data: bytes) -> None:
        nonlocal count
        count += 1
        if count >= step:
            raise IOFailed("no", path="x")
        write(offset, data)

    store.write = failing  # type: ignore[method-assign]
    with secrets.given(_SECRETS), pytest.raises(IOFailed):
        volumes.amend(volume, store, {"state": "active", "new-secret": "b", "keyslot": 1, "iter-time": 1}, force=True)
    store.write = write  # type: ignore[method-assign]
    assert volume.header.slots[1].active == luks.parse(bytes(store.data), "x").slots[1].active
    with pytest.raises(CowhandError, match="only active keyslot 0"):
        volumes.amend(volume, store, {"state": "inactive", "keyslot": 0}, force=False)
    assert _opened(bytes(store.data), b"first") == volume.key
