"""One image of a soak run: made, changed in sessions, and judged after each by QEMU's check, QEMU's compare and a model of its bytes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cowhand
from cowhand.block.disk import Disk
from cowhand.image.bitmaps import add_bitmap, clear_bitmap, enable_bitmap, list_bitmaps, remove_bitmap
from cowhand.image.create import create
from cowhand.image.snapshots import apply_snapshot, create_snapshot, delete_snapshot, list_snapshots, open_snapshot
from tests.soak.choice import SECRET, Choice, arguments_for_qemu, choose
from tests.tools.qemu import qemu_img

_SESSIONS = (1, 4)
_REQUESTS = (1, 25)
_MOST_BITMAPS = 4


class Wrong(Exception):
    """Something is not as it has to be."""


class Image:
    """An image in *folder*, with the model of what it holds. All that happens to it follows from *seed*."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.folder = folder
        self.choice: Choice = choose(self.chance)
        self.path = folder / "soak.qcow2"
        self.model = bytearray(self.choice.size)
        self.snapshots: dict[str, bytes] = {}
        #: Enabled bitmaps: (granularity, granules that have to be dirty).
        self.dirty: dict[str, tuple[int, set[int]]] = {}
        self.names = 0
        options = dict(self.choice.options)
        if self.choice.external:
            options["data_file"] = str(folder / "soak.data")
        create(self.path, "qcow2", self.choice.size, options)
        if self.choice.encrypted and "preallocation" in options:
            # What was not written yet is what its stored zeroes decrypt to, in QEMU too.
            with self.open(writable=False) as disk:
                self.model[:] = disk.read(0, disk.size)

    def open(self, *, writable: bool) -> Disk:
        description: dict[str, Any] = {"driver": "qcow2", "file.filename": str(self.path), "discard": "unmap"}
        if self.choice.encrypted:
            description["encrypt.key-secret"] = SECRET
        return cowhand.open(description, writable=writable)

    def run(self) -> int:
        """Live through all sessions; return how many requests there were. Raises Wrong and what the library raises."""
        requests = 0
        for _ in range(self.chance.randint(*_SESSIONS)):
            count = self.chance.randint(*_REQUESTS)
            with self.open(writable=True) as disk:
                for _ in range(count):
                    self._request(disk)
            requests += count
            self.judge()
        return requests

    # -- requests

    def _request(self, disk: Disk) -> None:
        verbs = ["write"] * 6 + ["zero", "discard", "flush", "grow"]
        if self.choice.snapshots:
            verbs += ["snapshot", "apply", "delete"]
        if self.choice.keeps_bitmaps:
            verbs += ["add_bitmap", "change_bitmap"]
        getattr(self, "_" + self.chance.choice(verbs))(disk)

    def _span(self) -> tuple[int, int]:
        size = len(self.model)
        offset = self.chance.randrange(size)
        length = self.chance.choice((1, 512, 4096, 65536, size))
        if self.chance.random() < 0.5:
            offset = offset // 65536 * 65536
        return offset, min(self.chance.randint(1, length), size - offset)

    def _changed(self, offset: int, length: int) -> None:
        for granularity, granules in self.dirty.values():
            granules.update(range(offset // granularity, (offset + length - 1) // granularity + 1))

    def _write(self, disk: Disk) -> None:
        offset, length = self._span()
        data = self.chance.randbytes(min(length, 4096)) * (length // 4096 + 1)
        disk.write(offset, data[:length])
        self.model[offset : offset + length] = data[:length]
        self._changed(offset, length)

    def _zero(self, disk: Disk) -> None:
        offset, length = self._span()
        disk.write_zeroes(offset, length, unmap=self.chance.random() < 0.5)
        self.model[offset : offset + length] = bytes(length)
        self._changed(offset, length)

    def _discard(self, disk: Disk) -> None:
        offset, length = self._span()
        disk.discard(offset, length)
        after = disk.read(0, len(self.model))
        if after[:offset] != self.model[:offset] or after[offset + length :] != self.model[offset + length :]:
            raise Wrong(f"a discard of {length} bytes at {offset} changed what lies around it")
        for at in range(offset, offset + length):
            if after[at] and after[at] != self.model[at]:
                raise Wrong(f"a discard left a byte at {at} that is neither the old one nor zero")
        self.model[:] = after

    def _flush(self, disk: Disk) -> None:
        disk.flush()

    def _grow(self, disk: Disk) -> None:
        if self.snapshots and self.choice.version == 2:
            return  # version 2 keeps no size in a snapshot
        more = self.chance.choice((512, 4096, 1 << 20))
        if len(self.model) + more <= 8 << 20:
            disk.resize(len(self.model) + more)
            self.model += bytes(more)

    def _snapshot(self, disk: Disk) -> None:
        if len(self.snapshots) < self.choice.most_snapshots:
            self.names += 1
            create_snapshot(disk, f"s{self.names}")
            self.snapshots[f"s{self.names}"] = bytes(self.model)

    def _apply(self, disk: Disk) -> None:
        if self.snapshots and not self.dirty:  # bitmaps keep the disk from another size
            name = self.chance.choice(sorted(self.snapshots))
            apply_snapshot(disk, name)
            self.model[:] = self.snapshots[name]

    def _delete(self, disk: Disk) -> None:
        if self.snapshots:
            name = self.chance.choice(sorted(self.snapshots))
            delete_snapshot(disk, name)
            del self.snapshots[name]

    def _add_bitmap(self, disk: Disk) -> None:
        if len(self.dirty) < _MOST_BITMAPS:
            self.names += 1
            granularity = self.chance.choice((512, 4096, 65536, 1 << 20))
            add_bitmap(disk, f"b{self.names}", granularity=granularity)
            self.dirty[f"b{self.names}"] = (granularity, set())

    def _change_bitmap(self, disk: Disk) -> None:
        if not self.dirty:
            return
        name = self.chance.choice(sorted(self.dirty))
        match self.chance.choice(("remove", "clear", "rest")):
            case "remove":
                remove_bitmap(disk, name)
                del self.dirty[name]
            case "clear":
                clear_bitmap(disk, name)
                self.dirty[name] = (self.dirty[name][0], set())
            case "rest":
                enable_bitmap(disk, name, enabled=False)
                enable_bitmap(disk, name)

    # -- judging

    def judge(self) -> None:
        """Compare the image with the model by both programs. Raises Wrong."""
        with self.open(writable=False) as disk:
            if disk.read(0, disk.size) != self.model:
                raise Wrong("cowhand reads another content than was written")
            if {snapshot.name for snapshot in list_snapshots(disk)} != set(self.snapshots):
                raise Wrong("the snapshots are others")
            for name, content in self.snapshots.items():
                with open_snapshot(disk, name) as view:
                    if view.read(0, view.size)[: len(content)] != content[: view.size]:
                        raise Wrong(f"snapshot {name} holds another content")
            self._judge_bitmaps(disk)
        self._judge_by_qemu()

    def _judge_bitmaps(self, disk: Disk) -> None:
        if not self.choice.keeps_bitmaps:
            return
        held = {bitmap.name: bitmap for bitmap in list_bitmaps(disk)}
        if set(held) != set(self.dirty):
            raise Wrong(f"the bitmaps are {sorted(held)}, not {sorted(self.dirty)}")
        for name, (granularity, granules) in self.dirty.items():
            missing = [granule for granule in granules if not held[name].bits.is_dirty(granule * granularity)]
            if missing:
                raise Wrong(f"bitmap {name} has lost granule {missing[0]}")

    def _judge_by_qemu(self) -> None:
        before, image = arguments_for_qemu(self.path, self.choice)
        done = qemu_img("check", *before, image, check=False)
        if done.status:
            raise Wrong(f"qemu-img check ends with {done.status}:\n{done.stdout}{done.stderr}")
        plain = self.folder / "model.raw"
        plain.write_bytes(self.model)
        done = qemu_img("compare", *before, f"driver=raw,file.filename={plain}", image, check=False)
        if done.status:
            raise Wrong(f"qemu-img compare ends with {done.status}:\n{done.stdout}{done.stderr}")
        if self.choice.options.get("data_file_raw") == "on":
            data = (self.folder / "soak.data").read_bytes()[: len(self.model)]
            if data.ljust(len(self.model), b"\0") != self.model:
                raise Wrong("the raw data file holds another content")
        if self.dirty:
            info = qemu_img("info", "--output=json", *before, image).json()["format-specific"]["data"]
            told = {bitmap["name"]: bitmap for bitmap in info.get("bitmaps", [])}
            if set(told) != set(self.dirty) or any("in-use" in bitmap["flags"] for bitmap in told.values()):
                raise Wrong(f"QEMU sees the bitmaps {told}")
