"""``json:`` names are read in QEMU's dialect, and nothing else than a description comes out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from cowhand.block.opening.json_names import parse_json_name
from cowhand.core.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'driver': 'raw'}", {"driver": "raw"}),
        ("""{'a': 'say "yes"', "b": "it's"}""", {"a": 'say "yes"', "b": "it's"}),
        (r"{'a': 'it\'s \u00e9 \\'}", {"a": "it's é \\"}),
        ("{ 'a': true, 'b': [1, {}] }", {"a": True, "b": [1, {}]}),
        ("{}", {}),
    ],
)
def test_strings_in_either_quotes(text: str, value: object) -> None:
    assert parse_json_name("json:" + text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Could not parse the JSON options: JSON parse error, premature EOI"),
        ("", "Could not parse the JSON options: Expecting a JSON value"),
        ("[]", "Invalid JSON object given"),
        ("{'a': }", "Could not parse the JSON options: JSON parse error"),
        ("{'a: 1}", "Could not parse the JSON options: JSON parse error"),
        ("[" * 100_000, "Could not parse the JSON options: JSON parse error, nested too deep"),
        (" " * (1 << 20) + "{}", "Could not parse the JSON options: the description is too long"),
    ],
)
def test_what_is_no_description(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_json_name("json:" + text)
    assert caught.value.qemu().startswith(message)


@given(st.dictionaries(st.text(), st.recursive(st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)))
def test_plain_json_is_read_as_it_is(value: dict[str, object]) -> None:
    assert parse_json_name("json:" + json.dumps(value)) == value


@given(st.text(max_size=40))
def test_any_text_is_a_description_or_refused(text: str) -> None:
    try:
        assert isinstance(parse_json_name("json:" + text), dict)
    except InvalidArgument:
        pass
