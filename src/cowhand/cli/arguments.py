"""Arguments that several commands take, said once."""

from __future__ import annotations

import argparse

from cowhand.block.node.options import CACHE_MODES
from cowhand.core.errors import InvalidArgument
from cowhand.core.units import parse_size

#: Cache modes that are told of; "off", which is "none", is only taken by QEMU's tools.
CACHE_NAMES = tuple(name for name in CACHE_MODES if name != "off")


class Usage(InvalidArgument):
    """The command line lacks something, or contradicts itself."""

    code = "usage"
    exit_code = 2


def size(text: str) -> int:
    """Parse a size for argparse, which shows the message of its own exception only."""
    try:
        return parse_size(text)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(f"{error.message}. {error.hint or ''}".strip()) from None


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output text|json``."""
    parser.add_argument(
        "--output", choices=("text", "json"), default="text", help="text for people, or JSON with stable keys"
    )


def add_format(parser: argparse.ArgumentParser, of: str = "the image") -> None:
    """Add ``-f, --format``: the format of what is read."""
    parser.add_argument(
        "-f", "--format", metavar="FMT", help=f"format of {of}; detected from its first bytes if left out"
    )


def add_share(parser: argparse.ArgumentParser) -> None:
    """Add ``-U, --force-share``."""
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="read although others may be writing; what is read may be inconsistent",
    )


def add_secrets(parser: argparse.ArgumentParser) -> None:
    """Add ``--secret`` and ``--key-file``: what opens encrypted images."""
    group = parser.add_argument_group("encrypted images")
    group.add_argument("--secret", action="store_true", help="ask for the passphrase on the terminal")
    group.add_argument(
        "--key-file",
        action="append",
        default=[],
        metavar="FILE",
        help="take the passphrase from FILE, every byte of it",
    )


def add_no_locks(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-locks``: the way on where the file system has none."""
    parser.add_argument(
        "--no-locks",
        action="store_true",
        help="write images also where the file system has no locks: nothing else may be using them",
    )


def add_encrypt(parser: argparse.ArgumentParser) -> None:
    """Add ``--encrypt``: make the new image an encrypted one."""
    parser.add_argument("--encrypt", action="store_true", help="encrypt the new image with LUKS")


def add_talk(parser: argparse.ArgumentParser) -> None:
    """Add ``-p, --progress`` and ``-q, --quiet``."""
    talk = parser.add_mutually_exclusive_group()
    talk.add_argument(
        "-p", "--progress", action="store_true", help="show progress even if standard error is not a terminal"
    )
    talk.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors and warnings")


def add_picture(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Add ``--svg`` and ``--theme``: a picture *of* something instead of text."""
    what = f"a picture of {of}" if of else "a picture"
    parser.add_argument("--svg", metavar="FILE", help=f"write {what} to FILE, or to standard output (-)")
    parser.add_argument(
        "--theme",
        choices=("auto", "light", "dark"),
        default="auto",
        help="colours of the picture; auto follows the viewer",
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add ``--dry-run``."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only show what would be read, written and moved, which images depend on it, and how to undo it",
    )


def driver_options(given: list[str]) -> dict[str, str]:
    """Return the options of repeated ``-o NAME=VALUE,...`` as one dictionary; later ones win."""
    from cowhand.block.node.options import split_options

    merged: dict[str, str] = {}
    for text in given:
        merged.update(split_options(text))
    return merged


#: What the ends of names say about formats, where the user says nothing.
ENDINGS = {
    ".qcow2": "qcow2",
    ".qcow": "qcow2",
    ".luks": "luks",
    ".raw": "raw",
    ".img": "raw",
    ".bin": "raw",
    ".iso": "raw",
}


#: Endings of formats that are not made here: a raw disk under such a name would mislead whoever finds it.
_OTHERS = {".vmdk": "VMDK", ".vdi": "VDI", ".vhd": "VHD", ".vhdx": "VHDX", ".qed": "QED", ".dmg": "DMG"}


def format_for(name: str, given: str | None) -> str:
    """Return the format of a new image: the *given* one, or what its *name* ends with, or raw.

    Raises InvalidArgument where the name says one that cannot be made.
    """
    if given is not None:
        return given
    dot = name.rfind(".")
    ending = name[dot:].lower() if dot >= 0 else ""
    if ending in _OTHERS:
        raise InvalidArgument(
            f"'{name}' is named like a {_OTHERS[ending]} image, and such images cannot be made yet",
            hint="Choose another name, or say which format it is to have (create -f FMT, convert -O FMT).",
        )
    return ENDINGS.get(ending, "raw")
