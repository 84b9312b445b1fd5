"""Rules of blkdebug from a configuration file or from options.

Source: QEMU's ``docs/devel/blkdebug.txt``: the file has ``[inject-error]`` and ``[set-state]`` sections of ``name = "value"`` lines; options
have the same names ("inject-error.0.event").
"""

from __future__ import annotations

import errno as _errno
import re
from collections.abc import Iterable, Mapping
from typing import Any

from cowhand.block.filters.blkdebug.rules import DEFAULT_IO_TYPES, EVENTS, IO_TYPES, InjectError, Rule, SetState
from cowhand.core.errors import InvalidArgument, from_os_error

#: A configuration file is read whole; nobody writes rules by the megabyte.
MAX_CONFIG = 1 << 20
MAX_RULES = 10_000
#: Linux' error numbers end here (MAX_ERRNO).
MAX_ERRNO = 4095

# As QEMU reads these files: white space before "=", and the value in quotes; without one it is empty.
_SECTION = re.compile(r'\[\s*([^\]\s"]+)(?:\s+"([^"]*)")?\s*\]')
_SETTING = re.compile(r'(\S+)(?:\s+=\s*"([^"]*)")?')
_KEYS = {
    "inject-error": ("event", "state", "iotype", "errno", "sector", "once", "immediately"),
    "set-state": ("event", "state", "new_state"),
}
_TRUE, _FALSE = ("on", "yes", "true", "y"), ("off", "no", "false", "n")


def read_file(path: str) -> list[Rule]:
    """Return the rules of a configuration file. Raises InvalidArgument naming the line, or the system's error."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raised = from_os_error(error, path, doing="reading the blkdebug configuration")
        raise raised.within(qemu="Could not read blkdebug config file") from error
    if len(data) > MAX_CONFIG:
        raise InvalidArgument(f"a blkdebug configuration has at most {MAX_CONFIG} bytes", path=path)
    return parse_text(data.decode("utf-8", "replace"), path)


def parse_text(text: str, path: str = "") -> list[Rule]:
    """Return the rules of a configuration."""
    sections: list[tuple[str, dict[str, Any]]] = []
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        section = _SECTION.match(line)
        if section is not None or line.startswith("["):
            name = section[1] if section is not None else line[1:]
            if section is None or name not in _KEYS:
                raise _wrong(f"There is no option group '{name}'", path, number)
            sections.append((name, {}))
            continue
        if not sections:
            raise _wrong("no group defined", path, number)
        setting = _SETTING.match(line)
        if setting is None or setting[1] not in _KEYS[sections[-1][0]]:
            raise _wrong(f"Invalid parameter '{setting[1] if setting is not None else line}'", path, number)
        sections[-1][1][setting[1]] = setting[2] or ""
    return [_rule(name, given) for name, given in _in_order(sections)]


def _wrong(text: str, path: str, line: int) -> InvalidArgument:
    return InvalidArgument(f"{text} (line {line} of the blkdebug configuration)", qemu=text, path=path)


def _in_order(sections: list[tuple[str, dict[str, Any]]]) -> Iterable[tuple[str, dict[str, Any]]]:
    # QEMU adds all rules of one section kind before the other's; it matters to which is looked at first.
    if len(sections) > MAX_RULES:
        raise InvalidArgument(f"more than {MAX_RULES} blkdebug rules")
    return sorted(sections, key=lambda section: section[0] != "inject-error")


def from_options(given: dict[str, Any]) -> list[Rule]:
    """Take "inject-error" and "set-state" out of the nested *given* and return their rules."""
    sections: list[tuple[str, dict[str, Any]]] = []
    for name, keys in _KEYS.items():
        for entry in as_list(given.pop(name, None), name):
            if not isinstance(entry, Mapping):
                raise InvalidArgument(f"'{name}' is a list of groups of options")
            for key in entry:
                if key not in keys:
                    raise InvalidArgument(f"[{name}] section doesn't support the option '{key}'")
            sections.append((name, dict(entry)))
    return [_rule(name, entry) for name, entry in _in_order(sections)]


def as_list(value: Any, name: str) -> list[Any]:
    """Return a list that was given as one, as {"0": ..., "1": ...} (dotted names), or as a single group without a number."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        if not all(key.isdecimal() for key in value):
            return [value]
        if sorted(map(int, value)) != list(range(len(value))):
            raise InvalidArgument(f"Missing list index: the entries of '{name}' are not numbered from 0 on")
        return [value[key] for key in sorted(value, key=int)]
    if isinstance(value, (list, tuple)):
        return list(value)
    raise InvalidArgument(f"'{name}' is a list")


def _rule(section: str, given: Mapping[str, Any]) -> Rule:
    event = given.get("event")
    if event is None:
        raise InvalidArgument("Missing event name for rule")
    _one_of(event, EVENTS)
    state = _number(given, "state", 0)
    if section == "set-state":
        return SetState(event, state, _number(given, "new_state", 0))
    sector = _number(given, "sector", -1)
    kind = given.get("iotype")
    if kind is not None:
        _one_of(kind, IO_TYPES)
    return InjectError(
        event,
        state,
        errno=_number(given, "errno", _errno.EIO, MAX_ERRNO),
        sector=None if sector < 0 else sector,
        once=_switch(given, "once"),
        immediately=_switch(given, "immediately"),
        io_types=DEFAULT_IO_TYPES if kind is None else frozenset((kind,)),
    )


def _one_of(value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidArgument(
            f"'{value}' is not known to blkdebug",
            qemu=f"invalid parameter value: {value}",
            hint="One of: " + ", ".join(known),
        )


def _number(given: Mapping[str, Any], name: str, default: int, limit: int = (1 << 63) - 1) -> int:
    value = given.get(name, default)
    try:
        number = int(value, 0) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool):
        raise InvalidArgument(f"Parameter '{name}' expects a number")
    if not -1 <= number <= limit:
        raise InvalidArgument(f"Parameter '{name}' is out of range")
    return number


def _switch(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if isinstance(value, bool):
        return value
    if value in _TRUE or value in _FALSE:
        return value in _TRUE
    raise InvalidArgument(f"Parameter '{name}' expects 'on' or 'off'")
