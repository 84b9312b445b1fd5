"""The passphrases of an encrypted image: key slots of LUKS volumes, and of LUKS inside qcow2, added, changed and removed.

Each passphrase has a slot of its own, which holds the master key under it; the data is not touched. A change adds the new one before it removes the
old one, so that at every moment, also after a crash, one of them opens the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.graph.block_status import skip_filters
from cowhand.core.errors import AccessDenied, InvalidArgument, NotSupported
from cowhand.crypto import luks, secrets

if TYPE_CHECKING:
    from cowhand.block.disk import Disk

_OLD, _NEW = "cowhand-slot-old", "cowhand-slot-new"


class KeySlot(NamedTuple):
    """One key slot: its number, whether it holds a passphrase, and the iterations that a guess costs."""

    number: int
    active: bool
    iterations: int


def key_slots(disk: Disk) -> list[KeySlot]:
    """Return the key slots of *disk*'s image. Raises NotSupported where it is not encrypted with LUKS."""
    return [KeySlot(number, slot.active, slot.iterations) for number, slot in enumerate(_header(disk).slots)]


def add_passphrase(
    disk: Disk, new: bytes | str, *, slot: int | None = None, iter_time: int | None = None, force: bool = False
) -> int:
    """Let *new* open the image, too; return the slot, the first free one unless *slot* is given. *iter_time*: milliseconds that a guess costs.

    *disk* is open for writing. Without *force* no slot in use is taken. Raises InvalidArgument, NotSupported, ReadOnly, IOFailed.
    """
    before = key_slots(disk)
    if slot is None:
        slot = next((one.number for one in before if not one.active), None)
        if slot is None:
            raise InvalidArgument(
                f"all {luks.SLOTS} key slots are in use",
                path=disk.filename,
                hint="Remove a passphrase that is not needed first.",
            )
    _check_slot(slot)
    if before[slot].active and not force:
        raise InvalidArgument(
            f"key slot {slot} is in use",
            path=disk.filename,
            hint="Choose a free one, or insist with --force: its passphrase is lost.",
        )
    with _held(_NEW, new):
        _amend(disk, {"state": "active", "keyslot": slot, "new-secret": _NEW, "iter-time": iter_time}, force=force)
    return slot


def remove_passphrase(
    disk: Disk, old: bytes | str | None = None, *, slot: int | None = None, force: bool = False
) -> list[int]:
    """Erase *slot*, or all slots that *old* opens; return their numbers. The last one is erased with *force* alone: all data is lost then.

    *disk* is open for writing. Raises AccessDenied where *old* opens none, InvalidArgument, NotSupported, ReadOnly, IOFailed.
    """
    if (old is None) == (slot is None):
        raise InvalidArgument("give either the passphrase that is to go, or its key slot")
    active = [one.number for one in key_slots(disk) if one.active]
    last = InvalidArgument(
        "no passphrase would be left, and all data in the image would be lost",
        path=disk.filename,
        hint="Add another one first, or insist with --force: nothing brings the data back.",
    )
    if slot is not None:
        _check_slot(slot)
        if slot not in active:
            raise InvalidArgument(
                f"key slot {slot} is not in use", path=disk.filename, hint=f"In use: {_names(active)}."
            )
        if active == [slot] and not force:
            raise last
        _amend(disk, {"state": "inactive", "keyslot": slot}, force=force)
        return [slot]
    assert old is not None
    with _held(_OLD, old):
        try:
            _amend(disk, {"state": "inactive", "old-secret": _OLD}, force=force)
        except InvalidArgument as error:
            if error.message.startswith("All the active keyslots"):
                raise last from None
            if error.message.startswith("No keyslots match"):
                raise AccessDenied("the passphrase opens none of the key slots", path=disk.filename) from None
            raise
    left = {one.number for one in key_slots(disk) if one.active}
    return [number for number in active if number not in left]


def change_passphrase(
    disk: Disk, old: bytes | str, new: bytes | str, *, iter_time: int | None = None, force: bool = False
) -> int:
    """Put *new* in the place of *old*, which opens the image no longer; return the slot of *new*. Other passphrases stay.

    *disk* is open for writing. Raises as :func:`add_passphrase` and :func:`remove_passphrase`; then *old* still opens the image.
    """
    if _bytes(old) == _bytes(new):
        raise InvalidArgument("the new passphrase is the old one", path=disk.filename)
    slot = add_passphrase(disk, new, iter_time=iter_time)
    try:
        remove_passphrase(disk, old)
    except AccessDenied:
        remove_passphrase(disk, slot=slot)
        raise
    return slot


def _header(disk: Disk) -> luks.Header:
    root: Any = skip_filters(disk.root)
    found = getattr(root, "encryption", None)
    header = found if isinstance(found, luks.Header) else getattr(found, "luks", None)
    if not isinstance(header, luks.Header):
        raise NotSupported(
            f"'{disk.filename}' has no passphrases that can be changed: it is not encrypted with LUKS",
            path=disk.filename,
            hint="Make an encrypted copy: cowhand convert --encrypt SOURCE TARGET",
        )
    return header


def _amend(disk: Disk, options: dict[str, Any], *, force: bool) -> None:
    root: Any = skip_filters(disk.root)
    prefix = "" if root.driver == "luks" else "encrypt."
    root.amend({prefix + name: value for name, value in options.items() if value is not None}, force=force)
    disk.flush()


@contextmanager
def _held(ident: str, passphrase: bytes | str) -> Iterator[None]:
    data = _bytes(passphrase)
    if not data:
        raise InvalidArgument("an empty passphrase protects nothing")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidArgument("a passphrase has to be text (UTF-8): QEMU could not be given another one") from None
    with secrets.given({ident: data}):
        yield


def _bytes(passphrase: bytes | str) -> bytes:
    return passphrase.encode() if isinstance(passphrase, str) else bytes(passphrase)


def _check_slot(slot: int) -> None:
    if not 0 <= slot < luks.SLOTS:
        raise InvalidArgument(f"there is no key slot {slot}, only 0 to {luks.SLOTS - 1}")


def _names(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
