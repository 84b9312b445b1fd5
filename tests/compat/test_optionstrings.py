"""Option strings: commas, doubled commas, words without values."""

from __future__ import annotations

import pytest

from cowhand.block.node.create_options import CreateOption
from cowhand.cli.compat.optionstrings import CreateOptions, Pair, check_list, parse
from cowhand.cli.compat.program import Failure

KNOWN = {
    "cluster_size": CreateOption("cluster_size", "size"),
    "lazy_refcounts": CreateOption("lazy_refcounts", "bool"),
    "refcount_bits": CreateOption("refcount_bits", "int"),
    "backing_file": CreateOption("backing_file", "str"),
}


def chosen(*lists: str) -> CreateOptions:
    options = CreateOptions()
    for text in lists:
        options.add(text)
    return options


def test_doubled_commas_stand_for_one() -> None:
    assert parse("file=a,,b,other=,,") == [Pair("file", "a,b", False), Pair("other", ",", False)]


def test_words_without_values_mean_on_or_off() -> None:
    assert parse("lazy,nolazy") == [Pair("lazy", "on", True), Pair("lazy", "off", True)]


def test_a_first_word_may_be_implied() -> None:
    assert parse("secret,id=a", "qom-type") == [Pair("qom-type", "secret", False), Pair("id", "a", False)]


@pytest.mark.parametrize("text", ["", ",", ",a=b", "a=b,", "a=b,,,"])
def test_lists_with_loose_commas_are_refused(text: str) -> None:
    with pytest.raises(Failure, match="Invalid option list"):
        check_list(text)


def test_values_have_their_kinds_and_the_last_one_counts() -> None:
    options = chosen("cluster_size=4k,lazy_refcounts=on", "refcount_bits=0x10,cluster_size=8k,backing_file=a,,b")
    expected = {"cluster_size": 8192, "lazy_refcounts": True, "refcount_bits": 16, "backing_file": "a,b"}
    assert options.values(KNOWN) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour=red", "Invalid parameter 'colour'"),
        ("cluster_size=big", "Parameter 'cluster_size' expects a non-negative number below 2^64"),
        ("cluster_size=16E", "Value '16E' is out of range for parameter 'cluster_size'"),
        ("lazy_refcounts=maybe", "Parameter 'lazy_refcounts' expects 'on' or 'off'"),
        ("refcount_bits=1k", "Parameter 'refcount_bits' expects a number"),
    ],
)
def test_wrong_values_are_named(text: str, message: str) -> None:
    with pytest.raises(Failure) as caught:
        chosen(text).values(KNOWN)
    assert caught.value.message == message


@pytest.mark.parametrize(("text", "wanted"), [("help", True), ("a=b,?", True), ("a=help", False), ("helper=on", False)])
def test_help_is_asked_for_by_a_word_of_its_own(text: str, wanted: bool) -> None:
    assert chosen(text).wants_help is wanted
