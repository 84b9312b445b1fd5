"""Servers that lie, hang, die and come back: what a disk over them does."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import struct
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import DISCARD, FLUSH, READ, WRITE_REQUEST, ZERO_REQUEST
from cowhand.block.protocols.nbd import node as nbd
from cowhand.block.protocols.nbd.node import NbdNode, NbdOptions
from cowhand.block.protocols.nbd.session import Session
from cowhand.core.errors import AccessDenied, Closed, CowhandError, IOFailed, NoSpace, NotSupported, Poisoned
from cowhand.core.extents import ZERO
from cowhand.nbd.constants import (
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    FLAG_HAS_FLAGS,
    FLAG_READ_ONLY,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_OFFSET_DATA,
)
from cowhand.nbd.errors import ConnectionLost, ProtocolViolation
from cowhand.nbd.replies import ReplyReader, encode_chunk, encode_simple
from cowhand.testing.nodes import in_threads
from tests.block.disks import submit
from tests.nbd.servers import Peer, Scripted, nbdkit, qemu_nbd, require_nbdkit
from tests.tools.patience import PATIENCE
from tests.tools.qemu import require_qemu_nbd


def open_node(uri: str, **options: object) -> NbdNode:
    options.setdefault("read_only", False)
    return NbdNode.open(None, NbdOptions(filename=uri, **options), {})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def serve_bytes(peer: Peer, *, limit: int = 1 << 30) -> list[int]:
    """Answer reads (byte N of the disk is N // 4096 % 251), writes and flushes by simple replies, until *limit* requests; return the commands."""
    seen: list[int] = []
    while len(seen) < limit:
        request = peer.request()
        seen.append(request.command)
        if request.command == CMD_DISC:
            break
        if request.command == CMD_WRITE:
            peer.receive(request.length)
        peer.send(encode_simple(request.cookie))
        if request.command == CMD_READ:
            peer.send(bytes((request.offset + i) // 4096 % 251 for i in range(request.length)))
    return seen


class TestHostile:
    """A server that breaks the rules costs an error, bounded time and bounded memory."""

    @pytest.mark.parametrize(
        "reply",
        [
            encode_simple(0xDEAD),
            b"\0" * 64,
            encode_chunk(REPLY_TYPE_OFFSET_DATA, 1, 0xFFFFFFFF, done=True) + bytes(8),
            encode_chunk(REPLY_TYPE_BLOCK_STATUS, 1, 0xFFFFFFFC, done=True),
        ],
    )
    def test_a_lie_ends_it_for_good(self, path: Path, reply: bytes) -> None:
        def script(peer: Peer) -> None:
            peer.agree()
            peer.request()
            peer.send(reply)
            peer.request()

        with Scripted(path, script) as server, Disk(open_node(server.uri, reconnect_delay=5)) as disk:
            for _ in range(3):
                with pytest.raises(ProtocolViolation):
                    disk.read(0, 4096)
            assert server.connections == 1

    def test_a_greeting_without_end_is_cut_off(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cowhand.block.protocols.nbd.address.HANDSHAKE_SECONDS", 0.3)

        def script(peer: Peer) -> None:
            peer.greet()
            while True:  # one byte at a time, never a whole reply
                peer.send(b"\0")
                time.sleep(0.02)

        with Scripted(path, script) as server, pytest.raises(ConnectionLost, match="in time"):
            open_node(server.uri)

    def test_silence_is_a_loss(self, path: Path) -> None:
        def script(peer: Peer) -> None:
            peer.agree()
            peer.receive(1 << 20)

        with Scripted(path, script) as server, Disk(open_node(server.uri, reply_timeout=1)) as disk:
            begin = time.monotonic()
            with pytest.raises(ConnectionLost, match="said nothing for 1 s") as caught:
                disk.read(0, 512)
            assert time.monotonic() - begin > 0.9
            assert caught.value.errno == errno.ETIMEDOUT

    def test_a_server_that_takes_nothing_is_a_loss(self, path: Path) -> None:
        def script(peer: Peer) -> None:
            peer.agree(64 << 20)
            time.sleep(2)

        with Scripted(path, script) as server:
            for before in ([], [(READ, 0, bytearray(512))]):
                node = open_node(server.uri, reply_timeout=1)
                with pytest.raises(ConnectionLost):
                    submit(node, [*before, (WRITE_REQUEST, 0, bytes(8 << 20))])
                graph.close_node(node)

    def test_all_who_wait_hear_of_a_failure(self, path: Path) -> None:
        def script(peer: Peer) -> None:
            peer.agree()
            for _ in range(8):
                peer.request()

        errors: list[BaseException] = []

        def read(disk: Disk) -> None:
            try:
                disk.read(0, 4096)
            except ConnectionLost as error:
                errors.append(error)

        with Scripted(path, script) as server, Disk(open_node(server.uri)) as disk:
            in_threads([lambda: read(disk)] * 8)
        assert len(errors) == 8
        assert len({id(error) for error in errors}) == 8

    def test_status_longer_than_asked_and_of_parts_of_blocks(self, path: Path) -> None:
        extents = [(512, 0), (100, 3), (1000, 3), (4096, 3), (0xFFFFFFFF, 0)]

        def script(peer: Peer) -> None:
            peer.agree(1 << 20, blocks=(512, 4096, 1 << 20))
            skipped = 0
            while True:
                request = peer.request()
                if request.command != CMD_BLOCK_STATUS:
                    return
                assert request.offset % 512 == 0
                # What the server says of its disk from the offset on.
                rows = []
                position = 0
                for length, state in extents:
                    begin, end = max(position, request.offset), position + length
                    if begin < end:
                        rows.append((min(end - begin, 0xFFFFFFFF), state))
                    position = end
                payload = struct.pack(">I", 7) + b"".join(struct.pack(">II", *row) for row in rows)
                peer.send(encode_chunk(REPLY_TYPE_BLOCK_STATUS, request.cookie, len(payload), done=True), payload)
                skipped += 1

        with Scripted(path, script) as server, Disk(open_node(server.uri)) as disk:
            rows = [(row.start, row.length, row.flags & ZERO) for batch in disk.extents() for row in batch]
        position = 0
        for start, length, _ in rows:
            assert start == position
            position += length
        assert position == 1 << 20
        for start, length, zero in rows:
            assert not zero or (start >= 512 and start + length <= 512 + 100 + 1000 + 4096)


class TestOldServers:
    """Servers that can do little."""

    def test_fua_is_a_flush_and_zeroes_are_bytes(self, path: Path) -> None:
        commands: list[int] = []

        def script(peer: Peer) -> None:
            peer.agree(flags=FLAG_HAS_FLAGS | FLAG_SEND_FLUSH, structured=False)
            commands.extend(serve_bytes(peer))

        with Scripted(path, script) as server, Disk(open_node(server.uri), writable=True) as disk:
            disk.write(0, b"x" * 512, fua=True)
            disk.write_zeroes(4096, 4096)
            disk.discard(0, 4096)
            with pytest.raises(NotSupported):
                disk.write_zeroes(0, 4096, fallback=False)
            disk.submit([(ZERO_REQUEST, 0, 512), (READ, 8192, bytearray(512)), (FLUSH, 0, 0)])
            assert disk.read(8192, 600) == b"\2" * 600  # without block status, aligned to sectors
        assert commands == [CMD_WRITE, CMD_FLUSH, CMD_WRITE, CMD_WRITE, CMD_READ, CMD_FLUSH, CMD_READ, CMD_DISC]

    def test_a_change_of_a_huge_export_is_never_whole_in_memory(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commands: list[int] = []
        most: list[int] = []
        run = Session.run
        monkeypatch.setattr(nbd, "MANY", 4)
        monkeypatch.setattr(Session, "run", lambda self, orders: (most.append(len(orders)), run(self, orders))[1])

        def script(peer: Peer) -> None:
            peer.agree(size=1 << 40, flags=FLAG_HAS_FLAGS | FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES, structured=False)
            commands.extend(serve_bytes(peer))

        with Scripted(path, script) as server, Disk(open_node(server.uri, discard="unmap"), writable=True) as disk:
            disk.discard(0, 10 << 30)
            disk.write_zeroes(0, 10 << 30)
            disk.submit([(DISCARD, 0, 5 << 30), (ZERO_REQUEST, 0, 5 << 30)])
        assert max(most) <= 4
        assert sorted(commands) == [CMD_DISC] + [CMD_TRIM] * 15 + [CMD_WRITE_ZEROES] * 15

    def test_fua_of_the_protocol(self, path: Path) -> None:
        flags: list[int] = []

        def script(peer: Peer) -> None:
            peer.agree(flags=FLAG_HAS_FLAGS | FLAG_SEND_FUA, structured=False)
            request = peer.request()
            flags.append(request.flags)
            peer.receive(request.length)
            peer.send(encode_simple(request.cookie))
            assert peer.request().command == CMD_DISC  # a flush that the server does not know is not sent

        with Scripted(path, script) as server, Disk(open_node(server.uri), writable=True) as disk:
            disk.write(0, b"x" * 512, fua=True)
            disk.flush()
        assert flags == [1]

    def test_a_flush_during_a_write_does_not_cover_it(self, path: Path) -> None:
        commands: list[int] = []
        writing, flushed = threading.Event(), threading.Event()

        def script(peer: Peer) -> None:
            peer.agree(structured=False)
            before = peer.request()
            peer.receive(before.length)
            peer.send(encode_simple(before.cookie))
            write = peer.request()
            peer.receive(write.length)
            writing.set()
            flush = peer.request()
            peer.send(encode_simple(flush.cookie))
            assert flushed.wait(PATIENCE)
            peer.send(encode_simple(write.cookie))
            commands.extend([before.command, write.command, flush.command, *serve_bytes(peer)])

        with Scripted(path, script) as server, Disk(open_node(server.uri), writable=True) as disk:
            disk.write(512, b"y" * 512)
            slow = threading.Thread(target=disk.write, args=(0, b"x" * 512))
            slow.start()
            assert writing.wait(PATIENCE)
            disk.flush()
            flushed.set()
            slow.join()
            disk.flush()
            disk.flush()
        assert commands == [CMD_WRITE, CMD_WRITE, CMD_FLUSH, CMD_FLUSH, CMD_DISC]

    def test_errors_of_the_server(self, path: Path) -> None:
        def script(peer: Peer) -> None:
            peer.agree(structured=False)
            for error in (28, 1, 95, 5, 77, 5):
                request = peer.request()
                if request.command == CMD_WRITE:
                    peer.receive(request.length)
                peer.send(encode_simple(request.cookie, error))
            serve_bytes(peer)

        with Scripted(path, script) as server:
            disk = Disk(open_node(server.uri), writable=True)
            with pytest.raises(NoSpace):
                disk.write(0, b"x" * 512)
            with pytest.raises(AccessDenied):
                disk.write(0, b"x" * 512)
            with pytest.raises(NotSupported):
                disk.write(0, b"x" * 512)
            with pytest.raises(IOFailed) as caught:
                disk.read(512, 512)
            assert caught.value.offset == 512
            with pytest.raises(CowhandError) as invalid:
                disk.read(512, 512)
            assert invalid.value.errno == errno.EINVAL
            with pytest.raises(IOFailed):
                disk.flush()
            with pytest.raises(Poisoned):
                disk.write(0, b"x" * 512)
            assert disk.read(4096, 512) == b"\1" * 512
            with pytest.raises(Poisoned):
                disk.close()

    def test_zeroes_that_the_server_cannot_write_become_bytes(self, path: Path) -> None:
        commands: list[int] = []

        def script(peer: Peer) -> None:
            peer.agree(structured=False)
            request = peer.request()
            assert request.command == CMD_WRITE_ZEROES
            peer.send(encode_simple(request.cookie, 95))
            commands.extend(serve_bytes(peer))

        with Scripted(path, script) as server, Disk(open_node(server.uri), writable=True) as disk:
            disk.write_zeroes(0, 8192)
        assert commands == [CMD_WRITE, CMD_FLUSH, CMD_DISC]


class TestReconnecting:
    """``reconnect-delay`` and ``open-timeout``."""

    def dying(self, requests: int) -> object:
        """Return a script whose first connection ends in the midst of the *requests*-th reply."""
        first = [True]

        def script(peer: Peer) -> None:
            peer.agree(structured=False)
            if first[0]:
                first[0] = False
                serve_bytes(peer, limit=requests - 1)
                request = peer.request()
                peer.send(encode_simple(request.cookie)[:7])
                return
            serve_bytes(peer)

        return script

    def test_requests_are_sent_again(self, path: Path) -> None:
        with Scripted(path, self.dying(3)) as server:  # type: ignore[arg-type]
            with Disk(open_node(server.uri, reconnect_delay=10)) as disk:
                for page in range(10):
                    assert disk.read(page * 4096, 4096) == bytes([page]) * 4096
                buffers = [bytearray(4096) for _ in range(40)]
                disk.submit([(READ, page * 4096, buffer) for page, buffer in enumerate(buffers)])
                assert all(buffer == bytes([page]) * 4096 for page, buffer in enumerate(buffers))
            assert server.connections == 2

    def test_an_interrupt_while_receiving_ends_the_connection(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        take = ReplyReader.feed

        def interrupted(reader: ReplyReader, data: memoryview) -> None:
            take(reader, data)
            monkeypatch.undo()
            raise KeyboardInterrupt  # between the caller's reply and that of somebody else, which came with it

        def serve(peer: Peer) -> None:
            peer.agree(structured=False)
            serve_bytes(peer)

        with Scripted(path, serve) as server:
            node = open_node(server.uri)
            buffer = bytearray(512)
            monkeypatch.setattr(ReplyReader, "feed", interrupted)
            with pytest.raises(KeyboardInterrupt):
                node.read_into(0, buffer)
            node.read_into(4096, buffer)
            assert bytes(buffer) == b"\1" * 512
            node.close()
        assert server.connections == 2

    def test_without_delay_the_request_fails_and_the_next_one_connects(self, path: Path) -> None:
        with Scripted(path, self.dying(1)) as server, Disk(open_node(server.uri)) as disk:  # type: ignore[arg-type]
            with pytest.raises(ConnectionLost) as caught:
                disk.read(0, 4096)
            assert caught.value.errno == errno.EIO
            assert disk.read(4096, 4096) == b"\1" * 4096

    def test_when_the_delay_is_over_requests_fail_at_once(self, path: Path) -> None:
        def script(peer: Peer) -> None:
            peer.agree(structured=False)
            peer.request()
            os.unlink(path)

        with Scripted(path, script) as server, Disk(open_node(server.uri, reconnect_delay=1)) as disk:
            begin = time.monotonic()
            with pytest.raises(ConnectionLost, match="Failed to connect"):
                disk.read(0, 4096)
            assert time.monotonic() - begin > 0.9
            with pytest.raises(ConnectionLost):
                disk.read(0, 4096)

    def test_a_server_that_drops_every_connection(self, path: Path) -> None:
        def script(peer: Peer) -> None:
            peer.agree(structured=False)
            peer.request()

        with Scripted(path, script) as server, Disk(open_node(server.uri, reconnect_delay=1)) as disk:
            with pytest.raises(ConnectionLost):
                disk.read(0, 4096)
            assert 2 <= server.connections < 20

    def test_another_export_is_not_taken_for_the_first(self, path: Path) -> None:
        sizes = iter([1 << 20, 2 << 20, 1 << 20])

        def script(peer: Peer) -> None:
            peer.agree(next(sizes), structured=False)
            peer.request()

        with Scripted(path, script) as server, Disk(open_node(server.uri, reconnect_delay=5)) as disk:
            for _ in range(2):
                with pytest.raises(ProtocolViolation, match="the export was 1048576 bytes"):
                    disk.read(0, 4096)

    def test_opening_waits_for_the_server(self, path: Path) -> None:
        begin = time.monotonic()
        with pytest.raises(ConnectionLost, match="No such file"):
            open_node(f"nbd+unix://?socket={path}", open_timeout=1)
        assert time.monotonic() - begin >= 1
        servers: list[Scripted] = []

        def serve(peer: Peer) -> None:
            peer.agree(structured=False)
            serve_bytes(peer)

        def start() -> None:
            server = Scripted(path, serve)
            servers.append(server)
            server.__enter__()

        timer = threading.Timer(0.3, start)
        timer.start()
        with Disk(open_node(f"nbd+unix://?socket={path}", open_timeout=120)) as disk:
            assert disk.read(4096, 1) == b"\1"
        timer.join()
        servers[0].__exit__(None, None, None)

    def test_closing_ends_a_wait_for_nothing(self, path: Path) -> None:
        with Scripted(path, self.dying(1)) as server:  # type: ignore[arg-type]
            node = open_node(server.uri)
            disk = Disk(node)
        with pytest.raises(ConnectionLost):
            disk.read(0, 1)
        disk.close()
        with pytest.raises(Closed):
            disk.read(0, 1)

    def test_a_connected_descriptor(self) -> None:
        ours, theirs = socket.socketpair()

        def serve() -> None:
            peer = Peer(theirs)
            peer.agree(structured=False)
            serve_bytes(peer)

        thread = threading.Thread(target=serve)
        thread.start()
        with ours, theirs:
            node = NbdNode.open(None, NbdOptions(), {"server": {"type": "fd", "str": str(ours.fileno())}})
            with Disk(node) as disk:
                assert disk.read(8192, 1) == b"\2"
                assert '"type": "fd"' in disk.filename
            thread.join()


class TestAddresses:
    @pytest.mark.parametrize(
        "server",
        [
            {"type": "fd", "str": "9" * 30},
            {"type": "fd", "str": "name"},
            {"type": "fd", "str": "0x"},
            {"type": "vsock", "cid": "9" * 30, "port": "1"},
            {"type": "vsock", "cid": "1", "port": "9" * 30},
            {"type": "vsock", "cid": "x", "port": "1"},
            {"type": "inet", "host": "127.0.0.1", "port": "9" * 30},
            {"type": "inet", "host": "127.0.0.1", "port": "no-such-service"},
            {"type": "inet", "host": "a" * 300, "port": "1"},
            {"type": "inet", "host": "\udc80.", "port": "1"},
            {"type": "inet", "host": "127.0.0.1"},
            {"type": "inet", "host": "127.0.0.1", "port": "1", "ipv4": "off", "ipv6": "off"},
            {"type": "unix", "path": "/" + "a" * 300},
            {"type": "unix", "path": "a\0b"},
            {"type": "unix", "path": ["a"]},
            {"type": "unix", "path": "x", "abstract": "on", "tight": "off"},
            {"type": "unix", "path": "nobody-listens", "abstract": "on"},
            {"type": "other", "path": "x"},
            {"path": "x"},
            "unix:x",
        ],
        ids=str,
    )
    def test_addresses_that_lead_nowhere(self, server: object) -> None:
        with pytest.raises(CowhandError):
            NbdNode.open(None, NbdOptions(), {"server": server})


class TestPermissions:
    def test_a_read_only_export(self, path: Path) -> None:
        def script(peer: Peer) -> None:
            peer.agree(flags=FLAG_HAS_FLAGS | FLAG_READ_ONLY, structured=False)
            serve_bytes(peer)

        with Scripted(path, script) as server:
            with pytest.raises(AccessDenied) as caught:
                open_node(server.uri)
            assert caught.value.errno == errno.EACCES
            node = open_node(server.uri, auto_read_only=True)
            assert not node.writable
            graph.close_node(node)


@require_nbdkit
class TestRealServers:
    """Servers of another make, with faults and limits."""

    def test_errors_with_a_rate(self, tmp_path: Path) -> None:
        words = ("--filter=error", "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=100%")
        with nbdkit(tmp_path, *words) as server, Disk(open_node(server.uri), writable=True) as disk:
            with pytest.raises(NoSpace):
                disk.read(0, 512)
            disk.write(0, b"x" * 512)

    def test_sizes_that_are_not_whole_sectors(self, tmp_path: Path) -> None:
        with nbdkit(tmp_path, "memory", "1234567") as server, Disk(open_node(server.uri), writable=True) as disk:
            assert disk.size == 1234567
            disk.write(1234560, b"seven__")
            assert disk.read(1234560, 7) == b"seven__"
            assert [row.end for batch in disk.extents() for row in batch][-1] == 1234567
            buffer = bytearray(b"x" * 100)
            disk.root.read_into(1234560, buffer)
            assert buffer == b"seven__" + bytes(93)

    def test_more_connections_while_threads_are_busy(self, tmp_path: Path) -> None:
        words = ("--filter=delay", "sparse-random", "256M", "rdelay=2ms")
        with nbdkit(tmp_path, *words) as server, Disk(open_node(server.uri, connections=3)) as disk:
            expected = disk.read(0, 8 << 20)
            before = len(os.listdir(f"/proc/{server.process.pid}/fd"))

            def read(part: int) -> None:
                for offset in range(part << 20, (part + 2) << 20, 1 << 18):
                    assert disk.read(offset, 1 << 18) == expected[offset : offset + (1 << 18)]

            in_threads([partial(read, part) for part in (0, 2, 4, 6)])
            assert len(os.listdir(f"/proc/{server.process.pid}/fd")) > before

    def test_a_killed_server(self, tmp_path: Path) -> None:
        with (
            nbdkit(tmp_path, "--filter=delay", "memory", "1M", "rdelay=10") as server,
            Disk(open_node(server.uri)) as disk,
        ):
            timer = threading.Timer(0.3, server.process.send_signal, (signal.SIGKILL,))
            timer.start()
            with pytest.raises(ConnectionLost):
                disk.read(0, 512)
            timer.join()
            with pytest.raises(ConnectionLost):
                disk.read(0, 512)


@require_qemu_nbd
def test_threads_and_batches_of_all_kinds_over_one_connection(tmp_path: Path) -> None:
    """Large writes against large reads fill both directions of the socket: nobody may wait for ever."""
    (tmp_path / "disk").write_bytes(bytes(64 << 20))
    with (
        qemu_nbd(tmp_path, tmp_path / "disk") as server,
        Disk(open_node(server.uri, connections=1), writable=True) as disk,
    ):

        def work(part: int) -> None:
            base = part * (16 << 20)
            for step in range(4):
                data = bytes([part * 16 + step]) * (1 << 20)
                buffers = [bytearray(1 << 20) for _ in range(8)]
                batch = []
                for index, buffer in enumerate(buffers):
                    batch += [(WRITE_REQUEST, base + (index << 20), data), (READ, base + ((8 + index) << 20), buffer)]
                disk.submit(batch)
                assert all(buffer == bytes(1 << 20) for buffer in buffers)
                assert disk.read(base, 8 << 20) == data * 8

        in_threads([partial(work, part) for part in range(4)])


@require_nbdkit
def test_writers_go_on_when_a_server_is_killed_and_started_again(tmp_path: Path) -> None:
    """Three times, on several connections; what was acknowledged is there."""
    (tmp_path / "disk").write_bytes(bytes(16 << 20))
    stop, started, ended = threading.Event(), threading.Event(), threading.Event()
    written: dict[int, bytes] = {}

    def serve() -> None:
        for number in range(4):
            with nbdkit(tmp_path, "file", tmp_path / "disk"):  # killed when the block is left
                started.set()
                time.sleep(0.3)
                if number == 3:
                    stop.set()
                    ended.wait(PATIENCE)

    def work(disk: Disk, part: int) -> None:
        rng = random.Random(part)
        while not stop.is_set():
            offset = (part << 22) + rng.randrange(64) * 65536
            data = rng.randbytes(16) * rng.choice((32, 4096))
            disk.write(offset, data)
            written[offset] = data
            assert disk.read(offset, len(data)) == data

    server = threading.Thread(target=serve)
    server.start()
    try:
        assert started.wait(PATIENCE)
        with Disk(
            open_node(f"nbd+unix:///?socket={tmp_path / 'nbdkit.sock'}", reconnect_delay=20), writable=True
        ) as disk:
            in_threads([partial(work, disk, part) for part in range(4)])
            assert len(written) > 10
            for offset, data in written.items():
                assert disk.read(offset, len(data)) == data
    finally:
        stop.set()
        ended.set()
        server.join()
    content = (tmp_path / "disk").read_bytes()
    assert all(content[offset : offset + len(data)] == data for offset, data in written.items())
