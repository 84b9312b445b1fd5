"""NBD over TLS, this project's server and client, each also with QEMU's, libnbd's and nbdkit's: who is let in, and who is not."""

# ruff: noqa: SIM117 - a server and what is done to it are two thoughts
from __future__ import annotations

import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.core.errors import CowhandError
from cowhand.crypto import tls
from cowhand.exports.nbd import sockets
from cowhand.exports.nbd.export import NbdExport
from cowhand.exports.nbd.server import NbdServer
from cowhand.nbd import constants as nbd
from cowhand.nbd.options import encode_option
from tests.exports.certificates import Authority
from tests.exports.serving import Raw, Seen
from tests.nbd.servers import nbdkit, qemu_nbd
from tests.tools.programs import require, run
from tests.tools.qemu import require_qemu

SIZE = 8 << 20
require_libnbd = require("nbdinfo")
require_nbdkit = require("nbdkit")
require_nbd = require("qemu-nbd")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tls")
    ours, theirs = Authority("ours"), Authority("theirs")
    found = {
        "server": ours.sign(base / "server", "server"),
        "client": ours.sign(base / "client", "client"),
        "nobody": ours.only(base / "nobody"),
        "stranger": theirs.sign(base / "stranger", "client"),
        "expired": ours.sign(base / "expired", "server", days=-1),
        "expired client": ours.sign(base / "expired-client", "client", days=-1),
        "elsewhere": ours.sign(base / "elsewhere", "server", host="elsewhere.example"),
    }
    mixed = ours.sign(base / "mixed", "client")  # one of ours that does not trust us
    theirs.only(mixed)
    return {**found, "mixed": mixed, "base": base}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    with cowhand.open(path, format="raw", writable=True) as opened:
        yield opened


class Encrypted:
    """A server on a port of this machine that encrypts."""

    def __init__(self, disk: Disk, credentials: tls.Credentials) -> None:
        self.seen = Seen()
        self.server = NbdServer([NbdExport(disk, writable=True)], tls=credentials.server(), observer=self.seen)
        listening = sockets.listen_tcp("127.0.0.1", 0)
        self.port = listening[0].getsockname()[1]
        self.server.listen(*listening)
        self.server.start()

    def __enter__(self) -> Encrypted:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.server.stop(5)
        assert not [each.reason for each in self.seen.left if "internal" in each.reason]


def connect(port: int, **options: Any) -> Disk:
    given = {name.replace("_", "-"): str(value) for name, value in options.items()}
    server = {"type": "inet", "host": "localhost", "port": str(port)}
    return cowhand.open({"driver": "raw", "file": {"driver": "nbd", "server": server, **given}}, writable=True)


