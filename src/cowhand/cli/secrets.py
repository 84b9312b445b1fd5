"""Passphrases of encrypted images: asked for on the terminal, or read from a file. Never taken from the command line, which others can see.

They are offered to every encrypted image that the command opens, whatever stands below it; the first one that fits opens it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from cowhand.core.errors import InvalidArgument
from cowhand.crypto import secrets

#: Under this id the passphrase of the new image is kept, where it has one of its own.
NEW = "cowhand-new"


@contextmanager
def offered(args: argparse.Namespace) -> Iterator[None]:
    """Offer what *args* ask for while the block runs. Raises InvalidArgument where there is nobody to be asked, and what reading a file raises."""
    keys = [secrets.read_file(path) for path in args.key_file]
    new = bool(getattr(args, "encrypt", False))
    target = [secrets.read_file(path) for path in getattr(args, "target_key_file", None) or ()]
    makes = not hasattr(args, "target_secret")  # the command opens nothing but what it makes
    if args.secret or (new and makes and not keys):
        keys.append(_new_passphrase() if new and makes else _asked("Passphrase: "))
    if getattr(args, "target_secret", False) and getattr(args, "no_create", False):
        target.append(_asked("Passphrase of the target: "))
    elif getattr(args, "target_secret", False) or (new and not makes and not keys and not target):
        target.append(_new_passphrase())
    held = {NEW: target[0]} if target else {}
    with secrets.given(held), secrets.offering(keys + target):
        yield


def creation_options(args: argparse.Namespace, format: str, given: dict[str, str]) -> dict[str, str]:
    """Return *given*, the options of a new image, with what ``--encrypt`` and the target's passphrase add."""
    prefix = "" if format == "luks" else "encrypt."
    out = dict(given)
    if args.encrypt and format not in ("qcow2", "luks"):
        raise InvalidArgument(f"images of format {format} are not encrypted", hint="Choose qcow2 or luks.")
    if args.encrypt and prefix and not {"encryption", "encrypt.format"} & out.keys():
        out["encrypt.format"] = "luks"
    encrypted = not prefix or "encryption" in out or "encrypt.format" in out
    if encrypted and NEW in secrets.known():
        out.setdefault(prefix + "key-secret", NEW)
    return out


def _asked(prompt: str) -> bytes:
    import getpass
    import signal
    import warnings

    # Raised, so that the terminal shows again what is typed.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with warnings.catch_warnings():
            # Rather not at all than where it is shown.
            warnings.simplefilter("error", getpass.GetPassWarning)
            return getpass.getpass(prompt).encode("utf-8", "surrogateescape")
    except (EOFError, OSError, getpass.GetPassWarning):
        raise InvalidArgument(
            "there is no terminal to ask for a passphrase", hint="Give a file with --key-file."
        ) from None
    finally:
        signal.signal(signal.SIGINT, before)


def _new_passphrase() -> bytes:
    first = _asked("New passphrase: ")
    if not first:
        raise InvalidArgument("an empty passphrase protects nothing")
    if _asked("Once more: ") != first:
        raise InvalidArgument("the two passphrases differ", hint="Begin again.")
    return first
