"""The I/O tool's state: the image that is open, what runs in the background, and the loop over commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cowhand.cli.compat import program
from cowhand.cli.compat.io import table
from cowhand.cli.compat.io.background import Background
from cowhand.cli.compat.io.opening import How, open_as
from cowhand.cli.compat.io.parsing import Complaint, UsageComplaint
from cowhand.cli.compat.program import Failure, Fatal
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.filters.blkdebug.node import BlkDebugNode
    from cowhand.block.node.node import BlockNode


class Session:
    """One run of the tool. Used by the main thread alone."""

    def __init__(self) -> None:
        self.disk: Disk | None = None
        self.how = How()
        self.background = Background()
        self.quitting = False
        self.image_opts = False  #: names are option strings (``--image-opts``)

    # -- the image

    def open(self, name: str | None, how: How) -> None:
        """Open an image and make it the one that commands work on. Raises Failure."""
        self.disk = open_as(name, how)
        self.how = how
        debug = self.breakpoints()
        if debug is not None:
            debug.listener = self._hear

    def close(self) -> None:
        """Wait for what is under way and close the image, if one is open."""
        if self.disk is None:
            return
        self.background.wait()
        disk, self.disk = self.disk, None
        try:
            disk.close()
        except CowhandError:
            pass  # the drivers have said what failed; QEMU closes all the same

    @property
    def image(self) -> BlockNode:
        """The root that the user asked for: not the filter that copies on reading (``-C``)."""
        assert self.disk is not None
        root = self.disk.root
        if self.how.copy_on_read and root.driver == "copy-on-read" and root.primary is not None:
            return root.primary.node
        return root

    def breakpoints(self) -> BlkDebugNode | None:
        """Return the node that suspends requests, if there is one below the disk."""
        if self.disk is None:
            return None
        node = self.disk.root
        while node.driver != "blkdebug":
            primary = node.primary
            if primary is None:
                return None
            node = primary.node
        return node  # type: ignore[return-value]

    def _hear(self, what: str, tag: str) -> None:
        """Tell of a breakpoint; called by the thread of the request."""
        if what == "suspended":
            print(f"blkdebug: Suspended request '{tag}'")
            self.background.suspended()
        else:
            print(f"blkdebug: Resuming request '{tag}'")

    # -- commands

    def run(self, commands: Sequence[str]) -> int:
        """Run *commands*, or without any those of standard input; return the exit status."""
        status = 0
        for line in commands or self._lines():
            status |= 0 if self.execute(line) else 1
            if self.quitting:
                break
        self.close()
        return status

    def execute(self, line: str) -> bool:
        """Run one command and tell whether it succeeded; what it has to say is printed."""
        words = [word for word in line.split(" ") if word]
        if not words:
            return True
        command = table.find(words[0])
        if command is None:
            program.plain(f'command "{words[0]}" not found')
            return False
        if command.needs != table.NOTHING and self.disk is None:
            program.plain("no file open, try 'help open'")
            return False
        if not command.takes(len(words) - 1):
            program.plain(command.wrong_count(words[0], len(words) - 1))
            return False
        if command.needs == table.CHANGES and self.disk is not None and self.disk.read_only:
            program.error("Block node is read-only")
            return False
        try:
            return command.load()(self, words)
        except UsageComplaint:
            print(table.usage(command.name, command))
        except Complaint as complaint:
            print(complaint)
        except Fatal:
            self.close()
            raise
        except Failure as failure:
            if failure.message is not None:
                program.error(failure.message, failure.hint)
        return False

    # -- standard input

    def _lines(self) -> Iterator[str]:
        if sys.stdin is None:
            return
        prompt = f"{program.name()}> "
        if sys.stdin.isatty():
            yield from _typed_lines(prompt)
            return
        pending = b""
        while True:
            sys.stdout.write(prompt)
            sys.stdout.flush()
            while b"\n" not in pending:
                self._wait_for_input()
                data = os.read(sys.stdin.fileno(), 4096)
                if not data:
                    if pending:
                        yield os.fsdecode(pending)
                        sys.stdout.write(prompt)
                    return
                pending += data
            line, _, pending = pending.partition(b"\n")
            yield os.fsdecode(line)

    def _wait_for_input(self) -> None:
        """Show results from the background until there is something to read."""
        import select

        while self.background.busy:
            ready, _, _ = select.select([sys.stdin], [], [], 0.02)
            if ready:
                return
            self.background.show()
            sys.stdout.flush()


def _typed_lines(prompt: str) -> Iterator[str]:
    try:
        import readline  # noqa: F401 - gives input() editing and history
    except ImportError:
        pass
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
