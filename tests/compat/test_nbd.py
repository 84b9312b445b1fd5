"""``cowhand-nbd`` beside qemu-nbd: the same words for wrong command lines, the same lists, and servers that clients cannot tell apart."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowhand
from cowhand.cli.compat.nbd.settings import snapshot_of
from tests.compat.sides import run_own, run_real
from tests.nbd.servers import _listens
from tests.tools.patience import PATIENCE
from tests.tools.programs import find, require, run
from tests.tools.qemu import require_qemu

pytestmark = [pytest.mark.interop, require_qemu]
require_nbd = require("qemu-nbd")
require_libnbd = require("nbdinfo")

OWN = [
    sys.executable,
    "-c",
    "import sys; from cowhand.cli.compat.nbd import main; sys.argv[0] = 'qemu-nbd'; sys.exit(main())",
]

#: Command lines that end at once.
WRONG = """

a b
-Z
--foo
-p
--sh
--port
-p abc -f raw r.raw
-p 10x -f raw r.raw
-k rel.sock r.raw
-e abc r.raw
-e -1 r.raw
-e 1x r.raw
-o abc r.raw
-o 1M r.raw
-o 0x10z r.raw
-o 2000000 -f raw -k FOLDER/s r.raw
-o -5 -f raw -k FOLDER/s r.raw
-n --cache=none r.raw
--cache=foo r.raw
--aio=foo r.raw
--aio=native --aio=native r.raw
--aio=native -f raw -k FOLDER/s r.raw
--discard=foo r.raw
--discard=unmap --discard=unmap r.raw
--detect-zeroes=foo r.raw
--detect-zeroes=unmap r.raw
--discard=unmap --detect-zeroes=foo r.raw
-k FOLDER/s nofile
-k FOLDER/s -f foo r.raw
-k FOLDER/s -f qcow2 r.raw
-k FOLDER/s --image-opts -f raw r.raw
-k FOLDER/s --image-opts driver=raw,file.driver=file,file.filename=nofile
-k FOLDER/s --image-opts driver=raw,foo=bar,file.filename=r.raw
-k FOLDER/s json:{}
-k /nonexistent/s -f raw r.raw
-L r.raw
-L -n
-L -o 1
-L -x foo
-L --fork
-L -k FOLDER/none
-L -p 1
--tls-creds=foo r.raw
--tls-authz=foo r.raw
--tls-hostname=foo r.raw
-L --tls-creds=foo
-c /dev/nbd99 --tls-creds=a r.raw
-B foo -f qcow2 -k FOLDER/s d.qcow2
-B foo -f raw -k FOLDER/s r.raw
-l foo -f qcow2 -k FOLDER/s d.qcow2
-l snapshot.foo=1 d.qcow2
-l snapshot.id=7,snapshot.name=one -f qcow2 -k FOLDER/s d.qcow2
-l one -f raw -k FOLDER/s r.raw
-s -l foo -f qcow2 -k FOLDER/s d.qcow2
-d
-d /dev/nbd99
--pid-file=/nonexistent/x -f raw -k FOLDER/s r.raw
--fork --pid-file=/nonexistent/x -f raw -k FOLDER/s r.raw
--fork -k FOLDER/s nofile
--object foo r.raw
--object secret,id=a r.raw
-f raw -x LONG -k FOLDER/s r.raw
-f raw -D LONG -k FOLDER/s r.raw
-k /LONG r.raw
""".splitlines()[1:]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("n") / "i"
    folder.mkdir()
    (folder / "r.raw").write_bytes(bytes(range(256)) * 4096)
    cowhand.create(folder / "d.qcow2", "qcow2", 1 << 20)
    with cowhand.open(folder / "d.qcow2", writable=True) as disk:
        disk.write(0, b"one" * 1000)
        cowhand.create_snapshot(disk, "one")
        cowhand.add_bitmap(disk, "b")
        disk.write(0, b"two" * 1000)
    return folder


@require_nbd
@pytest.mark.parametrize("line", WRONG)
def test_wrong_command_lines_are_told_in_the_same_words(images: Path, line: str) -> None:
    words = ["qemu-nbd", *shlex.split(line.replace("FOLDER", str(images)).replace("LONG", "a" * 5000))]
    theirs = run_real(words, images)
    theirs = dataclasses.replace(theirs, err=theirs.err.replace(str(find("qemu-nbd")), "qemu-nbd"))
    if "--fork" in words:
        done = subprocess.run([*OWN, *words[1:]], cwd=images, capture_output=True, text=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout, done.stderr) == (theirs.status, theirs.out, theirs.err)
    else:
        assert run_own(words, images) == theirs


@contextmanager
def serving(
    images: Path, *words: str, real: bool = False, path: str = "sock"
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the tool until the block is left; yields the process and the URI without an export."""
    sock = images / path
    sock.unlink(missing_ok=True)
    tool = [str(find("qemu-nbd"))] if real else OWN
    process = subprocess.Popen([*tool, "-k", str(sock), *words], cwd=images, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _listens(sock):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process, f"nbd+unix://{{}}?socket={sock}"
    finally:
        process.kill()
        process.communicate()
        sock.unlink(missing_ok=True)


SERVED = [
    ("-f raw r.raw", ""),
    ("-f raw -x name -D what -e 3 r.raw", "name"),
    ("-r -f qcow2 -A -B b d.qcow2", ""),
    ("-f qcow2 -l one -e 0 d.qcow2", ""),
    ("-f raw -o 512000 -e 0 r.raw", ""),
    ("-f qcow2 -s d.qcow2", ""),
    ("--image-opts driver=qcow2,file.filename=d.qcow2", ""),
    ("-n -f raw r.raw", ""),
]


@require_nbd
@require_libnbd
@pytest.mark.parametrize(("line", "name"), SERVED)
def test_clients_see_the_same(images: Path, line: str, name: str, tmp_path: Path) -> None:
    told = []
    for real in (True, False):
        with serving(images, "-t", *shlex.split(line), real=real) as (_, uri):
            address = uri.format(f"/{name}")
            listed = run("qemu-nbd", "-L", "-k", images / "sock").stdout
            info = re.sub(r'"(uri|protocol)": .*', "", run("nbdinfo", "--json", address).stdout)
            run("nbdcopy", address, tmp_path / f"{real}")
            told.append((listed, info))
    assert told[0] == told[1]
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()


@require_nbd
def test_lists_are_the_same(images: Path) -> None:
    with serving(images, "-t", "-e0", "-A", "-D", "what", "-x", "näme", "-f", "raw", "r.raw"):
        words = ["qemu-nbd", "-L", "-k", str(images / "sock")]
        own = run_own(words, images)
        real = run_real(words, images)
        # Since 8.2 QEMU's client asks for extended headers, and its server then offers the payload of block status.
        real = dataclasses.replace(
            real, out=real.out.replace("0x1ded", "0xded").replace(" block-status-payload )", " )")
        )
        real = dataclasses.replace(real, out=re.sub(r"(?m)^  transaction size: .*\n", "", real.out))
        assert own == real
        assert "export: 'näme'" in own.out


@require_libnbd
class TestItsLife:
    """When it begins, and when it ends."""

    def test_it_ends_with_its_last_client(self, images: Path) -> None:
        with serving(images, "-f", "raw", "r.raw") as (process, uri):
            probe = socket.socket(socket.AF_UNIX)
            probe.connect(str(images / "sock"))
            probe.recv(18)
            probe.close()  # one that asked for nothing does not count
            time.sleep(0.2)
            assert process.poll() is None
            run("qemu-img", "map", "-f", "raw", uri.format(""))  # nbdinfo may leave before it has chosen an export
            assert process.wait(PATIENCE) == 0
            assert not (images / "sock").exists()

    def test_persistent_it_ends_with_a_signal(self, images: Path) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with serving(images, "-t", "-f", "raw", "--pid-file", str(images / "pid"), "r.raw") as (process, uri):
                run("nbdinfo", "--size", uri.format(""))
                assert int((images / "pid").read_text()) == process.pid
                process.send_signal(number)
                assert process.wait(PATIENCE) == 0
                assert not (images / "sock").exists()

    def test_forked_the_parent_ends_when_it_serves(self, images: Path) -> None:
        pid = images / "forked"
        words = ["--fork", "-t", "-k", str(images / "f"), "--pid-file", str(pid), "-f", "raw", "r.raw"]
        with (images / "said").open("w") as said:  # the child keeps it, as qemu-nbd's does
            assert (
                subprocess.run([*OWN, *words], cwd=images, stdout=said, stderr=said, timeout=PATIENCE).returncode == 0
            )
        assert (images / "said").read_text() == ""
        try:
            run("nbdinfo", "--size", f"nbd+unix:///?socket={images / 'f'}")
        finally:
            os.kill(int(pid.read_text()), signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while (images / "f").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_sockets_that_it_was_started_with(self, images: Path) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        script = (
            "import os, sys\n"
            "os.dup2(int(sys.argv[1]), 3)\n"
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n"
            "from cowhand.cli.compat.nbd import main\n"
            "sys.exit(main(['qemu-nbd', *sys.argv[2:]]))"
        )
        number = str(listener.fileno())
        process = subprocess.Popen(
            [sys.executable, "-c", script, number, "-f", "raw", "r.raw"], cwd=images, pass_fds=[listener.fileno()]
        )
        listener.close()
        try:
            told = run("qemu-img", "info", "--output=json", f"nbd://127.0.0.1:{port}").stdout
            assert '"virtual-size": 1048576' in told
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
            process.wait()

    def test_a_temporary_overlay_leaves_nothing(self, images: Path) -> None:
        before = (images / "r.raw").read_bytes()
        with serving(images, "-f", "raw", "-s", "r.raw") as (process, uri):
            run("qemu-io", "-f", "raw", "-c", "write -P 9 0 64k", "-c", "read -P 9 0 64k", uri.format(""))
            assert process.wait(PATIENCE) == 0
        assert (images / "r.raw").read_bytes() == before

    def test_what_is_written_is_there(self, images: Path) -> None:
        with serving(images, "-f", "qcow2", "--discard=unmap", "--detect-zeroes=unmap", "d.qcow2") as (process, uri):
            run("qemu-io", "-f", "raw", "-c", "write -P 9 64k 64k", "-c", "write -P 0 128k 64k", uri.format(""))
            assert process.wait(PATIENCE) == 0
        with cowhand.open(images / "d.qcow2") as disk:
            assert disk.read(65536, 65536) == b"\x09" * 65536
            assert disk.read(131072, 65536) == bytes(65536)
        assert cowhand.check(images / "d.qcow2").corruptions == 0


def test_how_snapshots_are_named() -> None:
    assert snapshot_of("one") == "one"
    assert snapshot_of("snapshot.id=3,snapshot.name=x") == {"id": "3", "name": "x"}
