"""The drivers of files and block devices, on every medium of this machine: 512- and 4096-byte sectors, through and around the cache."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cowhand.block.disk import Disk
from cowhand.block.graph import graph
from cowhand.block.node.node import READ, WRITE_REQUEST, BlockNode, Run
from cowhand.block.node.options import CACHE_MODES
from cowhand.block.protocols.file import data as file_data
from cowhand.block.protocols.file.device import HostDeviceNode
from cowhand.block.protocols.file.node import FileNode, FileOptions
from cowhand.core import syscalls
from cowhand.core.errors import (
    AccessDenied,
    CowhandError,
    ImageExists,
    ImageNotFound,
    InvalidArgument,
    IOFailed,
    NoSpace,
    NotSupported,
    Poisoned,
)
from cowhand.core.extents import DATA, MAX_ROWS, ZERO
from cowhand.testing.nodes import NodeContract
from tests.block.disks import submit
from tests.tools.patience import PATIENCE
from tests.tools.programs import find, run
from tests.tools.qemu import qemu_io, qemu_map, require_qemu

needs_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root (loop devices, mounts)")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


def open_file(path: Path | str, **options: Any) -> FileNode:
    return FileNode.open(None, FileOptions(filename=str(path), **options), {})


@contextmanager
def loop_device(folder: Path, sector: int, size: int) -> Iterator[str]:
    """Attach a file of *size* bytes to a loop device with the given sectors."""
    if find("losetup") is None:
        pytest.skip("needs losetup")
    backing = folder / "loop.img"
    with open(backing, "wb") as file:
        file.truncate(size)
    made = run("losetup", "--find", "--show", "--sector-size", str(sector), str(backing), check=False)
    if made.status != 0:
        pytest.skip(f"no loop devices here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    place = folder / "mounted"
    place.mkdir()
    done = run("mount", *arguments, str(place), check=False)
    if done.status != 0:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield place
    finally:
        run("umount", str(place))


class Medium(NamedTuple):
    """Where a node's bytes lie: its path, driver, and the sectors below."""

    path: str
    kind: type[FileNode]
    sector: int


