"""Names by which a node can be opened again: descriptions, and the ``json:`` names made of them.

QEMU keeps an object's members in 512 chained buckets, chosen by a hash of the name that comes from TDB; it prints them bucket by bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode

_BUCKETS = 512


def describe(node: BlockNode) -> dict[str, Any]:
    """Return the description by which *node* could be opened again, with its children, but without backing files of their own word."""
    if not node.children:
        import json

        name = node.filename
        found: dict[str, Any] = json.loads(name[5:]) if name.startswith("json:") else {"filename": name}
        return {"driver": node.driver, **found}
    return {
        **node.strong_options(),
        "driver": node.driver,
        **node.described_children(),
    }


def json_name(node: BlockNode, extra: Mapping[str, Any] | None = None) -> str:
    """Return the ``json:`` name of *node*; *extra* are options that its class does not declare."""
    import json

    return "json:" + json.dumps(ordered({**(extra or {}), **describe(node)}))


def bucket(key: str) -> int:
    """Return the bucket that *key* falls into."""
    data = key.encode()
    value = 0x238F13AF * len(data)
    for index, byte in enumerate(data):
        value = (value + (byte << (index * 5 % 24))) & 0xFFFFFFFF
    return (1103515243 * value + 12345 & 0xFFFFFFFF) % _BUCKETS


def ordered(value: Any) -> Any:
    """Return *value* with the members of every object in the hash table's order.

    Of two in one bucket the one that was put in later comes first.
    """
    if isinstance(value, Mapping):
        keys = list(value)
        keys.reverse()
        return {key: ordered(value[key]) for key in sorted(keys, key=bucket)}
    if isinstance(value, (list, tuple)):
        return [ordered(item) for item in value]
    return value
