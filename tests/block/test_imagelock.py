"""Image locks: the bytes on the file, users of one process, and QEMU's tools on the other side, in both directions."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cowhand.block.locking import image_lock
from cowhand.block.node.node import ALL_PERMISSIONS, CONSISTENT_READ, RESIZE, WRITE, WRITE_UNCHANGED
from cowhand.block.protocols.file.node import FileNode, FileOptions
from cowhand.core.errors import ImageInUse, NotSupported
from tests.tools.patience import PATIENCE
from tests.tools.programs import find
from tests.tools.qemu import qemu_img, require_qemu

pytestmark = pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="needs open-file-description locks")

#: What users ask of a file, as (permissions used, permissions left to others).
READER = (CONSISTENT_READ, ALL_PERMISSIONS)
FORMAT_READER = (CONSISTENT_READ, ALL_PERMISSIONS & ~(WRITE | RESIZE))
WRITER = (CONSISTENT_READ | WRITE, ALL_PERMISSIONS)
FORMAT_WRITER = (CONSISTENT_READ | WRITE | RESIZE, ALL_PERMISSIONS & ~(WRITE | RESIZE))


def open_file(path: Path, **options: Any) -> FileNode:
    return FileNode.open(None, FileOptions(filename=str(path), **options), {})


@pytest.fixture
def image(image_dir: Path) -> Path:
    FileNode.create(str(image_dir / "image"), 1 << 20)
    return image_dir / "image"


@pytest.fixture
def node(image: Path) -> Iterator[FileNode]:
    node = open_file(image)
    yield node
    node.close()


def locked_bytes(path: Path, pid: int | str = "self") -> set[int]:
    """Return the bytes of *path* that a process holds open-file-description locks on, as the kernel tells."""
    found: set[int] = set()
    inode = os.stat(path).st_ino
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            if os.stat(f"/proc/{pid}/fd/{name}").st_ino != inode:
                continue
            lines = Path(f"/proc/{pid}/fdinfo/{name}").read_text().splitlines()
        except OSError:
            continue
        for words in (line.split() for line in lines if line.startswith("lock:")):
            assert words[2:5] == ["OFDLCK", "ADVISORY", "READ"], words
            found.update(range(int(words[7]), int(words[8]) + 1))
    return found


@contextmanager
def holding(path: Path, wanted: set[int], *command: str) -> Iterator[subprocess.Popen[str]]:
    """Run *command*, which holds *path* until its input ends, and wait until it has locked the *wanted* bytes."""
    program = find(command[0]) or command[0]
    process = subprocess.Popen(
        [program, *command[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while locked_bytes(path, process.pid) != wanted:
            if process.poll() is not None or time.monotonic() > deadline:
                output = process.communicate(timeout=PATIENCE)[0] if process.poll() is not None else "(it still runs)"
                pytest.fail(f"{command} holds {locked_bytes(path, process.pid)}, not {wanted}: {output}")
            time.sleep(0.01)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)


def refused(image: Path, name: str, shared: bool) -> str:
    kind = "shared " if shared else ""
    return f'Failed to get {kind}"{name}" lock\nIs another process using the image [{image}]?'


# -- the bytes


def test_each_permission_and_each_refusal_is_one_byte(node: FileNode, image: Path) -> None:
    for perm in range(ALL_PERMISSIONS + 1):
        for shared in range(ALL_PERMISSIONS + 1):
            node.update_permissions(perm, shared)
            used = {100 + bit for bit in range(4) if perm >> bit & 1}
            unshared = {200 + bit for bit in range(4) if not shared >> bit & 1}
            assert locked_bytes(image) == used | unshared


def test_a_node_that_nobody_uses_locks_nothing(node: FileNode, image: Path) -> None:
    assert locked_bytes(image) == set()
    node.update_permissions(*FORMAT_WRITER)
    node.update_permissions(0, ALL_PERMISSIONS)
    assert locked_bytes(image) == set()


def test_users_of_one_process_share_one_descriptor_and_keep_what_the_other_needs(image: Path) -> None:
    first, second = open_file(image), open_file(image)
    descriptors = len(os.listdir("/proc/self/fd"))
    first.update_permissions(*FORMAT_READER)
    second.update_permissions(*READER)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    first.close()
    assert locked_bytes(image) == {100}
    second.close()
    assert locked_bytes(image) == set()


def test_locks_outlive_the_data_descriptor(image: Path) -> None:
    node = open_file(image, read_only=True)
    node.update_permissions(*FORMAT_READER)
    node.set_writable(True)
    assert locked_bytes(image) == {100, 201, 203}
    os.close(os.open(image, os.O_RDWR))  # closing another descriptor of the file would drop POSIX locks
    assert locked_bytes(image) == {100, 201, 203}
    node.close()


def test_force_share_tells_what_is_used_and_refuses_nothing(image: Path) -> None:
    node = open_file(image, read_only=True, force_share=True)
    node.update_permissions(*FORMAT_READER)
    assert locked_bytes(image) == {100}
    node.close()


def test_locking_off_locks_nothing(image: Path) -> None:
    node = open_file(image, locking="off")
    node.update_permissions(*FORMAT_WRITER)
    assert locked_bytes(image) == set()
    node.close()


# -- inside one process


def test_users_of_one_process_exclude_each_other_too(node: FileNode, image: Path) -> None:
    node.update_permissions(*FORMAT_WRITER)
    link = image.with_name("link")
    link.symlink_to(image)
    other = open_file(link)
    with pytest.raises(ImageInUse) as caught:
        other.update_permissions(*READER[:1], ALL_PERMISSIONS & ~WRITE)
    assert caught.value.qemu() == refused(link, "write", shared=True)
    assert "this process" in str(caught.value)
    assert node.name in str(caught.value)
    with pytest.raises(ImageInUse) as caught:
        other.update_permissions(*WRITER)
    assert caught.value.qemu() == refused(link, "write", shared=False)
    assert locked_bytes(image) == {100, 101, 103, 201, 203}, "a refused user leaves no lock behind"
    other.update_permissions(CONSISTENT_READ, ALL_PERMISSIONS)
    other.close()


def test_a_refused_change_leaves_everything_as_it_was(node: FileNode, image: Path) -> None:
    other = open_file(image)
    other.update_permissions(*READER)
    node.update_permissions(CONSISTENT_READ | WRITE_UNCHANGED, ALL_PERMISSIONS & ~RESIZE)
    before = locked_bytes(image)
    with pytest.raises(ImageInUse):
        other.update_permissions(WRITE | RESIZE, ALL_PERMISSIONS & ~WRITE)
    assert locked_bytes(image) == before
    node.update_permissions(0, ALL_PERMISSIONS)
    other.update_permissions(WRITE | RESIZE, ALL_PERMISSIONS & ~WRITE)
    assert locked_bytes(image) == {101, 103, 201}
    other.close()


# -- another process of ours

HOLD = """
import sys
from cowhand.block.protocols.file.node import FileNode, FileOptions
node = FileNode.open(None, FileOptions(filename=sys.argv[1]), {})
node.update_permissions(int(sys.argv[2]), int(sys.argv[3]))
sys.stdin.read()
"""


def ours(image: Path, perm: int, shared: int) -> tuple[str, ...]:
    return sys.executable, "-c", HOLD, str(image), str(perm), str(shared)


def test_the_holder_is_named_and_its_death_frees_the_image(node: FileNode, image: Path) -> None:
    with holding(image, {100, 101, 103, 201, 203}, *ours(image, *FORMAT_WRITER)) as process:
        with pytest.raises(ImageInUse) as caught:
            node.update_permissions(*FORMAT_READER)
        comm = Path(f"/proc/{process.pid}/comm").read_text().strip()
        text = str(caught.value)
        assert f"{comm} (process {process.pid})" in text
        assert "has it open for writing" in text
        assert "-U" in text, "a reader is told how to read all the same"
        assert caught.value.errno == errno.EAGAIN
        process.kill()
        process.wait(timeout=PATIENCE)
        node.update_permissions(*FORMAT_WRITER)
        assert locked_bytes(image) == {100, 101, 103, 201, 203}


def test_creation_leaves_an_image_in_use_alone(image: Path) -> None:
    image.write_bytes(b"content" * 1000)
    with holding(image, {100, 201, 203}, *ours(image, *FORMAT_READER)):
        with pytest.raises(ImageInUse) as caught:
            FileNode.create(str(image), 4096)
        assert caught.value.qemu() == refused(image, "write", shared=False)
        assert image.read_bytes() == b"content" * 1000
        FileNode.create(str(image), 4096, locking=False)
    assert image.read_bytes() == bytes(4096)


def test_a_lock_of_the_whole_file_by_somebody_else_is_an_image_in_use(node: FileNode, image: Path) -> None:
    with open(image, "r+b") as stranger:
        fcntl.fcntl(stranger, fcntl.F_OFD_SETLK, image_lock._FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        with pytest.raises(ImageInUse) as caught:
            node.update_permissions(*READER)
        assert caught.value.qemu() == "Failed to lock byte 100"
    node.update_permissions(*READER)


# -- where there are no locks


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, *rest: Any) -> Any:
        if command == fcntl.F_OFD_SETLK:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return real(fd, command, *rest)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_file_is_read_but_not_written(image: Path) -> None:
    reader = open_file(image, read_only=True)
    reader.update_permissions(*FORMAT_READER)
    reader.update_permissions(*READER)
    reader.close()
    for options in ({}, {"read_only": True, "locking": "on"}):
        node = open_file(image, **options)
        with pytest.raises(NotSupported) as caught:
            node.update_permissions(*FORMAT_READER)
        assert caught.value.qemu() == "Failed to lock byte 100: No locks available"
        node.close()
    trusting = open_file(image, locking="off")
    trusting.update_permissions(*FORMAT_WRITER)
    trusting.close()


# -- QEMU's tools

QEMU_IO = (
    ("raw", (), WRITER, {100, 101}),
    ("raw", ("-r",), READER, {100}),
    ("qcow2", (), FORMAT_WRITER, {100, 101, 103, 201, 203}),
    ("qcow2", ("-r",), FORMAT_READER, {100, 201, 203}),
    ("qcow2", ("-r", "-U"), READER, {100}),
)
USERS = {"reader": READER, "format reader": FORMAT_READER, "writer": WRITER, "format writer": FORMAT_WRITER}


def fits(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return not first[0] & ~second[1] and not second[0] & ~first[1]


@pytest.fixture
def qcow2(image: Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    return image


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(("format", "options", "theirs", "held"), QEMU_IO, ids=lambda value: str(value))
def test_qemu_and_cowhand_exclude_each_other_alike(
    qcow2: Path, format: str, options: tuple[str, ...], theirs: tuple[int, int], held: set[int], user: str
) -> None:
    command = ("qemu-io", *options, "-f", format, str(qcow2))
    mine = USERS[user]
    node = open_file(qcow2)
    try:
        with holding(qcow2, held, *command) as process:
            if fits(mine, theirs):
                node.update_permissions(*mine)
            else:
                with pytest.raises(ImageInUse) as caught:
                    node.update_permissions(*mine)
                assert f"qemu-io (process {process.pid})" in str(caught.value)
        node.update_permissions(*mine)
        done = subprocess.run(
            [find(command[0]) or command[0], *command[1:], "-c", "length"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if fits(mine, theirs):
            assert (done.returncode, done.stderr) == (0, "")
        else:
            # The same event seen from both sides: QEMU's words for its user are those of our error for that user.
            assert done.returncode == 1
            node.update_permissions(0, ALL_PERMISSIONS)
            with holding(qcow2, locks_of(mine), *ours(qcow2, *mine)), pytest.raises(ImageInUse) as caught:
                node.update_permissions(*theirs)
            assert done.stderr == f"qemu-io: can't open device {qcow2}: {caught.value.qemu()}\n"
    finally:
        node.close()


def locks_of(user: tuple[int, int]) -> set[int]:
    perm, shared = user
    return {100 + bit for bit in range(4) if perm >> bit & 1} | {200 + bit for bit in range(4) if not shared >> bit & 1}


@require_qemu
@pytest.mark.interop
def test_qemu_img_refuses_what_cowhand_writes_in_the_words_of_our_error(qcow2: Path) -> None:
    node = open_file(qcow2)
    node.update_permissions(*FORMAT_WRITER)
    done = qemu_img("info", qcow2, check=False)
    assert done.stderr == f"qemu-img: Could not open '{qcow2}': {refused(qcow2, 'write', shared=True)}\n"
    assert qemu_img("info", "-U", qcow2).status == 0
    done = qemu_img("create", "-q", "-f", "raw", qcow2, "1M", check=False)
    assert done.stderr == f"qemu-img: {qcow2}: {refused(qcow2, 'write', shared=False)}\n"
    node.close()
    assert qemu_img("info", qcow2).status == 0


@pytest.mark.skipif(find("qemu-storage-daemon") is None, reason="needs qemu-storage-daemon")
@pytest.mark.interop
def test_the_storage_daemons_image_is_in_use(qcow2: Path, image_dir: Path) -> None:
    command = (
        "qemu-storage-daemon",
        "--blockdev",
        f"driver=qcow2,node-name=disk,file.driver=file,file.filename={qcow2}",
        "--nbd-server",
        f"addr.type=unix,addr.path={image_dir}/socket",
        "--export",
        "type=nbd,id=export,node-name=disk,writable=on",
    )
    with holding(qcow2, {100, 101, 103, 201, 203}, *command) as process:
        node = open_file(qcow2)
        with pytest.raises(ImageInUse, match=rf"\(process {process.pid}\) has it open for writing"):
            node.update_permissions(*FORMAT_READER)
        node.close()
