"""The NBD server over disks: what every command does, errors, limits, hostile clients, and its end."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols import null
from cowhand.core.errors import InvalidArgument
from cowhand.drivers import REGISTRY
from cowhand.exports.nbd import sockets
from cowhand.exports.nbd.export import NbdExport
from cowhand.exports.nbd.limits import LEAST_BUFFER, Limits
from cowhand.exports.nbd.server import NbdServer
from cowhand.nbd import constants as nbd
from cowhand.nbd.options import encode_go, encode_option
from tests.exports.serving import Raw, Running, served
from tests.tools.patience import PATIENCE

SIZE = 48 << 20
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk.qcow2"
    cowhand.create(path, "qcow2", SIZE)
    with cowhand.open(path, writable=True) as opened:
        yield opened


@pytest.fixture
def server(disk: Disk, tmp_path: Path) -> Iterator[Running]:
    with served(disk, tmp_path / "s") as running:
        yield running


def eventually(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def fill(client: Raw, words: bytes) -> None:
    """Send *words* again and again until nobody takes them any more."""
    client.sock.settimeout(0.5)
    try:
        while True:
            client.sock.sendall(words * 100)
    except TimeoutError:
        pass


# -- commands


@pytest.mark.parametrize("structured", [True, False])
def test_reads_and_writes_of_all_sizes(disk: Disk, server: Running, structured: bool) -> None:
    rng = random.Random(5)
    model = bytearray(SIZE)
    with Raw(server.path).go(structured=structured) as client:
        for length in (
            1,
            4096,
            100_001,
            2 * MIB,
            2 * MIB + 4096 - 28,
            2 * MIB + 4096,
            2 * MIB + 5000,
            9 * MIB,
            32 * MIB,
        ):
            offset = rng.randrange(SIZE - length)
            data = rng.randbytes(length)
            model[offset : offset + length] = data
            client.send(nbd.CMD_WRITE, offset, length, payload=data, flags=rng.randrange(2))
            assert client.reply() == (1, 0, b"")
            client.send(nbd.CMD_READ, offset, length, cookie=2)
            got = bytearray(length)
            if not structured:
                assert client.reply() == (2, 0, b"")
                got[:] = client.receive(length)
            else:
                have = 0
                while have < length:
                    cookie, kind, payload = client.reply()
                    assert (cookie, kind) == (2, nbd.REPLY_TYPE_OFFSET_DATA)
                    at = int.from_bytes(payload[:8], "big") - offset
                    got[at : at + len(payload) - 8] = payload[8:]
                    have += len(payload) - 8
            assert got == data
    for at in range(0, SIZE, MIB):
        assert disk.read(at, MIB) == model[at : at + MIB]


def test_one_piece_where_it_is_asked_for(server: Running) -> None:
    with Raw(server.path).go() as client:
        client.send(nbd.CMD_READ, 0, 5 * MIB, flags=nbd.CMD_FLAG_DF)
        assert len(client.reply()[2]) == 5 * MIB + 8


def test_many_requests_at_once_are_all_answered(disk: Disk, server: Running) -> None:
    with Raw(server.path).go() as client:
        words = b""
        for number in range(500):
            words += (
                struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, number, number * 4096, 512)
                + bytes([number % 256]) * 512
            )
        client.sock.sendall(words)
        assert sorted(client.reply()[0] for _ in range(500)) == list(range(500))
        words = b"".join(
            struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, n, n * 4096, 4096) for n in range(500)
        )
        threading.Thread(target=client.sock.sendall, args=(words,)).start()
        for _ in range(500):
            cookie, _, payload = client.reply()
            assert payload[8:] == bytes([cookie % 256]) * 512 + bytes(3584)


def test_zeroes_trim_flush_and_cache(disk: Disk, server: Running) -> None:
    disk.write(0, b"x" * MIB)
    with Raw(server.path).go() as client:
        for command, offset, length, flags in (
            (nbd.CMD_WRITE_ZEROES, 0, 65536, 0),
            (nbd.CMD_WRITE_ZEROES, 65536, 65536, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA),
            (nbd.CMD_WRITE_ZEROES, 131072, 65536, nbd.CMD_FLAG_FAST_ZERO),
            (nbd.CMD_TRIM, 196608, 65536, nbd.CMD_FLAG_FUA),
            (nbd.CMD_CACHE, 0, SIZE, 0),
            (nbd.CMD_FLUSH, 0, 0, 0),
            (nbd.CMD_READ, 0, 0, 0),
            (nbd.CMD_WRITE, SIZE, 0, 0),
            (nbd.CMD_TRIM, SIZE, 0, 0),
        ):
            client.send(command, offset, length, flags=flags)
            assert client.reply() == (1, 0, b""), (command, flags)
    assert disk.read(0, 262144) == bytes(262144)
    assert disk.read(262144, 5) == b"xxxxx"
    rows = [
        (row.start, row.length, bool(row.flags & cowhand.ZERO)) for batch in disk.extents(0, 262144) for row in batch
    ]
    assert all(zero for _, _, zero in rows)


def test_zeroes_that_would_not_be_fast_fail(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    cowhand.create(path, "qcow2", MIB, {"compat": "0.10"})
    with (
        cowhand.open(path, writable=True) as old,
        served(old, tmp_path / "s") as server,
        Raw(server.path).go() as client,
    ):
        old.write(0, b"x" * 65536)
        client.send(nbd.CMD_WRITE_ZEROES, 100, 1000, flags=nbd.CMD_FLAG_FAST_ZERO)
        assert client.error() == 95
        client.send(nbd.CMD_WRITE_ZEROES, 100, 1000)
        assert client.reply() == (1, 0, b"")


def test_status_of_every_context(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    cowhand.create(base, "qcow2", MIB)
    with cowhand.open(base, writable=True) as below:
        below.write(65536, b"b" * 65536)
        below.write_zeroes(131072, 65536)
    cowhand.create(top, "qcow2", backing=str(base), backing_format="qcow2")
    names = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b")
    with cowhand.open(top, writable=True) as disk:
        cowhand.add_bitmap(disk, "b", granularity=65536)
        disk.write(0, b"t" * 65536)
        with served(disk, tmp_path / "s", allocation_depth=True, bitmaps=["b"]) as server:
            with Raw(server.path).go(contexts=names) as client:
                client.send(nbd.CMD_BLOCK_STATUS, 0, MIB)
                told = [client.reply() for _ in names]
                rest = MIB - 3 * 65536
                expected = (
                    [(65536 * 2, 0), (MIB - 65536 * 2, 3)],
                    [(65536, 1), (65536 * 2, 2), (rest, 0)],
                    [(65536, 1), (MIB - 65536, 0)],
                )
                for ident, (reply, rows) in enumerate(zip(told, expected, strict=True)):
                    numbers = struct.unpack(f">{len(reply[2]) // 4}I", reply[2])
                    assert numbers == (ident, *[value for row in rows for value in row])
                client.send(nbd.CMD_BLOCK_STATUS, 100, MIB - 100, flags=nbd.CMD_FLAG_REQ_ONE)
                for ident, row in ((0, (131072 - 100, 0)), (1, (65536 - 100, 1)), (2, (65536 - 100, 1))):
                    assert client.reply()[2] == struct.pack(">III", ident, *row)
            with Raw(server.path).go(extended=True, contexts=names) as client:
                payload = struct.pack(">QII", MIB, 2, 2)
                client.send(nbd.CMD_BLOCK_STATUS, 0, 16, flags=nbd.CMD_FLAG_PAYLOAD_LEN, payload=payload)
                assert client.reply()[1:] == (6, struct.pack(">IIQQQQ", 2, 2, 65536, 1, MIB - 65536, 0))
                client.send(nbd.CMD_BLOCK_STATUS, 1, 12, flags=nbd.CMD_FLAG_PAYLOAD_LEN, payload=payload[:12])
                assert client.error() == 22
                client.send(nbd.CMD_TRIM, 0, 3, flags=nbd.CMD_FLAG_PAYLOAD_LEN, payload=b"???")
                assert client.error() == 22
                client.send(nbd.CMD_READ, 0, 4)
                assert client.reply()[2][8:] == b"tttt"
                client.send(nbd.CMD_WRITE, 0, 4, flags=nbd.CMD_FLAG_PAYLOAD_LEN, payload=b"last")
                assert client.reply() == (1, nbd.REPLY_TYPE_NONE, b"")


def test_errors_are_each_request_s_own(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    rule = {"event": "write_aio", "errno": errno.EIO, "sector": 8}
    full = {"event": "write_aio", "errno": errno.ENOSPC, "sector": 16}
    below = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}, "inject-error": [rule, full]}
    disk = Disk(Opening(REGISTRY).open({"driver": "raw", "file": below}), writable=True)
    with disk, served(disk, tmp_path / "s") as server:
        assert not server.server.exports.get("").waits  # type: ignore[union-attr]
        with Raw(server.path).go() as client:
            words = b""
            for number in range(20):
                words += (
                    struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, number & 1, nbd.CMD_WRITE, number, number * 512, 512)
                    + b"w" * 512
                )
            client.sock.sendall(
                words + struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 20, MIB, 512) + b"w" * 512
            )
            told = {}
            for _ in range(21):
                cookie, kind, payload = client.reply()
                told[cookie] = int.from_bytes(payload[:4], "big") if kind & nbd.REPLY_TYPE_ERROR_BIT else kind
            assert told == {**dict.fromkeys(range(20), 0), 8: 5, 16: 28, 20: 28}
            # In the middle of a write by pieces: its rest is passed over.
            client.send(nbd.CMD_WRITE, 0, MIB, payload=b"z" * MIB)
            assert client.error() in (5, 28)
            client.send(nbd.CMD_FLUSH)
            assert client.reply() == (1, 0, b"")


def test_a_read_only_export(disk: Disk, tmp_path: Path) -> None:
    with served(disk, tmp_path / "r", writable=False) as server, Raw(server.path).go() as client:
        for command, payload in ((nbd.CMD_WRITE, b"x"), (nbd.CMD_TRIM, b""), (nbd.CMD_WRITE_ZEROES, b"")):
            client.send(command, 0, 1, payload=payload)
            assert client.error() == 1
        client.send(nbd.CMD_WRITE, 0, 5 * MIB, payload=bytes(5 * MIB))
        assert client.error() == 1
        client.send(nbd.CMD_READ, 0, 1)
        assert client.reply()[1] == nbd.REPLY_TYPE_OFFSET_DATA


def test_a_write_larger_than_the_protocol_allows_is_passed_over(server: Running) -> None:
    with Raw(server.path).go() as client:
        client.send(nbd.CMD_WRITE, 0, (32 << 20) + 1, payload=bytes((32 << 20) + 1))
        assert client.error() == 22
        client.send(nbd.CMD_FLUSH)
        assert client.reply() == (1, 0, b"")


def test_a_disk_that_is_closed_under_clients_tells_them(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    disk = cowhand.open(path, format="raw")
    with served(disk, tmp_path / "s") as server, Raw(server.path).go() as client:
        disk.close()
        for command, length in ((nbd.CMD_READ, 512), (nbd.CMD_CACHE, 512)):
            client.send(command, 0, length)
            assert client.error() == 108


def test_an_export_for_writing_needs_a_writable_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    with cowhand.open(path, format="raw") as disk:
        with pytest.raises(InvalidArgument):
            NbdExport(disk, writable=True)
        with pytest.raises(InvalidArgument):
            NbdExport(disk, "n" * 4097)
        with pytest.raises(cowhand.errors.BitmapNotFound):
            NbdExport(disk, bitmaps=["none"])


# -- disks whose requests wait


def test_requests_that_wait_are_worked_on_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Condition()
    inside = most = 0

    def wait(_seconds: float) -> None:  # until a second request waits as well
        nonlocal inside, most
        with together:
            inside += 1
            most = max(most, inside)
            together.notify_all()
            assert together.wait_for(lambda: most > 1, PATIENCE)
            inside -= 1

    monkeypatch.setattr(null, "time", SimpleNamespace(sleep=wait))
    slow = {"driver": "null-co", "size": 1 << 30, "latency-ns": 100_000_000, "read-zeroes": True}
    disk = Disk(Opening(REGISTRY).open({**slow, "read-only": False}), writable=True)
    with disk, served(disk, tmp_path / "s") as server:
        assert server.server.exports.get("").waits  # type: ignore[union-attr]
        with Raw(server.path).go() as client:
            for number in range(16):
                client.send(nbd.CMD_READ, number * 4096, 4096, cookie=number)
            client.send(nbd.CMD_WRITE, 0, 3 * MIB, cookie=99, payload=bytes(3 * MIB))
            assert {client.reply()[0] for _ in range(17)} == {*range(16), 99}
    assert most > 1


def test_replies_that_nobody_reads_hold_back_their_own_client_only(tmp_path: Path) -> None:
    slow = {"driver": "null-co", "size": 1 << 30, "latency-ns": 1_000_000, "read-zeroes": True, "read-only": False}
    disk = Disk(Opening(REGISTRY).open(slow), writable=True)
    with disk, served(disk, tmp_path / "s", limits=Limits(memory=8 * MIB)) as server:
        stuck, other = Raw(server.path).go(), Raw(server.path).go()
        with stuck, other:
            words = struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 7, 0, MIB)
            fill(stuck, words)
            for _ in range(20):
                other.send(nbd.CMD_READ, 0, 4096)
                assert other.reply()[1] == nbd.REPLY_TYPE_OFFSET_DATA


# -- clients that do not behave


def test_a_crowd_in_its_handshake_keeps_nobody_out(disk: Disk, tmp_path: Path) -> None:
    limits = Limits(handshakes=20)
    with served(disk, tmp_path / "s", limits=limits) as server:
        crowd = []
        for _ in range(300):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(server.path))
            crowd.append(sock)
        with Raw(server.path).go() as client:
            client.send(nbd.CMD_READ, 0, 1)
            assert client.reply()[1] == nbd.REPLY_TYPE_OFFSET_DATA
        assert len(server.server._clients) <= 20
        for sock in crowd:
            sock.close()
        eventually(lambda: not server.server._clients, "clients that left are forgotten")


def test_a_handshake_has_a_deadline(disk: Disk, tmp_path: Path) -> None:
    with served(disk, tmp_path / "s", limits=Limits(handshake_seconds=0.2)) as server:
        client = Raw(server.path)
        with pytest.raises(EOFError):
            client.receive(1)
        client.close()
        with Raw(server.path).go() as quick:
            time.sleep(0.4)
            quick.send(nbd.CMD_FLUSH)
            assert quick.reply() == (1, 0, b"")
        assert "more than 0.2 s" in server.seen.refused[0]


def test_a_client_more_than_allowed_waits_for_another_to_leave(disk: Disk, tmp_path: Path) -> None:
    with served(disk, tmp_path / "s", limits=Limits(clients=1)) as server:
        first = Raw(server.path).go()
        second = socket.socket(socket.AF_UNIX)
        second.settimeout(0.3)
        second.connect(str(server.path))
        with pytest.raises(TimeoutError):
            second.recv(1)
        first.close()
        second.settimeout(PATIENCE)
        assert second.recv(18) == b"NBDMAGICIHAVEOPT\0\3"
        second.close()


@pytest.mark.parametrize("seed", range(4))
def test_garbage_ends_its_own_connection(server: Running, seed: int) -> None:
    rng = random.Random(seed)
    with Raw(server.path).go() as steady:
        for _ in range(25):
            client = Raw(server.path)
            with client, pytest.raises((EOFError, OSError)):  # noqa: PT012 - where it is hung up on is open
                if rng.random() < 0.5:
                    client.go(extended=rng.random() < 0.5)
                    client.send(
                        rng.randrange(12), rng.randrange(1 << 64), rng.randrange(1 << 16), flags=rng.randrange(64)
                    )
                client.sock.sendall(rng.randbytes(rng.randrange(28, 5000)))
                client.sock.shutdown(socket.SHUT_WR)
                while True:
                    client.receive(1)
        steady.send(nbd.CMD_READ, 0, 16)
        assert steady.reply()[1] == nbd.REPLY_TYPE_OFFSET_DATA


def test_a_client_that_reads_nothing_holds_little(disk: Disk, tmp_path: Path) -> None:
    with served(disk, tmp_path / "s", limits=Limits(memory=MIB)) as server:
        stuck, other = Raw(server.path).go(), Raw(server.path).go()
        with stuck, other:
            words = struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 7, 0, 32 << 20)
            fill(stuck, words)
            [held, _] = server.server.connections
            assert len(held._in) + len(held._out) <= 2 * max(LEAST_BUFFER, 1 << 18)
            other.send(nbd.CMD_READ, 0, 16)
            assert other.reply()[1] == nbd.REPLY_TYPE_OFFSET_DATA


def test_too_many_connections_are_sent_away(disk: Disk, tmp_path: Path) -> None:
    with served(disk, tmp_path / "s", limits=Limits(connections=2)) as server:
        with Raw(server.path).go(), Raw(server.path).go():
            eventually(lambda: len(server.server.connections) == 2, "two are there")
            third = Raw(server.path)
            third.sock.sendall(encode_option(nbd.OPT_GO, encode_go(b"")))
            with third, pytest.raises((EOFError, OSError)):
                third.receive(1000)
        eventually(lambda: not server.server.connections, "they left")
        with Raw(server.path).go() as client:
            client.send(nbd.CMD_FLUSH)
            assert client.reply() == (1, 0, b"")


# -- its end


def test_what_was_begun_is_finished(tmp_path: Path) -> None:
    slow = {"driver": "null-co", "size": 1 << 30, "latency-ns": 300_000_000, "read-zeroes": True, "read-only": False}
    disk = Disk(Opening(REGISTRY).open(slow), writable=True)
    path = tmp_path / "s"
    server = NbdServer([NbdExport(disk, writable=True)])
    server.listen(sockets.listen_unix(str(path)))
    server.start()
    client = Raw(path).go()
    client.send(nbd.CMD_WRITE, 0, 5, payload=b"hello")
    time.sleep(0.1)
    assert server.stop()
    assert client.reply() == (1, 0, b"")
    with client, pytest.raises((EOFError, OSError)):
        client.receive(1)
    disk.close()


def test_a_client_that_reads_nothing_does_not_keep_it(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = NbdServer([NbdExport(disk, writable=True)])
    server.listen(sockets.listen_unix(str(path)))
    server.start()
    client = Raw(path).go()
    for _ in range(4):
        client.send(nbd.CMD_READ, 0, 32 << 20)
    time.sleep(0.1)
    assert not server.stop(grace=0.3)
    client.close()


def test_descriptors_are_given_back(disk: Disk, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        with served(disk, tmp_path / f"s{number}") as server:
            for _ in range(5):
                with Raw(server.path).go() as client:
                    client.send(nbd.CMD_DISC)
            Raw(server.path).close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- sockets


def test_a_socket_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    sockets.listen_unix(path).close()
    again = sockets.listen_unix(path)
    with pytest.raises(cowhand.errors.IOFailed, match="Another server"):
        sockets.listen_unix(path)
    sockets.listen_unix(path, replace=True).close()
    again.close()
    (tmp_path / "file").write_text("not a socket")
    with pytest.raises(cowhand.errors.IOFailed):
        sockets.listen_unix(str(tmp_path / "file"), replace=True)
    assert (tmp_path / "file").read_text() == "not a socket"


def test_one_port_of_all_addresses() -> None:
    listening = sockets.listen_tcp("", 0)
    ports = {sock.getsockname()[1] for sock in listening}
    assert len(ports) == 1 and ports != {0}
    for sock in listening:
        sock.close()
    with pytest.raises(cowhand.errors.IOFailed):
        sockets.listen_tcp("no.such.host.invalid", 1)
