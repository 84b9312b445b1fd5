"""Structure-aware changes of LUKS volumes: fields of the header and of its key slots get values that mean something.

Source: "LUKS1 On-Disk Format Specification" 1.2.3, section 4. Shares no code with the driver.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.fuzz.mutation import edge

#: Fields of the header: name → (offset, bytes).
FIELDS = {
    "magic": (0, 6), "version": (6, 2), "cipher": (8, 32), "mode": (40, 32), "hash": (72, 32), "payload": (104, 4), "key bytes": (108, 4),
    "digest": (112, 20), "digest salt": (132, 32), "digest iterations": (164, 4), "uuid": (168, 40),
}  # fmt: skip
#: Fields of a key slot, from its beginning.
SLOT_FIELDS = {"state": (0, 4), "iterations": (4, 4), "salt": (8, 32), "offset": (40, 4), "stripes": (44, 4)}
_SLOTS_AT, _SLOT_BYTES, _SLOTS = 208, 48, 8
HEADER_BYTES = _SLOTS_AT + _SLOTS * _SLOT_BYTES
_STATES = (0x00AC71F3, 0x0000DEAD)
_WORDS = {
    "cipher": ("aes", "twofish", "serpent", "cast5", "des", "null", ""),
    "mode": (
        "xts-plain64",
        "cbc-essiv:sha256",
        "cbc-plain",
        "ecb-plain64",
        "ctr-essiv:md5",
        "xts-",
        "cbc-essiv:",
        "-",
        ":",
        "xts",
    ),
    "hash": ("sha1", "sha256", "sha512", "ripemd160", "md5", "crc32", ""),
}


def mutate(data: bytes, seed: int, size: int, otherwise: Callable[[bytes], bytes] | None = None) -> bytes:
    """Return *data* after one to three changes, at most *size* bytes. *otherwise* changes bytes without knowing what they are."""
    chance = random.Random(seed)
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        kind = chance.randrange(8)
        if len(out) < HEADER_BYTES:
            out = bytearray(otherwise(bytes(out)) if otherwise is not None else bytes(out) + bytes(HEADER_BYTES))
        elif kind == 0 and otherwise is not None:
            out[:HEADER_BYTES] = otherwise(bytes(out[:HEADER_BYTES])).ljust(HEADER_BYTES, b"\0")[:HEADER_BYTES]
        elif kind <= 3:
            _header(out, chance)
        elif kind <= 6:
            _slot(out, chance)
        else:
            _piece(out, chance)
    return bytes(out[:size])


def _put(out: bytearray, at: int, width: int, value: int) -> None:
    out[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "big")


def _header(out: bytearray, chance: random.Random) -> None:
    name = chance.choice(list(FIELDS))
    at, width = FIELDS[name]
    if name in _WORDS:
        word = chance.choice(_WORDS[name]).encode()
        # Without a zero byte at its end now and then.
        out[at : at + width] = word.ljust(width, b"x" if chance.random() < 0.1 else b"\0")
    elif width <= 4:
        old = int.from_bytes(out[at : at + width], "big")
        places = (old + 1, old - 1, old * 2, 16, 32, 64, 8, len(out) // 512, edge(8 * width, chance))
        _put(out, at, width, chance.choice(places))
    else:
        out[at + chance.randrange(width)] ^= 1 << chance.randrange(8)


def _slot(out: bytearray, chance: random.Random) -> None:
    begin = _SLOTS_AT + chance.randrange(_SLOTS) * _SLOT_BYTES
    name = chance.choice(list(SLOT_FIELDS))
    at, width = SLOT_FIELDS[name]
    at += begin
    old = int.from_bytes(out[at : at + width], "big")
    if name == "state":
        value = chance.choice((*_STATES, edge(32, chance)))
    elif name == "offset":
        other = _SLOTS_AT + chance.randrange(_SLOTS) * _SLOT_BYTES + SLOT_FIELDS["offset"][0]
        near = int.from_bytes(out[other : other + 4], "big")
        value = chance.choice((near, near + 1, near - 1, old + 1, 8, 0, len(out) // 512, edge(32, chance)))
    elif name == "salt":
        value = old ^ 1 << chance.randrange(256)
    else:
        value = chance.choice((old + 1, old - 1, 0, 1, 4000, edge(32, chance)))
    _put(out, at, width, value)


def _piece(out: bytearray, chance: random.Random) -> None:
    """Cut the end off, copy one slot over another, or change a byte of what is encrypted."""
    kind = chance.randrange(3)
    if kind == 0:
        del out[max(1, chance.randrange(len(out))) :]
    elif kind == 1:
        source, target = (_SLOTS_AT + chance.randrange(_SLOTS) * _SLOT_BYTES for _ in range(2))
        out[target : target + _SLOT_BYTES] = out[source : source + _SLOT_BYTES]
    else:
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
