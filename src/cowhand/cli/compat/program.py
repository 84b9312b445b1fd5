"""What every drop-in tool does around its command: its name, its messages, how it ends.

Messages go to standard error and begin with the tool's name; standard output is flushed when it is full, and at the end, as C's is.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Sequence

from cowhand.cli.compat import profiles

_RAW = "cowhand.raw"
_name = "cowhand"
_called = _name  #: the same with the folder that was typed
_profile = profiles.NEWEST
_release = profiles.PROFILES[profiles.NEWEST]
_command = ""


class Failure(Exception):
    """The tool ends with *status* after saying *message* (None: it was said already) and *hint* lines below it."""

    def __init__(self, message: str | None = None, *, status: int = 1, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.hint = hint


class Fatal(Failure):
    """A failure at which QEMU's process ends on the spot; its message was said already."""


class UsageFailure(Failure):
    """A failure that points to the help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint=help_hint())


def use_profile(version: str) -> None:
    """Print as *version* of QEMU does. Raises Failure for one that is not known."""
    global _profile, _release
    try:
        _profile = profiles.profile_of(version)
    except profiles.UnknownVersion as error:
        raise Failure(str(error)) from error
    # A whole release is named as it was asked for: scripts compare it.
    _release = version if version.count(".") >= 2 else profiles.PROFILES[_profile]


def _use_configured_profile(arguments: Sequence[str]) -> None:
    use_profile(profiles.NEWEST)
    if any(word == "--compat" or word.startswith("--compat=") for word in arguments):
        return  # what would be set wrongly elsewhere does not matter
    try:
        version = profiles.configured()
    except profiles.BadConfiguration as error:
        raise Failure(str(error)) from error
    if version is not None:
        use_profile(version)


def since(version: str) -> bool:
    """Tell whether text and JSON are those of *version* or a later one."""
    return profiles.number(_profile) >= profiles.number(version)


def enter(command: str) -> None:
    """Remember that *command* of the tool is running."""
    global _command
    _command = command


def asked() -> str:
    """Return what a hint tells the user to ask for help: the tool, since 10.0 with its command."""
    if not since("10.0"):
        return _name
    return f"{_called} {_command}" if _command else _called


def help_hint() -> str:
    """Return the line that points to the help."""
    return f"Try '{asked()} --help' for {'more info' if is_debian_10_0() else 'more information'}"


def is_debian_10_0() -> bool:
    """Tell whether the words are those of 10.1's command line in the early form that Debian 13 has."""
    return _profile == "10.0"


def name() -> str:
    """Return the name that the tool was started by."""
    return _name


def error(message: str, hint: str = "") -> None:
    """Print an error; *hint* goes below it as it is."""
    from cowhand.cli.compat import wording

    message = wording.in_words_of(_profile, message)
    tail = f"\n{hint}" if hint else ""
    sys.stderr.write(f"{_name}: {message}{tail}\n")
    sys.stderr.flush()


def warning(message: str) -> None:
    """Print a warning."""
    error(f"warning: {message}")


def plain(message: str) -> None:
    """Print lines to standard error without the tool's name."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def _diagnostic(message: str, as_tool: bool) -> None:
    if as_tool:
        error(message)
    else:
        plain(message)


def version_lines() -> str:
    """Return what ``--version`` prints: scripts look for the number."""
    from cowhand.__about__ import __version__

    return f"{_name} version {_release} (cowhand {__version__})\nCopyright (c) the cowhand developers; MIT licence"


def _raw(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write what an encoding lacks as the bytes that it was read from, as C does: a handler of codecs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return error.object[error.start : error.end].encode("utf-8", "surrogateescape"), error.end


def start(argument: str, fallback: str) -> None:
    """Take the tool's name from ``argv[0]`` and prepare the standard streams; *fallback* is for ``python -m``."""
    global _name, _called, _command
    _command = ""
    _name = os.path.basename(argument) or fallback
    if _name.startswith("__"):
        _name = fallback
    _called = argument if argument.endswith(_name) else _name
    codecs.register_error(_RAW, _raw)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None:  # a process may be started without them
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else _RAW)  # type: ignore[union-attr]
    from cowhand.core import diagnostics, malloc_tuning

    diagnostics.set_sink(_diagnostic)
    malloc_tuning.own_process()


def main(tool: Callable[[Sequence[str]], int], arguments: Sequence[str] | None, fallback: str) -> int:
    """Run *tool* as :func:`run` does; without *arguments* it has the process's, and the process for itself."""
    if arguments is not None:
        return run(tool, arguments, fallback)
    import _signal

    from cowhand.cli.process_exit import leave

    before = _signal.getsignal(_signal.SIGINT)
    try:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)  # the tools tidy up where it is raised
        try:
            status = run(tool, sys.argv, fallback)
        finally:
            _signal.signal(_signal.SIGINT, before)
    except KeyboardInterrupt:
        status = 130
    return leave(status)


def run(tool: Callable[[Sequence[str]], int], arguments: Sequence[str], fallback: str) -> int:
    """Start *tool* with *arguments* (``argv[0]`` first) and return the exit status; errors are printed here."""
    start(arguments[0] if arguments else "", fallback)
    from cowhand.core.errors import CowhandError

    try:
        try:
            _use_configured_profile(arguments)
            status = tool(arguments)
        except Failure as failure:
            status = failure.status
            if failure.message is not None:
                error(failure.message, failure.hint)
        except CowhandError as problem:
            error(problem.qemu(), problem.facts.get("advice") or "")
            status = 1
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has left. Nothing more can be said to it, not even by the interpreter at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130
    return status
