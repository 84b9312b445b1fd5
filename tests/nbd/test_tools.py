"""The drop-in tools beside QEMU's over the same exports: names, options, refusals, maps, conversions."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import cowhand
from cowhand.block.opening.policy import DEFAULT, UNTRUSTED
from cowhand.copy.ops.convert import convert
from cowhand.core.errors import InvalidArgument, PolicyRefused
from cowhand.image.create import create
from tests.compat.sides import play
from tests.nbd.servers import Process, nbdkit, qemu_nbd, require_nbdkit
from tests.tools.qemu import assert_clean, assert_identical, qemu_img, qemu_io, require_qemu, require_qemu_nbd

pytestmark = [pytest.mark.interop, require_qemu, require_qemu_nbd]

SCENE = """
qemu-img info nbd+unix://?socket=s
qemu-img info nbd+unix:///?socket=s
qemu-img info nbd:unix:s
qemu-img info nbd:unix:s:exportname=
qemu-img info --output json nbd:unix:s
qemu-img info --image-opts driver=nbd,path=s
qemu-img info --image-opts driver=nbd,server.type=unix,server.path=s
qemu-img info --image-opts driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=s,file.export=
qemu-img info --image-opts file.driver=nbd,file.path=s
qemu-img info 'json:{"driver": "raw", "file": {"driver": "nbd", "server": {"type": "unix", "path": "s"}}}'
qemu-img info 'json:{"driver": "nbd", "path": "s", "reconnect-delay": 3, "open-timeout": 2}'
qemu-img info nbd+unix:////a//b?socket=s
qemu-img info nbd+unix:///nothing?socket=s
qemu-img info --image-opts driver=nbd,path=s,export=nothing
qemu-img info nbd+unix:///?socket=absent
qemu-img info nbd:unix:absent
qemu-img info nbd+unix:///x
qemu-img info nbd+unix:///x?socket=a&more=b
qemu-img info nbd://
qemu-img info nbd://localhost?x=y
qemu-img info nbd://localhost:1/x
qemu-img info nbd:localhost:1
qemu-img info --image-opts driver=nbd
qemu-img info --image-opts driver=nbd,host=a,path=b
qemu-img info --image-opts driver=nbd,port=1,path=b
qemu-img info --image-opts driver=nbd,path=s,server.type=unix,server.path=s
qemu-img info --image-opts driver=nbd,path=s,tls-creds=tls0
qemu-img info --image-opts driver=nbd,path=s,x-dirty-bitmap=qemu:dirty-bitmap:none
qemu-img info --image-opts driver=nbd,path=s,bogus=on
qemu-img info 'json:{"driver": "nbd", "host": -1}'
qemu-img info 'json:{"driver": "nbd", "path": 42}'
qemu-img info 'json:{"driver": "nbd"}'
qemu-img create -f raw nbd+unix://?socket=s 1G
qemu-img create -f qcow2 -o preallocation=metadata nbd+unix://?socket=s 2M
qemu-img create -f qcow2 nbd+unix://?socket=s 1M
qemu-img info nbd+unix://?socket=s
qemu-img check nbd+unix://?socket=s
qemu-img map --output json nbd+unix://?socket=s
qemu-io -c 'write -P 5 64k 64k' -c 'read -P 5 64k 64k' -c 'read -P 0 0 64k' nbd+unix://?socket=s
qemu-img map nbd+unix://?socket=s
qemu-img resize nbd+unix://?socket=s 2M
qemu-img convert -n -f qcow2 -O raw nbd+unix://?socket=s nbd+unix://?socket=s2
qemu-img compare -f qcow2 -F raw nbd+unix://?socket=s nbd+unix://?socket=s2
qemu-img map -f raw --output json nbd+unix://?socket=s2
qemu-img map -f raw nbd+unix://?socket=s2
qemu-img map -f raw --output json -s 1000 -l 100000 nbd+unix://?socket=s2
qemu-img resize -f raw nbd+unix://?socket=s2 4M
qemu-img resize -f raw --shrink nbd+unix://?socket=s2 1M
qemu-img rebase -u -b base.qcow2 -F qcow2 nbd+unix://?socket=s
qemu-img map nbd+unix://?socket=s
qemu-img create -q -f qcow2 -b nbd+unix://?socket=s2 -F raw over.qcow2
qemu-img info over.qcow2
qemu-img info --backing-chain over.qcow2
qemu-img map --output json over.qcow2
qemu-io -c 'read -P 5 64k 64k' -c 'write -P 6 0 64k' over.qcow2
qemu-img commit over.qcow2
qemu-io -r -f raw -c 'read -P 6 0 64k' -c 'read -P 5 64k 64k' -c 'write 0 512' nbd+unix://?socket=s2
qemu-io -f raw -c 'write 2M 64k' -c 'read 4M 1' -c 'length' nbd+unix://?socket=s2
qemu-io -f raw -c 'write -z 64k 64k' -c 'write -zu 0 64k' -c 'discard 0 64k' -c 'write -f -P 7 512 512' -c 'flush' -c 'map' nbd+unix://?socket=s2
qemu-io -c 'write 0 512' nbd+unix://?socket=ro -f raw
qemu-io -r -c 'read 0 512' nbd+unix://?socket=ro -f raw
qemu-img convert -O raw nbd+unix://?socket=ro nbd+unix://?socket=s2
qemu-img convert -n -O raw nbd+unix://?socket=s2 nbd+unix://?socket=ro
qemu-img dd -f raw -O raw bs=64k if=nbd+unix://?socket=s2 of=out.raw
qemu-img compare nbd+unix://?socket=s2 out.raw -f raw -F raw
"""


def test_both_tools_say_the_same(tmp_path: Path) -> None:
    """Every line of the scene, on exports of the same content for each side."""
    folders = tmp_path / "real", tmp_path / "own"
    differences = []
    with ExitStack() as stack:
        for folder in folders:
            folder.mkdir()
            for name in ("s", "s2", "ro"):
                (folder / f"{name}.raw").write_bytes(bytes(2 << 20))
                words = ("-r",) if name == "ro" else ("--discard=unmap",)
                stack.enter_context(qemu_nbd(folder, folder / f"{name}.raw", *words, name=name))
        for line in SCENE.strip().splitlines():
            expected = play(line, folders[0], real=True)
            found = play(line, folders[1], real=False)
            for name in ("status", "out", "err"):
                if getattr(expected, name) != getattr(found, name):
                    differences.append(
                        f"$ {line}\n  QEMU: {getattr(expected, name)!r}\n  here: {getattr(found, name)!r}"
                    )
    assert not differences, "\n" + "\n".join(differences)


#: On an export that ends inside a sector.
ODD = """
qemu-img info -f raw nbd+unix://?socket=s
qemu-img map -f raw --output json nbd+unix://?socket=s
qemu-img map -f raw nbd+unix://?socket=s
qemu-img convert -f raw -O raw nbd+unix://?socket=s copy.raw
qemu-img compare -f raw -F raw copy.raw nbd+unix://?socket=s
qemu-img measure -f raw -O qcow2 nbd+unix://?socket=s
qemu-img dd -f raw -O raw bs=1000 skip=1234 if=nbd+unix://?socket=s of=tail.raw
qemu-io -f raw -c length -c 'read 1234000 567' -c 'read -P 0 1234567 377' -c 'read 1234000 1000' nbd+unix://?socket=s
qemu-io -f raw -c 'write -P 1 1234000 567' -c 'read -P 1 1234000 567' -c 'write 1234567 1' nbd+unix://?socket=s
qemu-io -f raw -c 'write 1234000 944' -c 'write -z 1230000 4567' -c 'discard 1230000 4567' -c 'alloc 1234560' nbd+unix://?socket=s
"""


@require_nbdkit
def test_both_tools_say_the_same_of_an_odd_size(tmp_path: Path) -> None:
    """The last sector is incomplete, and cannot be made whole."""
    content = bytes(range(1, 251)) * 5000
    differences = []
    outcomes = []
    for real in (True, False):
        folder = tmp_path / ("real" if real else "own")
        folder.mkdir()
        (folder / "disk").write_bytes(content[:1234567])
        with nbdkit(folder, "file", folder / "disk") as server:
            (folder / "s").symlink_to(server.socket)
            outcomes.append([play(line, folder, real=real) for line in ODD.strip().splitlines()])
    for line, expected, found in zip(ODD.strip().splitlines(), *outcomes, strict=True):
        if expected != found:
            differences.append(f"$ {line}\n  QEMU: {expected}\n  here: {found}")
    assert not differences, "\n" + "\n".join(differences)


BITMAPS = """
qemu-img map --output json --image-opts driver=nbd,path=s
qemu-img map --output json --image-opts driver=nbd,path=s,x-dirty-bitmap=qemu:dirty-bitmap:b
qemu-img map --output json --image-opts driver=nbd,path=s,x-dirty-bitmap=qemu:dirty-bitmap:b -s 12345 -l 1000000
qemu-img map --output json --image-opts driver=nbd,path=s,x-dirty-bitmap=qemu:allocation-depth
qemu-img map --image-opts driver=raw,file.driver=nbd,file.path=s,file.x-dirty-bitmap=qemu:allocation-depth
qemu-img convert -f raw -O qcow2 nbd+unix://?socket=s out.qcow2
qemu-img map --output json out.qcow2
"""


def test_bitmaps_and_depths_of_qemus_servers(tmp_path: Path) -> None:
    """What a server tells of a chain with a bitmap, asked by both tools."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", base, "8M")
    qemu_io(base, "write -P 1 0 1M", "write -z 5M 1M")
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    qemu_img("bitmap", "--add", "-g", "4k", top, "b")
    qemu_io(top, "write -P 2 4k 4k", "write -P 3 3M 100k", "write -z 6M 64k")
    differences = []
    with qemu_nbd(tmp_path, top, "-r", "-B", "b", "-A", format="qcow2") as server:
        for side in ("real", "own"):
            (tmp_path / side).mkdir()
            (tmp_path / side / "s").symlink_to(server.socket)
        for line in BITMAPS.strip().splitlines():
            expected = play(line, tmp_path / "real", real=True)
            found = play(line, tmp_path / "own", real=False)
            if expected != found:
                differences.append(f"$ {line}\n  QEMU: {expected}\n  here: {found}")
    assert not differences, "\n" + "\n".join(differences)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    """An export of a disk with some data."""
    (tmp_path / "disk.raw").write_bytes(b"secret" * 2000 + bytes(1 << 20))
    with qemu_nbd(tmp_path, tmp_path / "disk.raw") as process:
        yield process


