"""A verdict on an image from a stranger: what in it could harm whoever opens it. The file itself is read, and nothing that it names is opened.

The sources of harm are those of QEMU's and OpenStack's advisories (CVE-2024-32498, CVE-2022-47951, CVE-2015-5163): files of the host that a
header names, formats that are guessed, tables that lie over one another, little input that becomes much output.
"""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.disk import Disk
from cowhand.block.opening.filenames import has_protocol
from cowhand.block.opening.lookalikes import not_an_image
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.policy import UNTRUSTED
from cowhand.block.opening.registry import PROBE_SIZE
from cowhand.block.opening.signatures import MARKS, looks_like_a_format
from cowhand.core.errors import CowhandError, InvalidFormat, PolicyRefused, from_os_error
from cowhand.core.units import format_size
from cowhand.image.check import check_node

if TYPE_CHECKING:
    from cowhand.block.formats.qcow2.driver import Qcow2Node
    from cowhand.crypto.luks import Header as LuksHeader

#: A disk longer than this is a reason by itself; the caller may give another limit.
MAX_VIRTUAL_SIZE = 64 << 40
#: So many times the file's length may a disk's data be, from that amount on: what compresses better is rare, and hardly an accident.
MAX_EXPANSION = 100
_BOMB_BYTES = 256 << 20
#: Levels of a json: description, and bytes of it, that are looked at.
_JSON_DEPTH = 4
_SECTOR = 512
#: Marks at the end of a file, by which some programs recognise formats: (bytes, distance from the end, format).
_END_MARKS = ((b"conectix", 512, "vpc"), (b"koly", 512, "dmg"))
_ISO = (b"CD001", 0x8001)


class Reason(NamedTuple):
    """Something wrong: a stable ``code``, a sentence, and the ``offset`` in the file where it can be seen (None: all over)."""

    code: str
    text: str
    offset: int | None = None


