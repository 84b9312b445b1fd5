"""The I/O tool's commands: names, arguments, how many, and where each is. Nothing of a command is imported before it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from cowhand.cli.compat import program

if TYPE_CHECKING:
    from cowhand.cli.compat.io.session import Session

NOTHING, FILE, CHANGES = range(3)
_AT = "a number of bytes at a specified offset"


class Command(NamedTuple):
    """One command. ``most`` is None where there is no limit; ``needs`` is NOTHING, an open FILE, or one that it CHANGES."""

    name: str
    alias: str
    module: str
    function: str
    least: int
    most: int | None
    arguments: str
    summary: str
    needs: int
    since: str = ""

    def takes(self, count: int) -> bool:
        """Tell whether *count* words may follow the command, options included."""
        return self.least <= count and (self.most is None or count <= self.most)

    def wrong_count(self, called: str, count: int) -> str:
        """Return the message for a wrong number of words; *called* is the name that was used."""
        if self.most is None:
            expected = f"at least {self.least}"
        elif self.least == self.most:
            expected = f"{self.least}"
        else:
            expected = f"between {self.least} and {self.most}"
        return f"bad argument count {count} to {called}, expected {expected} arguments"

    def load(self) -> Callable[[Session, Sequence[str]], bool]:
        """Import and return what the command does: it tells whether it succeeded, or raises Complaint or Failure."""
        module = importlib.import_module(f"cowhand.cli.compat.io.{self.module}")
        return cast("Callable[[Session, Sequence[str]], bool]", getattr(module, self.function))


# fmt: off
COMMANDS = (
    Command("abort", "", "control", "abort", 0, 0, "", "simulate a program crash using abort(3)", NOTHING),
    Command("aio_discard", "", "aio", "aio_discard", 2, None, "[-Cq] off len", "asynchronously discards a number of bytes", CHANGES, "10.0"),
    Command("aio_flush", "", "aio", "aio_flush", 0, 0, "", "completes all outstanding aio requests", FILE),
    Command("aio_read", "", "aio", "aio_read", 2, None, "[-Ciqv] [-P pattern] off len [len..]", "asynchronously reads a number of bytes", FILE),
    Command("aio_write", "", "aio", "aio_write", 2, None, "[-Cfiquz] [-P pattern] off len [len..]",
            "asynchronously writes a number of bytes", CHANGES),
    Command("alloc", "a", "questions", "alloc", 1, 2, "offset [count]", "checks if offset is allocated in the file", FILE),
    Command("break", "", "control", "break_command", 2, 2, "event tag", "sets a breakpoint on event and tags the stopped request as tag", FILE),
    Command("close", "c", "control", "close", 0, 0, "", "close the current open file", FILE),
    Command("discard", "d", "requests", "discard", 2, None, "[-Cq] off len", f"discards {_AT}", CHANGES),
    Command("flush", "f", "control", "flush", 0, 0, "", "flush all in-core file state to disk", FILE),
    Command("help", "?", "questions", "help_command", 0, 1, "[command]", "help for one or all commands", NOTHING),
    Command("info", "i", "questions", "info", 0, 0, "", "prints information about the current file", FILE),
    Command("length", "l", "questions", "length", 0, 0, "", "gets the length of the current file", FILE),
    Command("map", "", "questions", "map_command", 0, 0, "", "prints the allocated areas of a file", FILE),
    Command("open", "o", "control", "open_command", 1, None, "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
            "open the file specified by path", NOTHING),
    Command("quit", "q", "control", "quit_command", 0, None, "", "exit the program", NOTHING),
    Command("read", "r", "requests", "read", 2, None, "[-abCqv] [-P pattern [-s off] [-l len]] off len", f"reads {_AT}", FILE),
    Command("readv", "", "requests", "readv", 2, None, "[-Cqv] [-P pattern] off len [len..]", f"reads {_AT}", FILE),
    Command("remove_break", "", "control", "remove_break", 1, 1, "tag", "remove a breakpoint by tag", FILE),
    Command("reopen", "", "control", "reopen", 0, None, "[(-r|-w)] [-c cache] [-o options]", "reopens an image with new options", FILE),
    Command("resume", "", "control", "resume", 1, 1, "tag", "resumes the request tagged as tag", FILE),
    Command("sigraise", "", "control", "sigraise", 1, 1, "signal", "raises a signal", NOTHING),
    Command("sleep", "", "control", "sleep", 1, 1, "", "waits for the given value in milliseconds", NOTHING),
    Command("truncate", "t", "control", "truncate", 1, 3, "[-m prealloc_mode] off", "truncates the current file at the given offset", CHANGES),
    Command("wait_break", "", "control", "wait_break", 1, 1, "tag", "waits for the suspension of a request", FILE),
    Command("write", "w", "requests", "write", 2, None, "[-bcCfnquz] [-P pattern | -s source_file] off len", f"writes {_AT}", CHANGES),
    Command("writev", "", "requests", "writev", 2, None, "[-Cfq] [-P pattern] off len [len..]", f"writes {_AT}", CHANGES),
    Command("zone_append", "", "zones", "zone", 3, 4, "offset len [len..]", "append write a number of bytes at a specified offset", FILE, "8.2"),
    Command("zone_close", "", "zones", "zone", 2, 2, "offset len", "close a range of zones in zone block device", FILE, "8.2"),
    Command("zone_finish", "", "zones", "zone", 2, 2, "offset len", "finish a range of zones in zone block device", FILE, "8.2"),
    Command("zone_open", "", "zones", "zone", 2, 2, "offset len", "explicit open a range of zones in zone block device", FILE, "8.2"),
    Command("zone_report", "", "zones", "zone", 2, 2, "offset number", "report zone information", FILE, "8.2"),
    Command("zone_reset", "", "zones", "zone", 2, 2, "offset len", "reset a zone write pointer in zone block device", FILE, "8.2"),
)
# fmt: on

_STATISTICS = """\
 -C, -- report statistics in a machine parsable format
 -q, -- quiet mode, do not show I/O statistics"""
_BACKGROUND = """
 The command succeeds when the request was started; aio_flush waits for its
 end, which shows its statistics or its error."""

#: What "help COMMAND" prints below the usage.
EXTENDED = {
    "read": f"""
 Reads len bytes at off.

 -b, -- read from the VM state, not from the disk
 -P, -- compare what was read with a byte
 -s, -- where to begin comparing, counted from off (with -P)
 -l, -- how many bytes to compare (with -P)
 -v, -- print what was read
{_STATISTICS}
""",
    "readv": f"""
 Reads the bytes at off into one buffer for each len.

 -P, -- compare what was read with a byte
 -v, -- print what was read
{_STATISTICS}
""",
    "write": f"""
 Writes len bytes at off, each of them 0xcd.

 -b, -- write to the VM state, not to the disk
 -c, -- store whole clusters compressed
 -f, -- the bytes are stable when the command ends (force unit access)
 -P, -- write another byte
 -s, -- write the content of a file, again and again
 -z, -- write zeroes without sending them
 -n, -- with -z, fail rather than send zeroes
 -u, -- with -z, allow giving the space back
{_STATISTICS}
""",
    "writev": f"""
 Writes bytes at off from one buffer for each len.

 -f, -- the bytes are stable when the command ends (force unit access)
 -P, -- write another byte than 0xcd
{_STATISTICS}
""",
    "aio_read": f"""
 Reads bytes at off in the background, into one buffer for each len.{_BACKGROUND}

 -i, -- only say that an invalid request is injected
 -P, -- compare what was read with a byte
 -v, -- print what was read
{_STATISTICS}
""",
    "aio_write": f"""
 Writes bytes at off in the background, from one buffer for each len.{_BACKGROUND}

 -f, -- the bytes are stable when the request ends (force unit access)
 -i, -- only say that an invalid request is injected
 -P, -- write another byte than 0xcd
 -u, -- with -z, allow giving the space back
 -z, -- write zeroes without sending them
{_STATISTICS}
""",
    "discard": f"""
 Says that len bytes at off are not needed any more.

