"""What a driver takes when it makes a new image: declared as a table, from which parsing, help and the printed line come.

Names, kinds and help are those of ``qemu-img create -f FORMAT -o help``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cowhand.core.errors import InvalidArgument
from cowhand.core.units import parse_size

_TRUE, _FALSE = ("on", "yes", "true", "y"), ("off", "no", "false", "n")


class CreateOption(NamedTuple):
    """One option: *kind* is "size", "bool", "int" or "str"; a *default* of None means "not set"."""

    name: str
    kind: str
    default: Any = None
    help: str = ""


#: What "file" takes beside what the format takes.
FILE_OPTIONS = (
    CreateOption("size", "size", help="Virtual disk size"),
    CreateOption("nocow", "bool", help="Turn off copy-on-write (valid only on btrfs)"),
    CreateOption("preallocation", "str", help="Preallocation mode (allowed values: off, falloc, full)"),
    CreateOption("extent_size_hint", "size", help="Extent size hint for the image file, 0 to disable"),
)


def merge(*tables: Iterable[CreateOption]) -> dict[str, CreateOption]:
    """Return {name: option} of several tables; what an earlier one declares stands."""
    out: dict[str, CreateOption] = {}
    for table in tables:
        for known in table:
            out.setdefault(known.name, known)
    return out


def parse(known: Mapping[str, CreateOption], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return *given* with each value as its option's kind says, in the order of *known*; raises InvalidArgument."""
    for name in given:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, list(known), n=1)
            raise InvalidArgument(
                f"Invalid parameter '{name}'",
                hint=(f"Did you mean '{near[0]}'? " if near else "") + "Known are: " + ", ".join(sorted(known)),
                qemu=f"Invalid parameter '{name}'",
            )
    return {name: convert(option, given[name]) for name, option in known.items() if given.get(name) is not None}


def convert(option: CreateOption, value: Any) -> Any:
    """Return *value*, a string or already what it should be, as *option*'s kind."""
    if option.kind == "bool":
        if isinstance(value, bool):
            return value
        if value not in _TRUE and value not in _FALSE:
            raise InvalidArgument(f"Parameter '{option.name}' expects 'on' or 'off'")
        return value in _TRUE
    if option.kind in ("size", "int"):
        try:
            return (
                parse_size(value) if option.kind == "size" else int(value) if isinstance(value, int) else int(value, 0)
            )
        except (TypeError, ValueError) as error:
            text = f"Parameter '{option.name}' expects a non-negative number below 2^64"
            suffixes = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
            raise InvalidArgument(text, qemu=f"{text}\n{suffixes}", hint=suffixes) from error
    return str(value)


def with_defaults(known: Mapping[str, CreateOption], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return *given* completed by the defaults that are declared, in the order of *known*."""
    out: dict[str, Any] = {}
    for name, option in known.items():
        if name in given:
            out[name] = given[name]
        elif option.default is not None:
            out[name] = convert(option, option.default)
    return out
