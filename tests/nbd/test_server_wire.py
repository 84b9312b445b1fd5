"""A server's half of the protocol without I/O: every option and its refusals, byte by byte, and whatever else may come."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Sequence

import pytest

from cowhand.nbd import constants as nbd
from cowhand.nbd.errors import NegotiationRefused, ProtocolViolation
from cowhand.nbd.handshake import negotiate
from cowhand.nbd.offers import Agreement, Offer
from cowhand.nbd.options import encode_contexts, encode_go, encode_option
from cowhand.nbd.replies import Pending, ReplyReader
from cowhand.nbd.requests import encode_request
from cowhand.nbd.server_handshake import Agreed, Ended, Send, ServerHandshake, StartTls, State, Tls
from cowhand.nbd.server_replies import ReplyEncoder
from cowhand.nbd.server_requests import ClientRequest, RequestReader, decode_status_payload, refusal

BITMAPS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b")
DISK = Offer("disk", 1 << 20, nbd.FLAG_SEND_FLUSH, "a disk", contexts=BITMAPS)
OTHER = Offer("ötherß", 5, nbd.FLAG_READ_ONLY)
BOTH = nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES


class Shelf:
    """Two exports."""

    def names(self) -> Sequence[tuple[str, str]]:
        return [(offer.name, offer.description) for offer in (DISK, OTHER)]

    def find(self, name: str) -> Offer | None:
        return next((offer for offer in (DISK, OTHER) if offer.name == name), None)


class Client:
    """The other end: says things, and takes apart what comes back."""

    def __init__(self, tls: Tls = Tls.OFF, flags: int = BOTH) -> None:
        self.server = ServerHandshake(Shelf(), tls)
        self.greeting = self.server.start()
        self.agreed: Agreed | None = None
        self.ended: Ended | None = None
        self.tls = False
        self.raw = b""
        assert self.say(flags.to_bytes(4, "big")) == []

    def say(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Return (option, kind, payload) of each reply."""
        sent = b""
        for event in self.server.feed(data):
            if isinstance(event, Send):
                sent += event.data
            elif isinstance(event, Agreed):
                self.agreed = event
            elif isinstance(event, Ended):
                self.ended = event
            elif isinstance(event, StartTls):
                self.tls = True
        self.raw = sent
        replies = []
        while len(sent) >= 20 and sent[:8] == nbd.OPTION_REPLY_MAGIC.to_bytes(8, "big"):
            option, kind, length = struct.unpack(">III", sent[8:20])
            replies.append((option, kind, sent[20 : 20 + length]))
            sent = sent[20 + length :]
        return replies

    def ask(self, option: int, payload: bytes = b"") -> list[tuple[int, bytes]]:
        replies = self.say(encode_option(option, payload))
        assert all(reply[0] == option for reply in replies)
        return [(kind, told) for _, kind, told in replies]

    def kinds(self, option: int, payload: bytes = b"") -> list[int]:
        return [kind for kind, _ in self.ask(option, payload)]


