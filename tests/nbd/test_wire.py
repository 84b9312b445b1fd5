"""The protocol without I/O: conversations byte by byte, and nothing but a result or a named error whatever comes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings, strategies as st

from cowhand.core.errors import InvalidArgument
from cowhand.nbd import options
from cowhand.nbd.constants import (
    CMD_BLOCK_STATUS,
    CMD_FLUSH,
    CMD_READ,
    FLAG_HAS_FLAGS,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    INIT_MAGIC,
    OLDSTYLE_MAGIC,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    OPTION_MAGIC,
    REP_ACK,
    REP_ERR_POLICY,
    REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
)
from cowhand.nbd.errors import ConnectionLost, NegotiationRefused, ProtocolViolation
from cowhand.nbd.handshake import Export, negotiate
from cowhand.nbd.options import encode_reply
from cowhand.nbd.replies import Pending, ReplyReader, encode_chunk, encode_simple
from cowhand.nbd.uri import Address, parse

GREETING = INIT_MAGIC + OPTION_MAGIC + b"\0\1"
EXPORT_INFO = encode_reply(OPT_GO, REP_INFO, struct.pack(">HQH", INFO_EXPORT, 1 << 20, FLAG_HAS_FLAGS))
STRUCTURED = encode_reply(OPT_STRUCTURED_REPLY, REP_ACK)
CONTEXT = encode_reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\7base:allocation")
CONTEXT_END = encode_reply(OPT_SET_META_CONTEXT, REP_ACK)
GO_END = encode_reply(OPT_GO, REP_ACK)


def converse(server: bytes, name: str = "") -> tuple[Export, bytes]:
    """Let a client talk to a server that says *server* whatever it is told; return the result and what the client said."""
    conversation = negotiate(name)
    said = b""
    position = 0
    answer: bytes | None = None
    while True:
        try:
            wanted = next(conversation) if answer is None else conversation.send(answer)
        except StopIteration as end:
            return end.value, said
        answer = None
        if isinstance(wanted, bytes):
            said += wanted
        else:
            answer = server[position : position + wanted]
            position += wanted
            answer = answer if len(answer) == wanted else b""


class TestHandshake:
    """'Fixed newstyle negotiation', and its predecessors."""

    def test_everything_is_agreed_on(self) -> None:
        sizes = encode_reply(OPT_GO, REP_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, 512, 4096, 1 << 25))
        export, said = converse(GREETING + STRUCTURED + CONTEXT + CONTEXT_END + EXPORT_INFO + sizes + GO_END, "name")
        assert export == Export(1 << 20, FLAG_HAS_FLAGS, 512, 4096, 1 << 25, True, ("base:allocation", 7))
        assert said.startswith(b"\0\0\0\1" + OPTION_MAGIC + b"\0\0\0\x08\0\0\0\0" + OPTION_MAGIC + b"\0\0\0\x0a")
        assert said.endswith(b"\0\0\0\x04name" + b"\0\1\0\3")

    def test_unknown_options_are_done_without(self) -> None:
        refusals = [encode_reply(option, REP_ERR_UNSUP, b"what?") for option in (OPT_STRUCTURED_REPLY, OPT_GO)]
        export, said = converse(
            GREETING + b"".join(refusals) + struct.pack(">QH", 4096, FLAG_HAS_FLAGS) + bytes(124), "x"
        )
        assert export == Export(4096, FLAG_HAS_FLAGS)
        assert said.endswith(options.encode_option(OPT_EXPORT_NAME, b"x"))

    def test_newstyle_that_is_not_fixed(self) -> None:
        export, said = converse(INIT_MAGIC + OPTION_MAGIC + b"\0\0" + struct.pack(">QH", 512, 3) + bytes(124))
        assert export == Export(512, 3)
        assert said == bytes(4) + options.encode_option(OPT_EXPORT_NAME)

    def test_oldstyle(self) -> None:
        oldstyle = INIT_MAGIC + b"\0" + OLDSTYLE_MAGIC + struct.pack(">QI", 1024, 1) + bytes(124)
        assert converse(oldstyle) == (Export(1024, 1), b"")
        with pytest.raises(NegotiationRefused, match="does not support non-empty export names"):
            converse(oldstyle, "name")

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            (REP_ERR_UNKNOWN, "Requested export not available"),
            (REP_ERR_POLICY, "Denied by server for option 7"),
            (REP_ERR_TLS_REQD, "TLS negotiation required before option 7"),
        ],
    )
    def test_a_refusal_is_told_with_the_servers_words(self, kind: int, message: str) -> None:
        refusal = encode_reply(OPT_GO, kind, b"go \x1b[31maway\n")
        with pytest.raises(NegotiationRefused, match=message) as caught:
            converse(GREETING + encode_reply(OPT_STRUCTURED_REPLY, REP_ERR_UNSUP) + refusal)
        assert caught.value.qemu().endswith("server reported: go \\x1b[31maway\\x0a")

    @pytest.mark.parametrize(
        "server",
        [
            b"NBDMAGIK" + OPTION_MAGIC,
            INIT_MAGIC + b"IHAVEOPS",
            GREETING + b"\0" * 20,
            GREETING + encode_reply(OPT_GO, REP_ACK),  # of another option
            GREETING + encode_reply(OPT_STRUCTURED_REPLY, REP_ACK, b"x"),
            GREETING + encode_reply(OPT_STRUCTURED_REPLY, REP_INFO),
            GREETING + STRUCTURED[:-4] + b"\xff\xff\xff\xff",
            GREETING + STRUCTURED + CONTEXT + CONTEXT,
            GREETING + STRUCTURED + encode_reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\7other:thing"),
            GREETING + STRUCTURED + encode_reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\7"),
            GREETING + STRUCTURED + CONTEXT_END + GO_END,
            GREETING + STRUCTURED + CONTEXT_END + encode_reply(OPT_GO, REP_INFO, b"\0"),
            GREETING + STRUCTURED + CONTEXT_END + encode_reply(OPT_GO, REP_INFO, b"\0\0\0"),
            *(
                GREETING + STRUCTURED + CONTEXT_END + encode_reply(OPT_GO, REP_INFO, struct.pack(">HIII", 3, *sizes))
                for sizes in ((0, 1, 1), (3, 4, 8), (1 << 17, 1 << 17, 1 << 20), (512, 256, 512), (512, 512, 513), (8, 8, 4))
            ),
            GREETING + STRUCTURED + CONTEXT_END + encode_reply(OPT_GO, REP_INFO, struct.pack(">HQH", 0, 1 << 63, 1)) + GO_END,
            GREETING + STRUCTURED + CONTEXT_END + encode_reply(OPT_GO, REP_INFO, b"\0\x09what") * 70000,
        ],
    )  # fmt: skip
    def test_a_server_that_breaks_the_rules(self, server: bytes) -> None:
        with pytest.raises(ProtocolViolation):
            converse(server)

    def test_a_hang_up_anywhere(self) -> None:
        server = GREETING + STRUCTURED + CONTEXT + CONTEXT_END + EXPORT_INFO + GO_END
        for length in range(len(server)):
            with pytest.raises((ConnectionLost, ProtocolViolation)):
                converse(server[:length])

    def test_names_have_a_limit(self) -> None:
        converse(GREETING + STRUCTURED + CONTEXT + CONTEXT_END + EXPORT_INFO + GO_END, "a" * 4096)
        with pytest.raises(InvalidArgument, match="export name too long"):
            next(negotiate("a" * 4097))

    @given(
        st.lists(
            st.sampled_from([GREETING, STRUCTURED, CONTEXT, CONTEXT_END, EXPORT_INFO, GO_END]) | st.binary(max_size=40)
        )
    )
    @settings(max_examples=200, deadline=None)
    def test_any_bytes_end_in_a_result_or_a_named_error(self, parts: list[bytes]) -> None:
        try:
            converse(GREETING + b"".join(parts))
        except (ConnectionLost, ProtocolViolation, NegotiationRefused):
            pass


def a_read(length: int = 16, offset: int = 4096) -> tuple[Pending, bytearray]:
    buffer = bytearray(b"\xee" * length)
    return Pending(CMD_READ, offset, length, memoryview(buffer)), buffer


def data_chunk(offset: int, data: bytes, *, done: bool = False, cookie: int = 1) -> bytes:
    return encode_chunk(REPLY_TYPE_OFFSET_DATA, cookie, 8 + len(data), done=done) + struct.pack(">Q", offset) + data


def hole_chunk(offset: int, length: int, *, done: bool = False) -> bytes:
    return encode_chunk(REPLY_TYPE_OFFSET_HOLE, 1, 12, done=done) + struct.pack(">QI", offset, length)


def error_chunk(number: int, text: bytes = b"", *, done: bool = True, length: int | None = None) -> bytes:
    payload = struct.pack(">IH", number, len(text) if length is None else length) + text
    return encode_chunk(REPLY_TYPE_ERROR, 1, len(payload), done=done) + payload


NONE = encode_chunk(REPLY_TYPE_NONE, 1, 0, done=True)


def feed(
    data: bytes, pending: Pending, *, structured: bool = True, piece: int = 1 << 20, direct: bool = False
) -> ReplyReader:
    """Give *data* to a reader in pieces; with *direct* as a socket would that receives at the place that the reader wants."""
    reader = ReplyReader(structured=structured, context=7, pending={1: pending})
    position = 0
    while position < len(data):
        into = reader.wants()
        if direct and into is not None:
            count = min(len(into), piece, len(data) - position)
            into[:count] = data[position : position + count]
            reader.received(count)
        else:
            count = min(piece, len(data) - position)
            reader.feed(memoryview(data)[position : position + count])
        position += count
    return reader


class TestReplies:
    """'Simple reply message', 'Structured reply chunk message'."""

    @pytest.mark.parametrize("direct", [False, True])
    @pytest.mark.parametrize("piece", [1, 3, 7, 1000])
    @pytest.mark.parametrize(
        "reply",
        [
            data_chunk(4096, b"0123456789abcdef", done=True),
            data_chunk(4096, b"0123456789abcdef") + NONE,
            data_chunk(4104, b"89abcdef") + data_chunk(4096, b"01234567", done=True),
            data_chunk(4097, b"123456789abcdef") + data_chunk(4096, b"0") + NONE,
        ],
    )
    def test_data_lands_in_its_place_however_it_comes(self, reply: bytes, piece: int, direct: bool) -> None:
        pending, buffer = a_read()
        reader = feed(reply, pending, piece=piece, direct=direct)
        assert pending.done
        assert reader.finished == [pending]
        assert buffer == b"0123456789abcdef"
        assert reader.pending == {}

    def test_holes_are_zeroes(self) -> None:
        pending, buffer = a_read()
        feed(data_chunk(4096, b"0123") + hole_chunk(4100, 12, done=True), pending)
        assert buffer == b"0123" + bytes(12)

    def test_simple_replies(self) -> None:
        pending, buffer = a_read()
        feed(encode_simple(1) + b"x" * 16, pending, structured=False, piece=5)
        assert (pending.done, pending.failure, buffer) == (True, None, b"x" * 16)
        pending, _ = a_read()
        feed(encode_simple(1, 28), pending, structured=False)
        assert pending.failure is not None
        assert pending.failure.errno == 28

    def test_errors_keep_the_first_message(self) -> None:
        pending, _ = a_read()
        feed(data_chunk(4096, b"0") + error_chunk(5, b"bad\nsector", done=False) + error_chunk(22, b"later"), pending)
        assert pending.failure == (5, "bad\\x0asector")

    def test_block_status_of_any_length(self) -> None:
        for count in (1, 3, 100_000):
            pending = Pending(CMD_BLOCK_STATUS, 0, 1 << 30)
            payload = struct.pack(">I", 7) + struct.pack(">II", 512, 3) * count
            reply = encode_chunk(REPLY_TYPE_BLOCK_STATUS, 1, len(payload), done=True) + payload
            feed(reply, pending, piece=4096)
            assert pending.done
            assert pending.extents == (512, 3) * count

    @pytest.mark.parametrize(
        "reply",
        [
            b"nonsense" * 4,
            encode_simple(2),  # a cookie that nobody has
            encode_simple(1),  # a read wants chunks
            data_chunk(4095, b"xx"),
            data_chunk(4096, b"x" * 17),
            data_chunk(4112, b"x"),
            data_chunk(0, b"x"),
            data_chunk((1 << 64) - 1, b"x"),
            encode_chunk(REPLY_TYPE_OFFSET_DATA, 1, 8, done=True) + bytes(8),
            encode_chunk(REPLY_TYPE_OFFSET_DATA, 1, 0xFFFFFFFF, done=True) + struct.pack(">Q", 4096),
            data_chunk(4096, b"x" * 8) + NONE,  # not all of it
            data_chunk(4096, b"x" * 8) + data_chunk(4096, b"x" * 8, done=True),  # some of it twice
            data_chunk(4096, b"x" * 16) + hole_chunk(4096, 1, done=True),
            hole_chunk(4096, 0, done=True),
            hole_chunk(4096, 17, done=True),
            hole_chunk(4096, 0xFFFFFFFF, done=True),
            encode_chunk(REPLY_TYPE_OFFSET_HOLE, 1, 11, done=True) + bytes(11),
            encode_chunk(REPLY_TYPE_NONE, 1, 0, done=False),
            encode_chunk(REPLY_TYPE_NONE, 1, 4, done=True) + bytes(4),
            encode_chunk(REPLY_TYPE_BLOCK_STATUS, 1, 12, done=True) + struct.pack(">III", 7, 1, 0),
            encode_chunk(77, 1, 0, done=True),
            encode_chunk(77, 1, 1 << 31, done=True),
            error_chunk(0),
            error_chunk(5, b"x", length=2),
            encode_chunk(REPLY_TYPE_ERROR, 1, 3, done=True) + bytes(3),
            encode_chunk(REPLY_TYPE_ERROR, 1, 1 << 30, done=True),
            encode_chunk(REPLY_TYPE_ERROR_OFFSET, 1, 6, done=True) + struct.pack(">IH", 5, 0),
            error_chunk(5, done=False) * 1100,
        ],
    )  # fmt: skip
    def test_a_reply_to_a_read_that_breaks_the_rules(self, reply: bytes) -> None:
        pending, buffer = a_read()
        with pytest.raises(ProtocolViolation):
            feed(reply, pending)
        assert not pending.done
        assert len(buffer) == 16

    @pytest.mark.parametrize(
        "payload",
        [
            struct.pack(">III", 8, 512, 0),
            struct.pack(">III", 7, 0, 0),
            struct.pack(">I", 7),
            struct.pack(">II", 7, 512),
            struct.pack(">IIIH", 7, 512, 0, 0),
            b"",
        ],
    )
    def test_a_status_that_breaks_the_rules(self, payload: bytes) -> None:
        pending = Pending(CMD_BLOCK_STATUS, 0, 4096)
        with pytest.raises(ProtocolViolation):
            feed(encode_chunk(REPLY_TYPE_BLOCK_STATUS, 1, len(payload), done=True) + payload, pending)

    @pytest.mark.parametrize("command", [CMD_FLUSH, CMD_BLOCK_STATUS])
    def test_data_that_nobody_asked_for(self, command: int) -> None:
        with pytest.raises(ProtocolViolation):
            feed(data_chunk(0, b"x", done=True), Pending(command, 0, 4096))
        with pytest.raises(ProtocolViolation):
            feed(hole_chunk(0, 1, done=True), Pending(command, 0, 4096))

    def test_chunks_that_were_not_agreed_on(self) -> None:
        with pytest.raises(ProtocolViolation):
            feed(NONE, Pending(CMD_FLUSH, 0, 0), structured=False)
        with pytest.raises(ProtocolViolation, match="did not reply with any"):
            feed(NONE, Pending(CMD_BLOCK_STATUS, 0, 4096))

    def test_pieces_out_of_order_are_bounded(self) -> None:
        pending, _ = a_read(1 << 16, 0)
        chunks = b"".join(data_chunk(offset, b"x") for offset in range((1 << 16) - 2, 0, -2))
        with pytest.raises(ProtocolViolation, match="too many pieces"):
            feed(chunks, pending)

    @given(
        st.lists(
            st.sampled_from([NONE, data_chunk(4096, b"0" * 8), data_chunk(4104, b"1" * 8), error_chunk(5, done=False)])
            | st.builds(hole_chunk, st.integers(4090, 4115), st.integers(0, 20))
            | st.binary(max_size=50),
            max_size=8,
        ),
        st.sampled_from([1, 5, 4096]),
        st.booleans(),
    )
    @settings(max_examples=300, deadline=None)
    def test_any_bytes_are_replies_or_a_violation(self, parts: list[bytes], piece: int, structured: bool) -> None:
        pending, buffer = a_read()
        try:
            feed(b"".join(parts), pending, piece=piece, structured=structured)
        except ProtocolViolation:
            return
        if pending.done and pending.failure is None:
            assert b"\xee" not in buffer, "a byte of a finished read was never sent"


class TestNames:
    """'NBD URI scheme', and QEMU's older names."""

    @pytest.mark.parametrize(
        ("name", "address", "printed"),
        [
            ("nbd://host", Address(host="host"), "nbd://host:10809"),
            ("nbd://host:1/", Address(host="host", port="1"), "nbd://host:1"),
            ("nbd+tcp://host:1/exp", Address(host="host", port="1", export="exp"), "nbd://host:1/exp"),
            ("nbd://[::1]:1/a/b", Address(host="::1", port="1", export="a/b"), "nbd://::1:1/a/b"),
            ("nbd+unix:///e%20x?socket=/a%2Fb", Address(path="/a/b", export="e x"), "nbd+unix:///e x?socket=/a/b"),
            ("nbd+unix://?socket=s", Address(path="s"), "nbd+unix://?socket=s"),
            ("nbd:host:1", Address(host="host", port="1"), "nbd://host:1"),
            ("nbd:[::1]:1:exportname=e", Address(host="::1", port="1", export="e"), "nbd://::1:1/e"),
            ("nbd:unix:/a:b:exportname=e:f", Address(path="/a:b", export="e:f"), "nbd+unix:///e:f?socket=/a:b"),
        ],
    )
    def test_what_a_name_means(self, name: str, address: Address, printed: str) -> None:
        assert parse(name) == address
        assert str(address) == printed

    @pytest.mark.parametrize(
        "name",
        [
            "nbd://", "nbd:///x", "nbd://host?socket=x", "nbd://host:x", "nbd+unix:///x", "nbd+unix://host/?socket=x",
            "nbd+unix:///x?socket=a&other=b", "nbds:///x", "nbds://host?tls-foo=1",
            "nbds+unix://h/?socket=s", "nbd+udp://host", "nbd:", "nbd:host", "nbd:host:", "host:1", "nbd:host:1:exportname=",
            "nbd+unix:///x?socket=%00abc", "nbd://host/a%00b", "nbd:unix:a\0b",
        ],
    )  # fmt: skip
    def test_names_that_mean_nothing(self, name: str) -> None:
        with pytest.raises(InvalidArgument):
            parse(name)
