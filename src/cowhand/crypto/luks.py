"""The header of LUKS version 1 ("LUKS1 On-Disk Format Specification" 1.2.3, section 4). No I/O.

Every number is checked against a named limit before anything is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from cowhand.core.errors import CowhandError, InvalidFormat, UnsupportedFeature
from cowhand.crypto.algorithms import CIPHERS, HASHES, IV_GENERATORS, MODES
from cowhand.crypto.sectors import SECTOR

MAGIC = b"LUKS\xba\xbe"
HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
SLOT = struct.Struct(">II32sII")
SLOTS = 8  #: specified
SLOTS_AT = HEADER.size
HEADER_BYTES = SLOTS_AT + SLOTS * SLOT.size
STRIPES = 4000  #: specified; QEMU refuses others
ENABLED, DISABLED = 0x00AC71F3, 0x0000DEAD
SLOT_AREA_AT = 4096  #: where the first key material lies, and what the others are aligned to (specified)

_MODE_OFFSET, _HASH_OFFSET, PAYLOAD_OFFSET, _KEY_BYTES_OFFSET, _DIGEST_ITERATIONS_OFFSET = 40, 72, 104, 108, 164


class Slot(NamedTuple):
    """A key slot; ``offset`` of its key material in sectors."""

    active: bool
    iterations: int
    salt: bytes
    offset: int
    stripes: int

    def encode(self, *, active: bool) -> bytes:
        return SLOT.pack(ENABLED if active else DISABLED, self.iterations, self.salt, self.offset, self.stripes)


class Header(NamedTuple):
    """All fields; names of algorithms are QEMU's. ``payload`` in sectors."""

    cipher: str
    mode: str
    ivgen: str
    ivgen_hash: str | None
    hash: str
    payload: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[Slot, ...]

    @property
    def material_bytes(self) -> int:
        """Length of one slot's key material, in whole sectors."""
        return -(-self.key_bytes * STRIPES // SECTOR) * SECTOR

    def with_slot(self, index: int, slot: Slot) -> Header:
        """Return the header with another slot *index*."""
        return self._replace(slots=(*self.slots[:index], slot, *self.slots[index + 1 :]))

    def encode(self) -> bytes:
        """Return the header's bytes."""
        mode = f"{self.mode}-{self.ivgen}" + (f":{self.ivgen_hash}" if self.ivgen_hash else "")
        fixed = HEADER.pack(
            MAGIC, 1, CIPHERS[self.cipher].family.encode(), mode.encode(), self.hash.encode(), self.payload, self.key_bytes,
            self.digest, self.digest_salt, self.digest_iterations, self.uuid.encode(),
        )  # fmt: skip
        return fixed + b"".join(slot.encode(active=slot.active) for slot in self.slots)


def slot_sectors(key_bytes: int) -> int:
    """Return the sectors that a slot's key material takes, as QEMU and cryptsetup align it."""
    unit = SLOT_AREA_AT // SECTOR
    needed = -(-key_bytes * STRIPES // SECTOR)
    return -(-needed // unit) * unit


def slot_at(index: int) -> int:
    """Return the offset of slot *index* in the header; its first four bytes say whether it is active."""
    return SLOTS_AT + index * SLOT.size


def key_bytes_of(cipher: str, mode: str) -> int:
    """Return the length of the master key: XTS has two keys."""
    return CIPHERS[cipher].key_bytes * (2 if mode == "xts" else 1)


def parse(data: bytes, path: str, *, at: int = 0, detached: bool = False) -> Header:
    """Parse the first bytes of a LUKS volume, which lie at offset *at* of *path*; a *detached* header has its payload elsewhere.

    Raises InvalidFormat or UnsupportedFeature naming file and offset.
    """

    def wrong(message: str, offset: int, qemu: str | None = None) -> CowhandError:
        return InvalidFormat(message, qemu=qemu, path=path, offset=at + offset)

    if len(data) < HEADER_BYTES:
        raise wrong("the file ends inside the LUKS header", len(data), "Volume is not in LUKS format")
    magic, version, name, mode, hash_name, payload, key_bytes, digest, salt, iterations, uuid = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise wrong("this is not a LUKS volume: the magic bytes are missing", 0, "Volume is not in LUKS format")
    if version != 1:
        raise UnsupportedFeature(f"LUKS version {version} is not supported", path=path, offset=at + 6)
    for field, what, offset in (
        (name, "cipher name", 8),
        (mode, "cipher mode", _MODE_OFFSET),
        (hash_name, "hash spec", _HASH_OFFSET),
    ):
        if b"\0" not in field:
            raise wrong(f"LUKS header {what} is not NUL terminated", offset)
    if payload < SLOT_AREA_AT // SECTOR and not (detached and not payload):
        raise wrong("LUKS payload is overlapping with the header", PAYLOAD_OFFSET)
    if not iterations:
        raise wrong("LUKS key iteration count is zero", _DIGEST_ITERATIONS_OFFSET)
    chain, ivgen, ivgen_hash = _mode(_text(mode), path, at)
    cipher = _cipher(_text(name), chain, key_bytes, path, at)
    slots = tuple(_slot(data, index) for index in range(SLOTS))
    header = Header(
        cipher, chain, ivgen, ivgen_hash, _known(_text(hash_name), HASHES, "Hash algorithm", path, at + _HASH_OFFSET),
        payload, key_bytes, digest, salt, iterations, _text(uuid), slots,
    )  # fmt: skip
    _check_slots(header, data, wrong)
    return header


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("ascii", "replace")


def _known(value: str, choices: tuple[str, ...], what: str, path: str, offset: int) -> str:
    if value not in choices:
        raise UnsupportedFeature(f"{what} '{value}' not supported", path=path, offset=offset)
    return value


def _mode(text: str, path: str, at: int) -> tuple[str, str, str | None]:
    """Return (mode, IV generator, its hash) of a cipher mode such as "cbc-essiv:sha256"."""
    chain, dash, ivgen = text.partition("-")
    where = at + _MODE_OFFSET
    if not dash:
        raise InvalidFormat(f"Unexpected cipher mode string format '{text}'", path=path, offset=where)
    ivgen, _, ivgen_hash = ivgen.partition(":")
    _known(chain, MODES, "Cipher mode", path, where)
    _known(ivgen, IV_GENERATORS, "IV generator", path, where)
    if ivgen == "essiv" and not ivgen_hash:
        raise InvalidFormat("Missing IV generator hash specification", path=path, offset=where)
    if ivgen_hash:
        _known(ivgen_hash, HASHES, "Hash algorithm", path, where)
    return chain, ivgen, ivgen_hash or None


def _cipher(family: str, mode: str, key_bytes: int, path: str, at: int) -> str:
    candidates = [algorithm for algorithm in CIPHERS.values() if algorithm.family == family]
    if not candidates:
        raise UnsupportedFeature(f"Algorithm '{family}' not supported", path=path, offset=at + 8)
    for algorithm in candidates:
        if algorithm.key_bytes * (2 if mode == "xts" else 1) == key_bytes:
            return algorithm.name
    raise UnsupportedFeature(
        f"Algorithm '{family}' with key size {key_bytes} bytes not supported", path=path, offset=at + _KEY_BYTES_OFFSET
    )


def _slot(data: bytes, index: int) -> Slot:
    active, iterations, salt, offset, stripes = SLOT.unpack_from(data, slot_at(index))
    return Slot(active == ENABLED, iterations, salt, offset, stripes)


def _check_slots(header: Header, data: bytes, wrong: Callable[[str, int], CowhandError]) -> None:
    length = header.material_bytes // SECTOR
    for index, slot in enumerate(header.slots):
        at = slot_at(index)
        state = int.from_bytes(data[at : at + 4], "big")
        if slot.stripes != STRIPES:
            raise wrong(f"Keyslot {index} is corrupted (stripes {slot.stripes} != {STRIPES})", at + 44)
        if state not in (ENABLED, DISABLED):
            raise wrong(f"Keyslot {index} state (active/disable) is corrupted", at)
        if slot.active and not slot.iterations:
            raise wrong(f"Keyslot {index} iteration count is zero", at + 4)
        if slot.offset < SLOT_AREA_AT // SECTOR:
            raise wrong(f"Keyslot {index} is overlapping with the LUKS header", at + 40)
        if header.payload and slot.offset + length > header.payload:
            raise wrong(f"Keyslot {index} is overlapping with the encrypted payload", at + 40)
        for number, other in enumerate(header.slots[index + 1 :], index + 1):
            if slot.offset < other.offset + length and other.offset < slot.offset + length:
                raise wrong(f"Keyslots {index} and {number} are overlapping in the header", at + 40)
