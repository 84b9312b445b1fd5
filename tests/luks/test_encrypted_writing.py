"""Encrypted qcow2 images that cowhand makes and writes: laid out as QEMU's, read by QEMU, converted, committed, compacted, resized."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.copy.ops.convert import convert
from cowhand.copy.ops.measure import measure
from cowhand.core.errors import ImageCorrupt, InvalidArgument, NotSupported
from cowhand.crypto import secrets
from cowhand.image.compact import compact
from cowhand.image.create import create
from cowhand.image.snapshots import apply_snapshot, create_snapshot, delete_snapshot, open_snapshot
from cowhand.testing.nodes import in_threads
from tests.tools.programs import ProgramFailed, Result
from tests.tools.qemu import qemu_img, qemu_io, require_qemu

_OBJECT = ("--object", "secret,id=s0,data=passphrase")
_SIZE = 3 << 20


@pytest.fixture(autouse=True)
def known_secret() -> Iterator[None]:
    with secrets.given({"s0": "passphrase", "s1": "another"}):
        yield


def make(path: Path, method: str = "luks", size: int = _SIZE, **options: Any) -> Path:
    quick = {"encrypt.iter-time": "1"} if method == "luks" else {}
    chosen = {"encrypt.format": method, "encrypt.key-secret": "s0", **quick, **options}
    create(path, "qcow2", size, chosen)
    return path


def opened(path: Path, **options: Any) -> Disk:
    return cowhand.open(path, writable=True, options={"encrypt.key-secret": "s0", **options})


def for_qemu(path: Path) -> str:
    return f"driver=qcow2,file.filename={path},encrypt.key-secret=s0"


def make_by_qemu(path: Path, method: str, **options: str) -> None:
    chosen = {"encrypt.format": method, "encrypt.key-secret": "s0", **options}
    if method == "luks":
        chosen["encrypt.iter-time"] = "10"
    text = ",".join(f"{name}={value}" for name, value in chosen.items())
    patiently("create", "-q", *_OBJECT, "-f", "qcow2", "-o", text, path, str(_SIZE))


def patiently(*arguments: str | Path) -> Result:
    """Run qemu-img, again where it could not time its key derivation, which a loaded machine may not let it."""
    for _ in range(9):
        try:
            return qemu_img(*arguments)
        except ProgramFailed as failure:
            if "accurate CPU usage" not in failure.result.stderr:
                raise
            last = failure
    raise last


def assert_qemu_agrees(path: Path, content: bytes | bytearray, folder: Path) -> None:
    raw = folder / "model.raw"
    raw.write_bytes(content)
    qemu_img("compare", *_OBJECT, "--image-opts", for_qemu(path), f"driver=raw,file.filename={raw}")
    report = qemu_img("check", "--output=json", *_OBJECT, "--image-opts", for_qemu(path)).json()
    assert (report.get("corruptions", 0), report.get("leaks", 0), report["check-errors"]) == (0, 0, 0)


def live(disk: Disk, model: bytearray, rng: random.Random, steps: int) -> None:
    """Write, zero and discard at random, mostly not on sectors."""
    for _ in range(steps):
        length = rng.choice((1, 100, 512, 4096, 70000, 200000))
        offset = rng.randrange(len(model) - length)
        verb = rng.randrange(6)
        if verb == 5:
            disk.write_zeroes(offset, length, unmap=rng.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        else:
            data = rng.randbytes(length)
            disk.write(offset, data)
            model[offset : offset + length] = data


_SHAPES: list[dict[str, str]] = [
    {},
    {"cluster_size": "512", "compat": "0.10"},
    {"cluster_size": "16k", "extended_l2": "on"},
    {"cluster_size": "2M", "lazy_refcounts": "on"},
    {"data_file": "data"},
]


@require_qemu
@pytest.mark.parametrize("method", ["luks", "aes"])
@pytest.mark.parametrize("shape", _SHAPES, ids=lambda shape: "-".join(shape.values()) or "default")
def test_what_is_written_qemu_reads(shape: dict[str, str], method: str, tmp_path: Path, rng: random.Random) -> None:
    if "data_file" in shape:
        shape = {"data_file": str(tmp_path / "data")}
    path = make(tmp_path / "x.qcow2", method, **shape)
    model = bytearray(_SIZE)
    with opened(path) as disk:
        assert disk.read(0, _SIZE) == model
        live(disk, model, rng, 25)
        if not shape.get("data_file"):
            create_snapshot(disk, "then")
            then = bytes(model)
            live(disk, model, rng, 10)
            with open_snapshot(disk, "then") as view:
                assert view.read(0, _SIZE) == then
        disk.write(_SIZE - 100, b"e" * 100)
        model[-100:] = b"e" * 100
    assert_qemu_agrees(path, model, tmp_path)
    if shape.get("data_file"):
        return
    with opened(path) as disk:
        apply_snapshot(disk, "then")
        assert disk.read(0, _SIZE) == then
        live(disk, model := bytearray(then), rng, 5)
        delete_snapshot(disk, "then")
    assert_qemu_agrees(path, model, tmp_path)


@require_qemu
@pytest.mark.parametrize("method", ["luks", "aes"])
def test_both_write_in_turn(method: str, tmp_path: Path, rng: random.Random) -> None:
    path, model = tmp_path / "x.qcow2", bytearray(_SIZE)
    make_by_qemu(path, method, cluster_size="4k")
    for turn in range(3):
        with opened(path) as disk:
            assert disk.read(0, _SIZE) == model
            live(disk, model, rng, 10)
        at = turn * 777 * 512 + 100
        qemu_io(for_qemu(path), f"write -P {turn + 1} {at} 9000", options=(*_OBJECT, "--image-opts"))
        model[at : at + 9000] = bytes([turn + 1]) * 9000
        assert_qemu_agrees(path, model, tmp_path)


@require_qemu
@pytest.mark.parametrize("method", ["luks", "aes"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"preallocation": "metadata"}, {"cluster_size": "2k", "compat": "0.10"}],
    ids=lambda shape: "-".join(shape.values()) or "default",
)
def test_a_new_image_is_laid_out_as_qemus(shape: dict[str, str], method: str, tmp_path: Path) -> None:
    ours, theirs = make(tmp_path / "ours", method, **shape), tmp_path / "theirs"
    make_by_qemu(theirs, method, **shape)
    one, other = bytearray(ours.read_bytes()), bytearray(theirs.read_bytes())
    other += bytes(-len(other) % 512)  # a new image of ours ends on a whole sector
    assert len(one) == len(other)
    if method == "luks":
        at = one.find(L.U32.pack(L.EXT_CRYPTO) + L.U32.pack(16)) + 8
        place, length = L.U64.unpack_from(one, at)[0], L.U64.unpack_from(one, at + 8)[0]
        assert one[place : place + 104] == other[place : place + 104]  # names of algorithms and the payload's place
        for data in (one, other):
            data[place + 104 : place + length] = bytes(length - 104)  # keys, salts, counts of iterations
    assert one == other


@require_qemu
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encryption": "on"}, "Parameter 'encrypt.key-secret' is required for cipher"),
        ({"encryption": "on", "encrypt.format": "luks"}, "'encrypt.format' and its alias 'encryption' can't be used at the same time"),
        ({"encrypt.format": "rot13"}, "Parameter 'format' does not accept value 'rot13'"),
        ({"encrypt.key-secret": "s0"}, "Parameter 'encrypt.format' is missing"),
        ({"encrypt.format": "aes", "encrypt.key-secret": "none"}, "No secret with id 'none'"),
        ({"encrypt.format": "aes", "encrypt.key-secret": "s0", "encrypt.cipher-alg": "aes-128"}, "Parameter 'encrypt.cipher-alg' is unexpected"),
        ({"encrypt.format": "luks", "encrypt.key-secret": "s0", "encrypt.cipher-mode": "x"}, "Parameter 'cipher-mode' does not accept value 'x'"),
    ],
)  # fmt: skip
def test_what_qemu_refuses_is_refused_in_its_words(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        create(tmp_path / "x", "qcow2", _SIZE, options)
    assert caught.value.qemu() == message
    text = ",".join(f"{name}={value}" for name, value in options.items())
    result = qemu_img("create", "-q", *_OBJECT, "-f", "qcow2", "-o", text, tmp_path / "y", str(_SIZE), check=False)
    assert result.stderr.strip().endswith(message)
    assert not (tmp_path / "x").exists()


@require_qemu
def test_measure_counts_the_header(tmp_path: Path) -> None:
    options = {
        "encrypt.format": "luks",
        "encrypt.key-secret": "s0",
        "encrypt.cipher-alg": "aes-128",
        "encrypt.iter-time": "10",
    }
    text = ",".join(f"{name}={value}" for name, value in options.items())
    theirs = patiently("measure", "--output=json", *_OBJECT, "-O", "qcow2", "-o", text, "--size", "10G").json()
    measured = measure(target_format="qcow2", size="10G", options=options)
    assert (measured.required, measured.fully_allocated) == (theirs["required"], theirs["fully-allocated"])


@require_qemu
def test_conversions(tmp_path: Path, rng: random.Random) -> None:
    model = bytearray(_SIZE)
    model[100000:900000] = rng.randbytes(800000)
    raw = tmp_path / "x.raw"
    raw.write_bytes(model)
    luks = {"encrypt.format": "luks", "encrypt.key-secret": "s0", "encrypt.iter-time": "1"}
    for number, options in enumerate(({}, {"preallocation": "metadata"}, {"cluster_size": "4k"})):
        path = tmp_path / f"{number}.qcow2"
        convert(raw, path, "qcow2", source_format="raw", options={**luks, **options})
        assert_qemu_agrees(path, model, tmp_path)
    source = {"driver": "qcow2", "encrypt": {"key-secret": "s0"}, "file": {"driver": "file", "filename": str(path)}}
    convert(source, tmp_path / "aes.qcow2", "qcow2", options={"encryption": "on", "encrypt.key-secret": "s0"})
    assert_qemu_agrees(tmp_path / "aes.qcow2", model, tmp_path)
    convert(source, tmp_path / "back.raw", "raw")
    assert (tmp_path / "back.raw").read_bytes() == model
    with pytest.raises(InvalidArgument, match="Compression and encryption"):
        convert(raw, tmp_path / "no.qcow2", "qcow2", source_format="raw", compressed=True, options=luks)
    with opened(path) as disk, pytest.raises(NotSupported, match="Compression and encryption"):
        convert(raw, disk, source_format="raw", compressed=True)
    assert raw.read_bytes()[100000:100512] not in path.read_bytes()


def test_a_backing_file_with_a_key_of_its_own(tmp_path: Path, rng: random.Random) -> None:
    model = bytearray(rng.randbytes(_SIZE))
    base = make(tmp_path / "base.qcow2", "luks", **{"encrypt.key-secret": "s1"})
    with opened(base, **{"encrypt.key-secret": "s1"}) as disk:
        disk.write(0, model)
    chosen = {"encrypt.format": "aes", "encrypt.key-secret": "s0"}
    create(
        tmp_path / "top.qcow2", "qcow2", _SIZE, chosen, backing="base.qcow2", backing_format="qcow2", open_backing=False
    )
    with opened(tmp_path / "top.qcow2", **{"backing.encrypt.key-secret": "s1"}) as disk:
        assert disk.read(0, _SIZE) == model
        live(disk, model, rng, 20)
        assert disk.read(0, _SIZE) == model
    with pytest.raises(InvalidArgument, match=r"encrypt\.key-secret"):
        opened(tmp_path / "top.qcow2")


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_compacting_moves_what_is_encrypted(method: str, tmp_path: Path, rng: random.Random) -> None:
    path = make(tmp_path / "x.qcow2", method)
    model = bytearray(rng.randbytes(_SIZE))
    with opened(path) as disk:
        disk.write(0, model)
        create_snapshot(disk, "then")
        disk.write(0, model[::-1])
        apply_snapshot(disk, "then")
        delete_snapshot(disk, "then")
        disk.discard(0, 1 << 20)
        model[: 1 << 20] = bytes(1 << 20)
    before = path.stat().st_size
    with pytest.raises(InvalidArgument, match=r"encrypt\.key-secret"):
        compact(path)
    assert compact(path, options={"encrypt.key-secret": "s0"}).moved
    assert path.stat().st_size < before - (1 << 20)
    with opened(path) as disk:
        assert disk.read(0, _SIZE) == model


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_sizes_change(method: str, tmp_path: Path, rng: random.Random) -> None:
    path = make(tmp_path / "x.qcow2", method, size=200 << 10)
    model = bytearray(rng.randbytes(200 << 10))
    with opened(path) as disk:
        disk.write(0, model)
        disk.resize(70000 // 512 * 512, shrink=True)
        disk.resize(300 << 10)
        assert disk.read(0, 300 << 10) == model[: 70000 // 512 * 512].ljust(300 << 10, b"\0")


def test_a_machine_state_need_not_keep_to_sectors(tmp_path: Path, rng: random.Random) -> None:
    state = rng.randbytes(100001)
    with opened(make(tmp_path / "x.qcow2")) as disk:
        for begin in range(0, len(state), 32771):
            disk.root.write_vmstate(begin, (state[begin : begin + 32771],))
        found = bytearray(len(state))
        disk.root.read_vmstate(0, found)
    assert found == state


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_threads_that_share_sectors(method: str, tmp_path: Path) -> None:
    """Each thread writes pieces of sectors that all of them share: nobody's bytes are lost."""
    path = make(tmp_path / "x.qcow2", method, size=256 << 10)
    share, count = 100, 60
    with opened(path) as disk:

        def write(number: int) -> None:
            for index in range(count):
                disk.write((index * 4 + number) * share, bytes([number + 1]) * share)

        in_threads([partial(write, number) for number in range(4)])
        assert disk.read(0, count * 4 * share) == b"".join(bytes([n + 1]) * share for n in range(4)) * count


