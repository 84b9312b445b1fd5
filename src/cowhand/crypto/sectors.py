"""Disk encryption by sectors of 512 bytes: modes and IV generators as LUKS and dm-crypt define them; XTS by IEEE Std 1619-2007.

A run of many sectors is one call of the block cipher: the tweaks of all blocks are computed as columns (doubling in the field by 1, 2, 4, 8 and 16
steps at once), and combined by XOR of whole arrays.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from cowhand.core.errors import UnsupportedFeature
from cowhand.crypto.algorithms import Algorithm, Ecb, cipher_named, digest, ecb

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cowhand.core.buffers import Buffer

SECTOR = 512
#: Sectors that are worked on at once: many enough that threads seldom wait for the interpreter between two operations.
_RUN = 2048
#: Blocks that rows of tweaks are longer by: rows a power of two apart would meet in the same places of the processor's cache.
_SPREAD = 4


class SectorCipher:
    """A cipher, mode and IV generator with a *key* (for XTS two keys, one behind the other). Thread-safe."""

    def __init__(self, algorithm: str, mode: str, ivgen: str, key: bytes, *, ivgen_hash: str | None = None) -> None:
        self.algorithm = cipher_named(algorithm)
        self.mode = mode
        self.ivgen = ivgen
        self._key = key
        self._essiv: tuple[Algorithm, bytes] | None = None
        if mode == "xts" and self.algorithm.block_bytes != 16:
            raise UnsupportedFeature(
                f"XTS needs a cipher with blocks of 16 bytes, which {algorithm} has not",
                qemu=f"Algorithm '{algorithm}' not supported",
            )
        if ivgen == "essiv":
            assert ivgen_hash is not None
            self._essiv = _essiv_key(self.algorithm, key, ivgen_hash)
        self._local = threading.local()

    def encrypt(self, sector: int, data: Buffer) -> bytearray:
        """Return the ciphertext of *data*, whole sectors of which the first has the number *sector*."""
        out = bytearray(len(data))
        self._work(sector, data, out, True)
        return out

    def decrypt_into(self, sector: int, view: memoryview) -> None:
        """Replace the ciphertext in the writable *view* by what it means."""
        self._work(sector, view, view, False)

    def _work(self, sector: int, data: Buffer, out: Any, encrypting: bool) -> None:
        source, target = memoryview(data), memoryview(out)
        if len(source) % SECTOR:
            raise AssertionError(f"{len(source)} bytes are no whole sectors")
        for begin in range(0, len(source), _RUN * SECTOR):
            piece = source[begin : begin + _RUN * SECTOR]
            into = target[begin : begin + len(piece)]
            if self.mode == "xts":
                self._run_xts(sector + begin // SECTOR, piece, into, encrypting)
            else:
                into[:] = self._run(sector + begin // SECTOR, piece, encrypting)

    def _ciphers(self) -> tuple[Ecb, Ecb | None, Ecb | None]:
        """Return this thread's block ciphers: for data, for XTS's tweaks, for ESSIV."""
        found = getattr(self._local, "ciphers", None)
        if found is None:
            size = self.algorithm.key_bytes
            tweak = ecb(self.algorithm, self._key[size:]) if self.mode == "xts" else None
            essiv = ecb(*self._essiv) if self._essiv is not None else None
            found = self._local.ciphers = ecb(self.algorithm, self._key[:size]), tweak, essiv
        return found

    def _run_xts(self, sector: int, piece: memoryview, into: memoryview, encrypting: bool) -> None:
        """Do a run in XTS mode from *piece* to *into*, which may be the same."""
        import numpy as np

        count = len(piece) // SECTOR
        data, tweak, essiv = self._ciphers()
        assert tweak is not None
        work: _XtsWork | None = getattr(self._local, "work", None) if count == _RUN else None
        if work is None:
            work = _XtsWork(count)
            if count == _RUN:
                self._local.work = work
        vectors = _vectors(sector, count, 16, self.ivgen, essiv)
        tweaks = work.tweaks(np.frombuffer(tweak.encrypt(vectors.tobytes()), "<u8").reshape(count, 2))
        np.bitwise_xor(np.frombuffer(piece, "<u8"), tweaks, out=work.mixed)
        (data.encrypt_into if encrypting else data.decrypt_into)(work.mixed.data.cast("B"), work.done)
        np.bitwise_xor(work.done_words, tweaks, out=np.frombuffer(into, "<u8"))

    def _run(self, sector: int, piece: memoryview, encrypting: bool) -> Any:
        import numpy as np

        count = len(piece) // SECTOR
        data, _, essiv = self._ciphers()
        block = data.encrypt if encrypting else data.decrypt
        if self.mode == "ecb":
            return block(bytes(piece))
        vectors = _vectors(sector, count, self.algorithm.block_bytes, self.ivgen, essiv)
        blocks = np.frombuffer(piece, np.uint8).reshape(count, -1, self.algorithm.block_bytes)
        if self.mode == "ctr":
            stream = data.encrypt(_counters(vectors, blocks.shape[1]).tobytes())
            return (blocks.ravel() ^ np.frombuffer(stream, np.uint8)).data
        return _cbc(data, blocks, vectors, encrypting).ravel().data


def _essiv_key(algorithm: Algorithm, key: bytes, ivgen_hash: str) -> tuple[Algorithm, bytes]:
    """Return the cipher, of *algorithm*'s family, whose key is as long as the hash of *key*, and that hash."""
    hashed = digest(ivgen_hash, key)
    name = f"{algorithm.family}-{len(hashed) * 8}"
    if algorithm.family == "cast5" and len(hashed) != algorithm.key_bytes:
        raise UnsupportedFeature(f"Cipher {algorithm.name} not supported with essiv")
    if len(hashed) not in (16, 24, 32):
        family = {"aes": "AES"}.get(algorithm.family, algorithm.family.capitalize())
        raise UnsupportedFeature(f"No {family} cipher with key size {len(hashed)} available")
    return cipher_named(name), hashed


