"""The tools that a run of the iotests is given: QEMU's own, or cowhand's with QEMU's for what cowhand has not built yet.

Each lies in one folder under the name that QEMU gives it, since messages begin with the name that a tool was started by.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cowhand.cli.compat import profiles
from tests.conformance import standin
from tests.tools.programs import installed_profile

#: Where each wrapper notes that it was called, one word a line; the runner sets it for each test.
USES_VARIABLE = "COWHAND_CONFORMANCE_USES"

#: Variable of iotests' testenv.py → (name of the program, word in a result's ``uses``, cowhand's module).
TOOLS = {
    "QEMU_IMG_PROG": ("qemu-img", "img", "cowhand.cli.compat.img"),
    "QEMU_IO_PROG": ("qemu-io", "io", "cowhand.cli.compat.io"),
    "QEMU_NBD_PROG": ("qemu-nbd", "nbd", "cowhand.cli.compat.nbd"),
    "QSD_PROG": ("qemu-storage-daemon", "daemon", "cowhand.cli.compat.storage_daemon"),
}


class ToolMissing(Exception):
    """A program that the iotests cannot start without is absent."""


@dataclass(frozen=True, slots=True)
class Toolset:
    """A name for reports, the environment that points iotests to the tools, and which of them are cowhand's.

    *identity* says which build of the tools this is: outcomes of another one are out of date.
    """

    name: str
    environment: dict[str, str]
    own: tuple[str, ...]
    identity: str = ""

    def words(self) -> frozenset[str]:
        """Return the words of ``uses`` that stand for cowhand's tools."""
        return frozenset(word for program, word, _ in TOOLS.values() if program in self.own)


def make(name: str, folder: Path, sources: Path, identity: str = "") -> Toolset:
    """Write the wrappers of the toolset *name* ("qemu" or "cowhand") into *folder*. Raises: ToolMissing.

    *sources* is the folder from which cowhand's tools are imported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment: dict[str, str] = {}
    own: list[str] = []
    for variable, (program, word, module) in TOOLS.items():
        path = folder / program
        if name == "cowhand" and _exists(module):
            _write(path, _cowhand_tool(word, module, sources))
            own.append(program)
        else:
            _write(path, _qemu_tool(word, _real(program)))
        environment[variable] = str(path)
    environment["QEMU_PROG"] = str(_machine(folder))
    # The expected output is that of the version whose sources these are.
    environment[profiles.VARIABLE] = installed_profile()
    return Toolset(name, environment, tuple(own), identity)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is absent
        return False


def _real(program: str) -> str:
    path = os.environ.get("COWHAND_" + program.upper().replace("-", "_")) or shutil.which(program)
    if path is None:
        raise ToolMissing(f"{program} is not installed (make setup-system)")
    return path


def _machine(folder: Path) -> Path:
    """Write the stand-in for a QEMU with qtest, under the real one's name, and the firmware that it uses."""
    program = f"qemu-system-{os.uname().machine}"
    halt = folder / "halt.bin"
    halt.write_bytes(standin.firmware())
    command = shlex.join([sys.executable, "-I", "-S", standin.__file__, _real(program), str(halt)])
    path = folder / program
    # iotests ask every time for the list of machines and devices; only a real start tells what a test needs.
    note = f'case "$*" in *help*) ;; *) {_note("machine")} ;; esac'
    _write(path, f'#!/bin/sh\n{note}\nexec {command} "$@"\n')
    return path


def _note(word: str) -> str:
    return f'[ -z "${USES_VARIABLE}" ] || echo {word} >>"${USES_VARIABLE}"'


def _qemu_tool(word: str, path: str) -> str:
    return f'#!/bin/sh\n{_note(word)}\nexec {shlex.quote(path)} "$@"\n'


def _cowhand_tool(word: str, module: str, sources: Path) -> str:
    # Isolated: iotests put their own folders, with modules of common names, into PYTHONPATH.
    return f"""#!{sys.executable} -I
import os
import sys
if uses := os.environ.get({USES_VARIABLE!r}):
    with open(uses, "a") as file:
        file.write("{word}\\n")
sys.path.insert(0, {str(sources)!r})
from {module} import main
sys.exit(main())
"""


def _write(path: Path, text: str) -> None:
    # By rename: another run may be starting the old one, which says the same.
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(0o755)
    temporary.replace(path)
