"""Files under an image's name that are none: told as what they are, by the library and the command; QEMU's tools call them raw."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

import cowhand
from cowhand.block.opening.lookalikes import not_an_image
from cowhand.block.opening.policy import AS_QEMU
from cowhand.core.errors import InvalidFormat
from cowhand.image.untrusted import judge

_DISK = bytes(range(256)) * 8


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        found = tarfile.TarInfo("disk.vmdk")
        found.size = len(_DISK)
        archive.addfile(found, io.BytesIO(_DISK))
    return out.getvalue()


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("disk.img", _DISK)
    return out.getvalue()


FILES = {
    "a web page": b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>404 Not Found</body></html>",
    "an XML document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a gzip archive": gzip.compress(_DISK),
    "an xz archive": lzma.compress(_DISK),
    "an lzma archive": lzma.compress(_DISK, format=lzma.FORMAT_ALONE),
    "a bzip2 archive": bz2.compress(_DISK),
    "a zip archive": _zip(),
    "a tar archive": _tar(),
    "a zstd archive": b"\x28\xb5\x2f\xfd\x04\x00" + _DISK,
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "an empty file": b"",
}


@pytest.mark.parametrize("what", FILES)
def test_it_is_told_and_raw_only_by_name(what: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(FILES[what])
    with pytest.raises(InvalidFormat, match=f"this is {what}") as caught:
        cowhand.open(path)
    assert "format raw" in (caught.value.hint or "")
    assert [reason.code for reason in judge(str(path)).reasons] == ["not-an-image"]
    for told in ({"format": "raw"}, {"policy": AS_QEMU}):
        with cowhand.open(path, **told) as disk:  # type: ignore[arg-type]
            assert disk.format == "raw"


@pytest.mark.parametrize(
    "head", [bytes(2048), b"\xeb\x63\x90" + bytes(2045), b"BZhello" + bytes(99), b"]\0\0\0\0\0" + bytes(99)]
)
def test_what_may_be_a_disk_is_one(head: bytes) -> None:
    assert not_an_image(head, "disk.img", len(head)) is None


def test_a_raw_disk_of_no_bytes_is_one() -> None:
    assert not_an_image(b"", "disk.raw", 0) is None
