"""Keys from passphrases, and the anti-forensic splitter."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings, strategies as st

from cowhand.crypto.derivation import iterations_for, merge, pbkdf2, split


def test_rfc_6070_vector() -> None:
    assert pbkdf2("sha1", b"password", b"salt", 4096, 20).hex() == "4b007901b765489abead49d926f721d065a429c1"


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 1 << 32), st.sampled_from([16, 24, 32, 48, 64]), st.integers(1, 40), st.sampled_from(["md5", "sha1", "sha256", "sha512"])
)  # fmt: skip
def test_what_is_split_is_merged(seed: int, size: int, stripes: int, name: str) -> None:
    rng = random.Random(seed)
    key = rng.randbytes(size)
    material = split(name, key, stripes, rng.randbytes(size * (stripes - 1)))
    assert len(material) == size * stripes
    assert merge(name, material, stripes) == key


def test_one_lost_bit_of_the_material_loses_the_key(rng: random.Random) -> None:
    key = rng.randbytes(32)
    material = bytearray(split("sha256", key, 100, rng.randbytes(32 * 99)))
    material[rng.randrange(32 * 99)] ^= 1
    found = merge("sha256", bytes(material), 100)
    assert sum(a != b for a, b in zip(found, key, strict=True)) > 16


@pytest.mark.parametrize("milliseconds", [1, 1000])
def test_iterations_follow_the_time(milliseconds: int) -> None:
    assert iterations_for("sha256", 32, milliseconds) > 100 * milliseconds
