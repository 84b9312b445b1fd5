"""Options of nodes: declared once, in a class for each driver, and read from there by everything else.

A declaration gives type, default, help and strength. From it come the parsing of ``--image-opts`` and ``json:`` names, the printed name of an
image, ``create -o help`` and the documentation. "Not set" is ``None`` where it differs from every value that a user can give.

The classes read like frozen dataclasses but are none: importing that module takes a quarter of the time of a small command.

Sources: QEMU's ``qapi/block-core.json`` (BlockdevOptions) for names and meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

from cowhand.core.errors import InvalidArgument
from cowhand.core.units import MAX_SIZE, parse_size

_T = TypeVar("_T", bound="NodeOptions")


class Option(NamedTuple):
    """One declared option."""

    default: Any
    help: str
    kind: str
    choices: tuple[str, ...]
    name: str | None
    strong: bool
    field: str = ""  #: the attribute that holds it


def option(
    default: Any = None,
    *,
    help: str = "",
    kind: str = "str",
    choices: tuple[str, ...] = (),
    name: str | None = None,
    strong: bool = True,
) -> Any:
    """Declare an option. *kind* is "str", "bool", "int", "size" or "any"; *name* is QEMU's where it is not the field's with dashes.

    A strong option changes what a reader sees and so belongs into the image's printed name; a weak one (caching, locking) does not.
    """
    return Option(default, help, kind, choices, name, strong)


class Declared:
    """An immutable record whose fields are declared with :func:`option`. Fields that were not given are found at the class."""

    declared_options: ClassVar[dict[str, Option]] = {}
    __slots__ = ("__dict__", "_written")  #: apart from the fields, which are all that ``vars`` shows

    def __init_subclass__(cls) -> None:
        own = {name: value._replace(field=name) for name, value in vars(cls).items() if isinstance(value, Option)}
        for name, value in own.items():
            setattr(cls, name, value.default)
        cls.declared_options = {**cls.declared_options, **{v.name or n.replace("_", "-"): v for n, v in own.items()}}

    def __init__(self, **given: Any) -> None:
        fields = {declaration.field for declaration in self.declared_options.values()}
        for name, value in given.items():
            if name not in fields:
                raise TypeError(f"{type(self).__name__} has no field '{name}'")
            object.__setattr__(self, name, value)

    @property
    def written(self) -> Mapping[str, Any]:
        """What the user wrote, by QEMU's names: the name of an image repeats it letter by letter."""
        return getattr(self, "_written", {})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, declaration.field) for declaration in self.declared_options.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Declared) and type(other) is type(self) and other._values() == self._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class NodeOptions(Declared):
    """What every node takes."""

    node_name: str | None = option(help="name of the node in the graph", strong=False)
    read_only: bool | None = option(kind="bool", help="open for reading only", strong=False)
    auto_read_only: bool = option(
        False, kind="bool", help="open for reading where writing is not possible", strong=False
    )
    force_share: bool = option(False, kind="bool", help="take no locks: others may write meanwhile", strong=False)
    discard: str | None = option(help="hand discards down", choices=("ignore", "unmap"), strong=False)
    detect_zeroes: str = option(
        "off", help="turn writes of zeroes into write_zeroes", choices=("off", "on", "unmap"), strong=False
    )
    cache_direct: bool = option(
        False, kind="bool", name="cache.direct", help="bypass the host's page cache", strong=False
    )
    cache_no_flush: bool = option(
        False, kind="bool", name="cache.no-flush", help="ignore flushes (unsafe)", strong=False
    )

    @classmethod
    def join(cls, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options, by QEMU's names, that hold when a node that was opened with *old* is reopened with *new*."""
        return {**old, **new}


def declared(cls: type[NodeOptions]) -> dict[str, Option]:
    """Return {QEMU's name: declaration} of the options that *cls* declares, common ones first."""
    return cls.declared_options


#: Other words for what an option can be, which QEMU takes as well.
_SYNONYMS = {"discard": {"on": "unmap", "off": "ignore"}}
#: Common options are read before a driver's own, these last: of several mistakes the first one so is told of, as in QEMU.
_LATE = ("discard", "detect-zeroes")


def is_on(name: str, value: Any) -> bool | None:
    """Return what *value*, a bool or a word, says to the switch *name*; None says nothing. Raises InvalidArgument."""
    if value is None or isinstance(value, bool):
        return value
    if value in ("on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise InvalidArgument(f"Parameter '{name}' expects 'on' or 'off'")


def _convert(name: str, value: Any, kind: str, choices: Iterable[str]) -> Any:
    if value is None or kind == "any":
        return value
    if kind == "bool":
        return is_on(name, value)
    if kind in ("int", "size"):
        if isinstance(value, bool):
            value = "on" if value else "off"
        if isinstance(value, int):
            if kind == "size" and not 0 <= value <= MAX_SIZE:
                raise InvalidArgument(f"Parameter '{name}' expects a size of 0 to {MAX_SIZE} bytes, not {value}")
            return value
        try:
            return parse_size(value) if kind == "size" else int(value, 0)
        except (ValueError, TypeError) as error:
            qemu = f"Parameter '{name}' expects a number"
            if kind == "size":
                qemu = (
                    f"Parameter '{name}' expects a non-negative number below 2^64\n"
                    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
                )
            raise InvalidArgument(f"Parameter '{name}' expects a number, not '{value}'", qemu=qemu) from error
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif isinstance(value, int):
        value = str(value)
    if not isinstance(value, str):
        raise InvalidArgument(f"Parameter '{name}' expects a string")
    if "\0" in value:  # the system's calls take no such names, and the tools' arguments cannot hold one
        raise InvalidArgument(f"Parameter '{name}' cannot contain a zero byte")
    value = _SYNONYMS.get(name, {}).get(value, value)
    if choices and value not in choices:
        qemu = {"discard": "Invalid discard option"}.get(name, f"invalid parameter value: {value}")
        raise InvalidArgument(
            f"Invalid parameter '{value}' for '{name}'", qemu=qemu, hint="One of: " + ", ".join(choices)
        )
    return value


def parse(cls: type[_T], given: Mapping[str, Any], *, driver: str, kind: str = "format") -> _T:
    """Make *cls* from flat or nested *given* ("cache.direct" or {"cache": {"direct": …}}), QEMU's names; raise on what it does not declare."""
    known = declared(cls)
    values: dict[str, Any] = {}
    common = NodeOptions.declared_options
    for name, value in sorted(
        flatten(given).items(), key=lambda pair: 2 * (pair[0] not in common) + (pair[0] in _LATE)
    ):
        found = known.get(name)
        if found is None:
            raise InvalidArgument(f"Block {kind} '{driver}' does not support the option '{name}'")
        values[found.field] = _convert(name, value, found.kind, found.choices)
    options = cls(**{k: v for k, v in values.items() if v is not None})
    object.__setattr__(options, "_written", flatten(given))
    return options


def check_zero_detection(options: NodeOptions) -> None:
    """Raise InvalidArgument where zeroes are to be unmapped although discards are not handed down."""
    if options.detect_zeroes == "unmap" and options.discard != "unmap":
        raise InvalidArgument(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
        )


def strong_options(options: NodeOptions) -> dict[str, Any]:
    """Return {QEMU's name: value} of the strong options that were given, or are not what they are by default."""
    out: dict[str, Any] = {}
    for name, found in declared(type(options)).items():
        value = getattr(options, found.field)
        given = options.written.get(name)
        if found.strong and (given is not None or value != found.default):
            out[name] = value if given is None else given
    return out


def flatten(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one with dotted names; lists become numbered names ("children.0.driver")."""
    out: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{prefix}{name}."))
        elif isinstance(value, (list, tuple)):
            out.update(flatten({str(i): item for i, item in enumerate(value)}, f"{prefix}{name}."))
        else:
            out[prefix + name] = value
    return out


def _dots(name: str) -> Iterable[int]:
    return (position for position, letter in enumerate(name) if letter == ".")


def nest(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dotted names of *given* as nested dictionaries, the inverse of :func:`flatten` but for lists.

    Where a name is both a value and the head of others ("overlap-check", "overlap-check.template"), the longer ones stay as they are.
    """
    out: dict[str, Any] = {}
    for name, value in given.items():
        if any(name[:dot] in given and not isinstance(given[name[:dot]], Mapping) for dot in _dots(name)):
            out[name] = value
            continue
        *path, last = name.split(".")
        place = out
        for part in path:
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                raise InvalidArgument(f"'{part}' is given both as a value and as a group of options ('{name}')")
            place = inner
        value = nest(value) if isinstance(value, Mapping) else value
        if isinstance(place.get(last), dict) and isinstance(value, dict):
            place[last].update(value)
        else:
            place[last] = value
    return out


def split_options(text: str) -> dict[str, str]:
    """Parse "a=b,c.d=e,flag" as QEMU's option strings: a doubled comma stands for one, a name alone means "on", "noNAME" is not special."""
    out: dict[str, str] = {}
    part = ""
    position = 0
    while position <= len(text):
        if position == len(text) or text[position] == ",":
            if position + 1 < len(text) and text[position + 1] == ",":
                part += ","
                position += 2
                continue
            if part:
                name, equals, value = part.partition("=")
                out[name] = value if equals else "on"
            part = ""
            position += 1
            continue
        part += text[position]
        position += 1
    return out


#: Cache modes as QEMU's tools name them: (write-through, cache.direct, cache.no-flush).
CACHE_MODES = {
    "none": (False, True, False),
    "off": (False, True, False),
    "writethrough": (True, False, False),
    "writeback": (False, False, False),
    "directsync": (True, True, False),
    "unsafe": (False, False, True),
}


def cache_switches(mode: str) -> tuple[bool, bool, bool]:
    """Return (write-through, cache.direct, cache.no-flush) of a cache *mode*. Raises InvalidArgument."""
    found = CACHE_MODES.get(mode)
    if found is None:
        raise InvalidArgument(f"Invalid cache mode '{mode}'", hint="One of: " + ", ".join(CACHE_MODES))
    return found