class Verdict(NamedTuple):
    """What was found. ``format`` is the one that the file was judged as. Nothing is wrong where there are no ``reasons``."""

    path: str
    format: str
    size: int | None
    file_size: int
    reasons: tuple[Reason, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Return the verdict for ``--output json``."""
        return {
            "filename": self.path, "format": self.format, "virtual-size": self.size, "file-size": self.file_size,
            "verdict": "sound" if self.sound else "unsafe", "reasons": [reason._asdict() for reason in self.reasons],
        }  # fmt: skip


def judge(path: str, format: str | None = None, *, max_size: int = MAX_VIRTUAL_SIZE) -> Verdict:
    """Judge the local file *path*, as *format* or as what its first bytes say. Raises ImageNotFound and IOFailed; damage is a reason.

    Time and memory are bounded by those of a check. Nothing is written, and no lock is taken or waited for.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                reason = Reason("not-a-file", "this is no regular file but a device, a pipe or a folder")
                return Verdict(path, format or "unknown", None, 0, (reason,))
            length = status.st_size
            head = os.pread(fd, PROBE_SIZE, 0)
            tails = [(os.pread(fd, len(m), max(0, length - back)), m, name) for m, back, name in _END_MARKS]
            iso = os.pread(fd, len(_ISO[0]), _ISO[1])
        finally:
            os.close(fd)
    except OSError as error:
        raise from_os_error(error, path) from error
    from cowhand.drivers import REGISTRY

    probed = REGISTRY.probe(head, "").name
    reasons = _ambiguities(head, [name for found, mark, name in tails if found == mark], iso == _ISO[0], probed, format)
    lookalike = not_an_image(head, path, length) if probed == "raw" and format is None else None
    if lookalike is not None:
        reasons = [Reason("not-an-image", f"this is {lookalike[0]}, and no disk image", 0)]
    chosen = format or probed
    size: int | None = None
    if chosen == "qcow2":
        size = _judge_qcow2(path, length, reasons)
    elif chosen == "luks":
        size = _judge_luks(path, length, reasons)
    elif chosen == "raw":
        size = length
    else:
        reasons.append(Reason("not-understood", f"what a {chosen} image names and holds is not looked into"))
    if size is not None and size > max_size:
        reasons.append(Reason("size", f"a disk of {format_size(size)} is longer than {format_size(max_size)}"))
    return Verdict(
        path, chosen, size, length, tuple(reason._replace(text=_one_line(reason.text)) for reason in reasons)
    )


def _one_line(text: str) -> str:
    """Return *text* with what steers a terminal, or begins a line of its own, spelled out: names in images may hold anything."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def _ambiguities(head: bytes, tails: list[str], iso: bool, probed: str, format: str | None) -> list[Reason]:
    """Return what makes it doubtful which format the file has."""
    found: list[Reason] = []
    marked = {looks_like_a_format(head) or ""} | {name for mark, at, name in MARKS if head[at : at + len(mark)] == mark}
    marked = {name for name in marked if name} | set(tails)
    if "qcow" in marked:
        marked.discard("qcow2")  # the same mark, and another version behind it
    if format is None and probed == "raw":
        text = "the format is a guess: whoever writes the disk's first bytes can make it another one"
        found.append(Reason("guessed-format", f"{text} (if it is raw, say so: -f raw)", 0))
    elif format is not None and format != probed and not (format == "raw" and not marked):
        found.append(Reason("ambiguous-format", f"it is said to be {format}, and its first bytes say {probed}", 0))
    others = marked - {probed, format}
    if others:
        names = ", ".join(sorted(others))
        found.append(
            Reason("ambiguous-format", f"it also carries the mark of {names}: other programs may take it for that")
        )
    if iso and probed != "raw":
        found.append(Reason("ambiguous-format", "it also carries the mark of a CD image (ISO 9660)", _ISO[1]))
    return found


# -- LUKS


def _judge_luks(path: str, length: int, reasons: list[Reason]) -> int | None:
    from cowhand.crypto import luks

    with open(path, "rb") as file:
        first = file.read(luks.HEADER_BYTES)
    try:
        header = luks.parse(first, path)
    except CowhandError as error:
        reasons.append(Reason("invalid-header", error.message, error.offset))
        return None
    begin = header.payload * _SECTOR
    if begin > length:
        text = f"the encrypted disk begins at {begin}, behind the end of the file"
        reasons.append(Reason("invalid-header", text, luks.PAYLOAD_OFFSET))
    _slots(header, 0, reasons)
    return max(0, length - begin)


def _slots(header: LuksHeader, at: int, reasons: list[Reason]) -> None:
    """Add a reason if trying a passphrase on the key slots of the *header* at offset *at* takes longer than it may."""
    from cowhand.crypto import luks
    from cowhand.crypto.effort import Effort

    effort = Effort(None)
    active = [index for index, slot in enumerate(header.slots) if slot.active]
    try:
        costly = [index for index in active if not effort.covers(header, index)]
    except CowhandError as error:  # the hash is not known here
        reasons.append(Reason("not-understood", error.message, at))
        return
    if costly:
        text = f"to try a passphrase on key slot {', '.join(map(str, costly))} takes minutes, or hours"
        reasons.append(Reason("costly-key-slot", text, at + luks.slot_at(costly[0])))


# -- qcow2


def _judge_qcow2(path: str, length: int, reasons: list[Reason]) -> int | None:
    from cowhand.block.formats.qcow2.ondisk import header as headers

    with open(path, "rb") as file:
        first = file.read(2 << 20)
    bits = int.from_bytes(first[20:24], "big")
    try:
        header = headers.parse(first[: 1 << min(bits, 21)] if bits >= 9 else first[:512], path, for_repair=True)
    except CowhandError as error:
        reasons.append(Reason("invalid-header", error.message, error.offset))
        return None
    _repeated(first[: header.cluster_size], header, reasons)
    _references(header, reasons)
    try:
        headers.check_features(header, path)
        _judge_tables(path, length, reasons)
    except PolicyRefused:
        pass  # what it would have opened is among the reasons
    except CowhandError as error:
        reasons.append(Reason("unreadable", error.message, error.offset))
    return header.size


def _repeated(data: bytes, header: Any, reasons: list[Reason]) -> None:
    """Look for header extensions that are there twice; the *header* was parsed, so that their lengths are right."""
    at, seen = header.header_length, set()
    while at + 8 <= min(len(data), int.from_bytes(data[8:16], "big") or len(data)):
        kind, length = (int.from_bytes(data[begin : begin + 4], "big") for begin in (at, at + 4))
        if not kind:
            break
        if kind in seen:
            text = f"it has the header extension {kind:#x} twice: other programs may go by the other one"
            reasons.append(Reason("ambiguous-header", text, at))
            break
        seen.add(kind)
        at += 8 + -(-length // 8) * 8


def _references(header: Any, reasons: list[Reason]) -> None:
    from cowhand.block.formats.qcow2.ondisk import layout as L

    if header.backing_name is not None:
        _reference("backing file", header.backing_name, reasons, 8)
        if header.backing_format is None:
            text = "the format of its backing file is not recorded: it would be guessed from that file's bytes"
            reasons.append(Reason("unrecorded-format", text, 8))
    data = header.find(L.EXT_DATA_FILE)
    if data is not None:
        _reference("external data file", data.decode("utf-8", "surrogateescape"), reasons, None)
    elif header.incompatible & L.INCOMPAT_DATA_FILE:
        text = "its data lie in another file, which it does not name"
        reasons.append(Reason("external-reference", text, L.OFFSET_INCOMPATIBLE))
    if header.incompatible & L.INCOMPAT_CORRUPT:
        reasons.append(Reason("marked-corrupt", "it is marked as corrupt", L.OFFSET_INCOMPATIBLE))
    if header.incompatible & L.INCOMPAT_DIRTY:
        text = "it was not closed: opening it for writing changes it at once"
        reasons.append(Reason("marked-dirty", text, L.OFFSET_INCOMPATIBLE))


def _reference(what: str, name: str, reasons: list[Reason], offset: int | None) -> None:
    """Add the reasons that a reference to another file gives."""
    shown = name if len(name) < 200 else name[:200] + "..."
    reasons.append(Reason("external-reference", f"it names another file, its {what}: '{shown}'", offset))
    if not name.isprintable():
        reasons.append(Reason("control-characters", f"the name of its {what} has control characters", offset))
    if name.startswith("json:"):
        reasons.append(
            Reason("json-name", f"its {what} is a description, which may name any driver and any file", offset)
        )
        _json(name[5:], what, reasons, offset)
        return
    if has_protocol(name):
        scheme = name.split(":", 1)[0]
        reasons.append(Reason("protocol", f"its {what} is reached by '{scheme}:', perhaps over the network", offset))
        name = name.split(":", 1)[1]
    if os.path.isabs(name):
        reasons.append(Reason("absolute-path", f"the path of its {what} is absolute", offset))
    if ".." in name.split("/"):
        reasons.append(Reason("parent-path", f"the path of its {what} leads out of its folder", offset))


def _json(text: str, what: str, reasons: list[Reason], offset: int | None) -> None:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        reasons.append(Reason("json-name", f"the description of its {what} is not JSON", offset))
        return
    level, depth = [described], 0
    while level and depth <= _JSON_DEPTH:
        names = [value for item in level if isinstance(item, dict) for value in item.values()]
        names += [value for item in level if isinstance(item, list) for value in item]
        for value in names:
            if isinstance(value, str) and os.path.isabs(value):
                reasons.append(
                    Reason(
                        "absolute-path", f"the description of its {what} has the absolute path '{value[:200]}'", offset
                    )
                )
        level, depth = [value for value in names if isinstance(value, (dict, list))], depth + 1
    if level:
        reasons.append(Reason("depth", f"the description of its {what} is more than {_JSON_DEPTH} deep", offset))


def _judge_tables(path: str, length: int, reasons: list[Reason]) -> None:
    """Follow the image's own tables: what lies over something else, and how much comes out of how little."""
    from cowhand.block.formats.qcow2 import overlap
    from cowhand.drivers import REGISTRY

    opening = Opening(REGISTRY, UNTRUSTED, backing=False)
    opening.for_repair = True
    file = {"driver": "file", "filename": path, "force-share": True}
    root: Any = opening.open({"driver": "qcow2", "file": file, "read-only": True})
    try:
        disk = Disk(root)
    except BaseException:
        opening.abandon()
        raise
    with disk:
        node: Qcow2Node = root
        if node.encryption is not None and node.encryption.luks is not None:
            _slots(node.encryption.luks, 0, reasons)
        result = check_node(node)
        if result.failure is not None:
            reasons.append(Reason("unreadable", result.failure.message, result.failure.offset))
        if result.corruptions or result.check_errors:
            count = result.corruptions + result.check_errors
            lines = "; ".join(line for finding in result.findings[:3] for line in finding.text.split("\n"))
            reasons.append(Reason("damaged", f"its tables contradict themselves in {count} places: {lines}"))
        elif result.leaks:
            reasons.append(Reason("lost-space", f"{result.leaks} clusters are counted and used by nothing"))
        try:
            over = overlap.conflict(node)
        except InvalidFormat as error:
            reasons.append(Reason("size", error.message))
            over = None
        if over is not None:
            text = f"other tables lie over its {over[0]}: writing the one destroys the other"
            reasons.append(Reason("overlap", text, over[1] * node.cluster_size))
        _bomb(node, result.allocated_clusters, length, reasons)
        for snapshot in node.snapshots[:1000]:
            if not snapshot.name.isprintable():
                reasons.append(
                    Reason("control-characters", f"the name of snapshot {snapshot.id!r} has control characters")
                )
                break
        for bitmap in node.bitmap_directory.entries[:1000]:
            if not bitmap.text.isprintable():
                where = node.bitmap_directory.offset + bitmap.at
                reasons.append(Reason("control-characters", "the name of a dirty bitmap has control characters", where))
                break


def _bomb(node: Qcow2Node, clusters: int, length: int, reasons: list[Reason]) -> None:
    data = clusters * node.cluster_size
    if data > _BOMB_BYTES and data > MAX_EXPANSION * length:
        text = (
            f"{format_size(length)} of file become {format_size(data)} of data: {data // max(1, length)} times as much"
        )
        reasons.append(Reason("decompression-bomb", text))
