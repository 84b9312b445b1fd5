"""The ``cowhand`` command: finds the sub-command, builds its parser alone, and runs it.

Each sub-command is a file in ``cowhand.cli.commands``, with its parser, what it does and its examples together. Only the one
that was asked for is imported, so that the others cost nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from types import ModuleType

#: Every command with the one line that the overview says of it, in the order of a disk's life.
COMMANDS = {
    "create": "make a new image, empty or as an overlay of another one",
    "info": "show what an image is, and its backing files",
    "map": "show where the data of a disk lies",
    "check": "look for damage and lost space in an image, and repair it",
    "du": "show what the space in an image's file is used for",
    "locks": "show which programs have an image open, and what they lock",
    "inspect": "show an image's header and tables, and judge an untrusted image",
    "convert": "copy a disk into a new image, of another format if you like",
    "compare": "check whether two disks hold the same bytes",
    "checksum": "print or verify checksums of what a guest sees",
    "dd": "copy a range of blocks from one image to another",
    "measure": "show how much space an image of a disk would need",
    "resize": "make a disk longer or shorter",
    "compact": "make an image's file shorter in place",
    "snapshot": "create, list, apply or delete snapshots inside an image",
    "bitmap": "list and change the dirty bitmaps that an image keeps",
    "commit": "write an overlay's changes into the image below it",
    "rebase": "give an image another backing file, or none",
    "flatten": "make an image that needs no backing file any more",
    "passphrase": "list, add, change or remove passphrases of an encrypted image",
    "serve": "serve images to other programs and machines over NBD",
    "completion": "print a script that completes command lines in a shell",
}
EXIT_USAGE = 2

_FOOT = """\
"cowhand COMMAND --help" explains one of them, with examples.
Where qemu-img has a letter for an option it means the same here; every command on images takes --output json.
Exit codes: 0 done, 1 failed, 2 usage, 3 input/output, 4 broken or unknown image, 5 in use, 6 disks differ,
7 lost space found, 8 damage found, 9 refused because other images need it, 130 interrupted."""


_SIZES = ("SIZE", "OFFSET", "LENGTH", "[+|-]SIZE")
_OF_SIZES = "Sizes are bytes, or have a suffix k, M, G, T, P or E for powers of 1024: 65536, 64k, 1.5G."


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are told like all others: in a line, with what was probably meant, and where the help is."""

    _given: Sequence[str] = ()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        from cowhand.cli.permutation import permuted

        self._given = list(args or ())
        found, unknown = self.parse_known_args(permuted(self, self._given), namespace)
        if unknown:
            option = next((word for word in unknown if word.startswith("-") and word != "--"), None)
            if option is None:
                self.error(f"too many arguments: {' '.join(unknown)}")
            name = option.partition("=")[0]
            self._refuse(f"there is no option '{name}'", _nearest(name, self._option_string_actions))
        return found

    def explain(self) -> None:
        """Let the help of options tell their defaults, and the help of a command with sizes how sizes are written."""
        for action in self._actions:
            default, told = action.default, action.help or ""
            if isinstance(default, (str, int)) and default not in (False, "==SUPPRESS==") and f"{default}" not in told:
                action.help = f"{told} (default: {default})"
        if any(action.metavar in _SIZES or "size" in (action.dest, action.metavar) for action in self._actions):
            self.epilog = f"{_OF_SIZES}\n\n{self.epilog}"

    def error(self, message: str) -> NoReturn:
        wrong, _, known = message.partition("invalid choice: ")[2].partition(" (choose from ")
        choices = [word.strip("'") for word in known.removesuffix(")").split(", ")]
        self._refuse(message, _nearest(wrong.strip("'"), choices) if known else "")

    def _refuse(self, message: str, near: str) -> NoReturn:
        from cowhand.cli.arguments import Usage
        from cowhand.cli.output import Output

        json = "--output=json" in self._given or "--output json" in " ".join(self._given)
        hint = f"{near}See: {self.prog} --help"
        Output(json=json).error(self.prog.removeprefix("cowhand "), Usage(message, hint=hint))
        self.exit(EXIT_USAGE)


def _nearest(word: str, known: Iterable[str]) -> str:
    """Return a question whether the one of *known* was meant that is nearest to *word*, or nothing."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean '{near[0]}'? " if near else ""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Formats help as wide as the terminal. Finding that out by itself, argparse would import shutil, bz2 and lzma at every start."""

    def __init__(self, prog: str) -> None:
        columns = os.environ.get("COLUMNS", "")
        try:
            width = int(columns) if columns.isdigit() else os.get_terminal_size(sys.stdout.fileno()).columns
        except (AttributeError, OSError, ValueError):
            width = 80
        super().__init__(prog, max_help_position=28, width=max(40, min(width, 120)) - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap what is prose; keep paragraphs with indented lines (examples, tables) as they are."""
        import textwrap

        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(part if "\n " in part else textwrap.fill(part, width) for part in paragraphs) + "\n"


def overview() -> str:
    """Return the text of ``cowhand --help``."""
    width = max(map(len, COMMANDS)) + 2
    lines = [
        "usage: cowhand COMMAND ...",
        "",
        "Keeps virtual machines' disks: images, overlays, snapshots, copies.",
        "",
    ]
    lines += [f"  {name:{width}}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join([*lines, "", _FOOT])


def build_parser(name: str, module: ModuleType) -> Parser:
    """Return the parser of the command *name*, which *module* implements."""
    parser = Parser(
        prog=f"cowhand {name}",
        description=module.__doc__,
        epilog=f"Examples:\n{module.EXAMPLES}",
        formatter_class=_Help,
    )
    module.configure(parser)
    parser.explain()
    if name != "completion":
        from cowhand.cli.arguments import add_no_locks, add_secrets

        add_secrets(parser)
        if getattr(module, "WRITES", False) or hasattr(module, "writes"):
            add_no_locks(parser)
    return parser


def load(name: str) -> ModuleType:
    """Return the module of the command *name*."""
    return importlib.import_module(f"cowhand.cli.commands.{name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``cowhand`` with *arguments* (those of the process by default) and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        from cowhand.core.malloc_tuning import own_process

        own_process()
    from cowhand.cli.console_encoding import settle

    settle()
    try:
        try:
            status = _dispatch(given)
        finally:
            sys.stdout.flush()  # help, too
    except OSError as error:
        # Nothing more can be said there, not even by the interpreter at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read our output has left
            return 141
        print(f"cowhand: standard output: {error.strerror}", file=sys.stderr)
        return 3
    if arguments is None:
        from cowhand.cli.process_exit import leave

        leave(status)
    return status


def _dispatch(given: list[str]) -> int:
    name = given[0] if given else ""
    if name in ("--version", "-V"):
        from cowhand.__about__ import __version__

        print(f"cowhand {__version__}")
        return 0
    if name in ("help", "-h", "--help") and len(given) > 1:
        name, given = given[1], [given[1], "--help"]
    if name not in COMMANDS:
        return _no_command(name)
    module = load(name)
    from cowhand.cli import running

    return running.run(module, name, build_parser(name, module).parse_args(given[1:]))


def _no_command(name: str) -> int:
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if not name:
        print(overview(), file=sys.stderr)
        return EXIT_USAGE
    what, known = ("option", ("--help", "--version")) if name.startswith("-") else ("command", tuple(COMMANDS))
    print(f"cowhand: there is no {what} '{name}'\n  {_nearest(name, known)}See: cowhand --help", file=sys.stderr)
    return EXIT_USAGE
