"""Encrypted qcow2 images that QEMU made, read: LUKS and the old AES, snapshots and backing files included."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.formats.qcow2.ondisk import layout as L
from cowhand.core.errors import AccessDenied, CowhandError, InvalidArgument
from cowhand.crypto import secrets
from cowhand.image.snapshots import open_snapshot
from tests.tools.programs import ProgramFailed
from tests.tools.qemu import qemu_img, qemu_io, require_qemu

pytestmark = require_qemu
_OBJECT = "secret,id=s0,data=passphrase"
_SIZE = 4 << 20


@pytest.fixture(autouse=True)
def known_secret() -> Iterator[None]:
    with secrets.given({"s0": "passphrase", "s1": "another"}):
        yield


@pytest.fixture(scope="module", params=["aes", "luks"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image with data, zeroes, a compressed cluster and a snapshot, in which the first bytes were others."""
    path = tmp_path_factory.mktemp("made") / f"{request.param}.qcow2"
    options = f"encrypt.format={request.param},encrypt.key-secret=s0,cluster_size=4k"
    if request.param == "luks":
        options += ",encrypt.iter-time=10"
    for attempt in range(8):
        try:
            qemu_img("create", "-q", "-f", "qcow2", "--object", _OBJECT, "-o", options, path, str(_SIZE))
            break
        except ProgramFailed as failure:
            # QEMU times its key derivation, which a loaded machine may not let it.
            if attempt == 7 or "accurate CPU usage" not in failure.result.stderr:
                raise
    text = f"driver=qcow2,file.filename={path},encrypt.key-secret=s0"
    tool = ("--object", _OBJECT, "--image-opts")
    qemu_io(text, "write -P 1 0 64k", options=tool)
    qemu_img("snapshot", *tool[:2], "--image-opts", "-c", "before", text)
    qemu_io(text, "write -P 2 0 9k", "write -P 3 1M 1537", "write -z 2M 64k", "write -c -P 4 3M 4k", options=tool)
    return path


@pytest.fixture
def image(made: Path, tmp_path: Path) -> Path:
    """Return a copy of that image."""
    return Path(shutil.copy(made, tmp_path / made.name))


def description(path: Path, **encrypt: str) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "qcow2", "encrypt": {"key-secret": "s0", **encrypt}, "file": file}


def test_the_guests_bytes(image: Path) -> None:
    expected = bytearray(_SIZE)
    expected[: 64 << 10] = b"\1" * (64 << 10)
    for offset, count, value in ((0, 9 << 10, 2), (1 << 20, 1537, 3), (3 << 20, 4096, 4)):
        expected[offset : offset + count] = bytes([value]) * count
    with cowhand.open(description(image, format=image.stem)) as disk:
        assert disk.read(0, _SIZE) == expected
        assert disk.read(9215, 3) == b"\2\1\1"
        with open_snapshot(disk, "before") as old:
            assert old.read(8000, 2000) == b"\1" * 2000


def test_as_a_backing_file(image: Path, tmp_path: Path) -> None:
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", image, "-F", "qcow2", tmp_path / "top.qcow2", str(_SIZE))
    with cowhand.open(tmp_path / "top.qcow2", options={"backing.encrypt.key-secret": "s0"}) as disk:
        assert disk.read(1000, 20) == b"\2" * 20


def test_what_does_not_fit_is_refused(image: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"encrypt\.key-secret"):
        cowhand.open(image)
    other = "aes" if image.stem == "luks" else "luks"
    with pytest.raises(InvalidArgument, match=f"options specify '{other}'"):
        cowhand.open(description(image, format=other))
    if image.stem == "luks":
        with pytest.raises(AccessDenied):
            cowhand.open(description(image, **{"key-secret": "s1"}))
    with cowhand.open(image, backing=False) as disk:  # what info does
        assert disk.root.format_specific()["encrypt"]["format"] == image.stem


@pytest.mark.parametrize("value", [0, 1, 4096 + 512, 1 << 62, (1 << 64) - 4096])
def test_a_pointer_to_the_header_that_lies(value: int, image: Path) -> None:
    data = bytearray(image.read_bytes())
    at = data.find(L.U32.pack(L.EXT_CRYPTO) + L.U32.pack(16))
    if image.stem == "aes":
        assert at < 0
        return
    data[at + 8 : at + 16] = L.U64.pack(value)
    image.write_bytes(data)
    with pytest.raises(CowhandError) as caught:
        cowhand.open(description(image))
    assert caught.value.path == str(image)