class TestOptions:
    """Each is answered once, with what was asked or with an error, and the conversation goes on."""

    def test_the_greeting_is_fixed_newstyle(self) -> None:
        assert Client().greeting == b"NBDMAGICIHAVEOPT\0\3"

    def test_list_tells_all(self) -> None:
        replies = Client().ask(nbd.OPT_LIST)
        assert [kind for kind, _ in replies] == [nbd.REP_SERVER, nbd.REP_SERVER, nbd.REP_ACK]
        assert replies[0][1] == b"\0\0\0\4diska disk"
        assert replies[1][1] == struct.pack(">I", 8) + "ötherß".encode()

    def test_info_tells_and_goes_on(self) -> None:
        client = Client()
        asked = struct.pack(">I4sHHHH", 4, b"disk", 3, nbd.INFO_NAME, nbd.INFO_DESCRIPTION, nbd.INFO_BLOCK_SIZE)
        told = [payload for kind, payload in client.ask(nbd.OPT_INFO, asked) if kind == nbd.REP_INFO]
        assert struct.pack(">HQH", 0, 1 << 20, DISK.flags | nbd.FLAG_HAS_FLAGS) in told
        assert struct.pack(">H", 1) + b"disk" in told
        assert struct.pack(">H", 2) + b"a disk" in told
        assert struct.pack(">HIII", 3, 1, 4096, 32 << 20) in told
        assert client.agreed is None
        assert client.kinds(nbd.OPT_INFO, encode_go(b"none")) == [nbd.REP_ERR_UNKNOWN]
        assert client.kinds(nbd.OPT_GO, encode_go(b"disk"))[-1] == nbd.REP_ACK
        assert client.agreed is not None and client.agreed.agreement.offer is DISK

    def test_export_name_agrees_or_ends(self) -> None:
        client = Client()
        client.say(encode_option(nbd.OPT_EXPORT_NAME, b"disk") + b"what follows")
        assert client.raw == struct.pack(">QH", 1 << 20, DISK.flags | nbd.FLAG_HAS_FLAGS)
        assert client.agreed is not None and client.agreed.rest == b"what follows"
        padded = Client(flags=nbd.FLAG_FIXED_NEWSTYLE)
        padded.say(encode_option(nbd.OPT_EXPORT_NAME, b"disk"))
        assert len(padded.raw) == 10 + 124
        wrong = Client()
        wrong.say(encode_option(nbd.OPT_EXPORT_NAME, b"no such"))
        assert wrong.ended is not None and not wrong.ended.broken
        assert wrong.raw == b""

    def test_df_is_offered_where_replies_are_structured(self) -> None:
        client = Client()
        assert client.kinds(nbd.OPT_STRUCTURED_REPLY) == [nbd.REP_ACK]
        assert client.kinds(nbd.OPT_STRUCTURED_REPLY) == [nbd.REP_ERR_INVALID]
        client.ask(nbd.OPT_GO, encode_go(b"disk"))
        assert client.agreed is not None
        assert client.agreed.agreement.structured and client.agreed.agreement.flags & nbd.FLAG_SEND_DF

    def test_extended_headers_are_structured_replies_too(self) -> None:
        client = Client()
        assert client.kinds(nbd.OPT_EXTENDED_HEADERS) == [nbd.REP_ACK]
        assert client.kinds(nbd.OPT_STRUCTURED_REPLY) == [nbd.REP_ERR_EXT_HEADER_REQD]
        assert client.kinds(nbd.OPT_EXTENDED_HEADERS) == [nbd.REP_ERR_INVALID]
        assert client.kinds(nbd.OPT_EXTENDED_HEADERS, b"x") == [nbd.REP_ERR_INVALID]
        client.ask(nbd.OPT_GO, encode_go(b"disk"))
        assert client.agreed is not None and client.agreed.agreement.extended
        assert client.agreed.agreement.flags & nbd.FLAG_BLOCK_STATUS_PAYLOAD

    def test_contexts_need_structured_replies(self) -> None:
        assert Client().kinds(nbd.OPT_SET_META_CONTEXT, encode_contexts(b"disk", ["base:allocation"])) == [
            nbd.REP_ERR_INVALID
        ]

    @pytest.mark.parametrize(
        ("queries", "found"),
        [
            ([], BITMAPS),
            (["base:"], BITMAPS[:1]),
            (["qemu:"], BITMAPS[1:]),
            (["qemu:dirty-bitmap:"], BITMAPS[2:]),
            (["qemu:dirty-bitmap:b", "x:y", "qemu:dirty-bitmap:c"], BITMAPS[3:]),
        ],
    )
    def test_lists_of_contexts(self, queries: list[str], found: tuple[str, ...]) -> None:
        client = Client()
        client.ask(nbd.OPT_STRUCTURED_REPLY)
        replies = client.ask(nbd.OPT_LIST_META_CONTEXT, encode_contexts(b"disk", queries))
        assert [told[4:].decode() for kind, told in replies if kind == nbd.REP_META_CONTEXT] == list(found)
        assert replies[-1] == (nbd.REP_ACK, b"")

    def test_chosen_contexts_are_those_of_the_export_and_the_last_choice(self) -> None:
        client = Client()
        client.ask(nbd.OPT_STRUCTURED_REPLY)
        chosen = ["qemu:dirty-bitmap:b", "base:", "base:allocation", "nobody:knows"]
        replies = client.ask(nbd.OPT_SET_META_CONTEXT, encode_contexts(b"disk", chosen))
        assert [told for kind, told in replies if kind == nbd.REP_META_CONTEXT] == [
            b"\0\0\0\0qemu:dirty-bitmap:b",
            b"\0\0\0\1base:allocation",
        ]
        assert client.kinds(nbd.OPT_SET_META_CONTEXT, encode_contexts(b"gone", chosen)) == [nbd.REP_ERR_UNKNOWN]
        client.ask(nbd.OPT_SET_META_CONTEXT, encode_contexts(b"disk", ["base:allocation"]))
        client.ask(nbd.OPT_GO, encode_go("ötherß".encode()))
        assert client.agreed is not None and client.agreed.agreement.contexts == ()  # they were for another export

    def test_what_is_not_known_is_refused_and_the_rest_goes_on(self) -> None:
        client = Client()
        assert client.kinds(77, b"payload") == [nbd.REP_ERR_UNSUP]
        assert client.kinds(nbd.OPT_LIST, b"x") == [nbd.REP_ERR_INVALID]
        assert client.kinds(nbd.OPT_STARTTLS) == [nbd.REP_ERR_POLICY]
        for payload in (b"", b"\0\0\0\5disk", encode_go(b"disk") + b"x", b"\xff\xff\xff\xff", encode_go(b"disk")[:-1]):
            assert client.kinds(nbd.OPT_GO, payload) == [nbd.REP_ERR_INVALID]
        client.ask(nbd.OPT_STRUCTURED_REPLY)
        for payload in (b"", b"\0\0\0\4disk\xff\xff\xff\xff", encode_contexts(b"disk", ["a"]) + b"x"):
            assert client.kinds(nbd.OPT_SET_META_CONTEXT, payload) == [nbd.REP_ERR_INVALID]
        assert client.server.state is State.OPTIONS

    def test_abort_is_acknowledged(self) -> None:
        client = Client()
        assert client.kinds(nbd.OPT_ABORT) == [nbd.REP_ACK]
        assert client.ended == Ended("it ended the handshake", False)
        assert client.say(encode_option(nbd.OPT_LIST)) == []

    def test_an_option_too_long_is_passed_over(self) -> None:
        client = Client()
        head = struct.pack(">8sII", nbd.OPTION_MAGIC, nbd.OPT_GO, 1 << 20)
        assert [kind for _, kind, _ in client.say(head + bytes(100))] == [nbd.REP_ERR_TOO_BIG]
        for _ in range(16):
            assert client.say(bytes(65536 - 100)) == []
            assert len(client.server._buffer) <= nbd.MAX_OPTION_PAYLOAD + 16
        client.say(bytes((1 << 20) - 100 - 16 * (65536 - 100)))
        assert client.kinds(nbd.OPT_LIST)[-1] == nbd.REP_ACK

    def test_what_no_client_sends_ends_it(self) -> None:
        for words in (
            b"\0\0\0\x10",
            BOTH.to_bytes(4, "big") + b"GET / HTTP/1.1\r\n",
            BOTH.to_bytes(4, "big") + struct.pack(">8sII", nbd.OPTION_MAGIC, 1, 0xFFFFFFFF),
            BOTH.to_bytes(4, "big") + struct.pack(">8sII", nbd.OPTION_MAGIC, 3, 0xFFFFFFFF),
            bytes(4) + encode_option(nbd.OPT_LIST),
            BOTH.to_bytes(4, "big") + encode_option(nbd.OPT_LIST) * (nbd.MAX_OPTIONS + 1),
        ):
            events = ServerHandshake(Shelf()).feed(words)
            assert isinstance(events[-1], Ended) and events[-1].broken, words[:20]


