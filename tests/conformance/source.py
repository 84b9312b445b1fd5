"""QEMU's source package, as Debian publishes it: fetched with apt, patched by dpkg-source, kept in the cache folder.

The machine's own apt sources are used. Where they have no deb-src entries, a temporary configuration is derived from them, so
that nothing on the machine changes and nothing here names a mirror.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGE = "qemu"
#: The binary package whose version decides which sources are fetched, so that the reference is the tools that are installed.
REFERENCE = "qemu-utils"
_UPDATE_SECONDS = 300
_FETCH_SECONDS = 900


class SourceUnavailable(Exception):
    """QEMU's sources could not be had; the message says what was tried."""


def installed_version() -> str | None:
    """Return the source version of the installed qemu-utils, or None."""
    try:
        query = ["dpkg-query", "--show", "--showformat", "${source:Version}", REFERENCE]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def iotests(cache: Path) -> Path:
    """Return the folder of QEMU's iotests, fetching the sources at the first call.

    COWHAND_QEMU_SOURCE names a tree that is there already. Raises: SourceUnavailable.
    """
    given = os.environ.get("COWHAND_QEMU_SOURCE")
    tree = Path(given) if given else _cached(cache)
    folder = tree / "tests" / "qemu-iotests"
    if not (folder / "check").is_file():
        raise SourceUnavailable(f"{folder} holds no iotests")
    return folder


def _cached(cache: Path) -> Path:
    version = installed_version()
    label = re.sub(r"[^A-Za-z0-9.+~-]", "_", version or "newest")
    tree = cache / f"{PACKAGE}-{label}"
    if tree.is_dir():
        return tree
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as name:
        unpacked = _fetch(Path(name), f"{PACKAGE}={version}" if version else PACKAGE)
        unpacked.rename(tree)
    return tree


def _fetch(folder: Path, wanted: str) -> Path:
    if shutil.which("apt-get") is None or shutil.which("dpkg-source") is None:
        raise SourceUnavailable("apt-get and dpkg-source are needed (make setup-system); or set COWHAND_QEMU_SOURCE")
    tried = []
    for options in (_own_configuration, _derived_configuration):
        work = folder / options.__name__
        work.mkdir()
        command = ["apt-get", "-q", *options(folder), "source", "--only-source", wanted]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False)
        trees = [path for path in work.iterdir() if path.is_dir()]
        if done.returncode == 0 and len(trees) == 1:
            return trees[0]
        tried.append(done.stderr.strip())
    raise SourceUnavailable(f"apt-get source {wanted} failed:\n" + "\n".join(tried))


def _own_configuration(_folder: Path) -> list[str]:
    return []


def _derived_configuration(folder: Path) -> list[str]:
    """Write source entries for every binary entry of the machine, load their lists, and return apt's options for them."""
    parts = folder / "sources"
    for path in (parts, folder / "lists" / "partial", folder / "archives" / "partial"):
        path.mkdir(parents=True)
    etc = Path("/etc/apt")
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if path.suffix in (".list", ".sources") and path.is_file():
            (parts / path.name).write_text(as_source_entries(path.read_text(errors="replace"), path.suffix))
    options = {
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": str(parts),
        "Dir::State::Lists": str(folder / "lists"),
        "Dir::Cache": str(folder / "archives"),
        "APT::Sandbox::User": "",
    }
    arguments = [argument for key, value in options.items() for argument in ("-o", f"{key}={value}")]
    # A third-party entry without sources fails alone; whether QEMU's were found shows when they are fetched.
    subprocess.run(["apt-get", "-q", *arguments, "update"], capture_output=True, timeout=_UPDATE_SECONDS, check=False)
    return arguments


def as_source_entries(text: str, suffix: str) -> str:
    """Turn apt entries of binary packages into entries of source packages; *suffix* tells sources.list(5)'s two forms apart."""
    if suffix == ".sources":
        return re.sub(r"(?mi)^types:.*$", "Types: deb-src", text)
    lines = [re.sub(r"^\s*deb\s", "deb-src ", line) for line in text.splitlines() if re.match(r"\s*deb\s", line)]
    return "".join(f"{line}\n" for line in lines)
