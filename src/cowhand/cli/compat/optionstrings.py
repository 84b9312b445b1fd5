"""Option strings: "name=value,other=value", a doubled comma standing for one; and what a driver takes at creation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.cli.compat import program
from cowhand.cli.compat.program import Failure
from cowhand.cli.compat.sizes import size_option

if TYPE_CHECKING:
    from cowhand.block.node.create_options import CreateOption

#: Formats that nobody makes images of, QEMU neither; so whether there is a driver does not matter.
_READ_ONLY = ("bochs", "cloop", "dmg")
_KINDS = {"size": "size", "bool": "bool (on/off)", "int": "num", "str": "str"}


class Pair(NamedTuple):
    """One option as it was written; ``short`` when it had no value."""

    name: str
    value: str
    short: bool


def parse(text: str, implied: str | None = None) -> list[Pair]:
    """Return the options in *text*. A first word without "=" is the value of *implied*; another one means "on", or "off" after "no"."""
    out: list[Pair] = []
    parts = text.replace(",,", "\0").split(",")
    for number, part in enumerate(parts):
        part = part.replace("\0", ",")
        if not part and number == len(parts) - 1:
            break
        name, equals, value = part.partition("=")
        if equals:
            out.append(Pair(name, value, False))
        elif number == 0 and implied is not None:
            out.append(Pair(implied, part, False))
        elif name.startswith("no"):
            out.append(Pair(name[2:], "off", True))
        else:
            out.append(Pair(name, "on", True))
    return out


def warn_of_short_form(pair: Pair) -> None:
    """Say that an option without a value is deprecated, as QEMU does where it parses a description."""
    if pair.short:
        program.warning(
            f"short-form boolean option '{pair.name if pair.value == 'on' else 'no' + pair.name}' deprecated"
        )
        program.plain(f"Please use {pair.name}={pair.value} instead")


def as_description(text: str, implied: str | None) -> dict[str, str]:
    """Return the node description that *text* means, the argument of ``--image-opts`` or of the I/O tool's ``-o``."""
    out = {}
    for pair in parse(text, implied):
        warn_of_short_form(pair)
        out[pair.name] = pair.value
    return out


def check_list(text: str) -> str:
    """Return *text*, the argument of one ``-o``, or fail when commas are where none may be."""
    trailing = len(text) - len(text.rstrip(","))
    if not text or text.startswith(",") or trailing % 2:
        raise Failure(f"Invalid option list: {text}")
    return text


class CreateOptions:
    """The ``-o`` options of a command, several of them joined."""

    def __init__(self) -> None:
        self._lists: list[str] = []

    def add(self, text: str) -> None:
        self._lists.append(check_list(text))

    def __bool__(self) -> bool:
        return bool(self._lists)

    @property
    def wants_help(self) -> bool:
        words = (word for text in self._lists for word in text.replace(",,", "\0").split(","))
        return any(word in ("help", "?") for word in words)

    def values(self, known: Mapping[str, CreateOption]) -> dict[str, Any]:
        """Return {name: value} as the drivers' tables *known* say. Raises Failure in QEMU's words."""
        out: dict[str, Any] = {}
        for pair in parse(",".join(self._lists)):
            option = known.get(pair.name)
            if option is None:
                raise Failure(f"Invalid parameter '{pair.name}'")
            out[pair.name] = _convert(option, pair.value)
        return out


def _convert(option: CreateOption, value: str) -> Any:
    if option.kind == "size":
        return size_option(option.name, value)
    if option.kind == "int":
        try:
            return int(value.lstrip(), 0)
        except ValueError:
            raise Failure(f"Parameter '{option.name}' expects a number") from None
    if option.kind == "bool":
        if value not in ("on", "off"):
            raise Failure(f"Parameter '{option.name}' expects 'on' or 'off'")
        return value == "on"
    return value


def known_options(format: str, filename: str | None = None) -> dict[str, CreateOption]:
    """Return what *format* takes at creation, with what *filename*'s protocol takes where one is named. Raises CowhandError."""
    from cowhand.block.node.create_options import FILE_OPTIONS, merge
    from cowhand.drivers import REGISTRY
    from cowhand.image.create import create_options_of, format_of, protocol_of

    if format in _READ_ONLY:
        raise Failure(f"Format driver '{format}' does not support image creation")
    own = create_options_of(format_of(format, REGISTRY))
    if filename is None or protocol_of(filename, REGISTRY).name not in ("file", "host_device"):
        # What a format only hands to its file is the file's to declare.
        return merge(
            option for option in own if option.name == "size" or format == "file" or option not in FILE_OPTIONS
        )
    return merge(own, FILE_OPTIONS)


def print_help(format: str, filename: str | None) -> None:
    """Print what ``-o help`` prints."""
    known = known_options(format, filename)
    print("Supported options:" if filename is not None else f"Supported {format} options:")
    for line in help_lines(known.values()):
        print(line)
    if filename is None:
        print("\nThe protocol level may support further options.")
        print("Specify the target filename to include those options.")


#: What later versions tell of options that are understood always: name → (since, text).
_LATER_HELP = {"keep_data_file": ("11", "Assume the external data file already exists and do not overwrite it")}


def _help_of(option: CreateOption) -> str:
    since, text = _LATER_HELP.get(option.name, ("", ""))
    return option.help or (text if since and program.since(since) else "")


def help_lines(known: Iterable[CreateOption]) -> list[str]:
    """Return one line an option, in the alphabet's order."""
    return [
        f"  {f'{option.name}=<{_KINDS[option.kind]}>':<22} - {_help_of(option)}"
        for option in sorted(known, key=lambda o: o.name)
        if _help_of(option)  # later versions' are understood, and not told of
    ]
