"""Doing without the zero flag of qcow2's version 3 (QEMU ``docs/interop/qcow2``, "Standard Cluster Descriptor").

In all L2 tables, of the disk and of its snapshots, a cluster that reads as zeroes becomes unallocated where nothing lies below, and else a cluster
of zeroes. Each table is written after the zeroes and their counts are stable, and what it named alone is freed after that: a crash leaks at worst.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.formats.qcow2.ondisk.l2_entries import words_of
from cowhand.block.formats.qcow2.refcount.bulk_update import l2_tables, read_table
from cowhand.block.formats.qcow2.snapshot.table import read_l1
from cowhand.core.buffers import ZEROES, ZEROES_SIZE
from cowhand.core.errors import UnsupportedFeature

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node


def expand_zeroes(
    node: Qcow2Node, *, refuse_compressed: bool, progress: Callable[[int, int], None] | None = None
) -> None:
    """Leave no zero flag in any L2 table of *node*, which nothing else uses.

    With *refuse_compressed* an image with compressed clusters raises UnsupportedFeature. Raises ImageCorrupt and InvalidFormat for tables that
    cannot be followed, all of them before a cluster is changed.
    """
    node.flush()
    node.release_quarantine(everything=True)
    with node.exclusive():
        node.write_back.run(locked=True)
        # Tables are changed on disk from here on.
        node.mapping.cache.clear()
        lists = [bytes(node.mapping.l1.data[: node.header.l1_size * L.ENTRY_SIZE])]
        lists += [read_l1(node, snapshot) for snapshot in node.snapshots]
        active = l2_tables(node, lists[0])
        hosts = dict.fromkeys(host for l1 in lists for host in l2_tables(node, l1))
        todo = {host for host in hosts if _has_zero(node, host, refuse_compressed)}
        done, whole = 0, sum(len(l1) // L.ENTRY_SIZE for l1 in lists)
        for l1 in lists:
            for number, (entry,) in enumerate(L.U64.iter_unpack(l1)):
                host = entry & L.L1_OFFSET_MASK
                if host in todo:
                    todo.remove(host)
                    _Table(node, host, host in active, number).expand()
                done += 1
                if progress is not None:
                    progress(done, whole)
        node.write_back.run(locked=True)


def _has_zero(node: Qcow2Node, host: int, refuse_compressed: bool) -> bool:
    """Tell whether the table at *host* has a zero flag. Raises ImageCorrupt for one at an impossible cluster."""
    data = read_table(node, host)
    found = False
    for index, entry in enumerate(words_of(data)):
        if entry & L.ENTRY_COMPRESSED:
            if refuse_compressed:
                raise UnsupportedFeature(
                    "Cannot downgrade an image with zstd compression type and existing compressed clusters", path=node.filename,
                    hint="Convert the image to a new one.",
                )  # fmt: skip
        elif entry & L.ENTRY_ZERO:
            found = True
            offset = entry & L.L2_OFFSET_MASK
            if offset & (node.cluster_size - 1):
                text = f"Cluster allocation offset {offset:#x} unaligned (L2 offset: {host:#x}, L2 index: {L.c_hex(index)})"
                raise node.mark_corrupt(text, offset=host + index * L.ENTRY_SIZE)
    return found


class _Table:
    """One L2 table on its way."""

    def __init__(self, node: Qcow2Node, host: int, active: bool, number: int) -> None:
        self.node = node
        self.host = host
        self.guest = number << node.mapping.table_shift  #: what its first entry maps
        self.words = words_of(read_table(node, host))
        #: So many L1 tables name it, and what it alone names has as many references.
        self.references = max(1, node.refcounts.get(host // node.cluster_size))
        self.copied = L.COPIED if active and self.references == 1 else 0
        self._left: list[int] = []  #: clusters that it names no more

    def expand(self) -> None:
        position, words = 0, self.words
        while position < len(words):
            entry = words[position]
            if entry & L.ENTRY_COMPRESSED or not entry & L.ENTRY_ZERO:
                position += 1
                continue
            position += self._expand_one(position) if entry & L.L2_OFFSET_MASK else self._expand_plain(position)
        node = self.node
        # The zeroes and their counts first.
        node.write_back.flush_refcounts()
        node.flush_file()
        node.write_metadata(self.host, b"".join(L.U64.pack(entry) for entry in words))
        node.flush_file()
        for cluster in self._left:
            node.refcounts.change(cluster, 1, -self.references)

    def _expand_one(self, position: int) -> int:
        """A cluster is kept for the zeroes: it takes them, unless somebody else sees what is in it."""
        node, size = self.node, self.node.cluster_size
        offset = self.words[position] & L.L2_OFFSET_MASK
        if node.refcounts.get(offset // size) > self.references:
            self._left.append(offset // size)
            return self._new(position, 1) if node.backing is not None else self._clear(position, 1)
        node.check_overlap(offset, size)
        self._write_zeroes(offset, position, 1)
        self.words[position] = offset | self.copied
        return 1

    def _expand_plain(self, position: int) -> int:
        count = 1
        while (
            position + count < len(self.words)
            and self.words[position + count] & (L.ENTRY_COMPRESSED | L.L2_OFFSET_MASK | 1) == 1
        ):
            count += 1
        return self._new(position, count) if self.node.backing is not None else self._clear(position, count)

    def _clear(self, position: int, count: int) -> int:
        for at in range(position, position + count):
            self.words[at] = 0
        return count

    def _new(self, position: int, count: int) -> int:
        node, size = self.node, self.node.cluster_size
        first = node.allocator.take(count)
        if self.references > 1:
            node.refcounts.change(first, count, self.references - 1)
        self._write_zeroes(first * size, position, count)
        for at in range(count):
            self.words[position + at] = (first + at) * size | self.copied
        return count

    def _write_zeroes(self, offset: int, number: int, clusters: int) -> None:
        node = self.node
        end = offset + clusters * node.cluster_size
        guest = self.guest + number * node.cluster_size
        for position in range(offset, end, ZEROES_SIZE):
            piece = ZEROES[: min(ZEROES_SIZE, end - position)]
            node.store(node.data_child, position, guest + position - offset, (piece,))
