"""Encrypted images whose LUKS header lies, inside qcow2 and by itself; the passphrase is offered, so that key slots are tried."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import cowhand
from cowhand.crypto import secrets
from cowhand.image.create import create
from tests.hostile.cases import Subject, maker

_PASSPHRASE = b"correct horse"  # the fuzzer's too
_EDGES = (0, 1, 7, 8, 9, 511, 999, 4000, 4001, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
#: Fields of the header: (offset, bytes), each in turn with all of _EDGES.
NUMBERS = {"version": (6, 2), "payload": (104, 4), "key bytes": (108, 4), "digest iterations": (164, 4)}
for _slot in (0, 1, 7):
    _at = 208 + 48 * _slot
    NUMBERS |= {
        f"slot {_slot} state": (_at, 4), f"slot {_slot} iterations": (_at + 4, 4), f"slot {_slot} material": (_at + 40, 4),
        f"slot {_slot} stripes": (_at + 44, 4),
    }  # fmt: skip
_TEXTS = {"cipher": (8, 32), "mode": (40, 32), "hash": (72, 32), "uuid": (168, 40)}
_WORDS = (b"", b"\xff" * 40, b"aes", b"serpent", b"des3_ede", b"xts", b"xts-", b"cbc-essiv", b"cbc-essiv:sha512", b"ecb-null", b"sha256",
          b"crc32", b"plain64-xts", b"xts-plain64:" + b"x" * 28)  # fmt: skip
#: Of the pointer in qcow2's header: offset and length.
_POINTERS = (
    (0, 0),
    (0, 4096),
    (4096, 4096),
    (1 << 16, 1),
    (1 << 16, 1 << 63),
    ((1 << 64) - 4096, 4096),
    (1 << 55, 592),
    (1 << 40, 1 << 20),
)
_LENGTHS = (0, 6, 207, 591, 592, 4096, 4097, 70000)


@lru_cache(maxsize=2)
def sound(kind: str) -> bytes:
    """Return a small encrypted image, with data."""
    with TemporaryDirectory() as folder, secrets.offering([_PASSPHRASE]):
        path = Path(folder) / "image"
        prefix = "encrypt." if kind == "qcow2" else ""
        options = {"iter-time": "1", "cipher-alg": "aes-128", "cipher-mode": "cbc"}
        chosen = {prefix + name: value for name, value in options.items()}
        if kind == "qcow2":
            chosen |= {"encrypt.format": "luks", "cluster_size": "4k"}
        create(path, kind, 64 << 10, chosen)
        with cowhand.open(path, format=kind, writable=True) as disk:
            disk.write(5000, b"guest" * 2000)
        return path.read_bytes()


def header_at(data: bytes, kind: str) -> int:
    """Return where the LUKS header lies."""
    if kind == "luks":
        return 0
    return struct.unpack_from(">Q", data, pointer_at(data))[0]  # type: ignore[no-any-return]


def pointer_at(data: bytes) -> int:
    """Return where qcow2's header extension says where the LUKS header lies."""
    return data.index(struct.pack(">II", 0x0537BE77, 16)) + 8


def names() -> Iterator[str]:
    """Yield the names of all these images."""
    for kind in ("qcow2", "luks"):
        yield f"encryption/{kind}/sound"
        # By itself the header is read by the same code: a part of them is enough there.
        step = 3 if kind == "luks" else 1
        yield from (f"encryption/{kind}/{field}/{value}" for field in NUMBERS for value in _EDGES[::step])
        yield from (f"encryption/{kind}/{field}/{number}" for field in _TEXTS for number in range(0, len(_WORDS), step))
        yield from (f"encryption/{kind}/cut/{length}" for length in _LENGTHS)
        yield f"encryption/{kind}/all slots are one/0"
    yield from (f"encryption/qcow2/pointer/{number}" for number in range(len(_POINTERS)))


@maker("encryption")
def _make(rest: str, folder: Path) -> Subject:
    kind, field, *values = rest.split("/")
    data = bytearray(sound(kind))
    begin = header_at(data, kind)
    number = int(values[0]) if values else 0
    if field in NUMBERS:
        at, width = NUMBERS[field]
        data[begin + at : begin + at + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "big")
    elif field in _TEXTS:
        at, width = _TEXTS[field]
        data[begin + at : begin + at + width] = _WORDS[number][:width].ljust(width, b"\0")
    elif field == "cut":
        del data[begin + number :]
    elif field == "pointer":
        at = pointer_at(data)
        data[at : at + 16] = struct.pack(">QQ", *_POINTERS[number])
    elif field == "all slots are one":
        slot = bytes(data[begin + 208 : begin + 256])
        data[begin + 208 : begin + 592] = slot * 8
    path = folder / "image"
    path.write_bytes(data)
    offer()
    accepted = ["info", "open", "read", "open to write"] if field == "sound" else []
    return Subject(path, None, writes=kind == "qcow2", accepted=accepted[: 3 if kind == "luks" else 4])


@lru_cache(maxsize=1)
def offer() -> ExitStack:
    """Offer the passphrase for as long as this process, a worker of these tests, lives."""
    stack = ExitStack()
    stack.enter_context(secrets.offering([_PASSPHRASE]))
    return stack
