"""JSON has QEMU's order of keys, indent and escapes."""

from __future__ import annotations

import json

from hypothesis import given, strategies as st

from cowhand.cli.compat.jsontext import ordered, render

#: As qemu-img 7.2 printed them.
INFO = ["backing-filename-format", "snapshots", "virtual-size", "filename", "cluster-size", "format", "actual-size"]
INFO += ["format-specific", "full-backing-filename", "backing-filename", "dirty-flag"]
SNAPSHOT = ["icount", "vm-clock-nsec", "name", "date-sec", "date-nsec", "vm-clock-sec", "id", "vm-state-size"]
CHECK = ["image-end-offset", "compressed-clusters", "total-clusters", "corruptions", "check-errors"]
CHECK += ["allocated-clusters", "filename", "format", "fragmented-clusters"]
QCOW2 = ["compat", "compression-type", "lazy-refcounts", "refcount-bits", "corrupt", "extended-l2"]


def test_known_documents() -> None:
    for keys in (INFO, SNAPSHOT, CHECK, QCOW2):
        assert list(ordered(dict.fromkeys(sorted(keys)))) == keys


def test_objects_inside_lists_and_objects_are_ordered_too() -> None:
    text = render({"a": [{"name": 1, "icount": 2}], "format": {"corrupt": True, "compat": "1.1"}})
    assert text.index('"icount"') < text.index('"name"')
    assert text.index('"compat"') < text.index('"corrupt"')


def test_characters_beyond_ascii_are_escaped_in_capitals() -> None:
    assert render({"a": 'é\x7f"\\u00e9\n'}) == '{\n    "a": "\\u00E9\\u007F\\"\\\\u00e9\\n"\n}'


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_the_value_stays_the_same(value: object) -> None:
    assert json.loads(render(value)) == value
