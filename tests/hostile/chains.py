"""Chains of images: loops, and chains longer than anybody needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cowhand.block.opening.policy import MAX_DEPTH
from tests.hostile.cases import Subject, maker
from tests.hostile.layout import Image, extension

BASE_BYTES = 64 << 10
_BASE_NAME = "base.raw"


def overlay(backing: str, *, format: str | None = "qcow2", cluster_bits: int = 9) -> Image:
    """Return an empty image of 64 KiB over the file *backing*, its format recorded or not."""
    image = Image(cluster_bits)
    image.take(1, "header")
    image.take(1, "refcount table")
    image.take(1, "refcount block")
    entries = BASE_BYTES // (image.cluster * image.cluster // 8) or 1
    image.take(1, "L1 table")
    body = (extension(0xE2792ACA, format.encode()) if format else b"") + extension(0, b"")
    name = backing.encode()
    image.put(0, b"QFI\xfb")
    for field, value in (
        ("version", 3), ("backing_file_offset", 104 + len(body)), ("backing_file_size", len(name)), ("cluster_bits", cluster_bits),
        ("size", BASE_BYTES), ("l1_size", entries), ("l1_table_offset", image.places["L1 table"]),
        ("refcount_table_offset", image.places["refcount table"]), ("refcount_table_clusters", 1), ("refcount_order", 4), ("header_length", 104),
    ):  # fmt: skip
        image.set(field, value)
    image.put(104, body + name)
    image.put_words(image.places["refcount table"], image.places["refcount block"])
    for number in range(4):
        image.set_count(number * image.cluster, 1)
    return image


def chain(folder: Path, length: int, *, format: str | None = "qcow2") -> Path:
    """Make a chain of *length* empty images over one raw file whose bytes are known; return the top one."""
    (folder / _BASE_NAME).write_bytes(base_content())
    (folder / "0.qcow2").write_bytes(overlay(_BASE_NAME, format="raw").data)
    for number in range(1, length):
        (folder / f"{number}.qcow2").write_bytes(overlay(f"{number - 1}.qcow2", format=format).data)
    return folder / f"{length - 1}.qcow2"


def base_content() -> bytes:
    """Return what shows through at the end of a chain: KiB *i* is filled with *i*."""
    return b"".join(bytes([i % 256]) * 1024 for i in range(BASE_BYTES // 1024))


def chain_names() -> Iterator[str]:
    """Yield the names of chains that come back to themselves, and of very long ones."""
    for form in ("recorded", "probed", "json", "linked"):
        for length in (1, 2, 3, 50):
            yield f"loop/{form}/{length}"
    for length in (200, 990, 1000, 1010, 3000):
        yield f"chain/{length}"


@maker("loop")
def _loop(rest: str, folder: Path) -> Subject:
    form, text = rest.split("/")
    length = int(text)
    for number in range(length):
        below = f"{(number + 1) % length}.qcow2"
        name = below
        if form == "json":
            name = '{"driver":"qcow2","file":{"driver":"file","filename":"%s"}}' % (folder / below)
            name = f"json:{name}"
        elif form == "linked":
            # Another name for the same file each time.
            name = f"link-{number}.qcow2"
            (folder / name).symlink_to(below)
        recorded = None if form in ("probed", "json") else "qcow2"
        (folder / f"{number}.qcow2").write_bytes(overlay(name, format=recorded, cluster_bits=12).data)
    subject = Subject(folder / "0.qcow2", writes=False)
    subject.refused = ["open"]
    subject.accepted = ["info", "chain", "open alone", "check"]
    return subject


@maker("chain")
def _chain(rest: str, folder: Path) -> Subject:
    subject = Subject(chain(folder, int(rest)), writes=False)
    if int(rest) > MAX_DEPTH:
        subject.accepted, subject.refused = ["info", "chain", "open alone"], ["open"]
    else:
        subject.accepted = ["info", "chain", "open", "map", "read", "check"]
    return subject
