"""Command lines are read as getopt_long of the GNU C library reads them."""

from __future__ import annotations

import pytest

from cowhand.cli.compat.arguments import Grammar, OptionError, options
from cowhand.cli.compat.program import UsageFailure

pytestmark = pytest.mark.usefixtures("as_7_2")

GRAMMAR = Grammar("hf:q", {"help": "h", "format": "f", "force": "force", "output": "output="})


def scan(*words: str, grammar: Grammar = GRAMMAR) -> tuple[list[tuple[str, str]], list[str]]:
    scanner = grammar.scan(["command", *words])
    return list(scanner), scanner.rest


def test_options_may_follow_positionals() -> None:
    assert scan("a", "-q", "b", "-f", "raw") == ([("q", ""), ("f", "raw")], ["a", "b"])


def test_options_end_at_two_dashes() -> None:
    assert scan("a", "--", "-q", "--", "b") == ([], ["a", "-q", "--", "b"])


def test_a_single_dash_is_a_positional() -> None:
    assert scan("-", "-q") == ([("q", "")], ["-"])


def test_short_options_are_bundled_and_the_last_takes_the_rest() -> None:
    assert scan("-qfraw", "-qf", "qcow2") == ([("q", ""), ("f", "raw"), ("q", ""), ("f", "qcow2")], [])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--format=raw"], ("f", "raw")),
        (["--format", "raw"], ("f", "raw")),
        (["--form=raw"], ("f", "raw")),
        (["--outp=a=b"], ("output", "a=b")),
        (["--output="], ("output", "")),
        (["--force"], ("force", "")),
        (["--he"], ("h", "")),
    ],
)
def test_long_options_may_be_abbreviated(words: list[str], found: tuple[str, str]) -> None:
    assert scan(*words) == ([found], [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-x"], "invalid option -- 'x'"),
        (["--fo"], "option '--fo' is ambiguous; possibilities: '--format' '--force'"),
        (["--nothing=3"], "unrecognized option '--nothing=3'"),
        (["--force=3"], "option '--force' doesn't allow an argument"),
        (["--format"], "option '--format' requires an argument"),
        (["-f"], "option requires an argument -- 'f'"),
    ],
)
def test_errors_have_the_words_of_the_c_library(words: list[str], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        scan(*words)
    assert caught.value.in_libc_words("tool") == f"tool: {message}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-x"], "unrecognized option '-x'"),
        (["-qx"], "unrecognized option '-qx'"),
        (["-xq"], "unrecognized option 'command'"),
        (["a", "-xq"], "unrecognized option 'a'"),
        (["-f", "raw", "-xq"], "unrecognized option 'raw'"),
        (["--fo=3"], "unrecognized option '--fo=3'"),
        (["--format"], "missing argument for option '--format'"),
        (["a", "-f"], "missing argument for option '-f'"),
    ],
)
def test_image_tool_names_the_word_that_getopt_points_at(words: list[str], message: str) -> None:
    with pytest.raises(UsageFailure) as caught:
        list(options(GRAMMAR, ["command", *words], []))
    assert caught.value.message == message


def test_without_long_options_a_second_dash_is_a_letter() -> None:
    with pytest.raises(OptionError) as caught:
        scan("--foo", grammar=Grammar("q"))
    assert caught.value.in_libc_words("read") == "read: invalid option -- '-'"


def test_posix_order_stops_at_the_first_positional() -> None:
    grammar = Grammar("q", {}, permute=False)
    assert scan("-q", "info", "-q", grammar=grammar) == ([("q", "")], ["info", "-q"])


def test_options_before_a_wrong_one_are_taken_first() -> None:
    scanner = iter(GRAMMAR.scan(["command", "-q", "-x"]))
    assert next(scanner) == ("q", "")
    with pytest.raises(OptionError):
        next(scanner)
