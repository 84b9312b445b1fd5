"""Converting, and qemu-img as the judge: what it makes of our images, and we of its."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import cowhand
from cowhand.copy.ops.convert import ConvertResult, convert
from cowhand.core.errors import CowhandError, ImageExists, InvalidArgument, NotSupported, SnapshotNotFound
from cowhand.core.progress import Progress
from cowhand.image.create import create
from cowhand.image.new_file import is_unfinished
from cowhand.image.snapshots import create_snapshot
from tests.copy.images import MIB, content, memory_disk, read_all, sparse_file
from tests.tools.qemu import assert_clean, assert_identical, qemu_img, qemu_io, qemu_map, require_qemu

SIZE = 6 * MIB + 512


@pytest.fixture
def data(rng: random.Random) -> bytes:
    return content(rng, SIZE, 25)


@pytest.fixture
def raw(image_dir: Path, data: bytes) -> Path:
    return sparse_file(image_dir / "source.raw", data)


SHAPES = [
    {},
    {"compat": "0.10"},
    {"cluster_size": "512"},
    {"cluster_size": "4k", "refcount_bits": "1"},
    {"cluster_size": "2M", "refcount_bits": "64"},
    {"compression_type": "zstd"},
    {"lazy_refcounts": "on"},
    {"preallocation": "metadata"},
]


#: (options of the image, whether it is compressed); compression and preallocation exclude each other
CASES = [(shape, packed) for shape in SHAPES for packed in (False, True) if not (packed and "preallocation" in shape)]
each_case = pytest.mark.parametrize(
    ("shape", "compressed"),
    CASES,
    ids=lambda part: named(part) if isinstance(part, dict) else "packed" * part or "plain",
)


def named(shape: dict[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in shape.items()) or "default"


def options(shape: dict[str, str]) -> list[str]:
    return ["-o", named(shape)] if shape else []


@require_qemu
@pytest.mark.interop
@each_case
def test_qemu_reads_what_we_convert(raw: Path, image_dir: Path, shape: dict[str, str], compressed: bool) -> None:
    target = image_dir / "target.qcow2"
    result = convert(raw, target, "qcow2", source_format="raw", options=shape, compressed=compressed)
    assert result[:3] == (str(target), "qcow2", SIZE)
    assert_clean(target)
    assert_identical(raw, "raw", target, "qcow2")
    if compressed:
        assert target.stat().st_size % 512 == 0
    else:
        # The same clusters at the same places as qemu-img would have put them: the whole file is the same.
        theirs = image_dir / "theirs.qcow2"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *options(shape), raw, theirs)
        assert target.read_bytes() == theirs.read_bytes()
    back = image_dir / "back.raw"
    convert(target, back)
    assert back.read_bytes() == raw.read_bytes()


@require_qemu
@pytest.mark.interop
@each_case
def test_we_read_what_qemu_converts(
    raw: Path, image_dir: Path, shape: dict[str, str], compressed: bool, data: bytes
) -> None:
    image = image_dir / "theirs.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *["-c"] * compressed, *options(shape), raw, image)
    back, again = image_dir / "back.raw", image_dir / "again.qcow2"
    convert(image, back, "raw")
    assert back.read_bytes() == data
    assert back.stat().st_blocks <= raw.stat().st_blocks + 8 * 25
    convert(image, again, "qcow2", source_format="qcow2")
    assert_clean(again)
    assert_identical(again, "qcow2", back, "raw")


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("sparse", ["0", "512", "4k", "64k", "1M"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_zeroes_are_left_out_as_qemu_does(raw: Path, image_dir: Path, sparse: str, format: str) -> None:
    ours, theirs = image_dir / "ours", image_dir / "theirs"
    convert(raw, ours, format, source_format="raw", sparse_size=sparse)
    qemu_img("convert", "-f", "raw", "-O", format, "-S", sparse, raw, theirs)
    assert_identical(ours, format, raw, "raw")
    if sparse == "0":
        assert not any(row["zero"] for row in qemu_map(ours, format)) or format == "raw"
    assert ours.stat().st_blocks <= theirs.stat().st_blocks + 8
    if format == "qcow2":
        assert ours.read_bytes() == theirs.read_bytes()


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("cluster", ["512", "4k", "64k"])
@pytest.mark.parametrize("longer", [-1, 0, 1])
def test_an_overlay_keeps_only_what_is_its_own(image_dir: Path, rng: random.Random, cluster: str, longer: int) -> None:
    base, top = image_dir / "base.qcow2", image_dir / "top.qcow2"
    size = 2 * MIB
    lower = sparse_file(image_dir / "base.raw", content(rng, size + longer * 300 * 512))
    convert(lower, base, "qcow2", source_format="raw", options={"cluster_size": "4k"})
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", "-o", "cluster_size=4k", top, str(size))
    changes = [
        f"write -P {rng.randrange(256)} {rng.randrange(size // 512 - 200) * 512} {rng.randrange(1, 200) * 512}"
        for _ in range(6)
    ]
    changes += [f"write -z {rng.randrange(size // 512 - 200) * 512} {rng.randrange(1, 200) * 512}" for _ in range(3)]
    qemu_io(top, *changes, format="qcow2")
    copied = image_dir / "copy.qcow2"
    result = convert(top, copied, "qcow2", options={"cluster_size": cluster}, backing=str(base), backing_format="qcow2")
    assert_clean(copied)
    assert_identical(copied, "qcow2", top, "qcow2")
    assert result.skipped > 0
    theirs = image_dir / "theirs.qcow2"
    qemu_img(
        "convert", "-f", "qcow2", "-O", "qcow2", "-B", base, "-F", "qcow2", "-o", f"cluster_size={cluster}", top, theirs
    )
    assert copied.stat().st_size <= theirs.stat().st_size


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("compressed", [False, True])
def test_an_existing_image_is_written_in_place(
    raw: Path, image_dir: Path, rng: random.Random, compressed: bool
) -> None:
    target = image_dir / "target.qcow2"
    convert(sparse_file(image_dir / "old.raw", content(rng, SIZE + MIB, 40)), target, "qcow2", source_format="raw")
    with cowhand.open(target, writable=True) as disk:
        create_snapshot(disk, "kept")
    before = target.stat().st_ino
    qemu_img("snapshot", "-l", target)
    convert(raw, target, "qcow2", source_format="raw", skip_create=True, compressed=compressed)
    assert target.stat().st_ino == before
    assert_clean(target)
    with cowhand.open(target) as disk:
        assert disk.read(0, SIZE) == raw.read_bytes()
        assert disk.size == SIZE + MIB
    kept = image_dir / "kept.raw"
    convert(target, kept, "raw", snapshot="kept")
    assert kept.read_bytes() == (image_dir / "old.raw").read_bytes()
    qemu_img("convert", "-l", "kept", "-O", "raw", target, image_dir / "theirs.raw")
    assert kept.read_bytes() == (image_dir / "theirs.raw").read_bytes()


@pytest.mark.parametrize("kept", [False, True])
def test_what_lies_behind_a_shorter_source_stays(image_dir: Path, rng: random.Random, kept: bool) -> None:
    """The source ends inside of a cluster that the target has to allocate anew."""
    base, source, target = image_dir / "base.raw", image_dir / "source.raw", image_dir / "target.qcow2"
    old = rng.randbytes(3 << 16)
    base.write_bytes(old)
    new = rng.randbytes((1 << 16) + 7 * 512)
    source.write_bytes(new)
    create(target, "qcow2", backing=str(base), backing_format="raw")
    if kept:
        with cowhand.open(target, writable=True) as disk:
            old = rng.randbytes(3 << 16)
            disk.write(0, old)
            create_snapshot(disk, "kept")
    convert(source, target, "qcow2", source_format="raw", skip_create=True)
    with cowhand.open(target) as disk:
        assert read_all(disk) == new + old[len(new) :]


def test_a_target_that_is_zero_is_believed(raw: Path, image_dir: Path, data: bytes) -> None:
    target = image_dir / "target.qcow2"
    create(target, "qcow2", SIZE)
    convert(raw, target, "qcow2", source_format="raw", skip_create=True, target_is_zero=True)
    with cowhand.open(target) as disk:
        assert read_all(disk) == data


def test_several_sources_make_one_disk(image_dir: Path, rng: random.Random) -> None:
    parts = [rng.randbytes(length) for length in (1000, 512, 70_000)]
    files = []
    for index, part in enumerate(parts):
        path = image_dir / f"part{index}"
        path.write_bytes(part)
        files.append(path)
    wanted = b"".join(part.ljust(-(-len(part) // 512) * 512, b"\0") for part in parts)
    for format in ("raw", "qcow2"):
        target = image_dir / f"target.{format}"
        result = convert(files, target, format, source_format="raw", compressed=format == "qcow2")
        assert result.size == len(wanted)
        with cowhand.open(target, format=format) as disk:
            assert read_all(disk) == wanted


def test_open_disks_are_taken_and_left_open(rng: random.Random, image_dir: Path) -> None:
    data = content(rng, MIB)
    create(image_dir / "target", "qcow2", 2 * MIB)
    with memory_disk(data) as source, cowhand.open(image_dir / "target", format="qcow2", writable=True) as target:
        convert(source, target)
        assert target.read(0, MIB) == data
        target.write(0, b"still open")
        assert source.read(0, 1) == data[:1]


def test_progress_counts_what_is_copied(raw: Path, image_dir: Path) -> None:
    progress = Progress()
    result = convert(raw, image_dir / "x", "qcow2", source_format="raw", progress=progress)
    assert progress.done == progress.total == result.copied
    assert progress.ended is not None


# -- what a target is left as


def nothing_left(folder: Path, *expected: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)


def test_an_existing_file_is_not_replaced_unless_asked(raw: Path, image_dir: Path) -> None:
    target = image_dir / "precious"
    target.write_bytes(b"precious")
    with pytest.raises(ImageExists):
        convert(raw, target, "qcow2", source_format="raw")
    assert target.read_bytes() == b"precious"
    nothing_left(image_dir, "source.raw", "precious")
    other = image_dir / "other"
    other.hardlink_to(target)
    convert(raw, target, "qcow2", source_format="raw", overwrite=True)
    assert other.read_bytes()[:4] == b"QFI\xfb"  # in place: its other names are the same file still


def test_a_name_that_is_taken_meanwhile_is_not_replaced(raw: Path, image_dir: Path) -> None:
    target = image_dir / "target"

    def interfere(progress: Progress) -> None:
        target.write_bytes(b"somebody else's")

    with pytest.raises(ImageExists):
        convert(raw, target, "raw", source_format="raw", progress=Progress(0, interfere))
    assert target.read_bytes() == b"somebody else's"
    nothing_left(image_dir, "source.raw", "target")


def test_the_name_appears_when_the_target_is_complete(raw: Path, image_dir: Path, data: bytes) -> None:
    target = image_dir / "target.qcow2"
    seen: list[list[str]] = []

    def look(progress: Progress) -> None:
        seen.append([path.name for path in image_dir.iterdir()])

    convert(raw, target, "qcow2", source_format="raw", progress=Progress(0, look))
    assert seen
    for names in seen:
        assert target.name not in names
        assert [name for name in names if is_unfinished(name)]
    with cowhand.open(target) as disk:
        assert read_all(disk) == data
        assert disk.filename == str(target)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda raw, new: convert(raw, new, "raw", source_format="raw", compressed=True), NotSupported),
        (
            lambda raw, new: convert(raw, new, "qcow2", source_format="raw", options={"cluster_size": "3"}),
            InvalidArgument,
        ),
        (lambda raw, new: convert(raw, new, "qcow2", source_format="raw", options={"nonsense": "1"}), InvalidArgument),
        (lambda raw, new: convert(raw, new, "qcow2", source_format="qcow2"), CowhandError),
        (lambda raw, new: convert(raw, new, "raw", source_format="raw", snapshot="s"), NotSupported),
        (lambda raw, new: convert(raw, new / "no" / "folder", "raw", source_format="raw"), CowhandError),
        (lambda raw, new: convert(raw.with_name("absent"), new, "raw"), CowhandError),
        (lambda raw, new: convert([], new, "raw"), InvalidArgument),
        (lambda raw, new: convert(raw, new, "raw", source_format="raw", workers=17), InvalidArgument),
        (lambda raw, new: convert(raw, new, "raw", source_format="raw", sparse_size=100), InvalidArgument),
        (
            lambda raw, new: convert(raw, new, "qcow2", compressed=True, options={"preallocation": "full"}),
            InvalidArgument,
        ),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    raw: Path, image_dir: Path, call: Callable[[Path, Path], ConvertResult], error: type[CowhandError]
) -> None:
    with pytest.raises(error):
        call(raw, image_dir / "new")
    nothing_left(image_dir, "source.raw")


def test_an_unknown_snapshot_is_named(image_dir: Path) -> None:
    create(image_dir / "x", "qcow2", MIB)
    with pytest.raises(SnapshotNotFound) as caught:
        convert(image_dir / "x", image_dir / "y", snapshot="nowhere")
    assert caught.value.qemu() == "Failed to load snapshot: Can't find snapshot"


def test_a_target_that_is_too_small_is_refused(raw: Path, image_dir: Path) -> None:
    create(image_dir / "small", "qcow2", MIB)
    with pytest.raises(InvalidArgument) as caught:
        convert(raw, image_dir / "small", "qcow2", source_format="raw", skip_create=True)
    assert caught.value.qemu() == "output file is smaller than input file"


def test_sources_keep_their_time_and_content(raw: Path, image_dir: Path, data: bytes) -> None:
    before = os.stat(raw)
    convert(raw, image_dir / "x", "qcow2", source_format="raw")
    after = os.stat(raw)
    assert (before.st_mtime_ns, before.st_size, before.st_blocks) == (after.st_mtime_ns, after.st_size, after.st_blocks)
    assert raw.read_bytes() == data