def exercise(own: Disk, disk: Disk) -> None:
    """Read and write in all sizes, by several threads."""
    rng = random.Random(4)
    assert own.read(0, SIZE) == disk.read(0, SIZE)
    parts = [(at, rng.randbytes(1 << 20)) for at in range(0, SIZE, 1 << 20)]
    threads = [threading.Thread(target=own.write, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own.flush()
    for at, data in parts:
        assert disk.read(at, 1 << 20) == data
    assert own.read(77, 100_000) == disk.read(77, 100_000)


class TestCertificates:
    """With certificates of both ends, or of the server alone."""

    def test_both_ends_are_known(self, disk: Disk, folders: dict[str, Path]) -> None:
        with (
            Encrypted(disk, tls.X509(str(folders["server"]))) as server,
            connect(server.port, tls_certificates=folders["client"]) as own,
        ):
            exercise(own, disk)
            assert "tls-certificates" in own.filename

    def test_a_uri_says_it_all(self, disk: Disk, folders: dict[str, Path]) -> None:
        with Encrypted(disk, tls.X509(str(folders["server"]))) as server:
            uri = f"nbds://localhost:{server.port}?tls-certificates={folders['client']}"
            with cowhand.open(uri, format="raw") as own:
                assert own.read(0, 4096) == disk.read(0, 4096)
                with cowhand.open(own.filename, format="raw") as again:
                    assert again.size == SIZE

    def test_clients_need_none_where_the_server_asks_for_none(self, disk: Disk, folders: dict[str, Path]) -> None:
        with Encrypted(disk, tls.X509(str(folders["server"]), verify_peer=False)) as server:
            with connect(server.port, tls_certificates=folders["nobody"]) as own:
                assert own.read(5, 5) == disk.read(5, 5)

    @pytest.mark.parametrize("who", ["nobody", "stranger", "expired client", "mixed"])
    def test_who_is_not_let_in(self, disk: Disk, folders: dict[str, Path], who: str) -> None:
        with Encrypted(disk, tls.X509(str(folders["server"]))) as server:
            with pytest.raises(CowhandError):
                connect(server.port, tls_certificates=folders[who])
            assert not server.seen.began

    @pytest.mark.parametrize("what", ["expired", "elsewhere"])
    def test_which_server_is_not_trusted(self, disk: Disk, folders: dict[str, Path], what: str) -> None:
        with Encrypted(disk, tls.X509(str(folders[what]), verify_peer=False)) as server:
            with pytest.raises(CowhandError, match=r"TLS handshake failed: .*(expired|ostname)"):
                connect(server.port, tls_certificates=folders["nobody"])
            if what == "elsewhere":
                with connect(server.port, tls_certificates=folders["nobody"], tls_hostname="elsewhere.example") as own:
                    assert own.size == SIZE
            with connect(server.port, tls_certificates=folders["nobody"], tls_verify_peer="off") as own:
                assert own.size == SIZE

    def test_the_system_s_authorities_do_not_know_it(self, disk: Disk, folders: dict[str, Path]) -> None:
        with Encrypted(disk, tls.X509(str(folders["server"]), verify_peer=False)) as server:
            with pytest.raises(CowhandError, match="TLS handshake failed"):
                cowhand.open(f"nbds://localhost:{server.port}", format="raw")

    def test_what_is_missing_is_named(self, tmp_path: Path, folders: dict[str, Path]) -> None:
        for folder in (tmp_path, folders["client"]):
            with pytest.raises(CowhandError) as caught:
                tls.X509(str(folder)).server()
            assert caught.value.qemu().startswith("Unable to access credentials")
        (folders["base"] / "bad").mkdir(exist_ok=True)
        for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
            (folders["base"] / "bad" / name).write_text("no certificate")
        with pytest.raises(CowhandError, match="cannot be used"):
            tls.X509(str(folders["base"] / "bad")).server()


class TestPlainText:
    """Nothing is said in plain text where TLS is required, and nothing that was counts afterwards."""

    def test_a_plain_client_is_told(self, disk: Disk, folders: dict[str, Path]) -> None:
        with (
            Encrypted(disk, tls.X509(str(folders["server"]))) as server,
            pytest.raises(CowhandError, match="TLS negotiation required"),
        ):
            connect(server.port)

    def test_a_server_without_it_is_not_talked_to(self, disk: Disk, folders: dict[str, Path], tmp_path: Path) -> None:
        seen = Seen()
        plain = NbdServer([NbdExport(disk, writable=True)], observer=seen)
        listening = sockets.listen_tcp("127.0.0.1", 0)
        plain.listen(*listening)
        plain.start()
        with pytest.raises(CowhandError):
            connect(listening[0].getsockname()[1], tls_certificates=folders["client"])
        plain.stop()
        assert not seen.began

    def test_what_comes_behind_the_wish_ends_it(self, disk: Disk, folders: dict[str, Path]) -> None:
        with Encrypted(disk, tls.X509(str(folders["server"]))) as server:
            for behind in (encode_option(nbd.OPT_LIST), b"\x16\x03"):
                with socket.create_connection(("127.0.0.1", server.port)) as sock:
                    sock.settimeout(10)
                    sock.recv(18)
                    sock.sendall(b"\0\0\0\3" + encode_option(nbd.OPT_STARTTLS) + behind)
                    assert sock.recv(100) == b""

    @pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", bytes(300), encode_option(nbd.OPT_LIST) * 5])
    def test_no_tls_behind_the_acknowledgement_ends_it(
        self, disk: Disk, folders: dict[str, Path], words: bytes
    ) -> None:
        with Encrypted(disk, tls.X509(str(folders["server"]))) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.settimeout(10)
                sock.recv(18)
                sock.sendall(b"\0\0\0\3" + encode_option(nbd.OPT_STARTTLS))
                sock.recv(20)
                sock.sendall(words)
                try:
                    while sock.recv(4096):
                        pass
                except ConnectionResetError:
                    pass
            assert not server.seen.began

    def test_an_old_version_is_refused(self, disk: Disk, folders: dict[str, Path]) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="TLS"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with Encrypted(disk, tls.X509(str(folders["server"]), verify_peer=False)) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.settimeout(10)
                sock.recv(18)
                sock.sendall(b"\0\0\0\3" + encode_option(nbd.OPT_STARTTLS))
                sock.recv(20)
                with pytest.raises((ssl.SSLError, OSError)):
                    context.wrap_socket(sock)

    def test_a_client_that_stops_in_the_middle_is_ended(self, disk: Disk, folders: dict[str, Path]) -> None:
        with Encrypted(disk, tls.X509(str(folders["server"]))) as server:
            server.server.limits = server.server.limits._replace(handshake_seconds=0.3)
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.settimeout(10)
                sock.recv(18)
                sock.sendall(b"\0\0\0\3" + encode_option(nbd.OPT_STARTTLS))
                sock.recv(20)
                sock.sendall(b"\x16\x03\x01\x02\x00\x01")
                assert sock.recv(100) == b""


def psk_or_skip() -> None:
    if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
        pytest.importorskip("sslpsk3")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    psk_or_skip()
    (tmp_path / "keys.psk").write_text("qemu:" + "ab" * 32 + "\nalice:" + "cd" * 32 + "\n")
    return tmp_path / "keys.psk"


class TestPresharedKeys:
    """With a file of keys."""

    @pytest.mark.parametrize("user", ["qemu", "alice"])
    def test_whoever_has_a_key(self, disk: Disk, keys: Path, user: str) -> None:
        with Encrypted(disk, tls.PresharedKeys(str(keys))) as server:
            with connect(server.port, tls_psk_file=keys, tls_username=user) as own:
                exercise(own, disk)
            with cowhand.open(f"nbds://{user}@localhost:{server.port}?tls-psk-file={keys}", format="raw") as own:
                assert own.size == SIZE

    def test_whoever_has_none(self, disk: Disk, keys: Path, tmp_path: Path) -> None:
        wrong = tmp_path / "wrong.psk"
        wrong.write_text("qemu:" + "00" * 32 + "\nbob:" + "11" * 32 + "\n")
        with Encrypted(disk, tls.PresharedKeys(str(keys))) as server:
            for user in ("qemu", "bob"):
                with pytest.raises(CowhandError, match="TLS handshake failed"):
                    connect(server.port, tls_psk_file=wrong, tls_username=user)
            with pytest.raises(CowhandError, match="no key of user 'eve'"):
                connect(server.port, tls_psk_file=keys, tls_username="eve")
            assert not server.seen.began

    def test_what_is_no_file_of_keys(self, tmp_path: Path) -> None:
        for text in ("", "# nothing", "qemu:xyz", "a" * (2 << 20)):
            (tmp_path / "k").write_text(text)
            with pytest.raises(CowhandError):
                tls.PresharedKeys(str(tmp_path / "k")).client()

    @require_libnbd
    def test_libnbd(self, disk: Disk, keys: Path, tmp_path: Path) -> None:
        with Encrypted(disk, tls.PresharedKeys(str(keys))) as server:
            uri = f"nbds://alice@localhost:{server.port}?tls-psk-file={keys}"
            run("nbdcopy", uri, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == disk.read(0, SIZE)

    @require_qemu
    def test_qemu(self, disk: Disk, keys: Path) -> None:
        with Encrypted(disk, tls.PresharedKeys(str(keys))) as server:
            words = ["--object", f"tls-creds-psk,id=t,endpoint=client,dir={keys.parent}", "--image-opts"]
            image = f"driver=nbd,host=localhost,port={server.port},tls-creds=t"
            run("qemu-io", *words, "-c", "write -P 7 1M 1M", "-c", "read -P 7 1M 1M", image)
        assert disk.read(1 << 20, 1 << 20) == bytes([7]) * (1 << 20)

    @require_nbdkit
    def test_nbdkit_as_server(self, keys: Path, tmp_path: Path) -> None:
        with nbdkit(tmp_path, "--tls=require", f"--tls-psk={keys}", "pattern", "8M") as server:
            with cowhand.open(f"nbds+unix://qemu@/?socket={server.socket}&tls-psk-file={keys}", format="raw") as own:
                assert own.read(8, 8) == (8).to_bytes(8, "big")


@pytest.mark.interop
class TestPeers:
    """Certificates, with other programs."""

    @require_libnbd
    def test_libnbd_as_client(self, disk: Disk, folders: dict[str, Path], tmp_path: Path) -> None:
        with Encrypted(disk, tls.X509(str(folders["server"]))) as server:
            uri = f"nbds://localhost:{server.port}?tls-certificates={folders['client']}"
            run("nbdcopy", uri, tmp_path / "out")
            assert (tmp_path / "out").read_bytes() == disk.read(0, SIZE)
            stranger = f"nbds://localhost:{server.port}?tls-certificates={folders['stranger']}"
            assert run("nbdinfo", stranger, check=False).status != 0
            assert "TLS" in run("nbdinfo", uri).stdout

    @require_qemu
    def test_qemu_as_client(self, disk: Disk, folders: dict[str, Path]) -> None:
        with Encrypted(disk, tls.X509(str(folders["server"]))) as server:
            image = f"driver=nbd,host=localhost,port={server.port},tls-creds=t"
            for who, status in (("client", 0), ("stranger", 1), ("nobody", 1)):
                words = ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={folders[who]}", "--image-opts"]
                result = run("qemu-io", *words, "-c", "write -P 9 0 3M", "-c", "read -P 9 0 3M", image, check=False)
                assert result.status == status, result
        assert disk.read(0, 3 << 20) == bytes([9]) * (3 << 20)

    @require_nbd
    def test_qemu_as_server(self, folders: dict[str, Path], tmp_path: Path) -> None:
        words = [
            "--object",
            f"tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir={folders['server']}",
            "--tls-creds",
            "t",
        ]
        (tmp_path / "q.raw").write_bytes(bytes(SIZE))
        with qemu_nbd(tmp_path, tmp_path / "q.raw", *words) as server:
            given = {"server.type": "unix", "server.path": str(server.socket), "tls-hostname": "localhost"}
            with cowhand.open(
                {"driver": "raw", "file": {"driver": "nbd", **given, "tls-certificates": str(folders["client"])}},
                writable=True,
            ) as own:
                data = own.read(0, SIZE)
                own.write(100, b"encrypted")
                own.flush()
            assert data[100:109] != b"encrypted"
            with pytest.raises(CowhandError):
                cowhand.open(
                    {"driver": "raw", "file": {"driver": "nbd", **given, "tls-certificates": str(folders["stranger"])}}
                )
            with pytest.raises(CowhandError, match="without a name"):
                cowhand.open(f"nbds+unix:///?socket={server.socket}&tls-certificates={folders['client']}", format="raw")
        assert (tmp_path / "q.raw").read_bytes()[100:109] == b"encrypted"

    @require_nbdkit
    def test_nbdkit_as_server(self, folders: dict[str, Path], tmp_path: Path) -> None:
        words = ["--tls=require", f"--tls-certificates={folders['server']}", "--tls-verify-peer", "pattern", "8M"]
        with nbdkit(tmp_path, *words) as server:
            uri = f"nbds+unix:///?socket={server.socket}&tls-certificates={folders['client']}&tls-hostname=localhost"
            with cowhand.open(uri, format="raw") as own:
                assert own.read(4096, 8) == (4096).to_bytes(8, "big")

    @require_nbd
    def test_the_drop_in_tool(self, folders: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
        script = "import sys; from cowhand.cli.compat.nbd import main; sys.exit(main(['qemu-nbd', *sys.argv[1:]]))"
        server = ["--object", f"tls-creds-x509,id=t,endpoint=server,dir={folders['server']}", "--tls-creds", "t"]
        client = ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={folders['client']}", "--tls-creds", "t"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        words = ["-b", "localhost", "-p", port, "-t", "-e", "0", "-f", "raw", "disk.raw"]
        process = subprocess.Popen([sys.executable, "-c", script, *server, *words], cwd=tmp_path)
        try:
            deadline = time.monotonic() + 20
            while True:
                ask = ["-L", "-b", "localhost", "-p", port, *client]
                theirs = run("qemu-nbd", *ask, check=False)
                if not theirs.status:
                    break
                assert time.monotonic() < deadline, theirs
                time.sleep(0.1)
            own = subprocess.run([sys.executable, "-c", script, *ask], capture_output=True, text=True, timeout=60)
            assert own.stdout == theirs.stdout
            assert run("qemu-nbd", "-L", "-b", "localhost", "-p", port, check=False).status == 1
        finally:
            process.kill()
            process.wait()


def test_raw_clients_of_a_plain_server_hear_that_there_is_none(disk: Disk, tmp_path: Path) -> None:
    server = NbdServer([NbdExport(disk)])
    server.listen(sockets.listen_unix(str(tmp_path / "s")))
    server.start()
    with Raw(tmp_path / "s") as client:
        assert client.option(nbd.OPT_STARTTLS) == [(nbd.REP_ERR_POLICY, b"TLS not configured")]
    server.stop()
