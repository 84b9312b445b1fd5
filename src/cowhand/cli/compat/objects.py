"""``--object``: the objects that images can name. Secrets are kept for encrypted images, throttle groups for the throttle filter."""

from __future__ import annotations

import json
import re
from typing import Any

from cowhand.cli.compat.optionstrings import parse, warn_of_short_form
from cowhand.cli.compat.program import Failure

#: Properties of each type that has a meaning here.
TYPES = {
    "secret": ("data", "file", "format", "iv", "keyid"),
    "throttle-group": (),
}
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*\Z")


class Objects:
    """The objects of one command line, by id. Raises Failure in QEMU's words."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, Any]] = {}

    def add(self, text: str) -> None:
        """Make the object that *text* describes, an option string or JSON."""
        given = _parse(text)
        kind = given.pop("qom-type", None)
        if kind is None:
            raise Failure("Parameter 'qom-type' is missing")
        if kind not in TYPES:
            raise Failure(f"Parameter 'qom-type' does not accept value '{kind}'")
        name = given.pop("id", None)
        if name is None:
            raise Failure("Parameter 'id' is missing")
        secret = b""
        if kind == "secret":
            secret, given = _secret(given), {}
        elif kind == "throttle-group":
            given = _limits(given)
        if not _IDENTIFIER.match(name):
            hint = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
            raise Failure("Parameter 'id' expects an identifier", hint=hint)
        if name in self.known:
            raise Failure(f"attempt to add duplicate property '{name}' to object (type 'container')")
        if kind == "throttle-group":
            _define_group(name, given)
        elif kind == "secret":
            from cowhand.crypto import secrets

            secrets.add(name, secret)
        self.known[name] = {"qom-type": kind, **given}


def _parse(text: str) -> dict[str, Any]:
    if text.startswith("{"):
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            raise Failure("JSON parse error") from None
        return dict(given)
    out = {}
    for pair in parse(text, "qom-type") if text else []:
        warn_of_short_form(pair)
        out[pair.name] = pair.value
    return out


def _secret(given: dict[str, Any]) -> bytes:
    for key in given:
        if key not in TYPES["secret"]:
            raise Failure(f"Parameter '{key}' is unexpected")
    if given.get("format", "raw") not in ("raw", "base64"):
        raise Failure(f"Parameter 'format' does not accept value '{given['format']}'")
    from cowhand.core.errors import CowhandError
    from cowhand.crypto import secrets

    try:
        return secrets.load(given)
    except CowhandError as error:
        raise Failure(error.qemu()) from None


def _limits(given: dict[str, Any]) -> dict[str, Any]:
    """Return the limits of a throttle group by their plain names: they are given as "x-NAME", "limits.NAME" or in a group "limits"."""
    from cowhand.block.options import flatten
    from cowhand.block.throttling import KINDS

    known = {"iops-size", *(kind + end for kind in KINDS for end in ("", "-max", "-max-length"))}
    out: dict[str, Any] = {}
    for name, value in flatten(given).items():
        plain = name.removeprefix("limits.") if name.startswith("limits.") else name.removeprefix("x-")
        if plain == name or plain not in known:
            raise Failure(f"Parameter '{name}' is unexpected")
        out[plain] = value
    return out


def _define_group(name: str, limits: dict[str, Any]) -> None:
    from cowhand.block import throttlegroups
    from cowhand.block.throttling import Limits
    from cowhand.core.errors import CowhandError

    try:
        throttlegroups.define(name, Limits.parse(limits))
    except CowhandError as error:
        raise Failure(error.qemu()) from None