class TestTls:
    """Where it is required nothing happens before, and nothing that was said before counts after."""

    def test_everything_waits_for_it(self) -> None:
        client = Client(Tls.REQUIRED)
        for option in (nbd.OPT_LIST, nbd.OPT_GO, nbd.OPT_INFO, nbd.OPT_STRUCTURED_REPLY, nbd.OPT_SET_META_CONTEXT, 99):
            assert client.kinds(option) == [nbd.REP_ERR_TLS_REQD]
        assert client.kinds(nbd.OPT_STARTTLS, b"x") == [nbd.REP_ERR_INVALID]
        assert client.kinds(nbd.OPT_STARTTLS) == [nbd.REP_ACK]
        assert client.tls and client.server.state is State.UPGRADING
        client.server.upgraded()
        assert client.kinds(nbd.OPT_STARTTLS) == [nbd.REP_ERR_INVALID]
        assert client.kinds(nbd.OPT_LIST)[-1] == nbd.REP_ACK

    def test_export_name_before_it_ends(self) -> None:
        client = Client(Tls.REQUIRED)
        client.say(encode_option(nbd.OPT_EXPORT_NAME, b"disk"))
        assert client.ended is not None and client.agreed is None

    def test_plain_text_behind_the_wish_ends(self) -> None:
        client = Client(Tls.REQUIRED)
        client.say(encode_option(nbd.OPT_STARTTLS) + encode_option(nbd.OPT_LIST))
        assert client.ended is not None and client.ended.broken
        assert not client.tls