{_STATISTICS}
""",
    "aio_discard": f"""
 Says in the background that len bytes at off are not needed any more.{_BACKGROUND}

{_STATISTICS}
""",
    "open": """
 Opens an image for the commands that follow.

 -r, -- open it for reading only
 -s, -- keep changes in a temporary file
 -n, -- bypass the host's cache, short for -t none
 -U, -- share it with others that write it
 -k, -- short for -i native
 -i, -- accepted: threads, native, io_uring
 -t, -- cache mode
 -d, -- discard mode
 -o, -- options for the driver, such as driver=raw""",
    "reopen": """
 Opens the image anew with other options.

 -r, -- for reading only
 -w, -- for reading and writing
 -c, -- with another cache mode
 -o, -- with other options for the driver
""",
    "sigraise": """
 Raises a signal in this process, given by its number.
""",
}


#: Commands that take -r, for buffers that are registered before, since 8.2's profile. It changes nothing here.
_REGISTERED = ("aio_read", "aio_write", "read", "readv", "write", "writev")


def known() -> Iterator[Command]:
    """Yield the commands of the version that is asked for."""
    for command in COMMANDS:
        if not command.since or program.since(command.since):
            yield command


def find(name: str) -> Command | None:
    """Return the command of that name or short name."""
    if not name:
        return None
    for command in known():
        if name in (command.name, command.alias):
            return command
    return None


def usage(called: str, command: Command) -> str:
    """Return the line that tells how *command* is used; *called* is the name that was used."""
    arguments = command.arguments
    if command.name in _REGISTERED and program.since("8.2"):
        arguments = arguments.replace("q", "qr", 1)
    gap = f"{arguments} " if command.arguments or command.name == "map" else ""
    return f"{called} {gap}-- {command.summary}"
