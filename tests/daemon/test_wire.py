"""QMP on the wire: values out of a stream in any pieces, and what is no JSON."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cowhand.daemon.wire import MAX_NESTING, Parser, SyntaxProblem, encode

STREAM = b"""{"execute": "a", "arguments": {"x": [1, 2, "}{"]}} {'execute': 'b'}\r\n[1]{"s": "\\"'{"}"text" 5 true\n"""
VALUES: list[Any] = [
    {"execute": "a", "arguments": {"x": [1, 2, "}{"]}}, {"execute": "b"}, [1], {"s": "\"'{"}, "text", 5, True,
]  # fmt: skip


def test_values_come_out_whatever_the_pieces(rng: random.Random) -> None:
    for _ in range(200):
        parser, out, at = Parser(), [], 0
        while at < len(STREAM):
            step = rng.randrange(1, 9)
            out += parser.feed(STREAM[at : at + step])
            at += step
        assert out == VALUES


def test_byte_by_byte() -> None:
    parser = Parser()
    assert [value for byte in STREAM for value in parser.feed(bytes([byte]))] == VALUES


@pytest.mark.parametrize("bad", [b"{x}", b"{'a': }", b"[1,,2]", b'{"a": 1, "a": 2}', b'{"a": "\xff"}', b"}"])
def test_what_is_no_json_is_told_and_the_stream_goes_on(bad: bytes) -> None:
    parser = Parser()
    first, *rest = parser.feed(bad + b' {"execute": "a"}')
    assert isinstance(first, SyntaxProblem)
    assert rest == [{"execute": "a"}]


def test_nesting_is_bounded() -> None:
    parser = Parser()
    (error,) = parser.feed(b"[" * (MAX_NESTING + 1))
    assert "nesting depth limit" in str(error)
    assert list(parser.feed(b"5 ")) == [5]


def test_answers_have_qemus_order_and_ends() -> None:
    line = encode(
        {"return": {"id": "j\u00e9", "type": "backup", "total-progress": 1, "status": "x", "current-progress": 0}}
    )
    told = b'"current-progress": 0, "status": "x", "total-progress": 1, "type": "backup", "id": "j\\u00e9"'
    assert line == b'{"return": {' + told + b"}}\r\n"
