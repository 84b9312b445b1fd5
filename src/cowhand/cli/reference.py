"""What the commands declare: their arguments as records, from which pages, man pages and shell completion are made."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from cowhand.cli import main

#: What a word on the command line names, by the placeholder or the destination that stands for it.
_FORMATS = ("FMT",)
_FOLDERS = ("FOLDER",)
_FILES = ("FILE", "BASE", "image", "source", "target", "first", "second")


class Argument(NamedTuple):
    """One argument: ``flags`` are empty for a positional one; ``completes`` is "file", "folder", "format" or ""."""

    flags: tuple[str, ...]
    placeholder: str  #: "" where no value follows
    help: str
    choices: tuple[str, ...]
    required: bool
    repeated: bool
    completes: str

    @property
    def takes_value(self) -> bool:
        """Tell whether a word belongs to the flag."""
        return bool(self.placeholder)


class Command(NamedTuple):
    """One command with everything that its file says of it."""

    name: str
    summary: str
    description: str
    examples: str
    options: tuple[Argument, ...]
    operands: tuple[Argument, ...]

    def synopsis(self) -> str:
        """Return the command line in one line."""
        words = ["cowhand", self.name, "[OPTIONS]", *map(_operand, self.operands)]
        return " ".join(words)


def commands() -> list[Command]:
    """Return all commands, in the order of the overview; imports every one of them."""
    return [describe(name) for name in main.COMMANDS]


def describe(name: str) -> Command:
    """Return what the command *name* declares."""
    module = main.load(name)
    arguments = [_argument(action) for action in vars(main.build_parser(name, module))["_actions"]]
    return Command(
        name,
        main.COMMANDS[name],
        (module.__doc__ or "").strip(),
        module.EXAMPLES,
        tuple(one for one in arguments if one.flags),
        tuple(one for one in arguments if not one.flags),
    )


def _argument(action: argparse.Action) -> Argument:
    choices = tuple(map(str, action.choices or ()))
    valued = action.nargs != 0
    if isinstance(action.metavar, str):
        placeholder = action.metavar
    elif choices and action.option_strings:
        placeholder = "|".join(choices)
    else:
        placeholder = action.dest.upper()
    return Argument(
        tuple(action.option_strings),
        placeholder if valued else "",
        (action.help or "").replace("%%", "%"),
        choices,
        # Told from what is declared: what argparse makes of "*" differs between versions of Python.
        action.required if action.option_strings else action.nargs not in ("?", "*", argparse.REMAINDER),
        action.nargs in ("+", "*") or type(action).__name__ == "_AppendAction",
        "" if choices else _completes(action),
    )


def _completes(action: argparse.Action) -> str:
    for kind, words in (("format", _FORMATS), ("folder", _FOLDERS), ("file", _FILES)):
        if action.nargs != 0 and (action.metavar in words or (not action.option_strings and action.dest in words)):
            return kind
    return ""


def _operand(argument: Argument) -> str:
    word = "|".join(argument.choices) or argument.placeholder
    word += "..." if argument.repeated else ""
    return word if argument.required else f"[{word}]"