class TestPolicy:
    """What an image names reaches the network only where the policy lets it."""

    @pytest.fixture
    def overlay(self, server: Process, tmp_path: Path) -> Path:
        path = tmp_path / "overlay.qcow2"
        qemu_img("create", "-f", "qcow2", "-b", server.uri, "-F", "raw", path)
        return path

    def test_the_default_follows_what_qemu_follows(self, overlay: Path) -> None:
        with cowhand.open(overlay) as disk:
            assert disk.read(0, 6) == b"secret"

    @pytest.mark.parametrize(
        "policy",
        [
            UNTRUSTED,
            DEFAULT.within("/"),
            DEFAULT._replace(drivers=frozenset(("file", "qcow2", "raw"))),
            DEFAULT._replace(implicit=False),
        ],
    )
    def test_stricter_ones_do_not_connect(self, tmp_path: Path, policy: object) -> None:
        listener = socket.socket(socket.AF_UNIX)
        with listener:
            listener.bind(str(tmp_path / "trap"))
            listener.listen()
            listener.settimeout(0.05)
            uri = f"nbd+unix:///?socket={tmp_path}/trap"
            options = f'{{"driver":"nbd","server":{{"type":"unix","path":"{tmp_path}/trap"}}}}'
            raw = f'json:{{"driver":"raw","file":{options}}}'
            for number, name in enumerate((uri, f"nbd:unix:{tmp_path}/trap", f"json:{options}", raw)):
                path = tmp_path / f"{number}.qcow2"
                qemu_img("create", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path, "1M")
                with pytest.raises(PolicyRefused):
                    cowhand.open(path, policy=policy)  # type: ignore[arg-type]
            with pytest.raises(TimeoutError):
                listener.accept()

    def test_an_image_cannot_name_a_descriptor(self, tmp_path: Path) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for server in (
                f'"server":{{"type":"fd","str":"{ours.fileno()}"}}',
                f'"server.type":"fd","server.str":"{ours.fileno()}"',
            ):
                path = tmp_path / "hostile.qcow2"
                name = f'json:{{"driver":"nbd",{server}}}'
                qemu_img("create", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path, "1M")
                with pytest.raises(PolicyRefused):
                    cowhand.open(path)

    def test_names_relative_to_an_export_mean_nothing(self, server: Process) -> None:
        qemu_img("create", "-u", "-f", "qcow2", "-b", "base.raw", "-F", "raw", server.uri, "512k")
        with pytest.raises(InvalidArgument, match="base directory"):
            cowhand.open(server.uri)


