"""Graphs of drivers, drawn from tables of each driver's options with values good and bad, and the three ways to write one down.

The same seed draws the same graphs. A graph is a nested dictionary; it is written as ``json:`` with objects, as ``json:`` with dotted names, or as
``--image-opts``. Files are those of ``FOLDER``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

#: Lines of ``play`` that prepare the folder of a script.
FOLDER = """\
qemu-img create -q -f raw base.raw 1M
qemu-io -f raw -c 'write -P 1 0 64k' -c 'write -P 2 512k 64k' base.raw
qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2 1536k
qemu-io -c 'write -P 3 128k 64k' -c 'write -z 192k 64k' -c 'write -c -P 4 256k 64k' mid.qcow2
folder sub
qemu-img create -q -f qcow2 -b ../mid.qcow2 -F qcow2 sub/top.qcow2
qemu-io -c 'write -P 5 0 32k' -c 'write -P 6 1M 100k' sub/top.qcow2
qemu-img create -q -f qcow2 -o data_file=d.raw,data_file_raw=on ext.qcow2 1M
qemu-io -c 'write -P 7 64k 64k' ext.qcow2
qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=16k 'a b,c.qcow2' 1M
qemu-io -c 'write -P 8 1k 3k' 'a b,c.qcow2'
qemu-img create -q -f raw copy.raw 1M
qemu-io -f raw -c 'write -P 1 0 64k' -c 'write -P 2 512k 64k' copy.raw
qemu-img create -q -f luks --object secret,id=s,data=pw -o key-secret=s,iter-time=100 l.luks 256k
qemu-img create -q -f qcow2 --object secret,id=s,data=pw -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100 crypt.qcow2 256k
qemu-img create -q -f raw log.raw 4M
text rules [inject-error]\\nevent="read_aio"\\nerrno="5"\\nonce="on"\\n
text empty ''
"""

#: How often something in a graph is wrong.
WRONG = 0.0

Graph = dict[str, "str | bool | int | Graph | list[Graph] | None"]

_BOOLEANS = ("on", "off", "on", "off", "yes", "maybe", "", True, False, 1, None)
_SIZES = ("0", "512", "64k", "4k", "1M", "100", "-1", "x", "", 4096, 65536, 1000, True)
_COMMON = {
    "read-only": _BOOLEANS,
    "auto-read-only": _BOOLEANS,
    "force-share": ("off", "off", "on", False, "x"),
    "discard": ("unmap", "ignore", "on", "off", "x", ""),
    "detect-zeroes": ("off", "on", "unmap", "x"),
    "cache.direct": ("off", "off", "x", False, 0),
    "cache.no-flush": _BOOLEANS,
    "cache.writeback": ("on", "off"),
    "node-name": ("n0", "n1", "0x", "", "a b", "file"),
    "nothing": ("1",),
}  # fmt: skip
_OPTIONS: dict[str, dict[str, tuple[object, ...]]] = {
    "file": {
        "aio": ("threads", "native", "io_uring", "x"),
        "locking": ("auto", "on", "off", "x"),
        "drop-cache": _BOOLEANS,
        "x-check-cache-dropped": ("off", "x"),
        "pr-manager": ("p", ""),
    },
    "raw": {"offset": _SIZES, "size": _SIZES},
    "qcow2": {
        "lazy-refcounts": _BOOLEANS,
        "pass-discard-request": _BOOLEANS,
        "pass-discard-snapshot": _BOOLEANS,
        "pass-discard-other": _BOOLEANS,
        "overlap-check": ("none", "constant", "cached", "all", "x", "", True),
        "overlap-check.template": ("none", "constant", "cached", "all", "x"),
        "overlap-check.active-l2": _BOOLEANS,
        "overlap-check.nothing": ("on",),
        "cache-size": _SIZES,
        "l2-cache-size": _SIZES,
        "l2-cache-entry-size": _SIZES,
        "refcount-cache-size": _SIZES,
        "cache-clean-interval": ("0", "600", "x", -1, "4294967296"),
        "encrypt.format": ("luks", "aes", "x"),
        "encrypt.key-secret": ("s", "none"),
    },
    "luks": {"key-secret": ("s", "s", "s", "none", "wrong", "")},
    "null-co": {"size": _SIZES, "latency-ns": ("0", "1000", "-1", "x"), "read-zeroes": _BOOLEANS},
    "null-aio": {"size": _SIZES, "latency-ns": ("0", "1000", "x"), "read-zeroes": _BOOLEANS},
    "throttle": {"throttle-group": ("g", "g", "h", "")},
    "copy-on-read": {"bottom": ("n0", "n1", "")},
    "compress": {},
    "preallocate": {"prealloc-align": ("512", "4k", "64k", "1M", "100", "x"), "prealloc-size": _SIZES},
    "blkdebug": {
        "config": ("rules", "nofile", "empty", ""),
        "align": ("512", "4096", "64k", "100", "x", "8G", 4096),
        "max-transfer": ("64k", "4k", "100", "x", "3G"),
        "opt-write-zero": ("4k", "64k", "100", "x"),
        "max-write-zero": ("4k", "64k", "100"),
        "opt-discard": ("4k", "64k", "100"),
        "max-discard": ("4k", "64k", "100"),
        "inject-error.0.event": ("read_aio", "write_aio", "l2_load", "none", "x"),
        "inject-error.0.errno": ("5", "28", "x", 5),
        "inject-error.0.sector": ("0", "-1", "8"),
        "inject-error.0.iotype": ("read", "write", "flush", "x"),
        "inject-error.0.once": _BOOLEANS,
        "inject-error.0.immediately": ("on", "off"),
        "set-state.0.event": ("l2_load", "x"),
        "set-state.0.new_state": ("2", "x"),
        "set-state.0.state": ("1", "0"),
        "take-child-perms.0": ("write", "x"),
        "unshare-child-perms.0": ("resize", "x"),
    },
    "blkverify": {},
    "blklogwrites": {
        "log-append": _BOOLEANS,
        "log-sector-size": ("512", "4096", "100", "x"),
        "log-super-update-interval": ("1", "4096", "x"),
    },
    "quorum": {
        "vote-threshold": ("1", "2", "3", "0", "x", -1),
        "blkverify": _BOOLEANS,
        "rewrite-corrupted": _BOOLEANS,
        "read-pattern": ("quorum", "fifo", "x"),
    },
}  # fmt: skip
_FILTERS = ("throttle", "copy-on-read", "preallocate", "blkdebug", "raw", "blkverify", "blklogwrites", "compress")
#: For graphs without the last three, where a file must not stand in two places.
_PLAIN = 5
#: Images by the driver that reads them.
_IMAGES = {
    "qcow2": ("mid.qcow2", "sub/top.qcow2", "ext.qcow2", "a b,c.qcow2", "crypt.qcow2"),
    "raw": ("base.raw", "copy.raw", "mid.qcow2", "empty"),
    "luks": ("l.luks",),
}  # fmt: skip


def graph(rng: random.Random, depth: int = 0) -> Graph:
    """Return a graph of drivers, mostly a right one."""
    kind = rng.random()
    if depth < 3 and kind < 0.4:
        driver = rng.choice(_FILTERS[:_PLAIN])
        out: Graph = {"driver": driver}
        under = graph(rng, depth + 1)
        out[_edge(driver)] = under
        if driver == "throttle":
            out["throttle-group"] = "g"
        if driver == "blkverify":
            out["raw"] = _file(rng, rng.choice(("copy.raw", "base.raw")))
        if driver == "blklogwrites":
            out["log"] = _file(rng, "log.raw")
    elif kind < 0.5 and depth < 2 and _PLAIN > 5:
        out = {"driver": "quorum", "vote-threshold": rng.choice(("1", "2", 1, 2))}
        out["children"] = [graph(rng, depth + 2) for _ in range(rng.choice((1, 2, 2, 3)))]
    elif kind < 0.58:
        out = {"driver": rng.choice(("null-co", "null-aio")), "size": rng.choice(("1M", "64k", 65536))}
    elif kind < 0.68:
        return _file(rng, rng.choice(("base.raw", "mid.qcow2", "copy.raw")))
    else:
        driver = rng.choice(("qcow2", "qcow2", "raw", "luks"))
        name = rng.choice(_IMAGES[driver])
        out = {"driver": driver, "file": _file(rng, name) if rng.random() < 0.6 else {"filename": name}}
        if driver == "luks":
            out["key-secret"] = "s"
        if name == "crypt.qcow2":
            out["encrypt"] = {"key-secret": "s"}
        if driver == "qcow2" and rng.random() < 0.15:
            out["backing"] = rng.choice((None, graph(rng, depth + 1)))
        if name == "ext.qcow2" and rng.random() < 0.2:
            out["data-file"] = _file(rng, "d.raw")
    _vary(rng, out)
    return out


def _edge(driver: str) -> str:
    return {"blkdebug": "image", "blkverify": "test"}.get(driver, "file")


def _file(rng: random.Random, name: str) -> Graph:
    out: Graph = {"driver": "file", "filename": name}
    _vary(rng, out)
    return out


def _vary(rng: random.Random, graph: Graph) -> None:
    """Put options in, and now and then take one out."""
    driver = str(graph.get("driver"))
    for table, chance in ((_OPTIONS.get(driver, {}), 0.4), (_COMMON, 0.25)):
        if table and rng.random() < chance:
            name = rng.choice(sorted(table))
            _set(graph, name, rng.choice([value for value in table[name] if _is_right(name, value)] or [None]))


_WRONG_VALUES = (
    "maybe", "", "x", "-1", "100", 100, -1, 1000, "none", "wrong", "nofile", "8G", "3G", "2", "3", "0x", "a b", "h",
)  # fmt: skip
_WRONG_NAMES = ("nothing", "overlap-check.nothing", "bottom", "pr-manager", "node-name")


def _is_right(name: str, value: object) -> bool:
    """Tell whether *value* is taken everywhere: whatever is wrong has to be the only thing that is."""
    if value is None or value in _WRONG_VALUES or name in _WRONG_NAMES:
        return False
    return value != 1 and not (value is True and "size" in name)


def spoil(rng: random.Random, graph: Graph) -> None:
    """Make one thing in *graph* wrong, or at least unusual."""
    nodes = [node for node in _nodes(graph) if "driver" in node]
    if not nodes:
        return
    node = rng.choice(nodes)
    driver = str(node["driver"])
    kind = rng.random()
    if kind < 0.1:
        node.pop(rng.choice(sorted(node)))
    elif kind < 0.2:
        node["driver"] = rng.choice(("foo", "", "file", "qcow2", "vmdk", "raw"))
    else:
        table = _OPTIONS.get(driver, {}) if kind < 0.7 and _OPTIONS.get(driver) else _COMMON
        name = rng.choice(sorted(table))
        _set(node, name, rng.choice([value for value in table[name] if not _is_right(name, value)] or table[name]))


def _nodes(graph: object) -> Iterator[Graph]:
    if isinstance(graph, dict):
        yield graph
        for value in graph.values():
            yield from _nodes(value)
    elif isinstance(graph, list):
        for value in graph:
            yield from _nodes(value)


def _set(graph: Graph, name: str, value: object) -> None:
    """Set a dotted name; what is in the way of it is replaced."""
    *path, last = name.split(".")
    for part in path:
        below = graph.setdefault(part, {})
        if not isinstance(below, dict):
            graph[part] = below = {}
        graph = below
    graph[last] = value  # type: ignore[assignment]


def flat(graph: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield dotted names and values."""
    if isinstance(graph, dict) and (graph or not prefix):
        pairs = list(graph.items())
    elif isinstance(graph, list) and graph:
        pairs = [(str(index), value) for index, value in enumerate(graph)]
    else:
        yield prefix, graph
        return
    for name, value in pairs:
        yield from flat(value, f"{prefix}.{name}" if prefix else str(name))


