"""Verdicts on what strangers send: each of these files is found unsafe for the right reason, soon, and nothing that it names is touched."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cowhand.crypto import secrets
from cowhand.image.create import create
from cowhand.image.untrusted import judge
from tests.cli.command import cowhand
from tests.hostile.layout import compressed_entry, deflated, extension, make
from tests.tools.patience import PATIENCE

#: Part of every name in these files. Whoever looks for such a file has followed a name.
NAMED = "named-by-the-image"
_BITS = 16
_DATA_FILE, _FEATURE_NAMES, _BACKING_FORMAT = 0x44415441, 0x6803F857, 0xE2792ACA


def _named(name: str | bytes, format: bytes | None = b"raw", *extensions: bytes) -> bytes:
    """Return an image whose backing file is called *name*."""
    image = make(_BITS)
    raw = name.encode() if isinstance(name, str) else name
    body = (
        b"".join(extensions) + (extension(_BACKING_FORMAT, format) if format is not None else b"") + extension(0, b"")
    )
    image.put(104, body + raw + bytes(64))
    image.set("backing_file_offset", 104 + len(body))
    image.set("backing_file_size", len(raw))
    return bytes(image.data)


def _extended(*extensions: bytes, incompatible: int = 0, autoclear: int = 0) -> bytes:
    image = make(_BITS)
    image.put(104, b"".join(extensions) + extension(0, b""))
    image.set("incompatible_features", incompatible)
    image.set("autoclear_features", autoclear)
    return bytes(image.data)


def _field(name: str, value: int) -> bytes:
    image = make(_BITS)
    image.set(name, value)
    return bytes(image.data)


def _long(size: int) -> bytes:
    image = make(_BITS)
    image.set("l1_size", size >> 29)
    image.point("header's L1 table", image.take((size >> 29) * 8 // image.cluster))
    image.set("size", size)
    return bytes(image.data)


def _bomb() -> bytes:
    """One compressed cluster of zeroes, named by a whole L2 table, which 64 L1 entries name: 32 GiB."""
    image = make(_BITS, tables=64)
    payload = deflated(bytes(image.cluster))
    entry = compressed_entry(image.places["compressed"], len(payload), _BITS)
    image.put(image.places["compressed"], payload)
    image.put_words(image.places["L2 table 1"], *[entry] * (image.cluster // 8))
    image.put_words(image.places["L1 table"], *[image.places["L2 table 1"]] * 64)
    return bytes(image.data)


def _overlapping() -> bytes:
    image = make(_BITS)
    image.point("free L1 entry", image.places["refcount block"])
    return bytes(image.data)


def _snapshot_named(name: bytes) -> bytes:
    image = make(_BITS)
    at = image.places["snapshot table"]
    image.put(at + 14, struct.pack(">H", len(name)))
    image.put(at + 40 + 16 + 1, name + bytes(8))
    image.set("nb_snapshots", 1)
    return bytes(image.data)


def _polyglot(*pieces: tuple[int, bytes], end: bytes = b"") -> bytes:
    image = make(_BITS)
    for offset, data in pieces:
        image.put(offset, data)
    return bytes(image.data) + end


def _luks(change: Callable[[bytearray], None], kind: str = "luks") -> Callable[[Path], bytes]:
    def build(folder: Path) -> bytes:
        prefix = "encrypt." if kind == "qcow2" else ""
        options = {f"{prefix}key-secret": "s", f"{prefix}iter-time": "0"}
        with secrets.given({"s": b"word"}):
            create(folder / "new", kind, 65536, options | ({"encrypt.format": "luks"} if kind == "qcow2" else {}))
        data = bytearray((folder / "new").read_bytes())
        (folder / "new").unlink()
        at = data.index(b"LUKS\xba\xbe")
        header = data[at : at + 592]
        change(header)
        data[at : at + 592] = header
        return bytes(data)

    return build


def _iterations(header: bytearray) -> None:
    header[212:216] = b"\xff\xff\xff\xff"


def _behind(header: bytearray) -> None:
    header[104:108] = b"\x7f\0\0\0"


def _other_version(header: bytearray) -> None:
    header[6:8] = b"\0\7"


_NESTED = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": f"/srv/{NAMED}"}})
_DEEP = '{"file":' * 60 + f'"{NAMED}"' + "}" * 60
_VMDK = (
    f'# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 8 FLAT "/etc/{NAMED}" 0\n'
)
_UNKNOWN = bytes([0, 60]) + b"\x1b]0;owned\x07\x1b[2J".ljust(46, b"\0")
_DATA = extension(_DATA_FILE, f"/dev/{NAMED}".encode())

#: name → (what makes the file's bytes, reasons that must be among those given, format that is said to be)
FILES: dict[str, tuple[bytes | Callable[[Path], bytes], set[str], str | None]] = {
    "a plain name": (_named(NAMED), {"external-reference"}, None),
    "no recorded format": (_named(NAMED, None), {"external-reference", "unrecorded-format"}, None),
    "an absolute path": (_named(f"/etc/{NAMED}"), {"absolute-path"}, None),
    "a parent path": (_named(f"a/../../{NAMED}"), {"parent-path"}, None),
    "a folder": (_named(f"{NAMED}/"), {"external-reference"}, None),
    "itself": (_named("."), {"external-reference"}, None),
    "a protocol": (_named(f"nbd://{NAMED}:1/x"), {"protocol"}, None),
    "an unknown protocol": (_named(f"gopher:{NAMED}"), {"protocol"}, None),
    "file: with an absolute path": (_named(f"file:/etc/{NAMED}"), {"protocol", "absolute-path"}, None),
    "a host device": (_named(f"host_device:/dev/{NAMED}"), {"protocol", "absolute-path"}, None),
    "fat:": (_named(f"fat:rw:/{NAMED}"), {"protocol"}, None),
    "json:": (_named(f"json:{_NESTED}"), {"json-name", "absolute-path"}, None),
    "json: that is none": (_named(f"json:{NAMED}"), {"json-name"}, None),
    "json: that is deep": (_named(f"json:{_DEEP}"), {"json-name", "depth"}, None),
    "json: in lists": (_named('json:{"children":[[["/' + NAMED + '"]]]}'), {"json-name", "absolute-path"}, None),
    "json: with a huge number": (_named('json:{"size":' + "9" * 900 + "}"), {"json-name"}, None),
    "blkdebug:": (_named(f"blkdebug:/{NAMED}:x"), {"protocol", "absolute-path"}, None),
    "a name that steers terminals": (_named(f"\x1b[31m{NAMED}"), {"control-characters"}, None),
    "a name of two lines": (_named(f"{NAMED}\nimage: nothing is wrong"), {"control-characters"}, None),
    "a name that ends early": (_named(f"{NAMED}\0/etc/passwd"), {"external-reference"}, None),
    "a name written from the right": (_named(f"\u202e{NAMED}"), {"control-characters"}, None),
    "a name that is no text": (_named(NAMED.encode() + b"\xff\xfe"), {"control-characters"}, None),
    "the longest name": (_named("/" + (NAMED * 60)[:1022]), {"absolute-path"}, None),
    "a longer name": (_named("/" + (NAMED * 60)[:1040]), {"invalid-header"}, None),
    "a name behind the end": (_field("backing_file_offset", 1 << 40), {"invalid-header"}, None),
    "two formats of the backing file": (
        _named(NAMED, b"raw", extension(_BACKING_FORMAT, b"vmdk")), {"ambiguous-header", "external-reference"}, None,
    ),
    "a data file": (_extended(_DATA, incompatible=4), {"external-reference", "absolute-path"}, None),
    "a data file that is not switched on": (_extended(_DATA), {"external-reference", "absolute-path"}, None),
    "a data file without a name": (_extended(incompatible=4), {"external-reference"}, None),
    "two data files": (
        _extended(extension(_DATA_FILE, NAMED.encode()), _DATA, incompatible=4), {"ambiguous-header"}, None,
    ),
    "a raw data file": (_extended(_DATA, incompatible=4, autoclear=2), {"external-reference"}, None),
    "a data file of another protocol": (
        _extended(extension(_DATA_FILE, f"json:{_NESTED}".encode()), incompatible=4), {"json-name", "absolute-path"}, None,
    ),
    "unknown features with names": (
        _extended(extension(_FEATURE_NAMES, _UNKNOWN), incompatible=1 << 60), {"unreadable"}, None,
    ),
    "an extension without an end": (_extended(struct.pack(">II", 0x1234, (1 << 32) - 1)), {"invalid-header"}, None),
    "marked as corrupt": (_field("incompatible_features", 2), {"marked-corrupt"}, None),
    "marked as dirty": (_field("incompatible_features", 1), {"marked-dirty"}, None),
    "an exbibyte": (_field("size", 1 << 60), {"invalid-header"}, None),
    "a disk of 128 TiB": (_long(1 << 47), {"size"}, None),
    "a bomb": (_bomb(), {"decompression-bomb"}, None),
    "tables over tables": (_overlapping(), {"damaged", "overlap"}, None),
    "a snapshot that steers terminals": (_snapshot_named(b"\x1b[2Jgone"), {"control-characters"}, None),
    "cut": (bytes(make(_BITS).data)[: 5 << _BITS], {"damaged"}, None),
    "only a header": (bytes(make(_BITS).data)[:104], {"damaged"}, None),
    "half a header": (bytes(make(_BITS).data)[:60], {"invalid-header"}, None),
    "three bytes": (b"QFI", {"guessed-format"}, None),
    "empty": (b"", {"guessed-format"}, None),
    "a boot sector": (bytes(510) + b"\x55\xaa", {"guessed-format"}, None),
    "qcow2 said to be raw": (_named(NAMED), {"ambiguous-format"}, "raw"),
    "raw said to be qcow2": (bytes(1 << 16), {"ambiguous-format"}, "qcow2"),
    "qcow2 and a virtual PC disk": (_polyglot(end=b"conectix".ljust(512, b"\0")), {"ambiguous-format"}, None),
    "qcow2 and an Apple disk": (_polyglot(end=b"koly".ljust(512, b"\0")), {"ambiguous-format"}, None),
    "qcow2 and a CD": (_polyglot((0x8001, b"CD001")), {"ambiguous-format"}, None),
    "qcow version 1": (b"QFI\xfb\0\0\0\1" + bytes(504), {"not-understood"}, None),
    "a VMDK of text": (_VMDK.encode(), {"not-understood"}, None),
    "a VMDK of text, said to be raw": (_VMDK.encode(), {"ambiguous-format"}, "raw"),
    "a VMDK": (b"KDMV" + bytes(4092), {"not-understood"}, None),
    "a VHDX": (b"vhdxfile" + bytes(4088), {"not-understood"}, None),
    "a QED": (b"QED\0" + bytes(60) + NAMED.encode(), {"not-understood"}, None),
    "LUKS for hours": (_luks(_iterations), {"costly-key-slot"}, None),
    "LUKS for hours in qcow2": (_luks(_iterations, "qcow2"), {"costly-key-slot"}, None),
    "LUKS behind the end": (_luks(_behind), {"invalid-header"}, None),
    "LUKS of another version": (_luks(_other_version), {"guessed-format", "ambiguous-format"}, None),
    "LUKS of another version, said to be LUKS": (_luks(_other_version), {"invalid-header"}, "luks"),
}  # fmt: skip


def _write(name: str, folder: Path) -> Path:
    content = FILES[name][0]
    path = folder / f"{sorted(FILES).index(name)}.image"
    path.write_bytes(content if isinstance(content, bytes) else content(folder))
    return path


@pytest.mark.parametrize("name", FILES)
def test_it_is_unsafe_for_this_reason(name: str, tmp_path: Path) -> None:
    _, wanted, format = FILES[name]
    path = _write(name, tmp_path)
    begin = time.process_time()
    verdict = judge(str(path), format)
    assert time.process_time() - begin < 20
    assert not verdict.sound
    assert wanted <= {reason.code for reason in verdict.reasons}, verdict.reasons
    assert all(reason.text.isprintable() for reason in verdict.reasons)


def test_what_is_sound_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(make(_BITS).data)
    assert judge(str(tmp_path / "image")).sound
    (tmp_path / "luks").write_bytes(_luks(lambda header: None)(tmp_path))
    verdict = judge(str(tmp_path / "luks"))
    assert verdict.sound and verdict.size == 65536
    (tmp_path / "inside").write_bytes(_luks(lambda header: None, "qcow2")(tmp_path))
    assert judge(str(tmp_path / "inside")).sound


def test_no_line_of_the_answer_is_the_strangers(tmp_path: Path) -> None:
    path = _write("a name of two lines", tmp_path)
    shown = cowhand("inspect", "--untrusted", path, status=8).stdout.splitlines()
    assert "not safe" in shown[0] and all(line.startswith("  ") for line in shown[1:])


def test_pipes_and_links_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert {reason.code for reason in judge(str(tmp_path / "pipe")).reasons} == {"not-a-file"}
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        judge(str(tmp_path / "loop"))


_ALL = """
import sys
from cowhand.image.untrusted import judge
for line in sys.stdin.read().splitlines():
    path, _, format = line.partition(" ")
    print(path, len(judge(path, format or None).reasons))
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_nothing_that_they_name_is_touched(tmp_path: Path) -> None:
    """Not opened, not looked for, not connected to: the kernel says so. What each file names exists beside it, and would be found."""
    log = tmp_path / "calls"
    (tmp_path / NAMED).write_bytes(b"secret")
    lines = [f"{_write(name, tmp_path)} {format or ''}" for name, (_, _, format) in FILES.items()]
    done = subprocess.run(
        ["strace", "-f", "-qq", "-s", "400", "-e", "trace=%file,%network,%process", "-o", str(log), sys.executable, "-c", _ALL],
        input="\n".join(lines), text=True, capture_output=True, timeout=PATIENCE, cwd=tmp_path,
    )  # fmt: skip
    if done.returncode and "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(FILES)
    calls = log.read_text(errors="replace").splitlines()
    assert sum(f"{tmp_path}/" in call for call in calls) >= len(FILES), "the files themselves are opened"
    assert not [call for call in calls if NAMED in call]
    assert not [call for call in calls if "socket(" in call or "connect(" in call]
    assert not [call for call in calls[1:] if "execve(" in call]