def _vectors(sector: int, count: int, size: int, ivgen: str, essiv: Ecb | None) -> NDArray[np.uint8]:
    """Return the initialisation vectors of *count* sectors as rows of *size* bytes."""
    import numpy as np

    numbers = np.arange(count, dtype="<u8") + np.uint64(sector)
    if ivgen == "plain":
        numbers &= np.uint64(0xFFFFFFFF)
    out = np.zeros((count, size // 8), "<u8")
    out[:, 0] = numbers
    if essiv is not None:
        return np.frombuffer(essiv.encrypt(out.tobytes()), np.uint8).reshape(count, size)
    return out.view(np.uint8)


class _XtsWork:
    """Arrays for a run of *count* sectors in XTS mode, made once for many: new ones cost more than what is done in them."""

    def __init__(self, count: int) -> None:
        import numpy as np

        blocks = SECTOR // 16
        # Words of all sectors side by side, block by block: then each step is one operation on adjoining memory.
        self._low, self._high = np.empty((2, blocks, count), "<u8")
        self._carry, self._shifted = np.empty((2, blocks // 2, count), "<u8")
        self._pairs = np.empty((blocks, count + _SPREAD, 2), "<u8")[:, :count]
        self._columns = self._pairs.view(np.complex128)[:, :, 0].T
        self._tweaks = np.empty((count, blocks * 2), "<u8")
        self.mixed = np.empty(count * blocks * 2, "<u8")
        #: The library demands room for an unfinished block.
        self.done = bytearray(count * SECTOR + 15)
        self.done_words = np.frombuffer(self.done, "<u8", count * blocks * 2)

    def tweaks(self, start: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the tweaks of all blocks of all sectors, whose first ones *start* has as rows of (low, high). Valid until the next call."""
        import numpy as np

        lows, highs = self._low, self._high
        lows[0], highs[0] = start[:, 0], start[:, 1]
        have = 1
        while have < len(lows):
            shift, back = np.uint64(have), np.uint64(64 - have)
            low, high, carry, shifted = lows[:have], highs[:have], self._carry[:have], self._shifted[:have]
            next_low, next_high = lows[have : 2 * have], highs[have : 2 * have]
            np.right_shift(high, back, out=carry)
            np.left_shift(low, shift, out=next_low)
            # x^128 = x^7 + x^2 + x + 1
            np.bitwise_xor(next_low, carry, out=next_low)
            for power in (1, 2, 7):
                np.left_shift(carry, np.uint64(power), out=shifted)
                np.bitwise_xor(next_low, shifted, out=next_low)
            np.left_shift(high, shift, out=next_high)
            np.right_shift(low, back, out=shifted)
            np.bitwise_or(next_high, shifted, out=next_high)
            have *= 2
        self._pairs[:, :, 0], self._pairs[:, :, 1] = lows, highs
        # From blocks of sectors to sectors of blocks: 16 bytes at a time, which numpy has as complex numbers.
        self._tweaks.view(np.complex128)[:] = self._columns
        return self._tweaks.reshape(-1)


def _counters(vectors: NDArray[np.uint8], blocks: int) -> NDArray[np.uint8]:
    """Return the counters of each sector's blocks: its vector as a big-endian number, and the following ones."""
    import numpy as np

    count, size = vectors.shape
    words = np.repeat(vectors.view(">u8").astype(np.uint64), blocks, axis=0).reshape(count, blocks, size // 8)
    before = words[:, :, -1].copy()
    words[:, :, -1] += np.arange(blocks, dtype=np.uint64)
    if size == 16:
        words[:, :, 0] += (words[:, :, -1] < before).astype(np.uint64)
    return words.astype(">u8").view(np.uint8)


def _cbc(cipher: Ecb, blocks: NDArray[np.uint8], vectors: NDArray[np.uint8], encrypting: bool) -> NDArray[np.uint8]:
    """Chain the blocks of each sector; encrypting goes a block of all sectors at a time."""
    import numpy as np

    if not encrypting:
        before = np.concatenate((vectors[:, None, :], blocks[:, :-1]), axis=1)
        plain = np.frombuffer(cipher.decrypt(blocks.tobytes()), np.uint8)
        return plain.reshape(blocks.shape) ^ before
    out = np.empty_like(blocks)
    last = vectors
    for index in range(blocks.shape[1]):
        last = np.frombuffer(cipher.encrypt((blocks[:, index] ^ last).tobytes()), np.uint8).reshape(last.shape)
        out[:, index] = last
    return out
