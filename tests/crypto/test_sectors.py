"""Sector encryption: against published vectors, against the library a sector at a time, and there and back."""

from __future__ import annotations

import hashlib
import random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings, strategies as st

from cowhand.core.errors import CowhandError, UnsupportedFeature
from cowhand.crypto import native
from cowhand.crypto.sectors import SECTOR, SectorCipher

_KEYS = {"aes-128": 16, "aes-192": 24, "aes-256": 32, "cast5-128": 16}


def test_ieee_1619_vector_4() -> None:
    # XTS-AES-128 applied for a data unit of 512 bytes, sector number 0.
    key = bytes.fromhex("2718281828459045235360287471352631415926535897932384626433832795")
    found = SectorCipher("aes-128", "xts", "plain64", key).encrypt(0, bytes(range(256)) * 2)
    assert found[:32].hex() == "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c"
    assert found[-16:].hex() == "0a282df920147beabe421ee5319d0568"


def _by_sector(mode: str, ivgen: str, key: bytes, sector: int, data: bytes) -> bytes:
    """What the library alone makes of each sector."""
    out = b""
    for number in range(len(data) // SECTOR):
        vector = (sector + number).to_bytes(16, "little")
        if ivgen == "plain":
            vector = (sector + number & 0xFFFFFFFF).to_bytes(16, "little")
        if ivgen == "essiv":
            vector = Cipher(algorithms.AES(hashlib.sha256(key).digest()), modes.ECB()).encryptor().update(vector)
        chain = {"cbc": modes.CBC, "ctr": modes.CTR, "xts": modes.XTS}[mode](vector)
        piece = data[number * SECTOR : (number + 1) * SECTOR]
        out += Cipher(algorithms.AES(key), chain).encryptor().update(piece)
    return out


@pytest.mark.parametrize("ivgen", ["plain", "plain64", "essiv"])
@pytest.mark.parametrize("mode", ["cbc", "ctr", "xts"])
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 1 << 32), count=st.integers(1, 40), sector=st.sampled_from([0, 1, 0xFFFFFFF0, (1 << 55) - 3])
)
def test_a_run_is_what_its_sectors_are(mode: str, ivgen: str, seed: int, count: int, sector: int) -> None:
    rng = random.Random(seed)
    key, data = rng.randbytes(64 if mode == "xts" else 32), rng.randbytes(count * SECTOR)
    cipher = SectorCipher("aes-256", mode, ivgen, key, ivgen_hash="sha256")
    stored = cipher.encrypt(sector, data)
    assert bytes(stored) == _by_sector(mode, ivgen, key, sector, data)
    cipher.decrypt_into(sector, memoryview(stored))
    assert bytes(stored) == data


@pytest.mark.parametrize("mode", ["ecb", "cbc", "ctr", "xts"])
@pytest.mark.parametrize("algorithm", sorted(_KEYS))
def test_there_and_back_past_one_run(algorithm: str, mode: str, rng: random.Random) -> None:
    if algorithm == "cast5-128" and mode == "xts":
        with pytest.raises(UnsupportedFeature, match="blocks of 16 bytes"):
            SectorCipher(algorithm, mode, "plain64", bytes(32))
        return
    cipher = SectorCipher(algorithm, mode, "plain64", rng.randbytes(_KEYS[algorithm] * (2 if mode == "xts" else 1)))
    data = rng.randbytes(1300 * SECTOR)
    whole = cipher.encrypt(5, data)
    assert whole != data
    assert bytes(whole[700 * SECTOR : 701 * SECTOR]) == bytes(cipher.encrypt(705, data[700 * SECTOR : 701 * SECTOR]))
    cipher.decrypt_into(5, memoryview(whole))
    assert bytes(whole) == data


@pytest.mark.parametrize("name", ["serpent-256", "twofish-128", "3des", "rot13"])
def test_a_cipher_that_no_library_offers_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda family, key_bytes: False)
    with pytest.raises(CowhandError, match=name):
        SectorCipher(name, "xts", "plain64", bytes(64))


def test_essiv_needs_a_cipher_as_wide_as_its_hash() -> None:
    with pytest.raises(UnsupportedFeature, match="No AES cipher with key size 64 available"):
        SectorCipher("aes-256", "cbc", "essiv", bytes(32), ivgen_hash="sha512")


#: (family, key, plain, cipher) from the submissions of Serpent and Twofish to NIST's competition.
_VECTORS = [
    ("serpent", "00" * 16, "00" * 16, "3620b17ae6a993d09618b8768266bae9"),
    ("serpent", "80" + "00" * 31, "00" * 16, "a223aa1288463c0e2be38ebd825616c0"),
    ("twofish", "00" * 16, "00" * 16, "9f589f5cf6122c32b6bfec2f2ae8c35a"),
    ("twofish", "00" * 32, "00" * 16, "57ff739d4dc92c1bd7fc01700cc8216f"),
]


@pytest.mark.parametrize(("family", "key", "plain", "cipher"), _VECTORS)
def test_the_systems_libraries_give_the_published_answers(family: str, key: str, plain: str, cipher: str) -> None:
    makers = [native._nettle_ecb(family, bytes.fromhex(key)), native._gcrypt_ecb(family, bytes.fromhex(key))]
    found = [one for one in makers if one is not None]
    if not found:
        pytest.skip("neither Nettle nor Libgcrypt is installed")
    for one in found:
        assert one.encrypt(bytes.fromhex(plain) * 3).hex() == cipher * 3
        assert one.decrypt(bytes.fromhex(cipher)).hex() == plain