def written(rng: random.Random, graph: Graph) -> list[str]:
    """Return words that name *graph*: an option string behind ``--image-opts``, or a ``json:`` name."""
    form = rng.choice(("opts", "opts", "json", "dotted"))
    if form == "json":
        return ["json:" + json.dumps(graph)]
    if form == "dotted":
        return ["json:" + json.dumps(dict(flat(graph)))]
    shown = {True: "on", False: "off", None: ""}
    pairs = [
        f"{name}={shown[value] if isinstance(value, bool) or value is None else str(value).replace(',', ',,')}"
        for name, value in flat(graph)
        if not isinstance(value, (dict, list))
    ]
    if pairs and pairs[0].startswith("driver=") and rng.random() < 0.1:
        pairs[0] = pairs[0].removeprefix("driver=")
    return ["--image-opts", ",".join(pairs)]


_OBJECTS = ["--object", "secret,id=s,data=pw", "--object", "secret,id=wrong,data=no", "--object", "throttle-group,id=g"]
_IO = (
    "read 0 64k", "read -P 1 0 4k", "write -P 9 64k 64k", "write -z 128k 64k", "write -zu 0 64k", "discard 64k 64k", "map", "length", "flush",
    "read 1000 5000", "write -P 3 4000 3000", "alloc 0 256k", "truncate 2M", "write -c 0 64k",
    "write -b -P 3 0 512", "write -f 0 512", "write -P 0 256k 64k", "read -b 0 512", "break read_aio A",
)  # fmt: skip


