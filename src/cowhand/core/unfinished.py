"""Names of files that are not finished: recognisable whatever happens to the process that makes them.

``.NAME.HHHHRRRRRRRR.cowhand-new`` lies beside what is to be NAME: four hexadecimal digits tell the machine that makes it, eight are random.
"""

from __future__ import annotations

import os
import re
import zlib

from cowhand.core import clock

#: Ends the name of every unfinished file.
SUFFIX = ".cowhand-new"
#: Ends the name of an image that stands aside while its successor and the successor's data file take their names.
ASIDE = ".cowhand-old"
_NAME_MAX = 255
#: The files that this process is making: {temporary name: name that it will have}.
being_made: dict[str, str] = {}
_OWN = re.compile(r"\..*\.([0-9a-f]{4})[0-9a-f]{8}" + re.escape(SUFFIX), re.DOTALL)


def machine() -> str:
    """Return four digits that stand for this machine: locks of a network file system may not reach another one."""
    name = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
    return f"{zlib.crc32(name.encode('utf-8', 'surrogateescape')) & 0xFFFF:04x}"


def temporary_name(path: str) -> str:
    """Return a new name beside *path* for what is to become it."""
    folder, name = os.path.split(path)
    mark = f".{machine()}{clock.random_bytes(4).hex()}{SUFFIX}"
    try:
        longest = os.pathconf(folder or ".", "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        longest = _NAME_MAX
    # Cut in bytes, since that is what the limit counts.
    kept = os.fsencode(name)[: min(longest, _NAME_MAX) - len(mark) - 1]
    return os.path.join(folder, "." + os.fsdecode(kept) + mark)


def final_name(path: str) -> str:
    """Return the name that the file *path* will have: its own, unless this process is making it under a temporary one."""
    return being_made.get(path, path)


def is_unfinished(name: str) -> bool:
    """Tell whether *name* is that of a file which a killed process left unfinished, or another one is making just now."""
    base = os.path.basename(name)
    return base.startswith(".") and base.endswith((SUFFIX, ASIDE))


def made_here(name: str) -> bool:
    """Tell whether *name* is that of an unfinished file which this machine makes, or made."""
    found = _OWN.fullmatch(os.path.basename(name))
    return found is not None and found[1] == machine()
