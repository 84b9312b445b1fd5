"""blkdebug: rules, states and breakpoints as QEMU documents them, limits, and the same random rules given to qemu-io."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cowhand.block.disk import Disk
from cowhand.block.filters.blkdebug.config import MAX_CONFIG, parse_text, read_file
from cowhand.block.filters.blkdebug.node import BlkDebugNode, BlkDebugOptions, find
from cowhand.block.filters.blkdebug.rules import DEFAULT_IO_TYPES, EVENTS, IO_TYPES, InjectError, SetState
from cowhand.block.graph import graph
from cowhand.block.node.node import (
    ALL_PERMISSIONS,
    CONSISTENT_READ,
    READ,
    RESIZE,
    WRITE,
    WRITE_REQUEST,
    BlockNode,
    Role,
    Run,
)
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode, MemoryOptions
from cowhand.core.errors import CowhandError, ImageNotFound, InvalidArgument, IOFailed, NoSpace, NotSupported
from cowhand.core.extents import ExtentBatch
from cowhand.drivers import REGISTRY
from cowhand.testing.filters import FilterContract
from tests.block.disks import submit
from tests.tools.patience import PATIENCE
from tests.tools.qemu import qemu_io, require_qemu

SIZE = 1 << 20


def wrap(inner: BlockNode, given: dict[str, Any] | None = None, **options: Any) -> BlkDebugNode:
    opening = Opening(REGISTRY)
    return BlkDebugNode.open(opening, BlkDebugOptions(**options), {"image": inner, **(given or {})})


def memory(**options: Any) -> MemoryNode:
    return MemoryNode(MemoryOptions(**{"size": SIZE, **options}))


def inject(event: str, **settings: Any) -> dict[str, Any]:
    return {"event": event, **settings}


class TestBlkDebugAsAFilter(FilterContract):
    """Without rules it changes nothing."""

    def wrap(self, inner: BlockNode) -> BlockNode:
        return wrap(inner, read_only=not inner.writable)


class TestBlkDebugWithLimits(FilterContract):
    """With limits, requests are cut to pieces, and nothing else changes."""

    def wrap(self, inner: BlockNode) -> BlockNode:
        return wrap(
            inner,
            read_only=not inner.writable,
            align=4096,
            max_transfer=12288,
            opt_write_zero=4096,
            max_write_zero=32768,
            opt_discard=4096,
            max_discard=16384,
        )


# -- rules: the sentences of docs/devel/blkdebug.txt


def test_an_error_stays_in_force_after_its_event() -> None:
    node = wrap(memory(), {"inject-error": [inject("read_aio", errno=errno.ENOSPC)]})
    node.read_into(0, bytearray(512))
    node.event("read_aio")
    for _ in range(2):
        with pytest.raises(NoSpace) as caught:
            node.read_into(0, bytearray(512))
    assert caught.value.qemu() == os.strerror(errno.ENOSPC)
    with pytest.raises(NoSpace):
        node.write(0, (b"x",))
    with pytest.raises(NoSpace):
        node.flush()


def test_the_second_write_can_be_told_from_the_first() -> None:
    config = """
        [set-state]
        event = "write_aio"
        state = "1"
        new_state = "2"

        [inject-error]
        event = "write_aio"
        state = "2"
        errno = "5"
    """
    node = wrap(memory())
    for rule in parse_text(config):
        node._engine.add(rule)
    assert node.state == 1
    node.event("write_aio")
    node.write(0, (b"first",))
    assert node.state == 2
    node.event("write_aio")
    with pytest.raises(IOFailed) as caught:
        node.write(0, (b"second",))
    assert caught.value.errno == errno.EIO


def test_a_rule_for_one_sector_fails_requests_that_touch_it() -> None:
    node = wrap(memory(), {"inject-error": [inject("none", sector=3)]})
    for offset, length, fails in (
        (0, 1536, False),
        (1535, 2, True),
        (1536, 512, True),
        (2047, 1, True),
        (2048, 512, False),
    ):
        for call in (
            lambda at=offset, count=length: node.read_into(at, bytearray(count)),
            lambda at=offset, count=length: node.write(at, (bytes(count),)),
            lambda at=offset, count=length: submit(node, [(READ, at, bytearray(count))]),
        ):
            if fails:
                with pytest.raises(IOFailed):
                    call()
            else:
                call()
    node.flush()  # touches no sector


def test_zeroes_that_only_writing_could_make_are_refused_where_that_was_asked() -> None:
    node = wrap(memory(), opt_write_zero=16384)
    node.write_zeroes(16384, 65536, fallback=False)
    with pytest.raises(NotSupported):
        node.write_zeroes(4096, 4096, fallback=False)


def test_a_rule_that_acts_once_is_gone_afterwards() -> None:
    node = wrap(memory(), {"inject-error": [inject("pwritev", once=True)]})
    with pytest.raises(IOFailed):
        node.write(0, (b"x",))
    node.write(0, (b"x",))
    node.event("pwritev")
    node.write(0, (b"x",))


@pytest.mark.parametrize("io_type", IO_TYPES)
def test_a_rule_for_one_kind_of_request_fails_no_other(io_type: str) -> None:
    inner = memory()
    node = wrap(inner, {"inject-error": [inject("none", iotype=io_type)]})
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: node.read_into(0, bytearray(512)),
        "write": lambda: node.write(0, (bytes(512),)),
        "write-zeroes": lambda: node.write_zeroes(0, 512),
        "discard": lambda: node.discard(0, 512),
        "flush": node.flush,
        "block-status": lambda: node.map_batch(0, 512),
    }
    for name, call in calls.items():
        if name == io_type:
            with pytest.raises(IOFailed):
                call()
        else:
            call()


def test_without_a_kind_everything_fails_but_the_question_for_holes() -> None:
    node = wrap(memory(), {"inject-error": [inject("none")]})
    assert node.map_batch(0, SIZE).end == SIZE
    for call in (lambda: node.discard(0, 512), lambda: node.write_zeroes(0, 512), node.flush):
        with pytest.raises(IOFailed):
            call()


def test_an_event_that_injects_replaces_what_an_earlier_one_did() -> None:
    rules = [inject("l2_load", errno=errno.EIO, iotype="read"), inject("l2_update", errno=errno.ENOSPC, iotype="write")]
    node = wrap(memory(), {"inject-error": rules})
    node.event("l2_load")
    with pytest.raises(IOFailed):
        node.read_into(0, bytearray(1))
    node.event("l1_update")
    with pytest.raises(IOFailed):
        node.read_into(0, bytearray(1))
    node.event("l2_update")
    node.read_into(0, bytearray(1))
    with pytest.raises(NoSpace):
        node.write(0, (b"x",))


def test_writes_and_zeroes_are_events_themselves() -> None:
    seen: list[str] = []

    class Watched(BlkDebugNode):
        def event(self, name: str) -> None:
            seen.append(name)
            super().event(name)

    node = Watched.open(Opening(REGISTRY), BlkDebugOptions(max_transfer=4096), {"image": memory()})
    node.write(0, (b"x" * 10_000,))
    node.write_zeroes(0, 4096)
    node.read_into(0, bytearray(1))
    node.flush()
    assert seen == ["none", "pwritev", "pwritev_done", "pwritev_zero", "pwritev_done"]


def test_an_injected_error_changes_nothing_below() -> None:
    inner = memory()
    node = wrap(inner, {"inject-error": [inject("none", sector=8)]})
    with pytest.raises(IOFailed):
        node.write(0, (b"x" * 8192,))
    assert inner.snapshot_bytes() == bytes(SIZE)
    with pytest.raises(IOFailed):
        submit(node, [(WRITE_REQUEST, 4096, b"y"), (WRITE_REQUEST, 0, b"z")])


# -- the configuration file and options


def test_a_configuration_is_read_as_qemu_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "blkdebug.conf"
    path.write_text(
        "# a comment\n\n"
        '[inject-error "named"]\nevent = "l2_load"\nerrno = "0x1c"\nsector = "7"\nonce = "on"\nimmediately = "off"\n'
        '[set-state]\n  event = "cluster_free"  \n state = "2"\n new_state = "3"\n'
        '[inject-error]\nevent = "write_aio"\niotype = "discard"\n'
    )
    assert read_file(str(path)) == [
        InjectError("l2_load", 0, errno.ENOSPC, 7, True, False, DEFAULT_IO_TYPES),
        InjectError("write_aio", io_types=frozenset({"discard"})),
        SetState("cluster_free", 2, 3),
    ]


@pytest.mark.parametrize(
    ("text", "qemu", "line"),
    [
        ('[foo]\na = "b"\n', "There is no option group 'foo'", 1),
        ("[inject-error\n", "There is no option group 'inject-error'", 1),
        ('\na = "b"\n', "no group defined", 2),
        ('[set-state]\nfoo = "b"\n', "Invalid parameter 'foo'", 2),
        ('[set-state]\nsector = "1"\n', "Invalid parameter 'sector'", 2),
        ("[set-state]\n=\n", "Invalid parameter '='", 2),
    ],
)
def test_a_wrong_configuration_names_the_line(text: str, qemu: str, line: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_text(text, "file")
    assert caught.value.qemu() == qemu
    assert f"line {line}" in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "qemu"),
    [
        ({"errno": 3}, "Missing event name for rule"),
        ({"event": "foo"}, "invalid parameter value: foo"),
        ({"event": "none", "iotype": "foo"}, "invalid parameter value: foo"),
        ({"event": "none", "foo": "3"}, "[inject-error] section doesn't support the option 'foo'"),
        ({"event": "none", "sector": "x"}, "Parameter 'sector' expects a number"),
        ({"event": "none", "once": "maybe"}, "Parameter 'once' expects 'on' or 'off'"),
        ({"event": "none", "errno": 1 << 40}, "Parameter 'errno' is out of range"),
    ],
)
def test_wrong_rules_are_refused_in_qemus_words(rule: dict[str, Any], qemu: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        wrap(memory(), {"inject-error": [rule]})
    assert caught.value.qemu() == qemu


def test_a_configuration_that_is_missing_or_huge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageNotFound) as caught:
        read_file(str(tmp_path / "missing"))
    assert caught.value.qemu() == "Could not read blkdebug config file: No such file or directory"
    huge = tmp_path / "huge"
    with open(huge, "wb") as file:
        file.truncate(MAX_CONFIG + 1)
    with pytest.raises(InvalidArgument):
        read_file(str(huge))


def test_rules_come_as_lists_as_numbered_names_and_as_one_group() -> None:
    for given in (
        {"inject-error": [{"event": "none", "errno": 28}]},
        {"inject-error": {"0": {"event": "none", "errno": "28"}}},
        {"inject-error": {"event": "none", "errno": "28"}},
    ):
        with pytest.raises(NoSpace):
            wrap(memory(), given).flush()
    with pytest.raises(InvalidArgument, match="list index"):
        wrap(memory(), {"inject-error": {"1": {"event": "none"}}})


@pytest.fixture
def image(image_dir: Path) -> Path:
    path = image_dir / "image"
    path.write_bytes(bytes(SIZE))
    return path


@contextmanager
def opened(what: Any) -> Iterator[BlkDebugNode]:
    node = Opening(REGISTRY).open(what)
    assert isinstance(node, BlkDebugNode)
    try:
        yield node
    finally:
        graph.close_node(node)


def test_a_file_name_names_configuration_and_image(image: Path, tmp_path: Path) -> None:
    config = tmp_path / "conf"
    config.write_text('[inject-error]\nevent = "none"\nerrno = "28"\n')
    for name, fails in ((f"blkdebug:{config}:{image}", True), (f"blkdebug::{image}", False)):
        with opened({"driver": "blkdebug", "filename": name}) as node:
            assert node.filename == name
            assert node.children["image"].node.filename == str(image)
            if fails:
                with pytest.raises(NoSpace):
                    node.flush()
            else:
                node.flush()
    with pytest.raises(InvalidArgument) as caught:
        BlkDebugNode.parse_filename("blkdebug:image")
    assert caught.value.qemu() == "blkdebug requires both config file and image path"
    assert BlkDebugNode.parse_filename("blkdebug::a:b") == {"x-image": "a:b"}


def test_options_open_it_and_the_printed_name_opens_it_again(image: Path) -> None:
    given = {
        "driver": "blkdebug",
        "image.driver": "file",
        "image.filename": str(image),
        "align": "4k",
        "max-transfer": "64k",
        "inject-error.0.event": "pwritev",
        "inject-error.0.sector": "8",
        "set-state.0.event": "pwritev",
        "set-state.0.new_state": "5",
        "take-child-perms.0": "resize",
        "unshare-child-perms": ["write"],
    }
    with opened(given) as node:
        printed = node.filename
        assert json.loads(printed[5:])["align"] == "4k"
    with opened(printed) as again:
        assert again.limits.request_alignment == 4096
        assert again.limits.maximum_io == 65536
        again.write(0, (bytes(4096),))
        assert again.state == 5
        with pytest.raises(IOFailed):
            again.write(4096, (bytes(4096),))


def test_an_image_below_is_taken_as_it_is(image: Path) -> None:
    # As in QEMU: a filter that opens its own file does not look for a format in it.
    image.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(4088))
    with opened({"driver": "blkdebug", "x-image": str(image)}) as node:
        assert node.children["image"].node.driver == "file"
        assert node.size == 4096


@pytest.mark.parametrize(
    ("options", "qemu"),
    [
        ({"align": 5}, "Cannot meet constraints with align 5"),
        ({"align": 512, "max_transfer": 1000}, "Cannot meet constraints with max-transfer 1000"),
        ({"align": 512, "opt_write_zero": 100}, "Cannot meet constraints with opt-write-zero 100"),
        ({"opt_write_zero": 4096, "max_write_zero": 512}, "Cannot meet constraints with max-write-zero 512"),
        ({"max_discard": 1 << 31}, "Cannot meet constraints with max-discard 2147483648"),
        ({"opt_discard": 3, "max_discard": 4}, "Cannot meet constraints with max-discard 4"),
    ],
)
def test_limits_that_cannot_be_met_are_refused_in_qemus_words(options: dict[str, int], qemu: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        wrap(memory(), **options)
    assert caught.value.qemu() == qemu


def test_an_image_is_needed_and_unknown_permissions_are_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        BlkDebugNode.open(Opening(REGISTRY), BlkDebugOptions(), {})
    assert caught.value.qemu() == 'A block device must be specified for "image"'
    with pytest.raises(InvalidArgument, match="does not accept 'foo'"):
        wrap(memory(), {"take-child-perms": ["foo"]})


# -- limits


class Recorded(MemoryNode):
    """Remembers the requests that reach it."""

    calls: ClassVar[list[tuple[str, int, int]]] = []

    def read_into(self, offset: int, buffer: Any) -> None:
        self.calls.append(("read", offset, len(buffer)))
        super().read_into(offset, buffer)

    def write(self, offset: int, buffers: Sequence[Any], fua: bool = False) -> None:
        self.calls.append(("write", offset, sum(map(len, buffers))))
        super().write(offset, buffers, fua)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True, fua: bool = False
    ) -> None:
        self.calls.append(("zero", offset, length))
        super().write_zeroes(offset, length, unmap=unmap, fallback=fallback, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        self.calls.append(("discard", offset, length))
        super().discard(offset, length)


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    Recorded.calls.clear()
    yield Recorded(MemoryOptions(size=SIZE))
    Recorded.calls.clear()


def test_large_requests_arrive_in_pieces(recorded: Recorded) -> None:
    node = wrap(recorded, max_transfer=8192, max_write_zero=65536, max_discard=131072)
    node.write(512, (b"x" * 10_000, b"y" * 10_000))
    node.read_into(0, bytearray(8193))
    node.write_zeroes(100, 65537)
    node.discard(0, 200_000)
    assert recorded.calls == [
        ("write", 512, 8192),
        ("write", 512 + 8192, 8192),
        ("write", 512 + 16384, 3616),
        ("read", 0, 8192),
        ("read", 8192, 1),
        ("zero", 100, 65536),
        ("zero", 65636, 1),
        ("discard", 0, 131072),
        ("discard", 131072, 68928),
    ]


def test_what_is_not_aligned_is_written_as_bytes_or_discarded_by_blocks(recorded: Recorded) -> None:
    node = wrap(recorded, align=512, opt_write_zero=65536, opt_discard=65536)
    node.write_zeroes(60_416, 139_776)
    node.discard(60_000, 140_000)
    node.discard(1, 510)
    assert recorded.calls == [
        ("write", 60_416, 5120),
        ("zero", 65536, 131072),
        ("write", 196_608, 3584),
        ("discard", 60_416, 5120),
        ("discard", 65536, 131072),
        ("discard", 196_608, 3072),
    ]


# -- the graph


class Format(BlockNode):
    """A parent that tells its events."""

    driver = "test"
    is_format = True
    size = SIZE

    def read_into(self, offset: int, buffer: Any) -> None:
        if self.event_sink is not None:
            self.event_sink("read_aio")
        self.children["file"].read_into(offset, buffer)


def over(node: BlockNode) -> Format:
    format = Format(BlkDebugOptions(read_only=True))
    graph.attach(format, "file", node, Role.PRIMARY)
    return format


def test_the_format_above_tells_its_events_until_it_leaves() -> None:
    node = wrap(memory(), {"inject-error": [inject("read_aio", errno=28)]})
    first, second = over(node), over(node)
    assert first.event_sink == second.event_sink == node.event
    with pytest.raises(NoSpace):
        first.read_into(0, bytearray(1))
    graph.detach(first.children["file"])
    assert first.event_sink is None
    assert second.event_sink == node.event
    graph.close_node(second)
    assert node.closed
    assert second.event_sink is None


def test_permissions_are_added_and_taken_away() -> None:
    inner = memory()
    node = wrap(inner, {"take-child-perms": ["resize"], "unshare-child-perms": ["consistent-read", "write"]})
    child = node.children["image"]
    disk = Disk(node)
    assert (child.perm, child.shared) == (CONSISTENT_READ | RESIZE, ALL_PERMISSIONS & ~(WRITE | CONSISTENT_READ))
    disk.close()


def test_the_fast_lane_never_passes_it() -> None:
    node = wrap(memory())
    assert node.host_file(Run(512, 0, None, 0)) is None
    assert node.lane_fd < 0
    assert find(over(node)) is node
    assert find(memory()) is None


def test_questions_for_holes_are_answered_by_the_image() -> None:
    inner = memory()
    node = wrap(inner)
    batch: ExtentBatch = node.map_batch(0, SIZE)
    assert [row.node for row in batch] == [inner]


# -- breakpoints


@contextmanager
def in_background(call: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_suspended_request_waits_and_others_pass() -> None:
    inner = memory()
    node = wrap(inner)
    heard: list[tuple[str, str]] = []
    node.listener = lambda what, tag: heard.append((what, tag))
    node.breakpoint("pwritev", "A")
    assert not node.is_suspended("A")
    with in_background(lambda: node.write(0, (b"late",))) as thread:
        assert node.wait_suspended("A", 10)
        node.write(4, (b"soon",))
        assert inner.snapshot_bytes()[:8] == b"\0\0\0\0soon"
        thread.join(0.05)
        assert thread.is_alive()
        node.resume("A")
    assert inner.snapshot_bytes()[:8] == b"latesoon"
    assert not node.is_suspended("A")
    assert heard == [("suspended", "A"), ("resumed", "A")]
    node.write(0, (b"gone",))  # a breakpoint acts once


def test_removing_a_breakpoint_resumes_all_that_it_stopped() -> None:
    node = wrap(memory())
    node.breakpoint("pwritev", "A")
    node.remove_breakpoint("A")
    node.write(0, (b"x",))
    node.breakpoint("pwritev", "B")
    with in_background(lambda: node.write(0, (b"1",))):
        assert node.wait_suspended("B", 10)
        node.breakpoint("pwritev", "B")
        with in_background(lambda: node.write(1, (b"2",))):
            deadline = time.monotonic() + PATIENCE
            while len(node._suspended) < 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            node.remove_breakpoint("B")


def test_resume_takes_the_latest_request_of_a_tag() -> None:
    node = wrap(memory())
    done: list[int] = []

    def write(number: int) -> None:
        node.write(number, (b"x",))
        done.append(number)

    node.breakpoint("pwritev_done", "T")
    with in_background(lambda: write(1)):
        assert node.wait_suspended("T", 10)
        node.breakpoint("pwritev", "T")
        with in_background(lambda: write(2)) as second:
            deadline = time.monotonic() + PATIENCE
            while len(node._suspended) < 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            node.resume("T")
            second.join(PATIENCE)
            assert done == [2]
            node.resume("T")
    assert done == [2, 1]


def test_closing_resumes_whatever_waits() -> None:
    node = wrap(memory())
    node.breakpoint("l2_update", "A")
    with in_background(lambda: node.event("l2_update")):
        assert node.wait_suspended("A", 10)
        node.close()


def test_what_is_not_there_cannot_be_resumed() -> None:
    node = wrap(memory())
    for call in (
        lambda: node.resume("A"),
        lambda: node.remove_breakpoint("A"),
        lambda: node.breakpoint("foo", "A"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            call()
        assert caught.value.errno == errno.ENOENT
    assert not node.wait_suspended("A", 0.01)


def test_many_threads_and_breakpoints_lose_nobody(rng: random.Random) -> None:
    inner = memory()
    node = wrap(inner)
    tags = [f"t{number}" for number in range(200)]
    for tag in tags:
        node.breakpoint(rng.choice(("pwritev", "pwritev_done")), tag)

    def write(first: int) -> None:
        for number in range(first, 400, 4):
            node.write(number, (b"w",))

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        for waiting in list(node._suspended):
            try:
                node.resume(waiting.tag)
            except InvalidArgument:
                continue
    for thread in threads:
        thread.join(1)
        assert not thread.is_alive()
    assert inner.snapshot_bytes()[:400] == b"w" * 400


# -- QEMU


def test_the_events_are_qemus() -> None:
    assert len(EVENTS) == len(set(EVENTS)) == 48
    assert EVENTS[0] == "l1_update"
    assert EVENTS[-1] == "none"


def random_rules(rng: random.Random) -> str:
    events = ("none", "read_aio", "write_aio", "pwritev", "pwritev_zero", "pwritev_done")
    text = ""
    for _ in range(rng.randrange(1, 7)):
        settings: dict[str, Any] = {"event": rng.choice(events)}
        if rng.random() < 0.5:
            settings["state"] = rng.randrange(4)
        if rng.random() < 0.35:
            text += "[set-state]\n"
            settings["new_state"] = rng.randrange(1, 4)
        else:
            text += "[inject-error]\n"
            for name, values in (
                ("errno", (5, 28, 5)),
                ("sector", range(12)),
                ("iotype", ("read", "write", "write-zeroes", "discard")),
                ("once", ("on", "off")),
                ("immediately", ("on", "off")),
            ):
                if rng.random() < 0.4:
                    settings[name] = rng.choice(values)
        text += "".join(f'{name} = "{value}"\n' for name, value in settings.items()) + "\n"
    return text


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("number", range(25))
def test_random_rules_fail_the_same_requests_as_in_qemu(
    image: Path, tmp_path: Path, rng: random.Random, number: int
) -> None:
    config = tmp_path / "conf"
    config.write_text(random_rules(rng))
    commands = [
        (rng.choice(("read", "write", "write -z", "discard")), rng.randrange(10) * 512, rng.randrange(1, 5) * 512)
        for _ in range(40)
    ]
    output = qemu_io(
        f"blkdebug:{config}:{image}",
        *(f"{name} {offset} {length}" for name, offset, length in commands),
        format="raw",
        options=("-d", "unmap", "-t", "writeback"),
        check=False,
    )
    theirs = []
    for line in (output.stdout + output.stderr).splitlines():
        failed = re.match(r"(?:read|write|discard) failed: (.*)", line)
        if failed is not None:
            theirs.append(failed[1])
        elif re.match(r"(?:read|wrote|discard) \d+/\d+ bytes", line):
            theirs.append("done")
    assert len(theirs) == len(commands), output.stdout + output.stderr

    node = wrap(memory(), config=str(config))
    ours = []
    for name, offset, length in commands:
        try:
            # The raw format's events; the others are blkdebug's own.
            if name == "read":
                node.event("read_aio")
                node.read_into(offset, bytearray(length))
            elif name == "write":
                node.event("write_aio")
                node.write(offset, (bytes(length),))
            elif name == "discard":
                node.discard(offset, length)
            else:
                node.write_zeroes(offset, length)
            ours.append("done")
        except CowhandError as error:
            ours.append(error.qemu())
    assert ours == theirs, config.read_text() + repr(list(zip(commands, ours, theirs, strict=True))[:6])
