"""Small qcow2 images for tests: their shapes, how they are made, and how they are opened over any node."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.create import create as create_image
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.node.node import BlockNode
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.policy import DEFAULT, Policy
from cowhand.block.protocols.memory import MemoryNode
from cowhand.crypto import secrets
from cowhand.drivers import REGISTRY
from cowhand.image.snapshots import apply_snapshot, create_snapshot, delete_snapshot, open_snapshot

PASSPHRASE = b"sixteen secrets."
SNAPSHOTS = hasattr(Qcow2Node, "create_snapshot")


@dataclass(frozen=True, slots=True)
class Shape:
    """What an image is made with."""

    version: int = 3
    cluster: int = 512
    refcount_bits: int = 16
    size: int = 128 << 10
    backed: bool = False
    lazy: bool = False  #: reference counts are postponed
    cache: int = 0  #: bytes of tables that an open image keeps, 0 for the default
    filled: int = 0  #: bytes of the disk that hold data when the test begins
    extended: bool = False  #: extended L2 entries
    data: str = ""  #: "plain" or "raw": guest data lies in a data file
    shrinks: bool = False  #: the disk may also become smaller
    encrypt: str = ""  #: "aes" or "luks": AES-128 in CBC mode, in the first case with :data:`PASSPHRASE` as key
    amended: bool = False  #: version and width of counts change

    @property
    def snapshots(self) -> bool:
        """Whether counts are wide enough for the tests' snapshots."""
        return self.refcount_bits >= 4 and SNAPSHOTS and not self.data

    def base(self, rng: random.Random) -> bytes:
        """Return a backing file's content: three quarters of the disk, with a hole; or longer than the disk, at random."""
        if not self.backed:
            return b""
        data = bytearray(rng.randbytes(self.size * rng.choice((3, 5)) // 4 // 512 * 512))
        data[self.size // 4 : self.size // 2] = bytes(self.size // 4)
        return bytes(data)

    def __str__(self) -> str:
        return (
            f"v{self.version}-{self.cluster}-{self.refcount_bits}"
            + "-backed" * self.backed
            + "-filled" * bool(self.filled)
            + "-cache" * bool(self.cache)
            + "-lazy" * self.lazy
            + "-extended" * self.extended
            + (f"-{self.data}" if self.data else "")
            + "-shrinks" * self.shrinks
            + (f"-{self.encrypt}" if self.encrypt else "")
            + "-amended" * self.amended
        )


class Medium(MemoryNode):
    """Memory that takes every mode of preallocation: space is nothing to it."""

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        super().resize(size, shrink=shrink)


def create(shape: Shape, content: bytes = b"") -> MemoryNode:
    """Return an image of *shape* that holds *content*, made by the driver (without a backing file's name: tests give the node)."""
    return create_media(shape, content)[0]


def create_media(shape: Shape, content: bytes = b"") -> list[MemoryNode]:
    """Return the image, and its data file if it has one."""
    media: list[MemoryNode] = [Medium() for _ in range(2 if shape.data else 1)]
    options: dict[str, Any] = {"compat": "0.10" if shape.version == 2 else "1.1", "cluster_size": shape.cluster}
    if shape.version > 2:
        options |= {"refcount_bits": shape.refcount_bits, "lazy_refcounts": shape.lazy, "extended_l2": shape.extended}
    if shape.data:
        options |= {"data_file": "data", "data_file_raw": shape.data == "raw", "data_file_node": media[1]}
    if shape.encrypt:
        options |= {"encrypt.format": shape.encrypt, "encrypt.key-secret": "s0"}
    if shape.encrypt == "luks":
        options |= {"encrypt.iter-time": 1, "encrypt.cipher-alg": "aes-128", "encrypt.cipher-mode": "cbc"}
    keepers = [Disk(node) for node in media]  # hold the memory while the driver opens and closes it
    with secrets.given({"s0": PASSPHRASE}):
        create_image(media[0], shape.size, options)
    if content:
        data = media[1] if shape.data else None
        with open_over(media[0], writable=True, data=data, encrypted=bool(shape.encrypt)) as disk:
            disk.write(0, content)
    for keeper in keepers:
        keeper.close()
    return [node.copy() for node in media]


def key_of(image: MemoryNode, shape: Shape) -> bytes | None:
    """Return the key that the data of *image* is encrypted with."""
    if shape.encrypt != "luks":
        return PASSPHRASE if shape.encrypt else None
    with open_over(image.copy(), encrypted=True) as disk:
        volume = disk.root.encryption.volume  # type: ignore[attr-defined]
    return bytes(volume.key)


def open_over(
    file: BlockNode,
    backing: BlockNode | None = None,
    *,
    writable: bool = False,
    cache: int = 0,
    data: BlockNode | None = None,
    encrypted: bool = False,
    policy: Policy = DEFAULT,
) -> Disk:
    """Open the qcow2 image that *file* holds; *backing* lies under it, *data* is its data file; *cache* bounds the bytes of tables in memory."""
    description: dict[str, Any] = {"driver": "qcow2", "file": file, "backing": backing, "read-only": not writable}
    if data is not None:
        description["data-file"] = data
    if cache:
        description |= {"l2-cache-size": cache, "refcount-cache-size": cache}
    if encrypted:
        description["encrypt"] = {"key-secret": "s0"}
    with secrets.given({"s0": PASSPHRASE}):
        root = Opening(REGISTRY, policy=policy).open(description)
    return Disk(root, writable=writable)


def snapshot_create(disk: Disk, name: str) -> None:
    """Take an internal snapshot."""
    create_snapshot(disk, name)


def snapshot_apply(disk: Disk, name: str) -> None:
    """Go back to a snapshot."""
    apply_snapshot(disk, name)


def snapshot_delete(disk: Disk, name: str) -> None:
    """Delete a snapshot."""
    delete_snapshot(disk, name)


def snapshot_read(disk: Disk, name: str) -> bytes:
    """Return what a snapshot holds, by way of a view of it."""
    with open_snapshot(disk, name) as view:
        return view.read(0, view.size)
