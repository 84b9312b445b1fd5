"""The vmdk format: VMware's virtual disks ("Virtual Disk Format 5.0", VMware technical note): one descriptor, one or more extents.

Sub-formats: monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, streamOptimized; of ESX vmfs, vmfsSparse and seSparse.
A disk with a parent (a redo log, a linked clone) names it by ``parentFileNameHint``, and tells by ``parentCID`` which content of it is meant.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cowhand.block.format_io.format_node import FormatNode
from cowhand.block.format_io.mapped import RECORDED, MappedFormat
from cowhand.block.format_io.reservations import Kind, Reservation
from cowhand.block.formats.vmdk import layout
from cowhand.block.formats.vmdk.extents import FlatExtent, SparseExtent
from cowhand.block.formats.vmdk.layout import SECTOR, ExtentLine
from cowhand.block.graph.block_status import skip_filters
from cowhand.block.node.create_options import CreateOption
from cowhand.block.node.node import Capabilities, Child, Role, Zeroing
from cowhand.block.node.records import CheckResult, Say
from cowhand.block.opening.filenames import combine, has_protocol, location
from cowhand.core import clock
from cowhand.core.errors import CowhandError, InvalidArgument, NotSupported
from cowhand.core.extents import COMPRESSED, DATA, OFFSET, ZERO, ExtentBatch

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.block.opening.opening import Opening

#: The unit of a disk all of whose bytes have their places.
_FLAT_UNIT = 65536
_MONOLITHIC = ("monolithicSparse", "streamOptimized")
#: createType of descriptors that stand alone and are read
_KNOWN = (
    "monolithicFlat", "vmfs", "vmfsSparse", "seSparse", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicSparse",
    "streamOptimized", "custom",
)  # fmt: skip


class VmdkNode(FormatNode):
    """A virtual disk of VMware: a descriptor and its extents. What none of them stores shows the parent, or zeroes."""

    driver: ClassVar[str] = "vmdk"
    supports_backing: ClassVar[bool] = True
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption("size", "size", help="Virtual disk size"),
        CreateOption(
            "adapter_type",
            "str",
            help="Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
        ),
        CreateOption("backing_file", "str", help="File name of a base image"),
        CreateOption("backing_fmt", "str", help="Must be 'vmdk' if present"),
        CreateOption("compat6", "bool", False, help="VMDK version 6 image"),
        CreateOption("hwversion", "str", "undefined", help="VMDK hardware version"),
        CreateOption("toolsversion", "str", help="VMware guest tools version"),
        CreateOption(
            "subformat",
            "str",
            help="VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | "
            "twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
        ),
        CreateOption("zeroed_grain", "bool", help="Enable efficient zero writes using the zeroed-grain GTE feature"),
    )

    # -- opening

    def start(self, opening: Opening, given: dict[str, Any]) -> None:
        self.extents: list[FlatExtent | SparseExtent] = []
        self._text_at = 0
        head = bytearray(SECTOR)
        self.file.read_into(0, head)
        described = given.pop("extents", {})
        alone = None
        if head[:4] == layout.SPARSE_MAGIC:
            alone = SparseExtent(self, self.file).read("SPARSE")
            self._text_at, size = alone.descriptor
            text = self._read_text(self._text_at, size) if size else b""
        elif head[:4] == layout.COWD_MAGIC:
            alone, text = SparseExtent(self, self.file).read("VMFSSPARSE"), b""
        else:
            size = self.file.node.size
            if size == 0:
                raise self.wrong("File is too small, not a valid image")
            text = self._read_text(0, size)
        self.descriptor = layout.parse(text)
        if alone is not None:
            self.extents.append(alone)
        else:
            self._open_extents(opening, described)
        self._arrange()
        self._open_parent(opening, given.pop("backing", RECORDED))
        self._set_capabilities()

    def _read_text(self, offset: int, size: int) -> bytes:
        size = min(size, self.file.node.size - offset)
        if size <= 0:
            raise self.wrong(f"the descriptor at {offset:#x} lies behind the end of the file", offset)
        text = bytearray(min(size, layout.MAX_DESCRIPTOR))
        self.file.read_into(offset, text)
        return bytes(text)

    def _open_extents(self, opening: Opening, described: Mapping[str, Any]) -> None:
        descriptor = self.descriptor
        kind = descriptor.values.get("createType")
        if kind is None:
            raise self.wrong("invalid VMDK image descriptor")
        if kind not in _KNOWN:
            raise self.wrong(f"Unsupported image type '{kind}'")
        if descriptor.wrong is not None:
            raise self.wrong(f"Invalid extent line: {descriptor.wrong}")
        if not descriptor.extents:
            raise self.wrong("the descriptor names no extents", qemu="invalid VMDK image descriptor")
        if len(descriptor.extents) > layout.MAX_EXTENTS:
            raise self.wrong(f"{len(descriptor.extents)} extents, more than {layout.MAX_EXTENTS}")
        for number, line in enumerate(descriptor.extents):
            if not layout.supported(line.kind):
                raise self.wrong(f"Unsupported extent type '{line.kind}'")
            if line.access == "NOACCESS" and line.kind != "ZERO":
                raise self.wrong(f"extent {number} ('{line.name}') may not be accessed")
            self.extents.append(self._open_extent(opening, number, line, described.get(str(number))))

    def _open_extent(self, opening: Opening, number: int, line: ExtentLine, given: Any) -> FlatExtent | SparseExtent:
        if not 0 < line.sectors <= layout.MAX_EXTENT_SECTORS * 16:
            raise self.wrong(f"extent {number} has {line.sectors} sectors")
        size = line.sectors * SECTOR
        if line.kind == "ZERO":
            return FlatExtent(None, size, 0, False)
        name = f"extents.{number}"
        if given is not None:
            child = opening.child(self, name, given, Role.DATA)
        else:
            # Relative to the descriptor, whatever the working directory is; the policy says whether it is opened.
            path = line.name
            if not os.path.isabs(path) and not has_protocol(path):
                path = self._beside(path)
            child = opening.implicit_file(self, name, path, Role.DATA, what="extent")
        if line.kind in ("FLAT", "VMFS"):
            end = (line.offset + line.sectors) * SECTOR
            if end > -(-child.node.size // SECTOR) * SECTOR:
                raise self.wrong(f"extent '{line.name}' has {child.node.size} bytes, fewer than the descriptor's {end}")
            return FlatExtent(child, size, line.offset * SECTOR, self.writable and line.access == "RW")
        extent = SparseExtent(self, child).read(line.kind)
        if extent.size < size:
            raise self.wrong(f"extent '{line.name}' has {extent.size} bytes, fewer than the descriptor's {size}")
        extent._size = size
        return extent

    def _beside(self, name: str) -> str:
        """Return the path of *name*, which is relative to the descriptor. Raises InvalidArgument where that has no folder."""
        below = self.file.node
        try:
            return combine(location(below), name)
        except CowhandError as error:
            text = f"Cannot use relative paths with VMDK descriptor file {below.filename}"
            reason = f"Cannot generate a base directory for {below.driver} nodes"
            raise InvalidArgument(text, qemu=f"{text}: {reason}", path=below.filename) from error

    def check(self, repair: str | None, say: Say) -> CheckResult:
        from cowhand.block.format_io.table_check import check

        out = CheckResult()
        for extent in self.extents:
            if isinstance(extent, SparseExtent):
                found = check(extent, say)
                out.corruptions += found.corruptions  # qemu-img counts no clusters of this format
        return out

    def _arrange(self) -> None:
        """Set where the extents begin on the disk, and what is allocated as one."""
        self.begins: list[int] = []
        self._size = 0
        units = {extent.allocation_unit for extent in self.extents if extent.allocation_unit} or {_FLAT_UNIT}
        self._regular = len(units) == 1
        for extent in self.extents:
            # A unit must not lie in two extents.
            self._regular = self._regular and not self._size % min(units)
            self.begins.append(self._size)
            self._size += extent.size
        self.allocation_unit = self.copy_unit = min(units)

    def _open_parent(self, opening: Opening, given: Any) -> None:
        self.cid = self.descriptor.hexadecimal("CID", 0)
        self.parent_cid = self.descriptor.hexadecimal("parentCID", layout.NO_PARENT)
        if self.parent_cid != layout.NO_PARENT:
            self.backing_name = self.descriptor.values.get("parentFileNameHint") or None
            self.backing_format = "vmdk"
        self.open_backing(opening, given)

    def _check_parent(self) -> None:
        """Raise InvalidFormat when the parent is not what it was when this disk was put over it."""
        below = self.backing
        if below is not None and isinstance(below.node, VmdkNode) and below.node.cid != self.parent_cid:
            raise self.wrong(
                f"the parent '{self.backing_name}' was changed since this disk was put over it: its content has the id "
                f"{below.node.cid:08x}, and {self.parent_cid:08x} is expected",
                qemu="Invalid argument",
            )

    def read_backing(self, offset: int, view: memoryview) -> None:
        self._check_parent()
        super().read_backing(offset, view)

    def read_own(self, offset: int, view: memoryview) -> list[tuple[MappedFormat, int, memoryview]]:
        missing = super().read_own(offset, view)
        if missing:
            self._check_parent()
        return missing

    def _set_capabilities(self) -> None:
        if self.writable and not self._regular:
            raise NotSupported(
                "the extents' grains differ, or do not fill them", path=self.filename, hint="Open it for reading only."
            )
        for extent in self.extents:
            if self.writable and isinstance(extent, SparseExtent) and extent.compressed:
                raise NotSupported(
                    "a streamOptimized disk cannot be changed", path=self.filename,
                    hint="Convert it to another sub-format, and write that.",
                )  # fmt: skip
        zeroes = all(
            isinstance(extent, FlatExtent) or extent.zero_entry is not None or self.backing_name is None
            for extent in self.extents
        )
        self.capabilities = Capabilities(
            writable=self.writable, zeroes=Zeroing.NATIVE if zeroes else Zeroing.EMULATED, fua=True,
            discard=self.file.node.capabilities.discard,
        )  # fmt: skip

    @property
    def size(self) -> int:
        return self._size

    @property
    def cluster_size(self) -> int | None:  # type: ignore[override]
        return self.extents[0].allocation_unit or None

    def allocated_size(self) -> int | None:
        sizes = [child.node.allocated_size() for child in self.children.values() if child.role is not Role.BACKING]
        return sum(size for size in sizes if size is not None)

    def format_specific(self) -> dict[str, Any]:
        extents = []
        for extent in self.extents:
            child = extent.child if isinstance(extent, FlatExtent) else extent.file
            entry: dict[str, Any] = {"filename": child.node.filename if child is not None else ""}
            if isinstance(extent, FlatExtent):
                extents.append({**entry, "format": "FLAT", "virtual-size": extent.size})
            else:
                more = {"compressed": True} if extent.compressed else {}
                extents.append(
                    {**more, "cluster-size": extent.allocation_unit, **entry, "format": "", "virtual-size": extent.size}
                )
        return {
            "cid": self.cid, "parent-cid": self.parent_cid, "create-type": self.descriptor.values.get("createType", ""),
            "extents": extents,
        }  # fmt: skip

    # -- data

    def _at(self, offset: int) -> tuple[int, FlatExtent | SparseExtent]:
        index = bisect_right(self.begins, offset) - 1
        return self.begins[index], self.extents[index]

    def map(self, offset: int, length: int) -> tuple[int, int, Child | None, int]:
        begin, extent = self._at(offset)
        return extent.map(offset - begin, min(length, begin + extent.size - offset))

    def map_batch(self, offset: int, length: int) -> ExtentBatch:
        begin, extent = self._at(offset)
        batch = extent.map_batch(offset - begin, min(length, begin + extent.size - offset))
        if begin:
            for index, start in enumerate(batch.start):
                batch.start[index] = start + begin
        return batch

    def decode(self, run: tuple[int, int, Child | None, int], offset: int, view: memoryview) -> None:
        begin, extent = self._at(offset)
        assert isinstance(extent, SparseExtent)
        place, offset = run[3], offset - begin
        while view:
            within = offset % extent.allocation_unit
            count = min(len(view), extent.allocation_unit - within)
            extent.unpack(place, within, view[:count])
            view, offset = view[count:], offset + count
            if view:
                place = extent.map(offset, 1)[3]

    # -- changes

    def begin_writing(self) -> None:
        for extent in self.extents:
            if isinstance(extent, SparseExtent):
                extent.begin()
        self._new_cid()

    def _new_cid(self) -> None:
        """Give the content a new id, so that disks over it can tell that it was changed."""
        cid = int.from_bytes(clock.random_bytes(4), "little") & 0xFFFFFFFE  # all ones mean "no parent"
        if self._record(b"CID=", cid):
            self.cid = cid

    def _record(self, key: bytes, value: int) -> bool:
        """Write *value* for *key* into the descriptor; False where there is no such line, or no space for a longer one."""
        space = layout.MAX_DESCRIPTOR if self._text_at == 0 else 20 * SECTOR
        text = self._read_text(self._text_at, space).split(b"\0", 1)[0]
        at = text.find(key)
        while at > 0 and text[at - 1 : at] not in (b"\n", b"\r"):
            at = text.find(key, at + 1)
        if at < 0:
            return False
        begin = end = at + len(key)
        while text[end : end + 1] and text[end : end + 1] in b"0123456789abcdefABCDEF":
            end += 1
        digits = b"%08x" % value
        if end - begin != len(digits):
            # Programs leave leading zeroes away: what follows moves.
            digits += text[end:]
            if self._text_at and begin + len(digits) >= space:
                return False
        self.file.write(self._text_at + begin, (digits,))
        return True

    def make_empty(self) -> bool:
        # What is let go shows the parent as it is now. The units are emptied one by one.
        below = self.backing
        if below is not None and isinstance(below.node, VmdkNode) and below.node.cid != self.parent_cid:
            self.check_writable()
            if not self._record(b"parentCID=", below.node.cid):
                raise NotSupported("the descriptor cannot say which content of the parent is meant", path=self.filename)
            self.file.flush()
            self.parent_cid = below.node.cid
        return False

    def reserve(self, offset: int, length: int, kind: Kind, nbytes: int = 0) -> Reservation | None:
        begin, extent = self._at(offset)
        if isinstance(extent, FlatExtent):
            if kind is Kind.DATA and extent.child is not None:
                return None
            raise NotSupported("a flat extent has no entries", path=self.filename, offset=offset)
        reservation = extent.reserve(offset - begin, min(length, begin + extent.size - offset), kind, nbytes)
        if reservation is not None:
            reservation.offset += begin
            reservation.begin += begin
            reservation.end += begin
            reservation.state = (extent, begin, reservation.state)
        return reservation

    def link(self, reservation: Reservation) -> None:
        extent, begin, state = reservation.state
        inner = Reservation(
            reservation.offset - begin,
            reservation.length,
            reservation.kind,
            reservation.child,
            reservation.host,
            state=state,
        )
        extent.link(inner)

    def abandon(self, reservation: Reservation) -> None:
        extent, begin, state = reservation.state
        inner = Reservation(
            reservation.offset - begin,
            reservation.length,
            reservation.kind,
            reservation.child,
            reservation.host,
            state=state,
        )
        extent.abandon(inner)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self.check_writable()
        end = offset + length
        while offset < end:
            count, flags, child, host = self.map(offset, end - offset)
            if flags & (DATA | OFFSET | COMPRESSED) == DATA | OFFSET and child is not None:
                child.write_zeroes(host, count, unmap=unmap, fallback=fallback)
                self.changed = True
            elif not flags & ZERO and (self.backing is not None or flags & DATA):
                super().write_zeroes(offset, count, unmap=unmap, fallback=fallback)
            offset += count
        if fua:
            self.flush()

    def discard(self, offset: int, length: int) -> None:
        if self.options.discard == "ignore":
            return
        self.check_writable()
        end = offset + length
        while offset < end:
            count, flags, child, host = self.map(offset, end - offset)
            if flags & (DATA | OFFSET | COMPRESSED) == DATA | OFFSET and child is not None:
                child.discard(host, count)
                self.changed = True
            offset += count

    def flush(self) -> None:
        if self.poison is not None:
            raise self._poisoned()
        self.changed = False
        try:
            for extent in self.extents:
                extent.flush()
            self.file.flush()
        except BaseException as error:
            self.set_poison(error)
            raise

    def close(self) -> None:
        if self.begun and self.poison is None:
            self.flush()

    @classmethod
    def check_creation(cls, size: int, options: Mapping[str, Any]) -> None:
        """Raise for *options* that :meth:`create` would refuse."""
        from cowhand.block.formats.vmdk.create import check

        check(size, options)

    @classmethod
    def backing_facts(cls, backing: BlockNode) -> dict[str, Any]:
        below = skip_filters(backing)
        if not isinstance(below, VmdkNode):
            raise InvalidArgument(f"Invalid backing file format: {below.driver}. Must be vmdk")
        return {"parent_cid": below.cid}

    @classmethod
    def extent_names(cls, filename: str, size: int, options: Mapping[str, Any]) -> list[str]:
        from cowhand.block.formats.vmdk.create import extent_names

        return extent_names(filename, size, options)

    @classmethod
    def create_extent(cls, file: BlockNode, number: int, size: int, options: Mapping[str, Any]) -> None:
        from cowhand.block.formats.vmdk.create import create_extent

        create_extent(file, number, size, options)

    @classmethod
    def create(cls, file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
        """Make the open, writable protocol node *file* a disk of *size* bytes."""
        from cowhand.block.formats.vmdk.create import create

        create(file, size, options)