def draw(seed: int, count: int) -> Iterator[list[str]]:
    """Yield *count* command lines that open graphs."""
    rng = random.Random(seed)
    for _ in range(count):
        drawn = graph(rng)
        if rng.random() < WRONG:
            spoil(rng, drawn)
        words = written(rng, drawn)
        kind = rng.random()
        if kind < 0.45:
            commands = [word for line in rng.sample(_IO, rng.randrange(1, 5)) for word in ("-c", line)]
            flags = rng.choice(([], [], ["-r"], ["-C"], ["-t", "writethrough"], ["-d", "unmap"], ["-U", "-r"], ["-s"]))
            yield ["qemu-io", *_OBJECTS, *flags, *commands, *words]
        elif kind < 0.6:
            yield ["qemu-img", "info", *_OBJECTS, *rng.choice(([], ["--output=json"], ["--backing-chain"])), *words]
        elif kind < 0.7:
            yield ["qemu-img", "map", *_OBJECTS, *rng.choice(([], ["--output=json"])), *words]
        elif kind < 0.76:
            yield ["qemu-img", "check", *_OBJECTS, *rng.choice(([], ["--output=json"], ["-r", "all"])), *words]
        elif kind < 0.82:
            yield ["qemu-img", "measure", "-O", rng.choice(("qcow2", "raw", "luks")), *_OBJECTS, *words]
        elif kind < 0.88:
            yield ["qemu-img", "convert", "-O", rng.choice(("qcow2", "raw")), *_OBJECTS, *words, "new.img"]
        elif kind < 0.92 and words[0] == "--image-opts":
            source = rng.choice(("driver=raw,file.filename=base.raw", "driver=qcow2,file.filename=mid.qcow2"))
            yield ["qemu-img", "convert", "-n", "--target-image-opts", *_OBJECTS, "--image-opts", source, words[-1]]
        elif kind < 0.96:
            yield ["qemu-img", "snapshot", rng.choice(("-l", "-l", "-cnew", "-dnew")), *_OBJECTS, *words]
        else:
            yield ["qemu-img", rng.choice(("commit", "rebase", "amend")), *_OBJECTS, *words]
