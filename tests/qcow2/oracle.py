"""A second, independent reader and checker of qcow2, made for small images of tests: slow, simple, and sharing no code with the driver.

Source: QEMU ``docs/interop/qcow2``. It knows versions 2 and 3, snapshots, zero clusters of both kinds, deflate clusters, extended L2 entries,
data files, backing content, and encryption by AES in CBC mode, whose key it is given; nothing else.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0x00FFFFFFFFFFFE00
LUKS = 2  #: encryption method


@dataclass(slots=True)
class Findings:
    """What is wrong: ``corruptions`` endanger data, ``leaks`` waste space.

    A COPIED bit on what several tables share is a corruption. ``flags`` are bits that are right, but for a count that leaks; ``lost_flags``
    are missing although the count is one: harmless too, but no repair of leaks brings them back.
    """

    corruptions: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    leaks_behind: list[str] = field(
        default_factory=list
    )  #: of clusters behind the end of the file, which checks do not look at
    flags: list[str] = field(default_factory=list)
    lost_flags: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Snapshot:
    """One entry of the snapshot table."""

    ident: str
    name: str
    size: int
    l1_offset: int
    l1_size: int


class Image:
    """The bytes of a whole qcow2 file. ``backing`` is the content that shows through; guest data lies in ``external``, if that is given;
    ``key`` is that of an encrypted image."""

    def __init__(
        self, data: bytes, backing: bytes = b"", external: bytes | None = None, *, key: bytes | None = None
    ) -> None:
        self.key = key
        self.data = data
        self.backing = backing
        self.external = external
        fields = struct.unpack_from(">IIQIIQIIQQIIQ", data)
        assert fields[0] == 0x514649FB, "no qcow2 magic"
        self.version, bits, self.size, self.method = fields[1], fields[4], fields[5], fields[6]
        self.cluster = 1 << bits
        self.bits = bits
        self.l1_size, self.l1_offset, self.table_offset, self.table_clusters = fields[7:11]
        self.snapshot_count, self.snapshots_offset = fields[11:13]
        self.incompatible = struct.unpack_from(">Q", data, 72)[0] if self.version >= 3 else 0
        assert bool(self.incompatible & 4) == (external is not None)
        self.extended = bool(self.incompatible & 16)
        self.stride = 2 if self.extended else 1
        self.order = struct.unpack_from(">I", data, 96)[0] if self.version >= 3 else 4
        self.snapshots = self._read_snapshots()

    # -- tables

    def words(self, offset: int, count: int) -> tuple[int, ...]:
        """Return the 8-byte entries at *offset*, at most *count*; zeroes at the end are left off."""
        data = self.data[offset : offset + 8 * count].rstrip(b"\0")
        count = -(-len(data) // 8)
        return struct.unpack(f">{count}Q", data.ljust(8 * count, b"\0"))

    def _read_snapshots(self) -> list[Snapshot]:
        found, at = [], self.snapshots_offset
        for _ in range(self.snapshot_count):
            l1_offset, l1_size, id_size, name_size, _, _, _, _, extra = struct.unpack_from(">QIHHIIQII", self.data, at)
            size = struct.unpack_from(">Q", self.data, at + 48)[0] if extra >= 16 else self.size
            names = at + 40 + extra
            ident = self.data[names : names + id_size].decode()
            name = self.data[names + id_size : names + id_size + name_size].decode()
            found.append(Snapshot(ident, name, size, l1_offset, l1_size))
            at = -(-(names + id_size + name_size) // 8) * 8
        self.snapshots_end = at
        return found

    def refcounts(self) -> dict[int, int]:
        """Return the count of every cluster whose count is not 0."""
        counts: dict[int, int] = {}
        per_block = self.cluster * 8 >> self.order
        width = 1 << self.order
        for index, entry in enumerate(self.words(self.table_offset, self.table_clusters * self.cluster // 8)):
            offset = entry & ~0x1FF
            if not offset:
                continue
            block = self.data[offset : offset + self.cluster].rstrip(b"\0")
            for number in range(-(-len(block) * 8 // width)):
                if width >= 8:
                    size = width // 8
                    count = int.from_bytes(block[number * size : (number + 1) * size].ljust(size, b"\0"), "big")
                else:
                    count = block[number * width // 8] >> (number * width % 8) & ((1 << width) - 1)
                if count:
                    counts[index * per_block + number] = count
        return counts

    # -- reading

    def content(self, snapshot: Snapshot | None = None) -> bytes:
        """Return the whole disk as the guest sees it, or as it was in *snapshot*."""
        l1_offset, l1_size, size = self.l1_offset, self.l1_size, self.size
        if snapshot is not None:
            l1_offset, l1_size, size = snapshot.l1_offset, snapshot.l1_size, snapshot.size
        per_table = self.cluster // 8 // self.stride
        disk = bytearray(self.backing[:size].ljust(size, b"\0"))
        for index, l1_entry in enumerate(self.words(l1_offset, l1_size)):
            if not l1_entry & OFFSET:
                continue
            words = self.words(l1_entry & OFFSET, self.cluster // 8)
            for number, entry in enumerate(words[:: self.stride]):
                at = (index * per_table + number) * self.cluster
                if at >= size:
                    continue
                if not self.extended:
                    found = self._cluster(entry, at) if entry else None
                    if found is not None:
                        disk[at : at + self.cluster] = found[: size - at]
                    continue
                bitmap = words[2 * number + 1] if 2 * number + 1 < len(words) else 0
                for start, piece in self._subclusters(entry, bitmap, at):
                    disk[start : start + len(piece)] = piece[: max(0, size - start)]
        return bytes(disk[:size])

    def _cluster(self, entry: int, guest: int) -> bytes | None:
        if entry & COMPRESSED:
            offset, length = self._compressed(entry)
            return zlib.decompressobj(-12).decompress(self.data[offset : offset + length], self.cluster)
        if self.version >= 3 and entry & 1:
            return bytes(self.cluster)
        return self._placed(entry, guest)

    def _placed(self, entry: int, guest: int) -> bytes | None:
        """Return what lies at the place that *entry* names."""
        offset = entry & OFFSET
        if self.external is not None:
            if not offset and not entry & COPIED:
                return None
            assert offset == guest, "a data file's cluster lies at its own guest offset"
            return self._plain(self.external[offset : offset + self.cluster], offset, guest)
        return self._plain(self.data[offset : offset + self.cluster], offset, guest) if offset else None

    def _plain(self, stored: bytes, host: int, guest: int) -> bytes:
        """Decrypt a cluster: LUKS counts sectors in the file, the old AES on the disk."""
        stored = stored.ljust(self.cluster, b"\0")
        if self.key is None:
            return stored
        first = (host if self.method == LUKS else guest) // 512
        plain = []
        for number in range(self.cluster // 512):
            vector = (first + number).to_bytes(16, "little")
            sector = Cipher(AES(self.key), CBC(vector)).decryptor()
            plain.append(sector.update(stored[number * 512 : number * 512 + 512]))
        return b"".join(plain)

    def _encryption_header(self) -> tuple[int, int]:
        """Return where the LUKS header lies."""
        at = struct.unpack_from(">I", self.data, 100)[0] if self.version >= 3 else 72
        while True:
            kind, length = struct.unpack_from(">II", self.data, at)
            assert kind, "no pointer to the encryption header"
            if kind == 0x0537BE77:
                offset, size = struct.unpack_from(">QQ", self.data, at + 8)
                return offset, size
            at += 8 + -(-length // 8) * 8

    def _subclusters(self, entry: int, bitmap: int, guest: int) -> list[tuple[int, bytes]]:
        """Return (guest offset, content) of the subclusters that do not show the backing file."""
        if entry & COMPRESSED:
            assert not bitmap
            found = self._cluster(entry, guest)
            return [(guest, found)] if found is not None else []
        assert not bitmap & bitmap >> 32, "a subcluster is data and zero at once"
        place, step = self._placed(entry, guest), self.cluster // 32
        assert place is not None or not bitmap & 0xFFFFFFFF, "data without a place"
        out = []
        for number in range(32):
            begin = number * step
            if bitmap >> 32 + number & 1:
                out.append((guest + begin, bytes(step)))
            elif bitmap >> number & 1 and place is not None:
                out.append((guest + begin, place[begin : begin + step]))
        return out

    def _compressed(self, entry: int) -> tuple[int, int]:
        shift = 62 - (self.bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> shift
        return offset, (sectors + 1) * 512 - offset % 512

    # -- checking

    def check(self) -> Findings:
        """Compare counts and COPIED bits with what the tables refer to."""
        findings = Findings()
        self._findings = findings
        self._references: Counter[int] = Counter()
        self._owners: dict[int, str] = {}
        self._flagged: list[tuple[str, int, bool]] = []
        self._refer("header", 0, self.cluster)
        self._refer("refcount table", self.table_offset, self.table_clusters * self.cluster)
        for index, entry in enumerate(self.words(self.table_offset, self.table_clusters * self.cluster // 8)):
            if entry & ~0x1FF:
                self._refer(f"refcount block {index}", entry & ~0x1FF, self.cluster)
                if (entry & ~0x1FF) + self.cluster > len(self.data) + self.cluster - 1:
                    findings.corruptions.append(f"refcount block {index} lies outside of the file")
        if self.snapshot_count:
            self._refer("snapshot table", self.snapshots_offset, self.snapshots_end - self.snapshots_offset)
        if self.method == LUKS:
            self._refer("encryption header", *self._encryption_header())
        self._walk("active", self.l1_offset, self.l1_size, active=True)
        for snapshot in self.snapshots:
            self._walk(f"snapshot {snapshot.name}", snapshot.l1_offset, snapshot.l1_size, active=False)
        counts = self.refcounts()
        for cluster in sorted(set(counts) | set(self._references)):
            count, references = counts.get(cluster, 0), self._references[cluster]
            if count < references:
                owner = self._owners[cluster]
                findings.corruptions.append(
                    f"cluster {cluster} ({owner}) has count {count} and {references} references"
                )
            elif count > references:
                behind = cluster * self.cluster >= len(self.data)
                (findings.leaks_behind if behind else findings.leaks).append(
                    f"cluster {cluster} has count {count} and {references} references"
                )
        for what, cluster, copied in self._flagged:
            count, references = counts.get(cluster, 0), self._references[cluster]
            text = f"{what}: COPIED is {copied} on cluster {cluster} with count {count} and {references} references"
            if copied and references > 1:
                findings.corruptions.append(text)
            elif copied != (count == 1):
                (findings.flags if count > references else findings.lost_flags).append(text)
        return findings

    def _refer(self, what: str, offset: int, length: int, *, whole: bool = True) -> None:
        if whole and offset % self.cluster:
            self._findings.corruptions.append(f"{what} at {offset:#x} does not begin on a cluster")
        if offset + length >= len(self.data) + self.cluster:
            self._findings.corruptions.append(f"{what} at {offset:#x} lies behind the end of the file")
        for cluster in range(offset // self.cluster, -(-(offset + length) // self.cluster)):
            before = self._owners.setdefault(cluster, what)
            if before != what:
                self._findings.corruptions.append(f"cluster {cluster} is both {before} and {what}")
            self._references[cluster] += 1

    def _walk(self, what: str, l1_offset: int, l1_size: int, *, active: bool) -> None:
        if l1_size:
            self._refer(f"L1:{what}", l1_offset, l1_size * 8)
        for index, l1_entry in enumerate(self.words(l1_offset, l1_size)):
            offset = l1_entry & OFFSET
            if not offset:
                continue
            self._refer("L2 table", offset, self.cluster)
            if active:
                self._flagged.append((f"L1 entry {index}", offset // self.cluster, bool(l1_entry & COPIED)))
            for number, entry in enumerate(self.words(offset, self.cluster // 8)[:: self.stride]):
                if self.external is not None:
                    assert not entry & COMPRESSED, "compressed clusters in an image with a data file"
                elif entry & COMPRESSED:
                    self._refer("compressed", *self._compressed(entry), whole=False)
                elif entry & OFFSET:
                    self._refer("data", entry & OFFSET, self.cluster)
                    if active:
                        cluster = (entry & OFFSET) // self.cluster
                        self._flagged.append((f"L2 entry {index}:{number}", cluster, bool(entry & COPIED)))
