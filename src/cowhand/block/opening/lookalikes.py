"""Files that go under an image's name and are none: what a failed download left, or an archive that holds the image. No I/O.

A guess would call each of them a raw disk. Source: the formats' own magic bytes.
"""

from __future__ import annotations

#: (bytes, offset, what it is, how to get at what is inside)
_ARCHIVES = (
    (b"\x1f\x8b\x08", 0, "a gzip archive", "gunzip"),
    (b"\xfd7zXZ\x00", 0, "an xz archive", "unxz"),
    (b"BZh", 0, "a bzip2 archive", "bunzip2"),
    (b"\x28\xb5\x2f\xfd", 0, "a zstd archive", "unzstd"),
    (b"\x04\x22\x4d\x18", 0, "an lz4 archive", "unlz4"),
    (b"LZIP", 0, "an lzip archive", "lzip -d"),
    (b"\x5d\x00\x00", 0, "an lzma archive", "unlzma"),
    (b"\x1f\x9d", 0, "a compress archive", "uncompress"),
    (b"PK\x03\x04", 0, "a zip archive", "unzip"),
    (b"PK\x05\x06", 0, "an empty zip archive", ""),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7-Zip archive", "7z x"),
    (b"Rar!\x1a\x07", 0, "a RAR archive", "unrar x"),
    (b"ustar", 257, "a tar archive (an OVA file is one)", "tar -xf"),
    (b"!<arch>\n", 0, "an ar archive (a Debian package is one)", "ar x"),
    (b"070701", 0, "a cpio archive", "cpio -i"),
    (b"070707", 0, "a cpio archive", "cpio -i"),
    (b"\xed\xab\xee\xdb", 0, "an RPM package", "rpm2cpio"),
    (b"MSCF\x00\x00\x00\x00", 0, "a cabinet archive", "cabextract"),
    (b"%PDF-", 0, "a PDF document", ""),
    (b"version https://git-lfs", 0, "a pointer of Git LFS, not the file that it stands for", "git lfs pull"),
)
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body", b"<title", b"<script")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: Ends of names that say that there is an image inside; raw disks of no bytes are what they say.
_ENDINGS = (
    ".qcow2",
    ".qcow",
    ".qc2",
    ".img",
    ".iso",
    ".vmdk",
    ".vdi",
    ".vhd",
    ".vhdx",
    ".vpc",
    ".qed",
    ".luks",
    ".dmg",
    ".hdd",
)
#: After "BZh": the size of blocks.
_BZIP2_LEVELS = b"123456789"
#: lzma: the size of its dictionary in the header, a power of two, is all that makes its first bytes certain.
_LZMA_DICTIONARIES = frozenset(1 << bits for bits in range(12, 31))


def not_an_image(head: bytes, name: str, size: int) -> tuple[str, str] | None:
    """Return (what it is, advice) of a file of *size* bytes called *name*, whose first bytes are *head* and carry no format's mark; None: unknown."""
    if not size:
        if name.lower().endswith(_ENDINGS):
            return "an empty file", "Was it downloaded, or copied, to its end?"
        return None
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()[:64].lower()
    if text.startswith(_PAGES):
        return "a web page", "Download the image itself: what came instead may say why."
    if text.startswith(b"<?xml"):
        return "an XML document", "Download the image itself: what came instead may say why."
    for mark, at, what, command in _ARCHIVES:
        if head[at : at + len(mark)] == mark and _certain(head, mark):
            return what, f"Unpack it first: {command}" if command else "It holds no disk."
    return None


def _certain(head: bytes, mark: bytes) -> bool:
    if mark == b"BZh":
        return head[3:4] in [bytes([level]) for level in _BZIP2_LEVELS]
    if mark == b"\x5d\x00\x00":
        return int.from_bytes(head[1:5], "little") in _LZMA_DICTIONARIES
    return True
