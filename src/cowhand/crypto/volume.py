"""A LUKS volume: unlocking it, making one, and changing its key slots ("LUKS1 On-Disk Format Specification" 1.2.3, sections 4 and 5).

Where header and key material lie is the caller's to say, by two functions. A change of a slot is ordered so that a crash in the middle of it costs
that slot at worst: the slot's state lies in one sector and is written alone, after what it vouches for is stable, and before that is destroyed.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from cowhand.core.errors import AccessDenied, CowhandError, InvalidArgument, InvalidFormat
from cowhand.crypto import luks, secrets
from cowhand.crypto.algorithms import HASHES, IV_GENERATORS, MODES, cipher_named, digest_size, one_of
from cowhand.crypto.derivation import iterations_for, merge, pbkdf2, split
from cowhand.crypto.effort import MAX_EFFORT, Effort, of_derivation
from cowhand.crypto.sectors import SECTOR, SectorCipher

MIN_ITERATIONS = 1000  #: specified
DEFAULT_ITER_TIME = 2000  #: QEMU, milliseconds
#: Ours, of an open LUKS volume: what :class:`Effort` allows.
MAX_ITERATIONS_OPTION = "max-iterations"
#: Each pass is made stable before the next one.
_ERASE_PASSES = 3


class Store(Protocol):
    """Where header and key material are: offsets from the header's first byte."""

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def flush(self) -> None: ...


class Choice(NamedTuple):
    """What a new volume is made with."""

    cipher: str = "aes-256"
    mode: str = "xts"
    ivgen: str = "plain64"
    ivgen_hash: str | None = None
    hash: str = "sha256"
    iter_time: int = DEFAULT_ITER_TIME

    @classmethod
    def of(cls, options: Mapping[str, Any], prefix: str = "") -> Choice:
        """Return the choice in QEMU's creation options. Raises InvalidArgument and UnsupportedFeature."""

        def value(name: str, default: Any = None) -> Any:
            found = options.get(prefix + name)
            return default if found is None else found

        ivgen = one_of("ivgen-alg", value("ivgen-alg", "plain64"), IV_GENERATORS)
        ivgen_hash = value("ivgen-hash-alg", "sha256" if ivgen == "essiv" else None)
        if ivgen_hash is not None:
            one_of("ivgen-hash-alg", ivgen_hash, HASHES)
        chosen = cls(
            value("cipher-alg", "aes-256"), one_of("cipher-mode", value("cipher-mode", "xts"), MODES), ivgen,
            ivgen_hash, one_of("hash-alg", value("hash-alg", "sha256"), HASHES), iter_time(value("iter-time")),
        )  # fmt: skip
        cipher_named(chosen.cipher)
        digest_size(chosen.hash)
        return chosen


def iter_time(value: int | None) -> int:
    """Return the milliseconds to spend on a passphrase; raises InvalidArgument."""
    if value is None:
        return DEFAULT_ITER_TIME
    # None at all means as few iterations as LUKS allows.
    if value < 0 or value > 1 << 31:
        raise InvalidArgument(f"iter-time is 0 to {1 << 31} milliseconds, not {value}")
    return value


class Volume:
    """An unlocked volume: its header, its master key, the cipher of its payload; and what trying a passphrase on its slots may cost."""

    def __init__(self, header: luks.Header, key: bytes, max_iterations: int | None = None) -> None:
        self.header = header
        self.key = key
        self.max_iterations = max_iterations
        self.cipher = _cipher(header, key)


def _cipher(header: luks.Header, key: bytes) -> SectorCipher:
    return SectorCipher(header.cipher, header.mode, header.ivgen, key, ivgen_hash=header.ivgen_hash)


