"""Rows for what moves bulk data: convert in all directions, compression, compare, commit. Whole processes against whole processes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from inputs import Inputs
from measuring import Case, Sample, program, spawn

_BARE = "bytes alone"


class Bulk:
    """Makes the cases; results lie under names that change, since writing to a fresh file costs differently from one to the next."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.cowhand = program("cowhand")
        self.qemu_img = program("qemu-img")
        self._made: list[Path] = []
        self._count = 0

    def fresh(self) -> Path:
        """Return a new name for a result."""
        self._count += 1
        path = self.inputs.path(f"result-{self._count}")
        self._made.append(path)
        return path

    def clear(self) -> None:
        """Remove the results."""
        for path in self._made:
            path.unlink(missing_ok=True)
        self._made.clear()

    def convert(self, *options: str, sized: bool = False) -> Callable[[], Sample]:
        """Return our conversion with *options*, the last of which is the source."""
        return self._conversion((self.cowhand, "convert", "--quiet"), options, sized)

    def peer(self, *options: str, sized: bool = False) -> Callable[[], Sample]:
        """Return qemu-img's."""
        return self._conversion((self.qemu_img, "convert"), options, sized)

    def _conversion(self, command: tuple[str, ...], options: tuple[str, ...], sized: bool) -> Callable[[], Sample]:
        def run() -> Sample:
            target = self.fresh()
            sample = spawn(*command, *options, target)
            return replace(sample, size=target.stat().st_blocks * 512) if sized else sample

        return run

    def case(
        self,
        name: str,
        goal: float,
        ours: list[str],
        peer: list[str],
        *,
        peer_name: str = "qemu-img",
        size_goal: float | None = None,
    ) -> Case:
        """Return a conversion's row."""
        sized = size_goal is not None
        return Case(
            name,
            peer_name,
            goal,
            self.convert(*ours, sized=sized),
            self.peer(*peer, sized=sized),
            self.clear,
            size_goal,
        )


def cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the rows, making their inputs one by one."""
    bulk = Bulk(inputs)
    raw = str(inputs.sparse_raw())
    to_qcow2 = ["-f", "raw", "-O", "qcow2"]
    parallel = ["-W", "-m", "16"]
    yield bulk.case("convert raw → qcow2, sparse source", 0.7, [*to_qcow2, raw], [*to_qcow2, raw])
    yield bulk.case("the same", 0.7, [*to_qcow2, raw], [*to_qcow2, *parallel, raw], peer_name="qemu-img -W -m 16")
    yield _bare(bulk, "copy", raw, f"{_BARE} (sparse source)")
    full = str(inputs.full_raw())
    yield bulk.case("convert raw → qcow2, full source", 0.5, [*to_qcow2, full], [*to_qcow2, full])
    yield _bare(bulk, "copy", full, f"{_BARE} (full source)")
    inputs.path("full.raw").unlink()
    yield _into_existing(bulk, raw)
    qcow2 = str(inputs.qcow2())
    yield bulk.case(
        "convert qcow2 → raw", 0.8, ["-f", "qcow2", "-O", "raw", qcow2], ["-f", "qcow2", "-O", "raw", qcow2]
    )
    both = ["-f", "qcow2", "-O", "qcow2", qcow2]
    yield bulk.case("convert qcow2 → qcow2", 0.8, both, both)
    fast = "qemu-img -W -m 16"
    deflate = ["-c", *to_qcow2]
    yield bulk.case(
        "compress, deflate", 0.15, [*deflate, raw], [*deflate, *parallel, raw], peer_name=fast, size_goal=1.06
    )
    zstd = ["-c", *to_qcow2, "-o", "compression_type=zstd"]
    yield bulk.case("compress, zstd", 0.5, [*zstd, raw], [*zstd, *parallel, raw], peer_name=fast, size_goal=1.03)
    for kind, options in (("deflate", ()), ("zstd", ("-o", "compression_type=zstd"))):
        packed = str(inputs.qcow2(f"packed-{kind}.qcow2", "-c", "-W", "-m", "16", *options))
        unpack = ["-f", "qcow2", "-O", "raw", packed]
        yield bulk.case(f"decompress, {kind}", 0.5, unpack, unpack)
    yield _compare(bulk, raw, qcow2)
    yield _bare(bulk, "compare", raw, f"{_BARE} (compare)")
    yield _commit(bulk, inputs)
    yield _rebase(bulk, inputs)


def _bare(bulk: Bulk, kind: str, raw: str, name: str) -> Case:
    """Say what the row before this one would be if nothing but the bytes cost anything."""
    program = (sys.executable, "-I", "-S", str(Path(__file__).with_name("bare.py")), kind, raw)
    peer = bulk.peer("-f", "raw", "-O", "qcow2", raw)
    if kind == "compare":
        return Case(name, "qemu-img compare", None, lambda: spawn(*program, raw), _qemu_compare(bulk, raw, raw, "raw"))
    return Case(name, "qemu-img", None, lambda: spawn(*program, bulk.fresh()), peer, bulk.clear)


def _into_existing(bulk: Bulk, raw: str) -> Case:
    size = str(os.path.getsize(raw))
    state: dict[str, Path] = {}

    def prepare() -> None:
        bulk.clear()
        state["target"] = bulk.fresh()
        spawn(bulk.qemu_img, "create", "-q", "-f", "qcow2", state["target"], size)

    options = ("-n", "-f", "raw", "-O", "qcow2", raw)
    return Case(
        "convert into an existing image (-n)",
        "qemu-img -n",
        0.9,
        lambda: spawn(bulk.cowhand, "convert", "--quiet", *options, state["target"]),
        lambda: spawn(bulk.qemu_img, "convert", *options, state["target"]),
        prepare,
    )


def _compare(bulk: Bulk, raw: str, qcow2: str) -> Case:
    options = ("-f", "raw", "-F", "qcow2", raw, qcow2)
    return Case(
        "compare raw and qcow2",
        "qemu-img compare",
        0.6,
        lambda: spawn(bulk.cowhand, "compare", "--quiet", *options),
        _qemu_compare(bulk, raw, qcow2, "qcow2"),
        bulk.clear,
    )


def _qemu_compare(bulk: Bulk, raw: str, other: str, format: str) -> Callable[[], Sample]:
    return lambda: spawn(bulk.qemu_img, "compare", "-f", "raw", "-F", format, raw, other)


def _commit(bulk: Bulk, inputs: Inputs) -> Case:
    """An overlay that holds half of the disk goes down into an empty base."""
    base, top, kept = inputs.path("base.qcow2"), inputs.path("top.qcow2"), inputs.path("kept/top.qcow2")

    def prepare() -> None:
        bulk.clear()
        size = str(inputs.sparse_raw().stat().st_size)
        spawn(bulk.qemu_img, "create", "-q", "-f", "qcow2", base, size)
        if not kept.exists():
            spawn(bulk.qemu_img, "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
            spawn(bulk.qemu_img, "convert", "-n", "-f", "raw", "-O", "qcow2", inputs.sparse_raw(), top)
            # In a folder of its own: beside the base it would be an overlay that the commit has to warn about.
            kept.parent.mkdir()
            top.rename(kept)
        shutil.copyfile(kept, top)
        with open(top, "rb") as file:
            os.fsync(file.fileno())

    return Case(
        "commit",
        "qemu-img commit",
        0.7,
        lambda: spawn(bulk.cowhand, "commit", "--quiet", "--force", "-f", "qcow2", top),
        lambda: spawn(bulk.qemu_img, "commit", "-q", "-f", "qcow2", top),
        prepare,
    )


def _rebase(bulk: Bulk, inputs: Inputs) -> Case:
    """An empty overlay takes over all that its base holds, and stands alone."""
    base, top = inputs.qcow2(), inputs.path("rebased.qcow2")

    def prepare() -> None:
        bulk.clear()
        spawn(bulk.qemu_img, "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)

    return Case(
        "rebase to no base",
        "qemu-img rebase",
        0.7,
        lambda: spawn(bulk.cowhand, "rebase", "--quiet", "-f", "qcow2", "-b", "", top),
        lambda: spawn(bulk.qemu_img, "rebase", "-f", "qcow2", "-b", "", top),
        prepare,
    )
