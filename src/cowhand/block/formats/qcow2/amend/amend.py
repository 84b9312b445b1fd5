"""Changing what a qcow2 image is, in place: its version, width of counts, lazy reference counts, size (QEMU ``docs/interop/qcow2``, "Header").

What only the new form needs is made and stable before the header says so; the header is written once, and written back when that fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cowhand.block.formats.qcow2.amend import key_slots
from cowhand.block.formats.qcow2.create import CREATE_OPTIONS
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.block.graph import graph
from cowhand.block.node.create_options import CreateOption
from cowhand.core import diagnostics
from cowhand.core.errors import CowhandError, InvalidArgument, NotSupported, UnsupportedFeature

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.block.formats.qcow2.ondisk.header import Header

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_TAKEN = (
    "backing_file",
    "backing_fmt",
    "compat",
    "data_file",
    "data_file_raw",
    "encrypt.iter-time",
    "lazy_refcounts",
    "refcount_bits",
    "size",
)

#: What is understood as an option of a change; not all of it can be changed.
AMEND_OPTIONS = (
    *(option for option in CREATE_OPTIONS if option.name in _TAKEN),
    CreateOption("encrypt.keyslot", "int", help="Select a single keyslot to modify explicitly"),
    CreateOption("encrypt.new-secret", "str", help="New secret to set in the matching keyslots. Empty string to erase"),
    CreateOption("encrypt.old-secret", "str", help="Select all keyslots that match this password"),
    CreateOption("encrypt.state", "str", help="Select new state of affected keyslots (active/inactive)"),
)


def amend(
    node: Qcow2Node,
    options: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
    *,
    force: bool = False,
) -> None:
    """Change *node*, which nothing else uses, to what *options* say (names and values of :data:`AMEND_OPTIONS`).

    *force* lets the last key slot of an encrypted image be erased.

    *progress* is called with (done, all). Raises InvalidArgument and NotSupported, in QEMU's words, before anything is changed, but for a
    downgrade, which a look at all tables may refuse after the other options are in effect.
    """
    header = node.header
    version = header.version if options.get("compat") is None else _VERSIONS.get(options["compat"])
    if version is None:
        raise InvalidArgument(
            f"Unknown compatibility level {options['compat']}", hint="compat is 0.10 (v2) or 1.1 (v3)."
        )
    _refuse(node, options, version)
    lazy = options.get("lazy_refcounts")
    if lazy and version < 3:
        raise InvalidArgument(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        )
    node.check_writable()
    with graph.quiesce(node):
        node.settle()
        if version > header.version:
            from cowhand.block.formats.qcow2.snapshot.operations import complete_table

            complete_table(node)
            try:
                with node.rewriting_header():
                    _upgrade(header)
            finally:
                node.mapping.learn_version()
        if key_slots.amends(options):
            key_slots.amend(node, options, force=force)
        bits = options.get("refcount_bits")
        if bits is not None and bits != header.refcount_bits:
            from cowhand.block.formats.qcow2.amend.refcount_width import change_width

            _write_counts(node)
            change_width(node, bits.bit_length() - 1, progress)
        if lazy is not None and lazy != bool(header.compatible & L.COMPAT_LAZY_REFCOUNTS):
            _set_lazy(node, lazy)
        if node.external:
            from cowhand.block.formats.qcow2.cluster.data_file import amend as amend_data_file

            switch = amend_data_file(options, header)
            if switch is not None:
                with node.rewriting_header():
                    switch()
        if options.get("size") is not None and options["size"] != header.size:
            from cowhand.block.formats.qcow2.resize.grow import resize

            try:
                resize(node, options["size"], shrink=True)
            finally:
                for disk in graph.disks_above((node,)):
                    disk.root_changed()
        if version < header.version:
            _downgrade(node, progress)


def _refuse(node: Qcow2Node, options: Mapping[str, Any], version: int) -> None:
    header = node.header
    if key_slots.amends(options):
        key_slots.refuse_amending(node)
    bits = options.get("refcount_bits")
    if bits is not None:
        if bits < 1 or bits & (bits - 1) or bits > 64:
            raise InvalidArgument("Refcount width must be a power of two and may not exceed 64 bits")
        if bits != 16 and version < 3:
            raise InvalidArgument(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
            )
    if options.get("data_file_raw") and not node.raw_data:
        raise InvalidArgument("data-file-raw cannot be set on existing images", path=node.filename)
    if options.get("data_file") is not None and not node.external:
        raise InvalidArgument("data-file can only be set for images that use an external data file", path=node.filename)
    present = {"backing_file": header.backing_name, "backing_fmt": header.backing_format}
    if present.keys() & options.keys():  # both are told, or neither
        if any(options.get(name) != value for name, value in present.items()):
            advice = "You can use 'qemu-img rebase' instead."
            raise NotSupported(
                "Cannot amend the backing file", path=node.filename, hint="Rebase the image instead.", advice=advice
            )


def _upgrade(header: Header) -> None:
    header.version = 3
    header.header_length = L.HEADER_LENGTH_WRITTEN
    header.incompatible = header.compatible = header.autoclear = 0
    header.unknown_tail = b""


def _set_lazy(node: Qcow2Node, lazy: bool) -> None:
    if not lazy:
        _write_counts(node)
    with node.rewriting_header() as header:
        if lazy:
            header.compatible |= L.COMPAT_LAZY_REFCOUNTS
        else:
            header.compatible &= ~L.COMPAT_LAZY_REFCOUNTS


def _write_counts(node: Qcow2Node) -> None:
    """End the postponing of reference counts: what is in memory is written, and then the dirty mark taken away."""
    if not node.lazy:
        return
    node.release_quarantine(everything=True)
    with node.exclusive():
        node.write_back.flush_refcounts()
        node.lazy = False
        node.set_incompatible(node.header.incompatible & ~L.INCOMPAT_DIRTY)


def _downgrade(node: Qcow2Node, progress: Callable[[int, int], None] | None) -> None:
    from cowhand.block.formats.qcow2.amend.zero_expansion import expand_zeroes

    header, path = node.header, node.filename
    if header.refcount_order != 4:
        raise UnsupportedFeature("compat=0.10 requires refcount_bits=16", path=path)
    if header.incompatible & L.INCOMPAT_DATA_FILE:
        raise UnsupportedFeature("Cannot downgrade an image with a data file", path=path)
    if any(snapshot.vm_state_size >> 32 or snapshot.disk_size != header.size for snapshot in node.snapshots):
        # Version 2 need not have the extra data that says so; without it, a state's size has 32 bits.
        raise UnsupportedFeature("Internal snapshots prevent downgrade of image", path=path)
    _write_counts(node)
    held = header.incompatible & ~L.INCOMPAT_COMPRESSION
    if held:
        raise UnsupportedFeature(f"Cannot downgrade an image with incompatible features {held:#x} set", path=path)
    try:
        expand_zeroes(node, refuse_compressed=bool(header.incompatible & L.INCOMPAT_COMPRESSION), progress=progress)
    except UnsupportedFeature:
        raise
    except CowhandError as error:
        if error.errno != 5:
            diagnostics.report(error.qemu(), as_tool=True)
        error.qemu_message = os.strerror(error.number)
        raise error.within(qemu="Failed to turn zero into data clusters") from None
    from cowhand.block.formats.qcow2.bitmap.store import remove_all

    remove_all(node)  # version 2 has no way to say that they are up to date
    try:
        with node.rewriting_header():
            _become_version_2(header)
    finally:
        node.forget_codec()
        node.mapping.learn_version()


def _become_version_2(header: Header) -> None:
    header.version = 2
    header.header_length = L.HEADER_V2_LENGTH
    header.incompatible = header.compatible = header.autoclear = 0
    header.unknown_tail = b""
    header.compression_type = L.COMPRESSION_DEFLATE
    header.unknown_tail = b""
    header.set(L.EXT_FEATURE_NAMES, None)