def unlock(
    header: luks.Header,
    store: Store,
    passphrases: Sequence[bytes],
    path: str,
    max_iterations: int | None = None,
    option: str = MAX_ITERATIONS_OPTION,
) -> Volume:
    """Open the volume with the first slot that one of *passphrases* fits. Raises AccessDenied when none does.

    *max_iterations* bounds what one passphrase may cost (see ``effort``), which *option* sets: UnsupportedFeature when slots were not tried for it.
    """
    cipher_named(header.cipher)
    left_out: Effort | None = None
    for passphrase in passphrases:
        effort = Effort(max_iterations)
        for index, slot in enumerate(header.slots):
            if slot.active and effort.covers(header, index):
                key = try_slot(header, store, index, passphrase)
                if key is not None:
                    return Volume(header, key, max_iterations)
        if effort.left_out:
            left_out = effort
    if left_out is not None:
        raise left_out.refusal(header, path, option)
    raise AccessDenied(
        "the passphrase opens none of the key slots",
        hint="Every byte of a key file counts, including a newline at its end.",
        qemu="Invalid password, cannot unlock any keyslot",
        path=path,
        errno=1,
    )


def try_slot(header: luks.Header, store: Store, index: int, passphrase: bytes) -> bytes | None:
    """Return the master key if *passphrase* fits slot *index*, which need not be active in the header given."""
    slot = header.slots[index]
    size = header.key_bytes
    wrapping = pbkdf2(header.hash, passphrase, slot.salt, slot.iterations, size)
    material = bytearray(store.read(slot.offset * SECTOR, header.material_bytes))
    _cipher(header, wrapping).decrypt_into(0, memoryview(material))
    key = merge(header.hash, bytes(material[: size * luks.STRIPES]), luks.STRIPES)
    found = pbkdf2(header.hash, key, header.digest_salt, header.digest_iterations, len(header.digest))
    return key if hmac.compare_digest(found, header.digest) else None


def header_bytes(choice: Choice) -> int:
    """Return the length of header and key material together: where the payload begins."""
    sectors = luks.slot_sectors(luks.key_bytes_of(choice.cipher, choice.mode))
    return luks.SLOT_AREA_AT + luks.SLOTS * sectors * SECTOR