class MediumContract(NodeContract):
    """The contract of nodes on one medium; ``direct`` goes around the page cache."""

    direct = False
    sector = 512
    medium: Medium

    def place(self, folder: Path) -> Iterator[Medium]:
        yield Medium(str(folder / "image"), FileNode, self.sector)

    @pytest.fixture(autouse=True)
    def _medium(self, tmp_path: Path) -> Iterator[None]:
        for medium in self.place(tmp_path):
            self.medium = medium
            yield

    def make_node(self, folder: Path, content: bytes, writable: bool = True) -> BlockNode:
        with open(self.medium.path, "r+b" if self.medium.kind is HostDeviceNode else "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        options = FileOptions(filename=self.medium.path, cache_direct=self.direct, read_only=not writable)
        return self.medium.kind.open(None, options, {})

    def raw_content(self, folder: Path, node: BlockNode) -> bytes:
        with open(self.medium.path, "rb") as file:
            return file.read()


class TestBufferedFile(MediumContract):
    """A file through the page cache."""


class DirectContract(MediumContract):
    direct = True

    def test_alignment_is_that_of_the_sectors(self, node: BlockNode) -> None:
        assert node.limits.request_alignment == self.medium.sector

    def test_memory_of_any_alignment_is_read_and_written(self, disk: Disk) -> None:
        raw = bytearray(3 * 65536 + 1)
        for shift in (0, 1, 8, 511):
            view = memoryview(raw)[shift : shift + 65536]
            view[:] = os.urandom(65536)
            disk.write(131072, view)
            back = memoryview(raw)[65536 + shift : 2 * 65536 + shift]
            disk.read_into(131072, back)
            assert back == view

    def test_many_odd_buffers_make_one_aligned_write(self, node: BlockNode) -> None:
        pieces = [bytes([index % 256]) * (index * 7 % 99) for index in range(3000)]
        joined = b"".join(pieces)
        pieces.append(bytes(-len(joined) % 4096))
        node.write(4096, pieces, True)
        found = bytearray(len(joined))
        with Disk(node) as disk:
            disk.read_into(4096, found)
        assert found == joined


@linux
class TestDirectFile(DirectContract):
    """A file around the page cache, on whatever the temporary folder lies on."""

    def place(self, folder: Path) -> Iterator[Medium]:
        probe = folder / "probe"
        probe.write_bytes(bytes(4096))
        try:
            node = open_file(probe, cache_direct=True)
        except CowhandError as error:
            pytest.skip(f"no direct I/O here: {error}")
        sector = node.limits.request_alignment
        node.close()
        yield Medium(str(folder / "image"), FileNode, sector)


@linux
@needs_root
@pytest.mark.root
class TestDirectFileOnLargeSectors(DirectContract):
    """A file on an ext4 file system on 4096-byte sectors."""

    sector = 4096

    def place(self, folder: Path) -> Iterator[Medium]:
        if find("mkfs.ext4") is None:
            pytest.skip("needs mkfs.ext4")
        with loop_device(folder, 4096, 16 << 20) as device:
            run("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", device)
            with mounted(folder, device) as place:
                yield Medium(str(place / "image"), FileNode, 4096)


class DeviceContract(DirectContract):
    """A whole device; it is exactly as long as the content."""

    def place(self, folder: Path) -> Iterator[Medium]:
        with loop_device(folder, self.sector, self.size) as device:
            yield Medium(device, HostDeviceNode, self.sector)

    def test_alignment_is_that_of_the_sectors(self, node: BlockNode) -> None:
        assert node.limits.request_alignment == (self.sector if self.direct else 1)
        assert node.limits.zero_alignment == node.limits.discard_alignment == self.sector

    def test_native_zeroing_needs_no_fallback(self, disk: Disk, model: Any) -> None:
        # Only a device that unmaps is sure not to write: a loop device punches its file.
        disk.write_zeroes(0, 131072, unmap=True, fallback=False)
        model.write_zeroes(0, 131072)
        model.compare(disk.read(0, self.size))
        with pytest.raises(NotSupported):
            disk.write_zeroes(0, 131072, fallback=False)

    def test_a_device_keeps_its_size(self, disk: Disk) -> None:
        for size in (self.size * 2, self.size // 2):
            with pytest.raises(CowhandError, match="device"):
                disk.root.resize(size, shrink=True)
        assert disk.root.size == self.size

    def test_a_device_set_read_only_is_not_opened_for_writing(self) -> None:
        run("blockdev", "--setro", self.medium.path)
        try:
            with pytest.raises(AccessDenied):
                HostDeviceNode.open(None, FileOptions(filename=self.medium.path), {})
            fallen = HostDeviceNode.open(None, FileOptions(filename=self.medium.path, auto_read_only=True), {})
            assert not fallen.writable
            fallen.close()
        finally:
            run("blockdev", "--setrw", self.medium.path)


@linux
@needs_root
@pytest.mark.root
class TestBufferedDevice(DeviceContract):
    direct = False


@linux
@needs_root
@pytest.mark.root
class TestBufferedDeviceWithLargeSectors(DeviceContract):
    direct = False
    sector = 4096


@linux
@needs_root
@pytest.mark.root
class TestDirectDevice(DeviceContract):
    pass


@linux
@needs_root
@pytest.mark.root
class TestDirectDeviceWithLargeSectors(DeviceContract):
    sector = 4096


# -- opening


def test_what_is_not_there_is_named_as_qemu_names_it(image_dir: Path) -> None:
    with pytest.raises(ImageNotFound) as caught:
        open_file(image_dir / "missing")
    assert caught.value.qemu() == f"Could not open '{image_dir}/missing': No such file or directory"
    assert caught.value.errno == errno.ENOENT


def test_only_regular_files_are_files(image_dir: Path) -> None:
    os.mkfifo(image_dir / "fifo")
    for path in (image_dir, image_dir / "fifo", Path("/dev/null")):
        for read_only in (True,) if path == image_dir else (False, True):
            with pytest.raises(InvalidArgument) as caught:
                open_file(path, read_only=read_only)
            assert caught.value.qemu() == f"'file' driver requires '{path}' to be a regular file"
    with pytest.raises(CowhandError) as raised:
        open_file(image_dir, read_only=False)
    assert raised.value.qemu() == f"Could not open '{image_dir}': Is a directory"


def test_a_socket_is_no_image(image_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(image_dir / "s"))
        with pytest.raises(InvalidArgument, match="socket") as caught:
            open_file(image_dir / "s")
    assert caught.value.qemu() == f"Could not open '{image_dir}/s': No such device or address"


def test_a_file_is_no_device(image_dir: Path) -> None:
    (image_dir / "f").touch()
    with pytest.raises(InvalidArgument, match="either a character or block device"):
        HostDeviceNode.open(None, FileOptions(filename=str(image_dir / "f")), {})


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_names_that_no_file_has_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        open_file(name)


def test_native_aio_needs_direct_io(image_dir: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"requires cache\.direct=on"):
        open_file(image_dir / "f", aio="native")


def test_file_names_lose_the_protocol() -> None:
    assert FileNode.parse_filename("file:a:b") == {"filename": "a:b"}
    assert HostDeviceNode.parse_filename("host_device:/dev/x") == {"filename": "/dev/x"}


@pytest.mark.skipif(
    os.name == "posix" and os.geteuid() == 0 and find("setpriv") is None, reason="needs setpriv as root"
)
def test_without_permission_reading_is_the_automatic_fallback(image_dir: Path) -> None:
    # In a process of its own, since root may do everything.
    image = image_dir / "f"
    image.write_bytes(b"content")
    image.chmod(0o444)
    for folder in (image_dir, *image_dir.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    program = (
        "import sys; from cowhand.block.protocols.file.node import *; from cowhand.core.errors import *\n"
        "try: FileNode.open(None, FileOptions(filename=sys.argv[1]), {}); print('opened')\n"
        "except AccessDenied as error: print(error.qemu())\n"
        "node = FileNode.open(None, FileOptions(filename=sys.argv[1], auto_read_only=True), {})\n"
        "print(node.writable, node.capabilities.writable)\n"
    )
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, "-c", program, str(image)], capture_output=True, text=True, timeout=PATIENCE
    )
    if "Permission denied" in done.stderr and "cowhand" not in done.stdout:
        pytest.skip("another user cannot run this Python")
    assert done.stdout.splitlines() == [f"Could not open '{image}': Permission denied", "False False"], done.stderr


@pytest.mark.parametrize("mode", sorted(CACHE_MODES))
def test_every_cache_mode_writes_and_reads(image_dir: Path, mode: str) -> None:
    through, direct, no_flush = CACHE_MODES[mode]
    path = image_dir / "f"
    FileNode.create(str(path), 65536)
    try:
        node = open_file(path, cache_direct=direct, cache_no_flush=no_flush)
    except CowhandError as error:
        pytest.skip(f"no direct I/O here: {error}")
    with Disk(node, writable=True, write_through=through) as disk:
        disk.write(1000, b"x" * 5000)
        disk.flush()
        assert disk.read(999, 5002) == b"\0" + b"x" * 5000 + b"\0"
    assert path.read_bytes() == bytes(1000) + b"x" * 5000 + bytes(65536 - 6000)


# -- the end of the file


@pytest.mark.parametrize("direct", [False, True])
def test_beyond_the_end_there_are_zeroes(image_dir: Path, direct: bool) -> None:
    path = image_dir / "f"
    path.write_bytes(b"d" * 1000)
    try:
        node = open_file(path, cache_direct=direct)
    except CowhandError as error:
        pytest.skip(f"no direct I/O here: {error}")
    buffer = bytearray(b"\xff" * 8192)
    node.read_into(0, buffer)
    assert buffer == b"d" * 1000 + bytes(7192)
    node.read_into(4096, buffer)
    assert buffer == bytes(8192)
    assert node.size == 1000
    node.close()


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_zeroes_beyond_the_end_make_the_file_longer(image_dir: Path, unmap: bool, direct: bool) -> None:
    path = image_dir / "f"
    path.write_bytes(b"d" * 4096)
    try:
        node = open_file(path, cache_direct=direct)
    except CowhandError as error:
        pytest.skip(f"no direct I/O here: {error}")
    node.write_zeroes(0, 1 << 20, unmap=unmap)
    assert node.size == 1 << 20
    assert path.read_bytes() == bytes(1 << 20)
    node.close()


def test_the_size_follows_writes_by_way_of_the_descriptor(image_dir: Path) -> None:
    FileNode.create(str(image_dir / "f"), 0)
    node = open_file(image_dir / "f")
    os.pwrite(node.fd, b"x", 99_999)
    assert node.size == 100_000
    node.close()


# -- failures


class Failing:
    """A system call that fails from its *first* call on, or is cut short."""

    def __init__(self, real: Any, *, number: int | None = None, at_most: int | None = None, zero: bool = False) -> None:
        self.real = real
        self.number = number
        self.at_most = at_most
        self.zero = zero
        self.calls = 0

    def __call__(self, fd: int, buffers: Any = (), *rest: Any) -> Any:
        self.calls += 1
        if self.number is not None:
            raise OSError(self.number, os.strerror(self.number))
        if self.zero:
            return 0
        if self.at_most is not None:
            return self.real(fd, (memoryview(buffers[0])[: self.at_most],), *rest)
        return self.real(fd, buffers, *rest)


@pytest.fixture
def node(image_dir: Path) -> Iterator[FileNode]:
    FileNode.create(str(image_dir / "f"), 1 << 20)
    node = open_file(image_dir / "f")
    yield node
    node.close()


def test_short_reads_and_writes_are_continued(node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(10_000)
    monkeypatch.setattr(file_data, "_pwritev", Failing(os.pwritev, at_most=1000))
    node.write(5000, (data[:7], b"", data[7:3000], data[3000:]))
    node.submit([(WRITE_REQUEST, 20_000, data[:5000]), (WRITE_REQUEST, 25_000, data[5000:])])
    monkeypatch.setattr(file_data, "_preadv", Failing(os.preadv, at_most=999))
    for offset in (5000, 20_000):
        found = bytearray(10_000)
        node.read_into(offset, found)
        assert found == data
        halves = bytearray(4000), bytearray(6000)
        node.submit([(READ, offset, halves[0]), (READ, offset + 4000, halves[1])])
        assert halves[0] + halves[1] == data


def test_a_read_that_makes_no_progress_is_an_error(node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_data, "_preadv", Failing(os.preadv, zero=True))
    with pytest.raises(IOFailed) as caught:
        node.read_into(4096, bytearray(512))
    assert caught.value.offset == 4096


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, IOFailed), (errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EFBIG, IOFailed)],
)
def test_errors_of_the_system_tell_file_and_offset(
    node: FileNode, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[CowhandError]
) -> None:
    monkeypatch.setattr(file_data, "_pwritev", Failing(os.pwritev, number=number))
    for call in (
        lambda: node.write(8192, (b"x",)),
        lambda: node.write(8192, (b"x",), True),
        lambda: submit(node, [(WRITE_REQUEST, 8192, b"x")]),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert (caught.value.errno, caught.value.path, caught.value.offset) == (number, node.path, 8192)
        assert caught.value.qemu() == os.strerror(number)
        node.failure = None


def test_a_failing_request_of_a_batch_leaves_the_others_alone(node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node.write(0, (b"a" * 512, b"b" * 512))
    first, second = bytearray(512), bytearray(512)
    real = os.preadv

    def fail_at_zero(fd: int, buffers: Any, offset: int) -> int:
        if offset == 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(file_data, "_preadv", fail_at_zero)
    with pytest.raises(IOFailed) as caught:
        submit(node, [(READ, 0, first), (READ, 512, second), (WRITE_REQUEST, 2048, b"written")])
    assert caught.value.offset == 0
    assert second == b"b" * 512
    assert os.pread(node.fd, 7, 2048) == b"written"


def test_after_a_failed_flush_nothing_is_written(node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node.write(0, (b"before",))
    monkeypatch.setattr(file_data, "_datasync", Failing(None, number=errno.EIO))
    with pytest.raises(IOFailed):
        node.flush()
    monkeypatch.undo()
    for call in (
        lambda: node.write(0, (b"after!",)),
        lambda: node.write(0, (b"after!",), True),
        lambda: submit(node, [(WRITE_REQUEST, 0, b"after!")]),
        lambda: node.write_zeroes(0, 512),
        lambda: node.discard(0, 512),
        lambda: node.resize(0, shrink=True),
        node.flush,
    ):
        with pytest.raises(Poisoned) as caught:
            call()
        assert caught.value.errno == errno.EIO
    assert node.host_file(Run(512, DATA, None, 0)) is None
    found = bytearray(6)
    node.read_into(0, found)
    assert found == b"before"
    again = open_file(node.path)
    again.write(0, (b"after!",))
    again.flush()
    again.close()


@linux
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_flush_that_fails_inside_another_call_is_not_forgotten(
    node: FileNode, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The system tells of what it could not store once: the next flush succeeds.
    def unstable(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(number, os.strerror(number))
        return os.pwritev(fd, buffers, offset)

    def full(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    changes = {
        "stable": lambda made: made.write(0, (b"x",), True),
        "resize": lambda made: made.resize(made.size + 4096, preallocation="full"),
        "reopen": lambda made: made.set_writable(False),
    }
    for name, change in changes.items():
        made = open_file(node.path)
        with monkeypatch.context() as patch:
            patch.setattr(file_data, "_datasync", Failing(None, number=number))
            patch.setattr("os.fsync", Failing(None, number=number))
            patch.setattr(file_data, "_pwritev", unstable)
            with pytest.raises(CowhandError):
                change(made)
        with pytest.raises(Poisoned):
            made.flush()
        assert name and made.writable
        made.close()
    with monkeypatch.context() as patch:
        patch.setattr(file_data, "_pwritev", full)
        with pytest.raises(NoSpace):
            node.write(0, (b"x",), True)
    node.write(0, (b"y",), True)  # that there was no space is an error of the one request


def test_flushes_are_ignored_where_that_was_asked(image_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FileNode.create(str(image_dir / "f"), 4096)
    node = open_file(image_dir / "f", cache_no_flush=True)
    monkeypatch.setattr(file_data, "_datasync", Failing(None, number=errno.EIO))
    node.write(0, (b"x",), True)
    node.flush()  # would raise
    node.close()
    assert (image_dir / "f").read_bytes() == b"x" + bytes(4095)


@pytest.mark.skipif(not hasattr(os, "RWF_DSYNC"), reason="needs RWF_DSYNC")
def test_fua_writes_where_the_system_lacks_it_are_flushed(node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    real, flushes = os.pwritev, []

    def without_flags(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(fd, buffers, offset)

    monkeypatch.setattr(file_data, "_pwritev", without_flags)
    monkeypatch.setattr(file_data, "_datasync", flushes.append)
    node.write(0, (b"x",), True)
    node.write(1, (b"y",), True)
    assert flushes == [node.fd, node.fd]
    assert os.pread(node.fd, 2, 0) == b"xy"


@linux
@needs_root
@pytest.mark.root
def test_a_full_file_system_is_an_error_of_the_one_request(tmp_path: Path) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=1m", "tmpfs") as place:
        path = place / "f"
        FileNode.create(str(path), 8 << 20)
        node = open_file(path)
        node.write(0, (b"k" * 4096,))
        with pytest.raises(NoSpace) as caught:
            node.write(65536, (b"x" * (2 << 20),))
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(NoSpace):
            node.resize(16 << 20, preallocation="falloc")
        assert node.size == 8 << 20, "the old length is restored"
        found = bytearray(4096)
        node.read_into(0, found)
        assert found == b"k" * 4096
        node.discard(65536, 4 << 20)
        node.write(65536, (b"x" * 65536,))
        node.flush()
        node.close()
        with pytest.raises(NoSpace):
            FileNode.create(str(place / "new"), 4 << 20, preallocation="full")
        assert not (place / "new").exists()


# -- without the system's help


def test_zeroes_are_written_where_the_file_system_cannot(node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(syscalls, "punch_hole", refuse)
    monkeypatch.setattr(syscalls, "zero_range", refuse)
    node.write(0, (b"x" * (1 << 20),))
    with pytest.raises(NotSupported):
        node.write_zeroes(0, 4096, fallback=False)
    node.write_zeroes(100, 700_000, unmap=True)
    node.discard(0, 100)
    assert os.pread(node.fd, 1 << 20, 0) == b"x" * 100 + bytes(700_000) + b"x" * ((1 << 20) - 700_100)


def test_positions_are_locked_where_there_are_no_positioned_calls(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Windows runs on, tried on this system's files.
    monkeypatch.setattr(file_data, "_preadv", syscalls._read_at)
    monkeypatch.setattr(file_data, "_pwritev", syscalls._write_at)
    node.write(10, (b"one", b"two"))
    first, second = bytearray(3), bytearray(5)
    node.submit([(READ, 10, first), (READ, 13, second)])
    assert (first, second) == (b"one", b"two\0\0")


#: Run in a process that has lost what only Linux has.
ELSEWHERE = """
import os, sys
for name in ("preadv", "pwritev", "fdatasync", "O_DIRECT", "O_NONBLOCK", "O_CLOEXEC", "SEEK_DATA", "SEEK_HOLE", "RWF_DSYNC",
             "uname", "copy_file_range", "set_blocking", "posix_fallocate"):
    if hasattr(os, name):
        delattr(os, name)
sys.platform = "elsewhere"
sys.modules["fcntl"] = None
from cowhand.block.disk import Disk
from cowhand.block.protocols.file.node import FileNode, FileOptions
import cowhand.block.protocols.file.device, cowhand.block.filters.blkdebug.node, cowhand.block.protocols.null
path = sys.argv[1]
FileNode.create(path, 65536, preallocation="falloc")
node = FileNode.open(None, FileOptions(filename=path), {})
with Disk(node, writable=True) as disk:
    disk.write(1000, b"one", b"two", fua=True)
    disk.write_zeroes(1001, 2, unmap=True)
    disk.resize(100_000)
    disk.discard(0, 512)
    disk.flush()
    print(disk.read(1000, 7), disk.size, sum(row.length for batch in disk.extents() for row in batch))
"""


def test_without_linux_everything_works_by_plain_means(image_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(image_dir / "f")], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "b'o\\x00\\x00two\\x00' 100000 100000"


# -- space


@linux
def test_discarding_gives_space_back(node: FileNode) -> None:
    node.write(0, (os.urandom(1 << 20),))
    node.flush()
    full = node.allocated_size()
    node.discard(65536, 524_288)
    assert full is not None
    assert node.allocated_size() == full - 524_288
    ignoring = open_file(node.path, discard="ignore")
    ignoring.discard(0, 1 << 20)
    ignoring.write_zeroes(0, 65536, unmap=True)
    assert ignoring.allocated_size() == full - 524_288
    ignoring.close()


@linux
@require_qemu
@pytest.mark.interop
def test_holes_are_told_as_qemu_tells_them(image_dir: Path) -> None:
    path = image_dir / "f"
    FileNode.create(str(path), 1 << 20)
    node = open_file(path)
    for offset, length in ((0, 4096), (65536, 100_000), (500_001, 1), (1_048_575, 1)):
        node.write(offset, (os.urandom(length),))
    node.write_zeroes(300_000, 50_000)
    node.flush()
    rows = [
        {
            "start": row.start,
            "length": row.length,
            "data": bool(row.flags & DATA),
            "zero": bool(row.flags & ZERO),
            "offset": row.host,
        }
        for row in node.map_batch(0, node.size)
    ]
    told = [{key: row[key] for key in rows[0]} for row in qemu_map(path, "raw")]
    assert rows == told
    assert len(rows) >= 6
    node.close()


def test_a_map_has_a_limit_of_rows(node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every other byte a hole, as no file system has it: the batch ends in time, and the next one goes on where it ended.
    def seek(fd: int, offset: int, whence: int) -> int:
        return offset + (offset % 2 == (0 if whence == os.SEEK_DATA else 1))

    monkeypatch.setattr(os, "lseek", seek)
    batch = node.map_batch(0, 1 << 20)
    assert len(batch) == MAX_ROWS
    following = node.map_batch(batch.end, (1 << 20) - batch.end)
    assert following.begin == batch.end
    assert (following.flags[0] & DATA) != (batch.flags[-1] & DATA)


def test_a_file_system_without_holes_has_data_only(node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "lseek", refuse)
    (row,) = node.map_batch(0, 1 << 20)
    assert (row.length, row.flags & (DATA | ZERO)) == (1 << 20, DATA)


@linux
@pytest.mark.parametrize(("preallocation", "allocated"), [("off", False), ("falloc", True), ("full", True)])
def test_growth_is_preallocated_as_asked(node: FileNode, preallocation: str, allocated: bool) -> None:
    node.resize(4 << 20, preallocation=preallocation)
    assert node.size == 4 << 20
    assert ((node.allocated_size() or 0) >= 3 << 20) is allocated
    found = bytearray(3 << 20)
    node.read_into(1 << 20, found)
    assert not any(found)


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
def test_space_that_is_not_there_is_not_asked_for(
    node: FileNode, preallocation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("this would fill the file system up")

    monkeypatch.setattr("cowhand.core.syscalls.allocate", refuse)
    monkeypatch.setattr("cowhand.block.protocols.file.space.write_zero_bytes", refuse)
    found, before = os.fstatvfs(node.fd), node.size
    with pytest.raises(NoSpace) as caught:
        node.resize(before + (found.f_bfree + 1) * found.f_frsize, preallocation=preallocation)
    assert caught.value.qemu() == "Could not preallocate new data: No space left on device"
    assert os.fstat(node.fd).st_size == node.size == before


def test_what_cannot_be_preallocated_is_refused_in_qemus_words(node: FileNode) -> None:
    with pytest.raises(NotSupported) as unknown:
        node.resize(2 << 20, preallocation="metadata")
    assert unknown.value.qemu() == "Unsupported preallocation mode: metadata"
    with pytest.raises(InvalidArgument) as shrinking:
        node.resize(4096, preallocation="full", shrink=True)
    assert shrinking.value.qemu() == "Cannot use preallocation for shrinking files"
    assert node.size == 1 << 20


# -- creating


def test_creation_keeps_an_existing_file_where_asked(image_dir: Path) -> None:
    path = image_dir / "f"
    path.write_bytes(b"precious")
    with pytest.raises(ImageExists):
        FileNode.create(str(path), 4096, exclusive=True)
    assert path.read_bytes() == b"precious"


def test_creation_empties_an_existing_file_in_place(image_dir: Path) -> None:
    path = image_dir / "f"
    path.write_bytes(b"old" * 10_000)
    os.link(path, image_dir / "other-name")
    FileNode.create(f"file:{path}", 5000)
    assert (image_dir / "other-name").read_bytes() == bytes(5000)


def test_creation_in_a_missing_folder_is_named_as_qemu_names_it(image_dir: Path) -> None:
    with pytest.raises(ImageNotFound) as caught:
        FileNode.create(str(image_dir / "no" / "f"), 0)
    assert caught.value.qemu() == f"Could not create '{image_dir}/no/f': No such file or directory"


# -- the fast lane


def test_the_descriptor_is_lent_for_whole_blocks(node: FileNode) -> None:
    assert node.host_file(Run(1000, DATA, None, 77)) == (node.fd, 77)


@linux
def test_direct_descriptors_are_lent_for_aligned_runs_only(image_dir: Path) -> None:
    FileNode.create(str(image_dir / "f"), 1 << 20)
    try:
        node = open_file(image_dir / "f", cache_direct=True)
    except CowhandError as error:
        pytest.skip(f"no direct I/O here: {error}")
    block = node.limits.request_alignment
    assert node.host_file(Run(block, DATA, None, 4 * block)) == (node.fd, 4 * block)
    assert node.host_file(Run(block - 1, DATA, None, 0)) is None
    assert node.host_file(Run(block, DATA, None, 1)) is None
    node.close()


# -- reopening


def test_the_access_mode_changes_behind_the_same_descriptor(image_dir: Path) -> None:
    FileNode.create(str(image_dir / "f"), 4096)
    node = open_file(image_dir / "f", read_only=True)
    number = node.fd
    with pytest.raises(CowhandError):
        node.write(0, (b"x",))
    node.set_writable(True)
    node.write(0, (b"x",))
    assert (node.fd, node.writable, node.capabilities.writable) == (number, True, True)
    node.set_writable(False)
    with pytest.raises(CowhandError):
        node.write(0, (b"y",))
    node.close()


def test_a_replaced_file_is_not_reopened(image_dir: Path) -> None:
    FileNode.create(str(image_dir / "f"), 4096)
    node = open_file(image_dir / "f", read_only=True)
    (image_dir / "new").write_bytes(b"other")
    os.replace(image_dir / "new", image_dir / "f")
    with pytest.raises(IOFailed, match="replaced"):
        node.set_writable(True)
    assert not node.writable
    assert node.size == 4096
    node.close()


# -- with others


@require_qemu
@pytest.mark.interop
def test_qemu_reads_what_was_written_and_the_other_way_round(image_dir: Path) -> None:
    path = image_dir / "f"
    FileNode.create(str(path), 1 << 20)
    with Disk(open_file(path), writable=True) as disk:
        disk.write(3000, b"\xa5" * 10_000)
        disk.write_zeroes(5000, 100)
    qemu_io(path, "read -P 0xa5 3000 2000", "read -P 0 5000 100", "write -P 0x5a 500k 64k", format="raw")
    with Disk(open_file(path, read_only=True)) as disk:
        assert disk.read(500 << 10, 65536) == b"\x5a" * 65536


def test_closing_gives_the_descriptor_back(image_dir: Path) -> None:
    FileNode.create(str(image_dir / "f"), 4096)
    node = open_file(image_dir / "f")
    number = node.fd
    graph.close_node(node)
    with pytest.raises(OSError):
        os.fstat(number)


def test_an_interrupted_preallocation_leaves_the_old_length(node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(fd: int, offset: int, length: int) -> None:
        raise KeyboardInterrupt

    before = node.size
    monkeypatch.setattr("cowhand.block.protocols.file.space.write_zero_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        node.resize(before + (1 << 20), preallocation="full")
    assert node.size == before