class TestConversions:
    def test_images_made_on_an_export_of_anything(self, tmp_path: Path) -> None:
        """What lay there before shows nowhere."""
        source = tmp_path / "source.qcow2"
        qemu_img("create", "-f", "qcow2", source, "20M")
        qemu_io(source, "write -P 1 1M 70k", "write -P 2 19M 1M")
        (tmp_path / "disk").write_bytes(b"\xee" * (32 << 20))
        with qemu_nbd(tmp_path, tmp_path / "disk", "--discard=unmap") as server:
            for options in ({}, {"preallocation": "metadata"}, {"extended_l2": "on"}):
                convert(source, server.uri, target_format="qcow2", options=options, overwrite=True)
                result = qemu_img("check", server.uri)
                assert "No errors" in result.stdout
                assert_identical(source, "qcow2", server.uri, "qcow2")  # type: ignore[arg-type]

    @require_nbdkit
    def test_an_image_of_small_clusters_on_large_blocks(self, tmp_path: Path) -> None:
        """Metadata and data that are smaller than what the server takes."""
        (tmp_path / "disk").write_bytes(bytes(16 << 20))
        words = (
            "blocksize-minimum=4096",
            "blocksize-preferred=4096",
            "blocksize-maximum=64K",
            "blocksize-error-policy=error",
        )
        with nbdkit(tmp_path, "--filter=blocksize-policy", "file", tmp_path / "disk", *words) as server:
            create(server.uri, "qcow2", "4M", {"cluster_size": "512"})
            with cowhand.open(server.uri, format="qcow2", writable=True) as disk:
                disk.write(513, b"x" * 1000)
                disk.write(1 << 20, b"y" * 70000)
                disk.discard(1 << 20, 512)
                disk.flush()
                assert disk.read(512, 1002) == b"\0" + b"x" * 1000 + b"\0"
                assert disk.read((1 << 20) + 512, 69489) == b"y" * 69488 + b"\0"
        assert_clean(tmp_path / "disk")

    @require_nbdkit
    def test_a_copy_of_random_sparse_data(self, tmp_path: Path) -> None:
        """Between a server with holes and a file, both ways; the holes stay holes."""
        with nbdkit(tmp_path, "sparse-random", "64M", "seed=7", "percent=20") as server:
            convert(server.uri, tmp_path / "copy.raw", source_format="raw", target_format="raw")
            assert_identical(server.uri, "raw", tmp_path / "copy.raw", "raw")  # type: ignore[arg-type]
            assert (tmp_path / "copy.raw").stat().st_blocks * 512 < 20 << 20