def make(store: Store, choice: Choice, passphrase: bytes, *, detached: bool = False) -> Volume:
    """Write a new header with one key slot, and return the volume. What lies there is overwritten."""
    size = luks.key_bytes_of(choice.cipher, choice.mode)
    key, salt = os.urandom(size), os.urandom(32)
    iterations = max(MIN_ITERATIONS, iterations_for(choice.hash, 20, choice.iter_time) // 8)
    sectors = luks.slot_sectors(size)
    first = luks.SLOT_AREA_AT // SECTOR
    empty = tuple(luks.Slot(False, 0, bytes(32), first + index * sectors, luks.STRIPES) for index in range(luks.SLOTS))
    header = luks.Header(
        choice.cipher, choice.mode, choice.ivgen, choice.ivgen_hash, choice.hash,
        0 if detached else header_bytes(choice) // SECTOR, size,
        pbkdf2(choice.hash, key, salt, _within_limit(choice.hash, iterations, 20), 20), salt, iterations, str(uuid.uuid4()), empty,
    )  # fmt: skip
    volume = Volume(header, key)
    store.write(0, header.encode().ljust(luks.SLOT_AREA_AT, b"\0"))
    activate(volume, store, 0, passphrase, choice.iter_time)
    return volume


def _within_limit(name: str, iterations: int, length: int) -> int:
    """Return *iterations* if a volume that asks for so many opens again without a word of permission; raises InvalidArgument."""
    effort = of_derivation(name, iterations, length)
    if effort > MAX_EFFORT * 7 // 8 or iterations >= 1 << 32:
        raise InvalidArgument(
            f"{iterations} iterations of {name} are more than opening a volume may cost",
            hint="Choose a shorter iter-time.",
        )
    return iterations


def activate(volume: Volume, store: Store, index: int, passphrase: bytes, milliseconds: int) -> None:
    """Put the master key into slot *index* under *passphrase*; what the slot held is lost from the first write on."""
    header = volume.header
    size = header.key_bytes
    iterations = max(MIN_ITERATIONS, iterations_for(header.hash, size, milliseconds))
    _within_limit(header.hash, iterations, size)
    slot = header.slots[index]._replace(active=False, iterations=iterations, salt=os.urandom(32))
    wrapping = pbkdf2(header.hash, passphrase, slot.salt, iterations, size)
    material = split(header.hash, volume.key, luks.STRIPES, os.urandom(size * (luks.STRIPES - 1)))
    stored = bytes(_cipher(header, wrapping).encrypt(0, material.ljust(header.material_bytes, b"\0")))
    with _changing(volume, store, index):
        if header.slots[index].active:
            _set_state(store, index, luks.DISABLED)
        store.write(slot.offset * SECTOR, stored)
        store.write(luks.slot_at(index), slot.encode(active=False))
        store.flush()
        _set_state(store, index, luks.ENABLED)
        volume.header = header.with_slot(index, slot._replace(active=True))


def erase(volume: Volume, store: Store, index: int) -> None:
    """Make slot *index* inactive, stably, then overwrite its key material."""
    header = volume.header
    slot = header.slots[index]._replace(active=False, iterations=0, salt=bytes(32))
    with _changing(volume, store, index):
        _set_state(store, index, luks.DISABLED)
        volume.header = header.with_slot(index, slot)
        store.write(luks.slot_at(index), slot.encode(active=False))
        for _ in range(_ERASE_PASSES):
            store.write(slot.offset * SECTOR, os.urandom(header.material_bytes))
            store.flush()


@contextlib.contextmanager
def _changing(volume: Volume, store: Store, index: int) -> Iterator[None]:
    """Change slot *index* in the ``with`` block; after an error *volume* knows of it what the store says.

    Who erases a slot counts the active ones: one that is taken for active and is not would let the last one go.
    """
    try:
        yield
    except BaseException:
        slot = volume.header.slots[index]._replace(active=False)
        with contextlib.suppress(CowhandError, OSError):
            state = store.read(luks.slot_at(index), luks.SLOT.size)
            active, iterations, salt, _, _ = luks.SLOT.unpack(state)
            slot = slot._replace(active=active == luks.ENABLED, iterations=iterations, salt=salt)
        volume.header = volume.header.with_slot(index, slot)
        raise


def _set_state(store: Store, index: int, state: int) -> None:
    store.write(luks.slot_at(index), state.to_bytes(4, "big"))
    store.flush()


def amend(volume: Volume, store: Store, options: Mapping[str, Any], *, force: bool, prefix: str = "") -> None:
    """Add or erase key slots as QEMU's amend options say (state, keyslot, old-secret, new-secret, iter-time).

    Raises InvalidArgument before anything is written. Without *force* no active slot is overwritten and the last one is not erased.
    """
    chosen = {
        name: options.get(prefix + name) for name in ("state", "keyslot", "old-secret", "new-secret", "iter-time")
    }
    if chosen["state"] is None:
        raise InvalidArgument("Parameter 'state' is missing", hint="state is active or inactive.")
    one_of("state", chosen["state"], ("active", "inactive"))
    if chosen["state"] == "active":
        _add(volume, store, chosen, force)
    else:
        _remove(volume, store, chosen, force)


def _slot_number(value: int) -> int:
    if not 0 <= value < luks.SLOTS:
        within = f"must be between 0 and {luks.SLOTS - 1}"
        raise InvalidArgument(
            f"Invalid keyslot {value} specified, {within}",
            qemu=f"Invalid keyslot {value & 0xFFFFFFFF} specified, {within}",
        )
    return value


def _add(volume: Volume, store: Store, chosen: Mapping[str, Any], force: bool) -> None:
    if chosen["new-secret"] is None:
        raise InvalidArgument("'new-secret' is required to activate a keyslot")
    if chosen["old-secret"] is not None:
        raise InvalidArgument("'old-secret' must not be given when activating keyslots")
    slots = volume.header.slots
    free = [index for index, slot in enumerate(slots) if not slot.active]
    if chosen["keyslot"] is not None:
        index = _slot_number(chosen["keyslot"])
        if slots[index].active and not force:
            raise InvalidArgument(f"Refusing to overwrite active keyslot {index} - please erase it first")
    elif not free:
        raise InvalidArgument("Can't add a keyslot - all keyslots are in use")
    else:
        index = free[0]
    milliseconds = iter_time(chosen["iter-time"])
    passphrase = secrets.passphrase(chosen["new-secret"])
    if slots[index].active and len(free) == luks.SLOTS - 1:
        # The only slot: the new passphrase is put elsewhere first, so that at every moment one of them opens the volume.
        activate(volume, store, free[0], passphrase, milliseconds)
        activate(volume, store, index, passphrase, milliseconds)
        erase(volume, store, free[0])
        return
    activate(volume, store, index, passphrase, milliseconds)


def _remove(volume: Volume, store: Store, chosen: Mapping[str, Any], force: bool) -> None:
    if chosen["new-secret"] is not None:
        raise InvalidArgument("'new-secret' must not be given when erasing keyslots")
    if chosen["iter-time"] is not None:
        raise InvalidArgument("'iter-time' must not be given when erasing keyslots")
    active = [index for index, slot in enumerate(volume.header.slots) if slot.active]
    old = secrets.passphrase(chosen["old-secret"]) if chosen["old-secret"] is not None else None
    if chosen["keyslot"] is not None:
        doomed = [_erasable(volume, store, _slot_number(chosen["keyslot"]), old, active, force)]
    elif old is not None:
        doomed = _opened_by(volume, store, active, old)
        if not doomed:
            raise InvalidArgument("No keyslots match given (old) password for erase operation")
        if len(doomed) == len(active) and not force:
            raise InvalidArgument(
                "All the active keyslots match the (old) password that was given and erasing them will erase all the data in the "
                "image irreversibly - refusing operation"
            )
    else:
        raise InvalidArgument(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given"
        )
    for index in doomed:
        erase(volume, store, index)


def _opened_by(volume: Volume, store: Store, slots: list[int], passphrase: bytes) -> list[int]:
    """Return those of the *slots* that *passphrase* opens. Raises UnsupportedFeature before the first when to try all costs too much."""
    effort = Effort(volume.max_iterations)
    for index in slots:
        effort.covers(volume.header, index)
    if effort.left_out:
        raise effort.refusal(volume.header, None, MAX_ITERATIONS_OPTION)
    return [index for index in slots if try_slot(volume.header, store, index, passphrase) is not None]


def _erasable(volume: Volume, store: Store, index: int, old: bytes | None, active: list[int], force: bool) -> int:
    if old is not None and (index not in active or not _opened_by(volume, store, [index], old)):
        raise InvalidArgument(f"Given keyslot {index} doesn't contain the given old password for erase operation")
    if index not in active and not force:
        raise InvalidArgument(f"Given keyslot {index} is already erased (inactive) ")
    if active == [index] and not force:
        raise InvalidArgument(
            f"Attempt to erase the only active keyslot {index} which will erase all the data in the image irreversibly - "
            "refusing operation"
        )
    return index


def describe(header: luks.Header) -> dict[str, Any]:
    """Return what ``info`` tells of a volume, keys as in QEMU's JSON."""
    out: dict[str, Any] = {
        "ivgen-alg": header.ivgen, "hash-alg": header.hash, "cipher-alg": header.cipher, "uuid": header.uuid,
        "cipher-mode": header.mode, "payload-offset": header.payload * SECTOR, "master-key-iters": header.digest_iterations,
    }  # fmt: skip
    out["detached-header"] = header.payload == 0
    if header.ivgen == "essiv":
        out["ivgen-hash-alg"] = header.ivgen_hash
    out["slots"] = [
        {"active": slot.active, "key-offset": slot.offset * SECTOR}
        | ({"iters": slot.iterations, "stripes": slot.stripes} if slot.active else {})
        for slot in header.slots
    ]
    return out


def read_header(read: Callable[[int, int], bytes], size: int, path: str, *, detached: bool = False) -> luks.Header:
    """Parse the header of a volume of *size* bytes that *read* gives the bytes of."""
    if size < luks.HEADER_BYTES:
        raise InvalidFormat(
            "the file ends inside the LUKS header", qemu="Volume is not in LUKS format", path=path, offset=size
        )
    return luks.parse(read(0, luks.HEADER_BYTES), path, detached=detached)
