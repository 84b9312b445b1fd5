"""``--object``: the objects that images can name. Secrets are kept for encrypted images, throttle groups for the throttle filter."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from cowhand.cli.compat import program
from cowhand.cli.compat.optionstrings import parse
from cowhand.cli.compat.program import Failure
from cowhand.cli.compat.wording import end_place

if TYPE_CHECKING:
    import ssl

#: Properties of each type that has a meaning here.
TYPES = {
    "secret": ("data", "file", "format", "iv", "keyid"),
    "throttle-group": (),
    "tls-creds-psk": ("dir", "endpoint", "priority", "username"),
    "tls-creds-x509": ("dir", "endpoint", "passwordid", "priority", "sanity-check", "verify-peer"),
}
#: Types of QEMU's that its image tools do not have either.
_ELSEWHERE = (
    "iothread",
    "memory-backend-file",
    "memory-backend-memfd",
    "memory-backend-ram",
    "rng-builtin",
    "rng-egd",
    "rng-random",
)
_WANTS_HELP = "?"
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*\Z")


class Objects:
    """The objects of one command line, by id. Raises Failure in QEMU's words."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, Any]] = {}

    def add(self, text: str) -> None:
        """Make the object that *text* describes, an option string or JSON."""
        if text in ("help", "?"):
            print("List of user creatable objects:", *TYPES, sep="\n  ")
            raise Failure(status=0)
        given = _parse(text)
        if given.pop(_WANTS_HELP, None) and given.get("qom-type") in TYPES:
            print(f"{given['qom-type']} options:", *_properties(given["qom-type"]), sep="\n  ")
            raise Failure(status=0)
        kind = given.pop("qom-type", None)
        if kind is None:
            raise Failure("Parameter 'qom-type' is missing")
        if not isinstance(kind, str):
            raise Failure("Invalid parameter type for 'qom-type', expected: string")
        if kind not in TYPES:
            if kind in _ELSEWHERE:
                raise Failure(f"invalid object type: {kind}")
            raise Failure(f"Parameter 'qom-type' does not accept value '{kind}'")
        name = given.pop("id", None)
        if name is None:
            raise Failure("Parameter 'id' is missing")
        if not isinstance(name, str):
            raise Failure("Invalid parameter type for 'id', expected: string")
        secret = b""
        if kind == "secret":
            secret, given = _secret(given), {}
        elif kind == "throttle-group":
            given = _limits(given)
        elif kind.startswith("tls-creds-"):
            given = _tls_properties(kind, given)
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
        elif kind.startswith("tls-creds-"):
            _add_credentials(name, kind, given)
        self.known[name] = {"qom-type": kind, **given}

    def tls_context(self, name: str, endpoint: str) -> ssl.SSLContext:
        """Return the context of the TLS credentials *name* for an *endpoint*, "server" or "client". Raises Failure."""
        found = self.known.get(name)
        if found is None:
            raise Failure(f"No TLS credentials with id '{name}'")
        if not found["qom-type"].startswith("tls-creds-"):
            raise Failure(f"Object with id '{name}' is not TLS credentials")
        if found.get("endpoint", "client") != endpoint:
            raise Failure(f"Expecting TLS credentials with a {endpoint} endpoint")
        from cowhand.core.errors import CowhandError
        from cowhand.crypto import tls

        credentials = tls.find(name)
        try:
            return credentials.server() if endpoint == "server" else credentials.client()
        except CowhandError as error:
            raise Failure(error.qemu()) from None


def _parse(text: str) -> dict[str, Any]:
    if text.startswith("{"):
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            at_end = isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip())
            if program.since("11") and at_end:
                raise Failure(f"{end_place(text)}: JSON parse error, premature end of input") from None
            raise Failure("JSON parse error" + (", premature EOI" if at_end else "")) from None
        return dict(given)
    out: dict[str, Any] = {}
    for pair in parse(text, "qom-type") if text else []:
        if pair.short and pair.value == "on" and pair.name in ("help", "?"):
            out[_WANTS_HELP] = True
            continue
        if pair.short:
            raise Failure(f"Expected '=' after parameter '{pair.name if pair.value == 'on' else 'no' + pair.name}'")
        out[pair.name] = pair.value
    return out


