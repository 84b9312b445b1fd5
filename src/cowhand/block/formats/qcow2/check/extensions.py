"""Checking qcow2: the clusters that header extensions name (QEMU ``docs/interop/qcow2``, "Bitmaps extension", "Full disk encryption header").

A check that did not know them would call them leaked, and a repair would free them. A broken bitmap directory does not end a check: what can be
followed of it is counted, and a repair of everything takes out of it what cannot be used.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from cowhand.block.formats.qcow2.bitmap.data import wrong_table_entry
from cowhand.block.formats.qcow2.bitmap.directory import (
    MAX_TABLE_ENTRIES,
    Directory,
    StoredBitmap,
    needed_entries,
    read_directory,
)
from cowhand.block.formats.qcow2.ondisk import findings as F, layout as L
from cowhand.block.node.records import ERROR, NOTE, REPAIRED, UNREADABLE, Finding

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.check.check import Examination
    from cowhand.block.formats.qcow2.check.references import Counters, Walk
    from cowhand.block.formats.qcow2.driver import Qcow2Node

_CRYPTO_LENGTH = 16
#: Table entries that a check keeps in memory: those of two bitmaps of the largest kind.
_MAX_KEPT_WORDS = 4 << 20
#: Table entries, of all bitmaps together, that are followed although the disk is too small for them: it was larger when they were used last.
_MAX_OUTDATED_WORDS = 4 << 20


def count_encryption(walk: Walk) -> None:
    """Count what the encryption header of *walk*'s image occupies."""
    header = walk.node.header
    crypto = header.find(L.EXT_CRYPTO)
    if crypto is not None and header.crypt_method == L.CRYPT_LUKS and len(crypto) >= _CRYPTO_LENGTH:
        walk.region(L.U64.unpack_from(crypto)[0], L.U64.unpack_from(crypto, 8)[0], "the encryption header")


class BitmapFindings:
    """What a check finds of an image's persistent bitmaps. ``problems`` are (byte of the file, words); ``lost`` the names that a repair drops."""

    def __init__(self, exam: Examination) -> None:
        self._walk = exam.walk
        self.directory: Directory = read_directory(exam.node)
        self.problems = [(problem.offset, problem.text) for problem in self.directory.problems]
        self.lost: set[bytes] = set()
        self._sound: dict[tuple[int, int], bool] = {}
        self._words: dict[tuple[int, int], array[int]] = {}
        self._kept_words = 0
        self._outdated: set[bytes] = set()
        self._find_outdated()
        if self.directory.failure is not None:
            raise exam.walk.unread(F.BITMAP_DIRECTORY_UNREADABLE, self.directory.offset, self.directory.failure.message)
        for entry in self.directory:
            self._judge(entry)

    def _find_outdated(self) -> None:
        """Learn which tables are larger than the disk asks for, as those of bitmaps in use may be."""
        node, budget = self._walk.node, _MAX_OUTDATED_WORDS
        for entry in self.directory:
            if entry.in_use and entry.entries > _most_entries(node):
                budget -= entry.entries
                if budget >= 0:
                    self._outdated.add(entry.name)

    @property
    def hidden(self) -> bool:
        """Whether clusters may be a bitmap's without anything that still tells so."""
        found = sum(map(self._followable, self.directory.unusable))
        return self.directory.present and len(self.directory.problems) > found

    def _judge(self, entry: StoredBitmap) -> None:
        node, key = self._walk.node, (entry.table, entry.entries)
        # A hostile directory can name one table over and over: it is read once, and judged for all.
        sound = self._sound.get(key)
        if sound is None:
            end = node.file.node.size
            words = self._table(key)
            sound = self._sound[key] = not any(wrong_table_entry(word, node.cluster_size, end) for word in set(words))
        if not sound:
            self.lost.add(entry.name)
            self.problems.append((entry.table, f"bitmap '{entry.text}': its table has entries that are not possible"))

    def _table(self, key: tuple[int, int]) -> array[int]:
        from cowhand.block.formats.qcow2.ondisk.l2_entries import words_of

        words = self._words.get(key)
        if words is None:
            words = words_of(self._walk.read(key[0], key[1] * L.ENTRY_SIZE, F.BITMAP_TABLE_UNREADABLE))
            self._kept_words += len(words)
            if self._kept_words <= _MAX_KEPT_WORDS:
                self._words[key] = words
        return words

    def count(self, walk: Walk, *, dropping: bool) -> None:
        """Count in *walk* all that the bitmaps occupy; with *dropping* not what is about to be dropped."""
        directory = self.directory
        if not directory.readable:
            return
        walk.region(directory.offset, directory.size, "the bitmap directory")
        times: dict[tuple[int, int], int] = {}
        known = list(directory) if dropping else [*directory, *directory.unusable]
        for entry in known:
            if not (dropping and entry.name in self.lost) and self._followable(entry):
                key = (entry.table, entry.entries)
                times[key] = times.get(key, 0) + 1
        for key, named in times.items():
            walk.region(key[0], key[1] * L.ENTRY_SIZE, "a bitmap table", named)
            end = walk.node.file.node.size
            for word in self._table(key):
                if word & L.BITMAP_TABLE_OFFSET_MASK and not wrong_table_entry(word, walk.size, end):
                    walk.region(word & L.BITMAP_TABLE_OFFSET_MASK, walk.size, "bitmap data", named)

    def _followable(self, entry: StoredBitmap) -> bool:
        """Tell whether *entry*'s table can be what it says: the entry may be broken in something else."""
        node = self._walk.node
        if not entry.table or entry.table % node.cluster_size or entry.entries > MAX_TABLE_ENTRIES:
            return False
        fits = entry.entries <= _most_entries(node) or entry.name in self._outdated
        return fits and entry.table + entry.entries * L.ENTRY_SIZE <= node.file.node.size


def _most_entries(node: Qcow2Node) -> int:
    """Return how many entries the table of the finest bitmap of *node*'s disk has."""
    return max(needed_entries(node, node.header.size, 9), 1)


def tell_bitmaps(exam: Examination, counters: Counters) -> None:
    """Look at the bitmaps, and tell what is wrong with them."""
    findings = exam.bitmaps = BitmapFindings(exam)
    status = REPAIRED if exam.fix_bitmaps else ERROR
    for offset, problem in findings.problems:
        exam.say(Finding(F.BITMAP_DIRECTORY, status, offset=offset, owner="the bitmap directory", problem=problem))
    counters.corruptions += len(findings.problems)


def rewrite_bitmaps(exam: Examination, counters: Counters) -> None:
    """Leave the sound bitmaps alone in the directory; what the others occupied was counted as leaked."""
    from cowhand.block.formats.qcow2.bitmap import store
    from cowhand.block.formats.qcow2.check.references import Stopped
    from cowhand.block.formats.qcow2.check.repair import forget
    from cowhand.core.errors import CowhandError

    node, findings = exam.node, exam.bitmaps
    assert findings is not None
    node.flush_file()
    forget(node)
    node.rebuild_metadata_map()
    try:
        store.mend(node, findings.lost)
    except CowhandError as error:
        counters.check_errors += 1
        reason = f"ERROR failed to update the bitmap directory: {error.qemu_message}"
        exam.say(Finding(F.REPAIR_FAILED, UNREADABLE, reason=reason))
        raise Stopped(error) from error
    exam.say(Finding(F.BITMAPS_LEFT, NOTE, count=len(node.bitmap_directory)))
    counters.corruptions_fixed += counters.corruptions
    counters.corruptions = 0
