"""Which version of QEMU the drop-in tools answer as: the profiles, how a version is written, and where a choice may stand.

A profile is a release of QEMU whose text or JSON differs from that of the profile before it. Source: the release notes and
manuals of each, and the tools of 7.2, 10.0 and 11.1 themselves. 10.0 is Debian 13's, which has the command line of 10.1 already, in an
earlier form; the tools that others built of 10.0 answer a wrong command line as 9.2 does.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

#: Profile → the release that ``--version`` names.
PROFILES = {
    "7.2": "7.2.22",
    "8.2": "8.2.10",
    "9.2": "9.2.4",
    "10.0": "10.0.13",
    "10.1": "10.1.5",
    "10.2": "10.2.2",
    "11": "11.1.3",
}
NEWEST = list(PROFILES)[-1]
#: Names the version, where the command line does not.
VARIABLE = "COWHAND_COMPAT"
#: The table and key of the configuration file that do where neither command line nor environment does.
TABLE, KEY = "qemu", "compat"
_SYSTEM_FILE = Path("/etc/cowhand/config.toml")
_VERSION = re.compile(r"\d{1,4}(?:\.\d{1,4}){0,3}")


class UnknownVersion(ValueError):
    """No profile is that version's; the message says which are."""


class BadConfiguration(ValueError):
    """A configuration file cannot be read; the message names it and says why."""


def number(version: str) -> tuple[int, ...]:
    """Return *version* as numbers that compare: "10.0.13" is (10, 0, 13)."""
    return tuple(map(int, version.split(".")))


def profile_of(version: str) -> str:
    """Return the profile of a release: the newest that is not newer ("10.0.13" has 10.0, "9.0" has 8.2, "11.1" has 11).

    Raises: UnknownVersion for what is no version, older than the oldest profile, or of a later series than the newest.
    """
    if _VERSION.fullmatch(version):
        wanted = number(version)
        wanted += (0,) * (2 - len(wanted))
        found = [name for name in PROFILES if number(name) <= wanted]
        if found and wanted[0] <= number(NEWEST)[0]:
            return found[-1]
    raise UnknownVersion(f"Unknown version '{version}' to be compatible with (one of {', '.join(PROFILES)})")


def configuration_files() -> list[Path]:
    """Return where a configuration file may be, the first that says something counts: the user's, then the system's."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return [Path(home, "cowhand", "config.toml"), _SYSTEM_FILE]


def configured() -> str | None:
    """Return the version that the environment or a configuration file asks for, or None.

    Raises: BadConfiguration for a file that is there and cannot be read, or that says it wrongly.
    """
    version = os.environ.get(VARIABLE)
    if version:
        return version
    for path in configuration_files():
        found = _read(path)
        if found is not None:
            return found
    return None


def _read(path: Path) -> str | None:
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None  # a folder that is closed to this user holds nothing for them
    except OSError as error:
        raise BadConfiguration(f"Could not read {path}: {error.strerror}") from error
    import tomllib

    try:
        document = tomllib.loads(text.decode())
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        raise BadConfiguration(f"Could not read {path}: {error}") from error
    table = document.get(TABLE, {})
    found = table.get(KEY) if isinstance(table, dict) else table
    if found is not None and not isinstance(found, str):
        raise BadConfiguration(f'{path}: [{TABLE}] {KEY} must be a version in quotation marks, such as "{NEWEST}"')
    return found
