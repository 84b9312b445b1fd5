"""Committing: qemu-img as the judge, and a reader of the top that must never see anything else."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

import cowhand
from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.format_io.reservations import Kind
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.protocols.file.data import DescriptorNode
from cowhand.copy.ops.convert import convert
from cowhand.core.errors import Cancelled, CowhandError, InvalidArgument
from cowhand.core.progress import CancelToken, Progress
from cowhand.image.create import create
from cowhand.jobs.commit import commit
from tests.copy.images import MIB, content, read_all, sparse_file
from tests.tools.qemu import assert_clean, qemu_img, qemu_io, qemu_map, require_qemu


def disk_of(path: Path) -> bytes:
    with cowhand.open(path) as disk:
        return read_all(disk)


def change(rng: random.Random, image: Path, size: int) -> None:
    """Write, zero and discard here and there in *image*, at any alignment."""
    sectors = size // 512
    orders = []
    for _ in range(8):
        offset = rng.randrange(sectors) * 512
        length = min(size - offset, rng.randrange(1, 400) * 512)
        orders += rng.sample(
            [
                f"write -P {rng.randrange(1, 256)} {offset} {length}",
                f"write -z {offset} {length}",
                f"write -z -u {offset} {length}",
                f"discard {offset} {length}",
            ],
            1,
        )
    qemu_io(image, *orders, format="qcow2")


def chain(rng: random.Random, folder: Path, sizes: list[int], base_format: str = "qcow2") -> list[Path]:
    """Return images of *sizes*, each standing on the one before it, each with changes of its own."""
    raw = sparse_file(folder / "content.raw", content(rng, sizes[0], 12))
    base = folder / "layer0"
    convert(raw, base, base_format, source_format="raw")
    raw.unlink()
    layers = [base]
    for index, size in enumerate(sizes[1:], 1):
        path = folder / f"layer{index}"
        cluster = rng.choice(("4k", "64k"))
        below = "qcow2" if index > 1 else base_format
        create(path, "qcow2", size, {"cluster_size": cluster}, backing=str(layers[-1]), backing_format=below)
        change(rng, path, size)
        layers.append(path)
    return layers


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
@pytest.mark.parametrize("drop", [False, True])
def test_the_base_gets_what_the_top_holds(
    image_dir: Path, rng: random.Random, sizes: tuple[int, ...], base_format: str, drop: bool
) -> None:
    base, top = chain(rng, image_dir, [size * MIB + 512 * index for index, size in enumerate(sizes)], base_format)
    wanted, before = disk_of(top), top.read_bytes()
    theirs = [shutil.copy(path, path.with_name("qemu-" + path.name)) for path in (base, top)]
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", theirs[0], "-F", base_format, theirs[1])
    qemu_img("commit", "-f", "qcow2", *["-d"] * drop, theirs[1])
    result = commit(top, format="qcow2", drop=drop)
    assert (result.grown, result.emptied) == (sizes[1] >= sizes[0], not drop)
    assert disk_of(top) == wanted
    with cowhand.open(base, format=base_format) as disk:
        after = read_all(disk)
    assert after[: len(wanted)] == wanted[: len(after)]
    assert_clean(top)
    if base_format == "qcow2":
        assert_clean(base)
    # What lies beyond a shorter top, QEMU's base has as well.
    assert qemu_img("compare", "-F", base_format, "-f", base_format, base, theirs[0], check=False).status == 0
    if drop:
        assert top.read_bytes() == before
    else:
        assert not any(row["depth"] == 0 and row["data"] for row in qemu_map(top, "qcow2"))


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (3, 1, 2, 3), (2, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("to", [0, 1])
def test_several_layers_go_down_at_once(image_dir: Path, rng: random.Random, sizes: tuple[int, ...], to: int) -> None:
    layers = chain(rng, image_dir, [size * MIB for size in sizes])
    wanted = disk_of(layers[-1])
    below = layers[to - 1].read_bytes() if to else b""
    result = commit(layers[-1], str(layers[to]))
    assert not result.emptied
    assert disk_of(layers[to])[: len(wanted)] == wanted
    assert disk_of(layers[-1]) == wanted
    assert_clean(layers[to])
    if to:
        assert layers[to - 1].read_bytes() == below


def test_a_base_is_known_by_its_name_in_the_header_or_as_a_file(
    image_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(image_dir / "base", "qcow2", MIB)
    create(image_dir / "top", "qcow2", backing="base", backing_format="qcow2")
    monkeypatch.chdir(image_dir.parent)
    for name in ("base", str(image_dir / "base"), "images/base", "./images/../images/base"):
        assert commit(image_dir / "top", name).base.endswith("base")
    with pytest.raises(InvalidArgument) as caught:
        commit(image_dir / "top", "elsewhere")
    assert caught.value.qemu() == f"Did not find 'elsewhere' in the backing chain of '{image_dir / 'top'}'"
    with pytest.raises(InvalidArgument, match="Image does not have a backing file"):
        commit(image_dir / "base")


def test_everything_is_checked_before_the_first_write(image_dir: Path, rng: random.Random) -> None:
    base, top = image_dir / "base", image_dir / "top"
    create(base, "qcow2", MIB)
    create(top, "qcow2", backing="base", backing_format="qcow2")
    with cowhand.open(top, writable=True) as disk:
        disk.write(0, rng.randbytes(1000))
    before = base.read_bytes(), top.read_bytes()
    with cowhand.open(base, force_share=False), pytest.raises(CowhandError):  # somebody reads the base
        commit(top)
    assert (base.read_bytes(), top.read_bytes()) == before
    with cowhand.open(top), pytest.raises(CowhandError):
        commit(top)
    assert (base.read_bytes(), top.read_bytes()) == before
    commit(top)


def test_a_cancelled_commit_changes_nothing_that_the_top_shows(image_dir: Path, rng: random.Random) -> None:
    base, top = chain(rng, image_dir, [8 * MIB, 8 * MIB])
    with cowhand.open(top, writable=True) as disk:
        disk.write(MIB, rng.randbytes(6 * MIB))
    wanted = disk_of(top)
    cancel = CancelToken()
    with pytest.raises(Cancelled):
        commit(top, progress=Progress(0, lambda progress: cancel.cancel()), cancel=cancel)
    assert disk_of(top) == wanted
    commit(top)
    assert disk_of(top) == disk_of(base) == wanted


@pytest.mark.parametrize("slowly", [True, False])
def test_the_base_is_stable_before_the_top_is_emptied(
    image_dir: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, slowly: bool
) -> None:
    base, top = chain(rng, image_dir, [MIB, MIB])
    if slowly:  # what an image with snapshots needs
        monkeypatch.setattr(Qcow2Node, "make_empty", lambda node: False)
    log: list[tuple[str, str]] = []
    flush, change = DescriptorNode.flush, FormatNode.change

    def logged_flush(node: DescriptorNode) -> None:
        flush(node)
        log.append(("flushed", node.filename))

    def logged_change(node: FormatNode, offset: int, length: int, kind: Kind) -> None:
        log.append((kind.name, node.filename))
        change(node, offset, length, kind)

    monkeypatch.setattr(DescriptorNode, "flush", logged_flush)
    monkeypatch.setattr(FormatNode, "change", logged_change)
    commit(top)
    if slowly:
        emptied = log.index(("EMPTY", str(top)))
        assert ("flushed", str(base)) in log[:emptied]
        assert ("flushed", str(top)) not in log[:emptied]
        assert ("flushed", str(top)) in log[emptied:]
    else:
        assert log.index(("flushed", str(base))) < log.index(("flushed", str(top)))


def test_an_emptied_image_is_as_small_as_a_new_one(image_dir: Path, rng: random.Random) -> None:
    base, top = chain(rng, image_dir, [4 * MIB, 4 * MIB])
    commit(top)
    fresh = image_dir / "fresh"
    create(fresh, "qcow2", 4 * MIB, {"cluster_size": _cluster_size(top)}, backing=str(base), backing_format="qcow2")
    # The first cluster names features and the backing file; behind it are the same tables at the same places.
    unit = _cluster_size(top)
    assert top.stat().st_size == -(-fresh.stat().st_size // unit) * unit
    assert top.read_bytes()[unit:].rstrip(b"\0") == fresh.read_bytes()[unit:].rstrip(b"\0")
    assert_clean(top)
    with cowhand.open(top, writable=True) as disk:
        disk.write(MIB, b"again" * 1000)
    assert_clean(top)


def _cluster_size(path: Path) -> int:
    return 1 << int.from_bytes(path.read_bytes()[20:24], "big")


def test_snapshots_of_the_top_survive(image_dir: Path, rng: random.Random) -> None:
    from cowhand.image.snapshots import create_snapshot, open_snapshot

    _, top = chain(rng, image_dir, [MIB, MIB])
    then = rng.randbytes(MIB)  # all of it in the top itself: what a snapshot has from the base changes with the base
    with cowhand.open(top, writable=True) as disk:
        disk.write(0, then)
        create_snapshot(disk, "then")
        disk.write(0, rng.randbytes(100_000))
    wanted = disk_of(top)
    commit(top)
    assert disk_of(top) == wanted
    with cowhand.open(top) as disk, open_snapshot(disk, "then") as view:
        assert read_all(view) == then


def test_the_rate_is_limited(image_dir: Path, rng: random.Random) -> None:
    import time

    _, top = chain(rng, image_dir, [4 * MIB, 4 * MIB])
    with cowhand.open(top, writable=True) as disk:
        disk.write(0, rng.randbytes(2 * MIB))
    begin = time.monotonic()
    commit(top, rate_limit="8M")
    assert time.monotonic() - begin > 0.1


@pytest.mark.parametrize(("below", "above"), [(200_000, 100_000), (100_000, 100_000), (100_000, 150_001)])
def test_disks_that_end_inside_a_sector(tmp_path: Path, below: int, above: int) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    create(str(base), "qcow2", 256 << 10)
    create(str(top), "qcow2", 256 << 10, backing=str(base), backing_format="qcow2")
    for path, size in ((base, below), (top, above)):
        with cowhand.open(path, writable=True) as disk:
            disk.write(0, path.name[:1].encode() * disk.size)
        with path.open("r+b") as file:
            file.seek(24)
            file.write(size.to_bytes(8, "big"))
    commit(str(top), drop=True)
    size = below if above <= below else -(-above // 512) * 512
    assert disk_of(base) == (b"t" * above + (b"b" * (below - above) if below > above else bytes(size - above)))
