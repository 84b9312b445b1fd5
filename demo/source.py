"""Real input: a disk image made from real files, with a file inside whose every block says what it is.

With e2fsprogs the disk holds an ext4 file system; without it, a tar archive. No privileges and no mounts are needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tarfile
from pathlib import Path

BLOCK = 4096
#: The file that the "guest" changes: so many blocks.
JOURNAL_BLOCKS = 4096
JOURNAL_NAME = "var/journal.bin"
DISK_SIZE = 192 << 20
#: Real files are taken up to this many bytes.
FILES_LIMIT = 120 << 20
_MARK = b"cowhand demo block "


def journal_block(number: int, generation: int) -> bytes:
    """Return block *number* of the journal: a line that names it, repeated."""
    line = _MARK + b"%06d generation %03d\n" % (number, generation)
    return (line * (BLOCK // len(line) + 1))[:BLOCK]


def find_tool(name: str) -> str | None:
    """Return the path of a program; those of administrators are looked for too."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")))


def collect(tree: Path) -> tuple[int, int]:
    """Copy real files (Python's library, this project) into *tree* and add the journal; return their number and bytes."""
    project = Path(__file__).resolve().parents[1]
    count = total = 0
    places = (
        (Path(sysconfig.get_path("stdlib")), "usr/lib/python"),
        (project / "src", "srv/src"),
        (project / "docs", "srv/docs"),
    )
    for origin, name in places:
        for folder, folders, names in os.walk(origin):
            folders[:] = sorted(part for part in folders if part not in ("site-packages", "test", "__pycache__"))
            for file in sorted(names):
                path = Path(folder, file)
                if path.is_symlink() or not path.is_file():
                    continue
                size = path.stat().st_size
                if total + size > FILES_LIMIT:
                    continue
                target = tree / name / path.relative_to(origin)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                count, total = count + 1, total + size
    journal = tree / JOURNAL_NAME
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.write_bytes(b"".join(journal_block(number, 0) for number in range(JOURNAL_BLOCKS)))
    return count + 1, total + JOURNAL_BLOCKS * BLOCK


def make_disk(tree: Path, disk: Path) -> str:
    """Make the raw *disk* from *tree*; return what it holds, in words."""
    with open(disk, "wb") as file:
        file.truncate(DISK_SIZE)
    mkfs = find_tool("mkfs.ext4")
    if mkfs is not None:
        # Blocks of 4 KiB, so that no block of the journal is torn between two places.
        command = [
            mkfs,
            "-q",
            "-F",
            "-b",
            str(BLOCK),
            "-L",
            "cowhand-demo",
            "-E",
            "root_owner=0:0",
            "-d",
            str(tree),
            str(disk),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return "an ext4 file system"
        print(f"mkfs.ext4 failed ({done.stderr.strip()}); a tar archive takes its place")
        with open(disk, "wb") as file:
            file.truncate(DISK_SIZE)
    with open(disk, "r+b") as file, tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(tree, arcname=".")
    return "a tar archive (mkfs.ext4 is not installed)"


def find_journal(disk: Path) -> dict[int, int]:
    """Return {block number: offset in the raw *disk*} of the journal's blocks; in a tar archive they lie on sectors."""
    found: dict[int, int] = {}
    with open(disk, "rb") as file:
        position, tail = 0, b""
        while chunk := file.read(16 << 20):
            data = tail + chunk
            base = position - len(tail)
            at = data.find(_MARK)
            while at >= 0 and at + BLOCK <= len(data):
                number = int(data[at + len(_MARK) : at + len(_MARK) + 6])
                if data[at : at + BLOCK] == journal_block(number, 0):
                    found[number] = base + at
                    at += BLOCK - 1
                at = data.find(_MARK, at + 1)
            position += len(chunk)
            tail = data[-BLOCK:]
    return found
