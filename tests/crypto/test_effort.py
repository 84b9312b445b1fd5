"""What unlocking may cost: headers that ask for hours are refused, by slot and with the way to allow it; real ones open."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import AccessDenied, InvalidArgument, UnsupportedFeature
from cowhand.crypto import effort, luks, secrets, volume as volumes
from cowhand.image.create import create
from tests.crypto.test_volume import MemoryStore

_CHOICE = volumes.Choice("aes-128", "cbc", "plain64", hash="sha1", iter_time=0)
_MOST = (1 << 32) - 1


@pytest.fixture
def store() -> MemoryStore:
    """A volume with two passphrases."""
    made = MemoryStore()
    volume = volumes.make(made, _CHOICE, b"first")
    volumes.activate(volume, made, 1, b"second", 0)
    return made


def _header(store: MemoryStore, *, slots: dict[int, int] | None = None, digest: int | None = None) -> luks.Header:
    """Return the header with other numbers of iterations."""
    header = luks.parse(bytes(store.data), "some.luks")
    for index, iterations in (slots or {}).items():
        header = header.with_slot(index, header.slots[index]._replace(iterations=iterations))
    return header if digest is None else header._replace(digest_iterations=digest)


@pytest.mark.parametrize(
    "lie", [{"slots": {0: _MOST, 1: _MOST}}, {"digest": _MOST}, {"slots": {0: 1 << 28, 1: 1 << 28}}]
)
def test_hours_are_refused_at_once_by_slot_and_option(store: MemoryStore, lie: dict[str, int]) -> None:
    before = time.process_time()
    with pytest.raises(UnsupportedFeature, match="key slot 0, 1 was not tried") as caught:
        volumes.unlock(_header(store, **lie), store, [b"first"], "some.luks")  # type: ignore[arg-type]
    assert time.process_time() - before < 20  # hours, if it were tried
    assert caught.value.path == "some.luks" and caught.value.offset == 208
    assert "max-iterations" in (caught.value.hint or "")


def test_a_slot_that_is_too_much_does_not_keep_the_next_one_shut(store: MemoryStore) -> None:
    header = _header(store, slots={0: _MOST})
    assert volumes.unlock(header, store, [b"second"], "x").key
    with pytest.raises(UnsupportedFeature, match="key slot 0 was not tried"):
        volumes.unlock(header, store, [b"other"], "x")


def test_the_limit_counts_all_slots_that_are_tried_and_zero_is_none(store: MemoryStore) -> None:
    header = _header(store)
    one = effort.of_slot(header, 0)
    assert one == 2 * volumes.MIN_ITERATIONS  # a key and a digest, a block of the hash each
    with pytest.raises(UnsupportedFeature, match="key slot 1 was not tried"):
        volumes.unlock(header, store, [b"second"], "x", one)
    assert volumes.unlock(header, store, [b"first"], "x", one).key
    assert volumes.unlock(header, store, [b"first", b"second"], "x", one).key
    for allowed in (2 * one, 0):
        assert volumes.unlock(header, store, [b"second"], "x", allowed).key
        with pytest.raises(AccessDenied):
            volumes.unlock(header, store, [b"other"], "x", allowed)


@pytest.mark.parametrize(
    ("name", "key_bytes", "per_second", "seconds", "slots"),
    [
        ("sha256", 64, 8_000_000, 2, 8),  # cryptsetup's and QEMU's defaults, twice as fast as what this was measured on
        ("sha512", 64, 4_000_000, 2, 8),
        ("sha256", 64, 12_000_000, 10, 1),  # iter-time=10000
        ("sha1", 32, 4_500_000, 10, 2),
    ],
)
def test_volumes_that_real_creators_make_are_within_the_limit(
    name: str, key_bytes: int, per_second: int, seconds: int, slots: int, store: MemoryStore
) -> None:
    blocks = -(-key_bytes // {"sha1": 20, "sha256": 32, "sha512": 64}[name])
    header = _header(store, slots=dict.fromkeys(range(8), per_second * seconds // blocks))
    header = header._replace(hash=name, key_bytes=key_bytes, digest_iterations=per_second // 8)
    allowed = effort.Effort(None)
    assert all(allowed.covers(header, index) for index in range(slots))


def test_erasing_by_passphrase_is_bounded_as_well_and_writes_nothing(store: MemoryStore) -> None:
    volume = volumes.unlock(_header(store), store, [b"first"], "x")
    volume.header = _header(store, slots={1: _MOST})
    store.begin()
    with secrets.given({"a": b"first"}):
        for more in ({}, {"keyslot": 1}):
            with pytest.raises(UnsupportedFeature, match="key slot 1 was not tried"):
                volumes.amend(volume, store, {"state": "inactive", "old-secret": "a", **more}, force=False)
    assert store.epochs == [[]]


def test_no_volume_is_made_that_would_not_open_again(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "iterations_for", lambda name, length, milliseconds: 5000 * milliseconds)
    volume = volumes.unlock(_header(store), store, [b"first"], "x")
    store.begin()
    with pytest.raises(InvalidArgument, match="more than opening a volume may cost"):
        volumes.activate(volume, store, 2, b"third", 60_000)
    assert store.epochs == [[]]


@pytest.mark.parametrize(("kind", "prefix"), [("luks", ""), ("qcow2", "encrypt.")])
def test_the_option_of_both_formats(kind: str, prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    options = {f"{prefix}key-secret": "a", f"{prefix}iter-time": "0"} | (
        {"encrypt.format": "luks"} if kind == "qcow2" else {}
    )
    with secrets.given({"a": b"first"}):
        create(path, kind, 65536, options)
        described = {"driver": kind, "file.filename": str(path), f"{prefix}key-secret": "a"}
        with pytest.raises(UnsupportedFeature, match="was not tried") as caught:
            cowhand.open({**described, f"{prefix}max-iterations": 999}).close()
        assert f"{prefix}max-iterations" in (caught.value.hint or "")
        for allowed in (0, "0", 1 << 20):
            with cowhand.open({**described, f"{prefix}max-iterations": allowed}) as disk:
                assert disk.read(0, 512) is not None
        with pytest.raises(InvalidArgument):
            cowhand.open({**described, f"{prefix}max-iterations": "many"}).close()
