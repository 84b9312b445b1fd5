"""Secrets by id."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.crypto import secrets


def test_raw_and_base64_and_files(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"c2VjcmV0\n")
    assert secrets.load({"data": "secret"}) == b"secret"
    assert secrets.load({"data": "c2VjcmV0", "format": "base64"}) == b"secret"
    assert secrets.load({"file": str(tmp_path / "key"), "format": "base64"}) == b"secret"
    assert secrets.load({"file": str(tmp_path / "key")}) == b"c2VjcmV0\n"


def test_one_secret_encrypted_by_another() -> None:
    key, vector = bytes(range(32)), bytes(range(16))
    encryptor = Cipher(algorithms.AES(key), modes.CBC(vector)).encryptor()
    stored = encryptor.update(b"passphrase" + bytes([6]) * 6)
    given = {
        "data": base64.b64encode(stored).decode(),
        "format": "base64",
        "keyid": "k",
        "iv": base64.b64encode(vector).decode(),
    }
    with secrets.given({"k": key}):
        assert secrets.load(given) == b"passphrase"
    with pytest.raises(InvalidArgument, match="No secret with id 'k'"):
        secrets.load(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Either 'file' or 'data'"),
        ({"data": "a", "file": "b"}, "mutually exclusive"),
        ({"data": "???", "format": "base64"}, "not base64"),
        ({"file": "/nonexistent/key"}, "reading a secret"),
        ({"data": "x", "keyid": "short"}, "Key should be 32 bytes"),
    ],
)
def test_what_is_no_secret(given: dict[str, str], message: str) -> None:
    with secrets.given({"short": b"k"}), pytest.raises(CowhandError, match=message):
        secrets.load(given)


def test_what_was_there_before_comes_back() -> None:
    with secrets.given({"nested": b"1"}):
        with secrets.given({"nested": "2"}):
            assert secrets.lookup("nested") == b"2"
        assert secrets.lookup("nested") == b"1"
    with pytest.raises(InvalidArgument):
        secrets.lookup("nested")


def test_a_passphrase_is_text_and_its_error_does_not_show_it() -> None:
    with secrets.given({"p": b"hush\xff"}), pytest.raises(InvalidArgument) as caught:
        secrets.passphrase("p")
    assert "hush" not in str(caught.value)