def test_old_images_lose_their_zero_flags(tmp_path: Path, rng: random.Random) -> None:
    """A downgrade writes zeroes where the backing file must not show, and those are encrypted too."""
    base = tmp_path / "base.raw"
    base.write_bytes(rng.randbytes(1 << 20))
    for method in ("luks", "aes"):
        path = tmp_path / method
        chosen = {"encrypt.format": method, "encrypt.key-secret": "s0", "cluster_size": "4k"}
        if method == "luks":
            chosen["encrypt.iter-time"] = "1"
        create(path, "qcow2", 1 << 20, chosen, backing=str(base), backing_format="raw")
        model = bytearray(base.read_bytes())
        with opened(path) as disk:
            live(disk, model, rng, 10)
            disk.write_zeroes(8192, 65536)
            model[8192 : 8192 + 65536] = bytes(65536)
            create_snapshot(disk, "then")
            disk.root.amend({"compat": "0.10"})
        with opened(path) as disk:
            assert disk.read(0, 1 << 20) == model
            with open_snapshot(disk, "then") as view:
                assert view.read(0, 1 << 20) == model


def test_metadata_does_not_pass_for_data(tmp_path: Path) -> None:
    """An L2 entry that names the encryption header is not written through."""
    path = make(tmp_path / "x.qcow2")
    with opened(path) as disk:
        disk.write(0, bytes(65536))
    data = bytearray(path.read_bytes())
    at = data.find(L.U32.pack(L.EXT_CRYPTO) + L.U32.pack(16)) + 8
    header = L.U64.unpack_from(data, at)[0]
    l1 = L.U64.unpack_from(data, L.OFFSET_L1_SIZE + 4)[0]
    l2 = L.U64.unpack_from(data, l1)[0] & L.L1_OFFSET_MASK
    data[l2 : l2 + 8] = L.U64.pack(header | L.COPIED)
    path.write_bytes(data)
    with pytest.raises(ImageCorrupt, match="encryption header"), opened(path) as disk:
        disk.write(0, bytes(512))
    assert path.read_bytes()[header : header + 2000] == data[header : header + 2000]