def _properties(kind: str) -> list[str]:
    """Return a line for each property that objects of *kind* have."""
    if kind == "secret":
        return [f"{name}=<{'QCryptoSecretFormat' if name == 'format' else 'string'}>" for name in TYPES[kind]]
    from cowhand.block.filters.throttle.limits import KINDS

    limits = ["x-iops-size", *(f"x-{name}{end}" for name in KINDS for end in ("", "-max", "-max-length"))]
    return ["limits=<ThrottleLimits>", *sorted(f"{name}=<int>" for name in limits)]


def _secret(given: dict[str, Any]) -> bytes:
    for key, value in given.items():
        if key not in TYPES["secret"]:
            raise Failure(f"Parameter '{key}' is unexpected")
        if not isinstance(value, str):
            raise Failure(f"Invalid parameter type for '{key}', expected: string")
    if given.get("format", "raw") not in ("raw", "base64"):
        raise Failure(f"Parameter 'format' does not accept value '{given['format']}'")
    from cowhand.core.errors import CowhandError
    from cowhand.crypto import secrets

    try:
        return secrets.load(given)
    except CowhandError as error:
        raise Failure(error.qemu()) from None


def _tls_properties(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    for key, value in given.items():
        if key not in TYPES[kind]:
            raise Failure(f"Parameter '{key}' is unexpected")
        if key == "endpoint" and value not in ("client", "server"):
            raise Failure(f"Parameter 'endpoint' does not accept value '{value}'")
        if key in ("sanity-check", "verify-peer") and value not in (
            "on",
            "yes",
            "true",
            "y",
            "off",
            "no",
            "false",
            "n",
            True,
            False,
        ):
            raise Failure(f"Parameter '{key}' expects 'on' or 'off'")
    return given


def _add_credentials(name: str, kind: str, given: dict[str, Any]) -> None:
    """Keep TLS credentials, which have to be there for the end that they are for. Raises Failure."""
    import os

    from cowhand.core.errors import CowhandError
    from cowhand.crypto import tls

    folder = str(given.get("dir", ""))
    verify = given.get("verify-peer", "on") in ("on", "yes", "true", "y", True)
    if kind == "tls-creds-psk":
        made: tls.Credentials = tls.PresharedKeys(
            os.path.join(folder, "keys.psk"), str(given.get("username") or tls.DEFAULT_USER)
        )
    else:
        made = tls.X509(folder, verify)
    try:
        if given.get("endpoint", "client") == "server":
            made.server()
        else:
            made.client()
    except CowhandError as error:
        raise Failure(error.qemu()) from None
    tls.add(name, made)


def _limits(given: dict[str, Any]) -> dict[str, Any]:
    """Return the limits of a throttle group by their plain names: they are given as "x-NAME", "limits.NAME" or in a group "limits"."""
    from cowhand.block.filters.throttle.limits import KINDS, MAX_RATE
    from cowhand.block.node.options import flatten

    known = {"iops-size", *(kind + end for kind in KINDS for end in ("", "-max", "-max-length"))}
    out: dict[str, Any] = {}
    if not isinstance(given.get("limits", {}), dict):
        raise Failure("Invalid parameter type for 'limits', expected: object")
    nested = given.get("limits", {})
    for name, value in flatten(given).items():
        if name.removeprefix("limits.") in nested and (isinstance(value, bool) or not isinstance(value, int)):
            raise Failure(f"Invalid parameter type for '{name}', expected: integer")
        if name.startswith("limits.") and str(value).startswith("-"):
            value = MAX_RATE + 1  # as QEMU: out of the range of every rate
        plain = name.removeprefix("limits.") if name.startswith("limits.") else name.removeprefix("x-")
        if plain == name or plain not in known:
            raise Failure(f"Parameter '{name}' is unexpected")
        out[plain] = value
    return out


def _define_group(name: str, limits: dict[str, Any]) -> None:
    from cowhand.block.filters.throttle import groups
    from cowhand.block.filters.throttle.limits import Limits
    from cowhand.core.errors import CowhandError

    try:
        groups.define(name, Limits.parse(limits))
    except CowhandError as error:
        raise Failure(error.qemu()) from None