@pytest.mark.parametrize("size", [1, 2, 3, 7, 4096])
def test_pieces_of_any_size_say_the_same(size: int) -> None:
    words = BOTH.to_bytes(4, "big") + b"".join(
        encode_option(option, payload)
        for option, payload in (
            (nbd.OPT_LIST, b""),
            (nbd.OPT_STRUCTURED_REPLY, b""),
            (nbd.OPT_SET_META_CONTEXT, encode_contexts(b"disk", ["base:allocation"])),
            (99, b"?" * 300),
            (nbd.OPT_GO, encode_go(b"disk")),
        )
    )
    words += b"rest"
    whole = ServerHandshake(Shelf()).feed(words)
    server = ServerHandshake(Shelf())
    pieces = [event for at in range(0, len(words), size) for event in server.feed(words[at : at + size])]
    assert [event for event in pieces if isinstance(event, Send)] == whole[:-1]
    [agreed] = [event for event in pieces if isinstance(event, Agreed)]
    assert isinstance(whole[-1], Agreed) and agreed.agreement == whole[-1].agreement


@pytest.mark.parametrize("name", ["disk", "ötherß", "none"])
def test_the_client_of_this_project_gets_on_with_it(name: str) -> None:
    server = ServerHandshake(Shelf())
    outgoing = server.start()
    agreed: list[Agreed] = []
    conversation = negotiate(name)
    wanted = next(conversation)
    try:
        while True:
            if isinstance(wanted, bytes):
                for event in server.feed(wanted):
                    if isinstance(event, Send):
                        outgoing += event.data
                    elif isinstance(event, Agreed):
                        agreed.append(event)
                wanted = next(conversation)
            else:
                assert len(outgoing) >= wanted
                answer, outgoing = outgoing[:wanted], outgoing[wanted:]
                wanted = conversation.send(answer)
    except StopIteration as end:
        export = end.value
    except NegotiationRefused:
        export = None
    assert (export is None) == (name == "none")
    if export is not None:
        assert export.size == agreed[0].agreement.offer.size
        assert export.structured
        assert (export.context is not None) == (name == "disk")


def test_anything_at_all_is_met_with_an_event_or_nothing() -> None:
    rng = random.Random(12)
    for _ in range(400):
        client = ServerHandshake(Shelf(), rng.choice(list(Tls)))
        words = bytearray(BOTH.to_bytes(4, "big"))
        for _ in range(rng.randrange(6)):
            option = rng.choice([*range(13), 0xFFFFFFFF])
            payload = rng.choice(
                [b"", encode_go(b"disk"), encode_contexts(b"disk", ["base:"]), rng.randbytes(rng.randrange(60))]
            )
            words += encode_option(option, payload)
        for _ in range(rng.randrange(3)):
            words[rng.randrange(len(words))] = rng.randrange(256)
        at = 0
        while at < len(words):
            count = rng.randrange(1, 50)
            for event in client.feed(bytes(words[at : at + count])):
                if isinstance(event, StartTls):
                    client.upgraded()
            at += count


# -- requests


AGREED = Agreement(DISK, structured=True, contexts=("base:allocation",))


