"""Sizes are read and printed as QEMU's tools do."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from cowhand.cli.compat import program, sizes
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import InvalidArgument
from cowhand.core.units import parse_size

pytestmark = pytest.mark.usefixtures("as_7_2")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1b", 1),
        ("1B", 1),
        ("010", 10),
        ("+5", 5),
        (" 1k", 1024),
        ("\t1K", 1024),
        ("1.5G", 3 << 29),
        ("1.k", 1024),
        ("1.3k", 1331),
        ("0.1k", 102),
        ("0.0005k", 1),
        ("1.9999999999999999k", 2048),
        ("0x100000", 1 << 20),
        ("0XEe", 238),
        ("0x1E", 30),
        ("1T", 1 << 40),
        ("1p", 1 << 50),
        ("7E", 7 << 60),
        ("1.0", 1),
    ],
)
def test_numbers_with_suffixes(text: str, value: int) -> None:
    assert sizes.parse_size(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "k", "1e3", "1e1k", ".5k", ".", "1.3", "1.5b", "1kb", "1 k", "1k ", "1kk", "1..", "0x", "0xk", "0x1.8k", "inf", "-1", "-0", "1_0", "\u0661"],
)  # fmt: skip
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(sizes.SizeSyntax):
        sizes.parse_size(text)


def test_sizes_since_8_2() -> None:
    program.use_profile("8.2")
    assert sizes.parse_size(".5k") == 512
    for text in ("0x1k", ".k", ".", "-x", "-", "-0k", "-.5k"):
        with pytest.raises(sizes.SizeSyntax):
            sizes.parse_size(text)
    for text in ("-1", "-0"):
        with pytest.raises(sizes.SizeRange):
            sizes.parse_size(text)


@pytest.mark.parametrize("text", ["8E", "16E", "9223372036854775808", "0x8000000000000000", "9" * 400])
def test_sizes_beyond_63_bits(text: str) -> None:
    with pytest.raises(sizes.SizeRange):
        sizes.parse_size(text)


def test_hexadecimal_with_a_suffix_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert sizes.parse_size("0x1k") == 1024
    assert "Using a multiplier suffix on hex numbers is deprecated: 0x1k" in capsys.readouterr().err


def test_an_argument_out_of_bounds_names_them() -> None:
    with pytest.raises(Failure) as caught:
        sizes.size_argument("bs", "0", 1, 100)
    assert caught.value.message == "Invalid bs specified. Must be between 1 and 100."


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (512, "512 B"), (1000, "0.977 KiB"), (1024, "1 KiB"), (196608, "192 KiB"), (21705523, "20.7 MiB"), (1 << 60, "1 EiB")],
)  # fmt: skip
def test_human_sizes_have_three_digits(value: int, text: str) -> None:
    assert sizes.human(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (512, "512 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (1536, "1.500 KiB"), (1 << 30, "1 GiB"), (110965.76, "108.365 KiB")],
)  # fmt: skip
def test_precise_sizes_have_three_decimals_or_none(value: float, text: str) -> None:
    assert sizes.precise(value) == text


@given(st.integers(0, sizes.MAX_SIZE))
def test_every_whole_number_is_itself(value: int) -> None:
    assert sizes.parse_size(str(value)) == sizes.parse_size(hex(value)) == value


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        value = sizes.parse_size(text)
    except (sizes.SizeSyntax, sizes.SizeRange):
        return
    assert 0 <= value <= sizes.MAX_SIZE


def test_numbers_of_any_length_are_answered() -> None:
    for text in ("9" * 5000, "0x" + "f" * 5000, "1." + "1" * 5000 + "k"):
        with pytest.raises(InvalidArgument, match="out of range"):
            parse_size(text)
