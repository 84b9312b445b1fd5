"""The marks of image formats: to recognise a format that no driver reads, and to keep a guest from writing one into a guessed raw disk."""

from __future__ import annotations

#: (bytes, offset, format): the marks by which programs recognise formats in the first 512 bytes.
MARKS = (
    (b"QFI\xfb", 0, "qcow2"),
    (b"KDMV", 0, "vmdk"),
    (b"COWD", 0, "vmdk"),
    (b"# Disk DescriptorFile", 0, "vmdk"),
    (b"vhdxfile", 0, "vhdx"),
    (b"conectix", 0, "vpc"),
    (b"\x7f\x10\xda\xbe", 0x40, "vdi"),
    (b"QED\x00", 0, "qed"),
    (b"WithoutFreeSpace", 0, "parallels"),
    (b"WithouFreSpacExt", 0, "parallels"),
    (b"Bochs Virtual HD Image", 0, "bochs"),
    (b"LUKS\xba\xbe", 0, "luks"),
)


#: What follows the same magic bytes in the format before qcow2.
_QCOW_VERSION = b"\0\0\0\1"


def looks_like_a_format(first: bytes) -> str | None:
    """Return the name of the format whose mark *first*, the first 512 bytes of a disk, carries, or None."""
    for magic, at, name in MARKS:
        if first[at : at + len(magic)] == magic:
            return "qcow" if name == "qcow2" and first[4:8] == _QCOW_VERSION else name
    return None
