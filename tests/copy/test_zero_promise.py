"""``target_is_zero`` is a promise that is looked into: where it is not kept zeroes are written, and the user hears of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowhand
from cowhand.copy.ops.convert import convert
from cowhand.copy.ops.zero_promise import broken_promise
from cowhand.crypto import secrets
from cowhand.image.create import create

_SIZE = 1 << 20


def _source(folder: Path) -> Path:
    path = folder / "source.raw"
    path.write_bytes(b"data".ljust(4096, b".") + bytes(_SIZE - 4096))
    return path


def test_an_encrypted_target_is_no_zeroes(tmp_path: Path) -> None:
    source, target, heard = _source(tmp_path), tmp_path / "t.luks", []
    with secrets.offering([b"passphrase"]):
        create(target, "luks", _SIZE, {"iter-time": "1"})
        convert(source, target, "luks", source_format="raw", skip_create=True, target_is_zero=True, warn=heard.append)
        with cowhand.open(target, format="luks") as disk:
            assert disk.read(0, _SIZE) == source.read_bytes()
    assert len(heard) == 1 and "does not read as zeroes" in heard[0]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_target_that_holds_data_is_no_zeroes(format: str, tmp_path: Path) -> None:
    source, target, heard = _source(tmp_path), tmp_path / "target", []
    create(target, format, _SIZE)
    with cowhand.open(target, format=format, writable=True) as disk:
        disk.write(3 * _SIZE // 4, b"old data")
    convert(source, target, format, source_format="raw", skip_create=True, target_is_zero=True, warn=heard.append)
    with cowhand.open(target, format=format) as disk:
        assert disk.read(0, _SIZE) == source.read_bytes()
    assert len(heard) == 1 and "holds data at" in heard[0]


def test_a_target_of_zeroes_is_believed(tmp_path: Path) -> None:
    target = tmp_path / "t.raw"
    target.write_bytes(bytes(_SIZE))
    with cowhand.open(target, format="raw") as disk:
        assert broken_promise(disk) is None