class TestRequests:
    """Whole ones come out, whatever pieces they came in."""

    def test_several_of_a_buffer_and_the_beginning_of_one(self) -> None:
        data = encode_request(nbd.CMD_READ, 0, 7, 512, 4096) + encode_request(nbd.CMD_WRITE, 1, 8, 0, 5) + b"hello"
        data += encode_request(nbd.CMD_WRITE, 0, 9, 0, 6) + b"hell"
        reader = RequestReader(extended=False)
        found, end = reader.take(b"xx" + data, 2, 2 + len(data))
        assert [(request.cookie, request.payload) for request in found] == [(7, 0), (8, 5)]
        assert (b"xx" + data)[found[1].place :][:5] == b"hello"
        assert reader.partial is not None and reader.partial.cookie == 9
        assert len(b"xx" + data) - end == 32
        found, end = reader.take(data[-32:] + b"o!", 0, 34)
        assert (found[0].payload, end, reader.partial) == (6, 34, None)

    def test_byte_by_byte(self) -> None:
        data = encode_request(nbd.CMD_WRITE, 0, 1, 0, 3) + b"abc" + encode_request(nbd.CMD_FLUSH, 0, 2, 0, 0)
        reader = RequestReader(extended=False)
        begin, found = 0, []
        for end in range(1, len(data) + 1):
            some, begin = reader.take(data, begin, end)
            found += some
        assert [(request.command, request.cookie) for request in found] == [(nbd.CMD_WRITE, 1), (nbd.CMD_FLUSH, 2)]

    def test_nothing_is_taken_behind_a_goodbye(self) -> None:
        data = encode_request(nbd.CMD_DISC, 0, 1, 0, 0) + b"garbage that is long enough to be a request......"
        found, _ = RequestReader(extended=False).take(data, 0, len(data))
        assert [request.command for request in found] == [nbd.CMD_DISC]

    def test_garbage_is_a_violation(self) -> None:
        for extended in (False, True):
            with pytest.raises(ProtocolViolation):
                RequestReader(extended=extended).take(bytes(32), 0, 32)
        with pytest.raises(ProtocolViolation):
            RequestReader(extended=True).take(
                struct.pack(">IHHQQQ", nbd.EXTENDED_REQUEST_MAGIC, 32, 1, 0, 0, 1 << 40), 0, 32
            )

    def test_extended_headers_have_lengths_of_64_bits(self) -> None:
        data = struct.pack(">IHHQQQ", nbd.EXTENDED_REQUEST_MAGIC, 0, nbd.CMD_TRIM, 3, 0, 1 << 40)
        data += struct.pack(
            ">IHHQQQ", nbd.EXTENDED_REQUEST_MAGIC, nbd.CMD_FLAG_PAYLOAD_LEN, nbd.CMD_BLOCK_STATUS, 4, 0, 12
        )
        data += struct.pack(">QI", 77, 0)
        found, end = RequestReader(extended=True).take(data, 0, len(data))
        assert (found[0].length, found[0].payload) == (1 << 40, 0)
        assert (found[1].payload, end) == (12, len(data))
        assert decode_status_payload(data[-12:], AGREED) == (77, (0,))
        for wrong in (
            b"",
            data[-11:],
            struct.pack(">QI", 77, 1),
            struct.pack(">QI", 0, 0),
            struct.pack(">QII", 7, 0, 0),
        ):
            assert decode_status_payload(wrong, AGREED) is None

    @pytest.mark.parametrize(
        ("command", "flags", "offset", "length", "number"),
        [
            (nbd.CMD_READ, 0, 0, 1 << 20, None),
            (nbd.CMD_READ, nbd.CMD_FLAG_DF, 0, 1, None),
            (nbd.CMD_READ, nbd.CMD_FLAG_FUA, 0, 0, None),
            (nbd.CMD_READ, nbd.CMD_FLAG_NO_HOLE, 0, 1, errno.EINVAL),
            (nbd.CMD_READ, 0, 1, 1 << 20, errno.EINVAL),
            (nbd.CMD_READ, 0, (1 << 64) - 1, 1, errno.EINVAL),
            (nbd.CMD_READ, 0, 0, (32 << 20) + 1, errno.EINVAL),
            (nbd.CMD_WRITE, nbd.CMD_FLAG_FUA, 0, 1, None),
            (nbd.CMD_WRITE, 0, 1 << 20, 1, errno.ENOSPC),
            (nbd.CMD_WRITE_ZEROES, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE, 0, 1 << 20, None),
            (nbd.CMD_WRITE_ZEROES, 0, 1, 1 << 20, errno.ENOSPC),
            (nbd.CMD_TRIM, 0, 1, 1 << 20, errno.EINVAL),
            (nbd.CMD_TRIM, nbd.CMD_FLAG_FAST_ZERO, 0, 1, errno.EINVAL),
            (nbd.CMD_FLUSH, 0, 77, 99, None),
            (nbd.CMD_CACHE, 0, 0, 1 << 20, None),
            (nbd.CMD_BLOCK_STATUS, nbd.CMD_FLAG_REQ_ONE, 0, 1, None),
            (nbd.CMD_BLOCK_STATUS, 0, 0, 0, errno.EINVAL),
            (8, 0, 0, 0, errno.EINVAL),
            (0xFFFF, 0xFFFF, 0, 0, errno.EINVAL),
        ],
    )
    def test_what_is_refused(self, command: int, flags: int, offset: int, length: int, number: int | None) -> None:
        refused = refusal(ClientRequest(command, flags, 1, offset, length, 0, 0), AGREED)
        assert (refused.errno if refused is not None else None) == number

    def test_a_read_only_export_refuses_changes_and_no_context_means_no_status(self) -> None:
        agreed = Agreement(OTHER)
        for command in (nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES):
            refused = refusal(ClientRequest(command, 0, 1, 0, 1, 0, 0), agreed)
            assert refused is not None and refused.errno == errno.EPERM
        for command, flags in ((nbd.CMD_BLOCK_STATUS, 0), (nbd.CMD_READ, nbd.CMD_FLAG_DF)):
            refused = refusal(ClientRequest(command, flags, 1, 0, 1, 0, 0), agreed)
            assert refused is not None and refused.errno == errno.EINVAL


