"""Every verb of the three tools, on a copy of an image each: whatever the image says, a tool ends with an error of its own, never with 70.

The tools run in this process, their output thrown away. What they leave of the copy is looked at: none may make it longer than what is asked for.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from tests.hostile.treatment import Finding

#: Commands; "IMAGE" is a copy of the image.
LOOKING = (
    "cowhand info IMAGE",
    "cowhand info --output json IMAGE",
    "cowhand check IMAGE",
    "cowhand map IMAGE",
    "cowhand measure IMAGE",
    "cowhand measure -l 1 IMAGE",
    "cowhand inspect IMAGE",
    "cowhand inspect --untrusted IMAGE",
    "cowhand du IMAGE",
    "cowhand checksum IMAGE",
    "cowhand compare IMAGE same",
    "cowhand snapshot list IMAGE",
    "cowhand bitmap list IMAGE",
    "cowhand convert -q IMAGE out",
    "cowhand convert -q -l 1 IMAGE out",
    "cowhand convert -q --snapshots -O qcow2 IMAGE out",
    "cowhand convert -q --bitmaps -O qcow2 IMAGE out",
    "cowhand dd if=IMAGE of=out bs=512 count=9 skip=3",
    "cowhand-img info --output=json IMAGE",
    "cowhand-img info -U --backing-chain IMAGE",
    "cowhand-img check IMAGE",
    "cowhand-img map --output=json IMAGE",
    "cowhand-img measure -O qcow2 IMAGE",
    "cowhand-img snapshot -l IMAGE",
    "cowhand-img compare IMAGE same",
    "cowhand-img convert -O raw IMAGE out",
    "cowhand-img convert -l snapshot.id=1 -O raw IMAGE out",
    "cowhand-img dd if=IMAGE of=out bs=512 count=9",
    "cowhand-io -r -c read_0_4k -c read_-v_512_512 -c map -c length -c info IMAGE",
)
CHANGING = (
    "cowhand check -r leaks IMAGE",
    "cowhand check -r all IMAGE",
    "cowhand snapshot create IMAGE new",
    "cowhand snapshot apply IMAGE 1",
    "cowhand snapshot delete IMAGE 1",
    "cowhand resize IMAGE +1M",
    "cowhand resize --shrink IMAGE 4k",
    "cowhand resize --preallocation falloc IMAGE +64k",
    "cowhand compact IMAGE",
    "cowhand bitmap add IMAGE new",
    "cowhand bitmap remove IMAGE b",
    "cowhand bitmap clear IMAGE b",
    "cowhand rebase -u -b same -F raw IMAGE",
    "cowhand commit --force IMAGE",
    "cowhand convert -q -n -f raw -O qcow2 same IMAGE",
    "cowhand-img check -r all IMAGE",
    "cowhand-img snapshot -c new IMAGE",
    "cowhand-img snapshot -a 1 IMAGE",
    "cowhand-img snapshot -d night_1 IMAGE",
    "cowhand-img resize IMAGE +1M",
    "cowhand-img resize --shrink IMAGE 4k",
    "cowhand-img bitmap --add IMAGE new",
    "cowhand-img amend -o compat=0.10 IMAGE",
    "cowhand-img amend -o refcount_bits=64 IMAGE",
    "cowhand-img rebase -u -b same -F raw IMAGE",
    "cowhand-img commit IMAGE",
    "cowhand-io -c write_0_9k -c write_-z_1k_3k -c discard_0_64k -c write_-c_64k_64k -c flush IMAGE",
    "cowhand-io -c truncate_2M -c write_1M_64k IMAGE",
)
#: Bytes by which a verb may make the image longer.
_MOST_GROWTH = 24 << 20
_INTERNAL = 70


def _tools() -> dict[str, Callable[[list[str]], int]]:
    from cowhand.cli import main
    from cowhand.cli.compat import img, io as io_tool

    return {
        "cowhand": lambda words: main.main(words[1:]),
        "cowhand-img": img.main,
        "cowhand-io": io_tool.main,
    }


class _Sink(io.TextIOWrapper):
    """A standard stream whose end is kept, since tools tell of their own mistakes there."""

    def __init__(self) -> None:
        self.kept = io.BytesIO()
        super().__init__(self.kept, encoding="utf-8", errors="backslashreplace", write_through=True)


@contextmanager
def _quiet() -> Iterator[_Sink]:
    out, err = _Sink(), _Sink()
    with mock.patch.object(sys, "stdin", _Sink()), redirect_stdout(out), redirect_stderr(err):
        yield err


def run(line: str, image: str) -> None:
    """Run one command with *image* in place of IMAGE. Raises Finding where a tool ends in an internal error, and what it raises itself."""
    words = [image if word == "IMAGE" else word.replace("=IMAGE", f"={image}") for word in line.split()]
    words = [word.replace("_", " ") if words[0] == "cowhand-io" or word == "night_1" else word for word in words]
    before = threading.active_count()
    with _quiet() as err:
        try:
            status = _tools()[words[0]](words)
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
    told = err.kept.getvalue().decode(errors="replace")
    if status == _INTERNAL or status < 0 or "Traceback" in told or "internal error" in told:
        raise Finding(f"{line}: ended with {status}: {told[-1500:]}")
    if threading.active_count() > before:
        raise Finding(f"{line}: leaves threads behind")


def every(path: Path, lines: tuple[str, ...], begin: Callable[[], None] = lambda: None) -> None:
    """Run *lines* in the image's folder, each on a copy of its own; *begin* is called before each."""
    with chdir(path.parent):
        Path("same").write_bytes(bytes(4096))
        for line in lines:
            begin()
            Path("out").unlink(missing_ok=True)
            shutil.copyfile(path.name, "copy")
            size = os.stat("copy").st_size
            run(line, "copy")
            if os.stat("copy").st_size > size + _MOST_GROWTH:
                raise Finding(f"{line}: made {os.stat('copy').st_size} bytes of {size}")
            for left in Path().glob("*.cowhand-*"):
                left.unlink()
