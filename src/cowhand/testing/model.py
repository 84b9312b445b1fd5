"""The perfect disk: an array of bytes with snapshots, a backing file, growth; what every real one is compared with."""

from __future__ import annotations


class ModelMismatch(AssertionError):
    """A disk differs from its model."""


class DiskModel:
    """A disk without formats, caches or errors. *backing* shows through until it is written; growth over a longer one gives zeroes."""

    def __init__(self, size: int, backing: bytes = b"") -> None:
        self.content = bytearray(backing[:size].ljust(size, b"\0"))
        self.snapshots: dict[str, bytes] = {}

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, offset: int, length: int) -> bytes:
        """Return *length* bytes at *offset*."""
        assert offset + length <= self.size
        return bytes(self.content[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """Change the bytes at *offset*."""
        assert offset + len(data) <= self.size
        self.content[offset : offset + len(data)] = data

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the bytes zero."""
        self.write(offset, bytes(length))

    def discard(self, offset: int, length: int, found: bytes) -> None:
        """Take over *found*, what the disk holds after a discard; raise unless each byte kept its content or became zero."""
        assert len(found) == length
        before = self.read(offset, length)
        if found != before and any(found):
            for index, (now, was) in enumerate(zip(found, before, strict=True)):
                if now not in (0, was):
                    raise ModelMismatch(f"a discard made byte {offset + index:#x} {now:#04x}, which was {was:#04x}")
        self.write(offset, found)

    def resize(self, size: int) -> None:
        """Change the size; new bytes are zeroes."""
        self.content = self.content[:size].ljust(size, b"\0")

    def snapshot_create(self, name: str) -> None:
        """Keep the present content as *name*."""
        assert name not in self.snapshots
        self.snapshots[name] = bytes(self.content)

    def snapshot_apply(self, name: str) -> None:
        """Go back to *name*, its size too."""
        self.content = bytearray(self.snapshots[name])

    def snapshot_delete(self, name: str) -> None:
        """Forget *name*."""
        del self.snapshots[name]

    def compare(self, content: bytes, what: str = "the disk") -> None:
        """Raise ModelMismatch, naming the first different byte, unless *content* is what the model holds."""
        compare(bytes(self.content), content, what)


def compare(expected: bytes, found: bytes, what: str) -> None:
    """Raise ModelMismatch, naming the first difference, unless both are equal."""
    if expected == found:
        return
    if len(expected) != len(found):
        raise ModelMismatch(f"{what} has {len(found)} bytes, expected {len(expected)}")
    at = next(index for index, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    count = sum(a != b for a, b in zip(expected, found, strict=True))
    raise ModelMismatch(
        f"{what} differs in {count} bytes, first at {at:#x}: found {found[at : at + 8].hex()}, expected {expected[at : at + 8].hex()}"
    )