class TestReplies:
    """What a server sends, this project's client understands."""

    def read(self, encoder: ReplyEncoder, structured: bool) -> tuple[ReplyReader, dict[int, Pending]]:
        pending: dict[int, Pending] = {}
        return ReplyReader(structured=structured, context=0, pending=pending), pending

    @pytest.mark.parametrize("structured", [False, True])
    def test_data_success_and_errors(self, structured: bool) -> None:
        encoder = ReplyEncoder(structured=structured, extended=False)
        reader, pending = self.read(encoder, structured)
        view = memoryview(bytearray(5))
        requests = {
            1: Pending(nbd.CMD_READ, 10, 5, view),
            2: Pending(nbd.CMD_WRITE, 0, 5),
            3: Pending(nbd.CMD_READ, 10, 5, memoryview(bytearray(5))),
        }
        pending.update(requests)
        out = bytearray(encoder.data_header) + b"hello"
        encoder.put_data_header(out, 0, 1, 10, 5, 10)
        reader.feed(memoryview(bytes(out) + encoder.success(ClientRequest(nbd.CMD_WRITE, 0, 2, 0, 5, 0, 0))))
        reader.feed(memoryview(encoder.error(ClientRequest(nbd.CMD_READ, 0, 3, 10, 5, 0, 0), errno.EROFS, "no,  ü")))
        assert bytes(view) == b"hello"
        assert [request.failure is None for request in requests.values()] == [True, True, False]
        failure = requests[3].failure
        assert failure is not None and failure.errno == errno.EPERM
        assert failure.message == ("no,  ü" if structured else "")
        assert all(request.done for request in requests.values())

    def test_pieces_holes_and_status(self) -> None:
        encoder = ReplyEncoder(structured=True, extended=False)
        reader, pending = self.read(encoder, True)
        view = memoryview(bytearray(b"x" * 8))
        read, status = Pending(nbd.CMD_READ, 100, 8, view), Pending(nbd.CMD_BLOCK_STATUS, 0, 99)
        pending.update({1: read, 2: status})
        asked = ClientRequest(nbd.CMD_READ, 0, 1, 100, 8, 0, 0)
        reader.feed(
            memoryview(encoder.data_piece(asked, 100, 3, done=False) + b"abc" + encoder.hole(asked, 103, 5, done=True))
        )
        reader.feed(
            memoryview(
                encoder.status(ClientRequest(nbd.CMD_BLOCK_STATUS, 0, 2, 0, 99, 0, 0), 0, [(9, 3), (90, 0)], done=True)
            )
        )
        assert bytes(view) == b"abc" + bytes(5)
        assert status.extents == (9, 3, 90, 0)
        assert read.done and status.done

    def test_extended_chunks_carry_the_offset(self) -> None:
        encoder = ReplyEncoder(structured=True, extended=True)
        request = ClientRequest(nbd.CMD_BLOCK_STATUS, 0, 5, 1 << 50, 1 << 45, 0, 0)
        assert encoder.success(request) == struct.pack(">IHHQQQ", 0x6E8A278C, 1, 0, 5, 1 << 50, 0)
        told = encoder.status(request, 1, [(1 << 45, 3)], done=True)
        assert told == struct.pack(">IHHQQQIIQQ", 0x6E8A278C, 1, 6, 5, 1 << 50, 24, 1, 1, 1 << 45, 3)
        out = bytearray(encoder.data_header)
        encoder.put_data_header(out, 0, 5, 77, 10, 70)
        assert out == struct.pack(">IHHQQQQ", 0x6E8A278C, 1, 1, 5, 70, 18, 77)
