"""What unlocking a LUKS volume may cost: a header can ask for 2**32 iterations in each slot, hours of them ("LUKS1 On-Disk Format
Specification" 1.2.3, section 4.3).

Effort is counted in applications of SHA-256, or what takes as long. One core of an EPYC of 2022 does 4.3 million of them a second (SHA-1: 4.5,
SHA-512: 1.9, RIPEMD-160: 1.7, MD5: 1.6 million); creators measure the iterations for a time, 2 seconds if nobody says otherwise. The limit
holds eight slots of 2 seconds by a machine that is twice as fast, or one of 10 seconds (``iter-time=10000``) by one that is three times as fast,
and is 35 seconds here. QEMU has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.core.errors import UnsupportedFeature
from cowhand.crypto.algorithms import digest_size

if TYPE_CHECKING:
    from cowhand.crypto.luks import Header

#: Ours: for one passphrase, all slots that are tried together.
MAX_EFFORT = 150_000_000
#: Applications of SHA-256 that one of these takes as long as.
_WEIGHT = {"sha384": 2, "sha512": 2, "ripemd160": 3, "md5": 3}


def of_derivation(name: str, iterations: int, length: int) -> int:
    """Return what it costs to derive *length* bytes: PBKDF2 makes them in blocks of the hash's size."""
    return _WEIGHT.get(name, 1) * iterations * -(-length // digest_size(name))


def of_slot(header: Header, index: int) -> int:
    """Return what it costs to try a passphrase on slot *index*: the slot's key, and the digest of the master key."""
    slot = of_derivation(header.hash, header.slots[index].iterations, header.key_bytes)
    return slot + of_derivation(header.hash, header.digest_iterations, len(header.digest))


class Effort:
    """What may still be spent on one passphrase; *limit* 0 is no limit, None the usual one."""

    def __init__(self, limit: int | None) -> None:
        self.limit = MAX_EFFORT if limit is None else limit
        self._spent = 0
        self.left_out: list[int] = []  #: slots that were too much

    def covers(self, header: Header, index: int) -> bool:
        """Tell whether slot *index* can be tried as well, and count it."""
        cost = of_slot(header, index)
        if self.limit and self._spent + cost > self.limit:
            self.left_out.append(index)
            return False
        self._spent += cost
        return True

    def refusal(self, header: Header, path: str | None, option: str) -> UnsupportedFeature:
        """Return the error that names the slots left out, and *option*, which allows them."""
        from cowhand.crypto.luks import slot_at

        slots = ", ".join(str(index) for index in self.left_out)
        asked = sum(of_slot(header, index) for index in self.left_out)
        return UnsupportedFeature(
            f"key slot {slots} was not tried: that takes {asked} iterations of SHA-256, or as long, of which {self.limit - self._spent} are "
            f"left of the {self.limit} that one passphrase may cost",
            hint=f"If you trust the image, allow more with the option {option} (0: any number); four million take about a second.",
            path=path, offset=slot_at(self.left_out[0]),
        )  # fmt: skip
