"""The one list of built-in drivers: name, where it is, how it is recognised."""

from __future__ import annotations

from cowhand.block.opening.registry import DriverEntry, Registry

_QCOW_MAGIC = b"QFI\xfb"


def _probe_qcow2(data: bytes, filename: str) -> int:
    return 100 if data[:4] == _QCOW_MAGIC and int.from_bytes(data[4:8], "big") >= 2 else 0


def _probe_luks(data: bytes, filename: str) -> int:
    return 100 if data[:8] == b"LUKS\xba\xbe\0\1" else 0


def _probe_bochs(data: bytes, filename: str) -> int:
    marks = ((0, b"Bochs Virtual HD Image\0"), (32, b"Redolog\0"), (48, b"Growing\0"))
    versions = (b"\0\0\1\0", b"\0\0\2\0")
    return 100 if all(data[at : at + len(m)] == m for at, m in marks) and data[64:68] in versions else 0


def _probe_vdi(data: bytes, filename: str) -> int:
    return 100 if data[64:68] == b"\x7f\x10\xda\xbe" else 0


def _probe_vmdk(data: bytes, filename: str) -> int:
    if data[:4] in (b"KDMV", b"COWD"):
        return 100
    # A descriptor: comments and empty lines, then its version.
    for line in data.splitlines():
        line = line.strip()
        if line and not line.startswith(b"#"):
            return 100 if line in (b"version=1", b"version=2", b"version=3") else 0
    return 0


def _probe_vpc(data: bytes, filename: str) -> int:
    return 100 if data[:8] == b"conectix" else 0


def _probe_vhdx(data: bytes, filename: str) -> int:
    return 100 if data[:8] == b"vhdxfile" else 0


def _probe_qed(data: bytes, filename: str) -> int:
    return 100 if data[:4] == b"QED\0" else 0


def _probe_qcow(data: bytes, filename: str) -> int:
    return 100 if data[:8] == _QCOW_MAGIC + b"\0\0\0\1" else 0


def _probe_parallels(data: bytes, filename: str) -> int:
    return 100 if data[:16] in (b"WithoutFreeSpace", b"WithouFreSpacExt") and data[16:20] == b"\2\0\0\0" else 0


_CLOOP_SCRIPT = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"


def _probe_cloop(data: bytes, filename: str) -> int:
    return 2 if data.startswith(_CLOOP_SCRIPT) else 0


def _probe_dmg(data: bytes, filename: str) -> int:
    # What marks it stands at the end of the file.
    return 2 if len(filename) > 4 and filename.endswith(".dmg") else 0


REGISTRY = Registry()
for _entry in (
    DriverEntry("file", "protocol", "cowhand.block.protocols.file.node", "FileNode", prefixes=("file",)),
    DriverEntry(
        "host_device", "protocol", "cowhand.block.protocols.file.device", "HostDeviceNode", prefixes=("host_device",)
    ),
    DriverEntry(
        "host_cdrom",
        "protocol",
        "cowhand.block.protocols.file.device",
        "HostCdromNode",
        prefixes=("host_cdrom",),
        creatable=False,
    ),
    DriverEntry("memory", "protocol", "cowhand.block.protocols.memory", "MemoryNode", creatable=False),
    DriverEntry(
        "null-co", "protocol", "cowhand.block.protocols.null", "NullNode", prefixes=("null-co",), creatable=False
    ),
    DriverEntry(
        "null-aio", "protocol", "cowhand.block.protocols.null", "NullAioNode", prefixes=("null-aio",), creatable=False
    ),
    DriverEntry(
        "nbd",
        "protocol",
        "cowhand.block.protocols.nbd.node",
        "NbdNode",
        prefixes=("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix"),
    ),
    DriverEntry("raw", "format", "cowhand.block.formats.raw", "RawNode"),
    DriverEntry(
        "qcow2",
        "format",
        "cowhand.block.formats.qcow2.driver",
        "Qcow2Node",
        _probe_qcow2,
        links="cowhand.block.links.qcow2",
    ),
    DriverEntry("luks", "format", "cowhand.block.formats.luks", "LuksNode", _probe_luks),
    DriverEntry("bochs", "format", "cowhand.block.formats.bochs", "BochsNode", _probe_bochs, creatable=False),
    DriverEntry(
        "vmdk", "format", "cowhand.block.formats.vmdk.driver", "VmdkNode", _probe_vmdk, links="cowhand.block.links.vmdk"
    ),
    DriverEntry("vpc", "format", "cowhand.block.formats.vpc", "VpcNode", _probe_vpc, links="cowhand.block.links.vpc"),
    DriverEntry(
        "vhdx", "format", "cowhand.block.formats.vhdx.driver", "VhdxNode", _probe_vhdx, links="cowhand.block.links.vhdx"
    ),
    DriverEntry("qed", "format", "cowhand.block.formats.qed", "QedNode", _probe_qed, links="cowhand.block.links.qed"),
    DriverEntry(
        "qcow", "format", "cowhand.block.formats.qcow", "QcowNode", _probe_qcow, links="cowhand.block.links.qcow2"
    ),
    DriverEntry("parallels", "format", "cowhand.block.formats.parallels", "ParallelsNode", _probe_parallels),
    DriverEntry("dmg", "format", "cowhand.block.formats.dmg.driver", "DmgNode", _probe_dmg, creatable=False),
    DriverEntry("cloop", "format", "cowhand.block.formats.cloop", "CloopNode", _probe_cloop, creatable=False),
    DriverEntry("vdi", "format", "cowhand.block.formats.vdi", "VdiNode", _probe_vdi),
    DriverEntry(
        "blkdebug",
        "filter",
        "cowhand.block.filters.blkdebug.node",
        "BlkDebugNode",
        prefixes=("blkdebug",),
        creatable=False,
    ),
    DriverEntry(
        "blkverify",
        "filter",
        "cowhand.block.filters.blkverify",
        "BlkVerifyNode",
        prefixes=("blkverify",),
        creatable=False,
    ),
    DriverEntry("blklogwrites", "filter", "cowhand.block.filters.blklogwrites", "BlkLogWritesNode", creatable=False),
    DriverEntry("compress", "filter", "cowhand.block.filters.compress", "CompressNode", creatable=False),
    DriverEntry(
        "copy-before-write",
        "filter",
        "cowhand.block.filters.copy_before_write.node",
        "CopyBeforeWriteNode",
        creatable=False,
    ),
    DriverEntry("copy-on-read", "filter", "cowhand.block.filters.copy_on_read", "CopyOnReadNode", creatable=False),
    DriverEntry("preallocate", "filter", "cowhand.block.filters.preallocate", "PreallocateNode", creatable=False),
    DriverEntry("quorum", "filter", "cowhand.block.filters.quorum", "QuorumNode", creatable=False),
    DriverEntry(
        "snapshot-access", "filter", "cowhand.block.filters.snapshot_access", "SnapshotAccessNode", creatable=False
    ),
    DriverEntry("throttle", "filter", "cowhand.block.filters.throttle.node", "ThrottleNode", creatable=False),
):
    REGISTRY.add(_entry)
