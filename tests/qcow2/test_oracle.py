"""The tests' own reader of qcow2 agrees with QEMU on images that QEMU made, sound and damaged."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.qcow2.oracle import Image
from tests.tools.qemu import qemu_img, qemu_io, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]

SIZE = 512 << 10
LAYOUTS = [("0.10", 512, 16), ("1.1", 512, 1), ("1.1", 4096, 64), ("1.1", 65536, 16), ("1.1", 1024, 4)]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: f"{layout[0]}-{layout[1]}-{layout[2]}")
def image(request: pytest.FixtureRequest, tmp_path: Path, rng: random.Random) -> Path:
    compat, cluster, bits = request.param
    base = tmp_path / "base.raw"
    base.write_bytes(rng.randbytes(SIZE * 3 // 4))
    path = tmp_path / "disk.qcow2"
    options = f"compat={compat},cluster_size={cluster}" + (f",refcount_bits={bits}" if compat != "0.10" else "")
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", path, str(SIZE))
    commands = []
    for _ in range(20):
        offset = rng.randrange(SIZE - 70_000) // 512 * 512
        verb = rng.choice(("write -P 17", "write -P 99", "write -z", "discard"))
        commands.append(f"{verb} {offset} {rng.choice((512, 4096, 65536))}")
    qemu_io(path, *commands[:10], format="qcow2")
    if bits > 1:
        qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, *commands[10:], f"write -c -P 7 {SIZE - cluster} {cluster}", format="qcow2", check=False)
    if bits > 1:
        qemu_img("snapshot", "-c", "two", path)
        qemu_io(path, "write -P 55 0 100k", format="qcow2")
    return path


def raw(path: Path, *options: str) -> bytes:
    out = path.with_suffix(".out")
    qemu_img("convert", *options, "-f", "qcow2", "-O", "raw", path, out)
    return out.read_bytes()


def read(path: Path) -> Image:
    return Image(path.read_bytes(), (path.parent / "base.raw").read_bytes())


def test_reads_what_qemu_reads(image: Path) -> None:
    found = read(image)
    assert found.content() == raw(image)
    for snapshot in found.snapshots:
        assert found.content(snapshot) == raw(image, "-l", f"snapshot.name={snapshot.name}")


def test_finds_a_sound_image_sound(image: Path) -> None:
    findings = read(image).check()
    assert (findings.corruptions, findings.leaks, findings.flags, findings.lost_flags) == ([], [], [], [])


def test_counts_damage_as_qemu_does(image: Path, rng: random.Random) -> None:
    """Reference counts that are too high are leaks, too low corruptions."""
    sound = read(image)
    width = 1 << sound.order
    if width < 8:
        pytest.skip("counts of less than a byte are not patched here")
    block = sound.words(sound.table_offset, 1)[0]
    data = bytearray(image.read_bytes())
    clusters = rng.sample(sorted(sound.refcounts())[3:60], 6)
    for number, cluster in enumerate(clusters):
        at = block + cluster * width // 8
        count = int.from_bytes(data[at : at + width // 8], "big")
        count = count + 3 if number % 2 else 0
        data[at : at + width // 8] = count.to_bytes(width // 8, "big")
    image.write_bytes(data)
    findings = read(image).check()
    report = qemu_img("check", "--output=json", "-f", "qcow2", image, check=False).json()
    assert len(findings.leaks) == report["leaks"] == 3
    assert len(findings.corruptions + findings.flags + findings.lost_flags) == report["corruptions"] >= 3


def test_a_shared_cluster_marked_as_copied_is_a_corruption(image: Path) -> None:
    found = read(image)
    if not found.snapshots:
        pytest.skip("counts of one bit allow no snapshots")
    qemu_img("snapshot", "-c", "three", image)
    data = bytearray(image.read_bytes())
    found = read(image)
    index = next(i for i, entry in enumerate(found.words(found.l1_offset, found.l1_size)) if entry)
    entry = struct.unpack_from(">Q", data, found.l1_offset + index * 8)[0]
    struct.pack_into(">Q", data, found.l1_offset + index * 8, entry | 1 << 63)
    image.write_bytes(data)
    assert len(read(image).check().corruptions) == 1
