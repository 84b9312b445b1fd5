"""What a command line of qemu-nbd asks for, and what in it contradicts itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.block.node.options import CACHE_MODES
from cowhand.cli.compat import program
from cowhand.cli.compat.program import Failure
from cowhand.nbd.constants import DEFAULT_PORT

if TYPE_CHECKING:
    import ssl

_AIO = ("threads", "native", "io_uring")
_DISCARD = {"ignore": "ignore", "off": "ignore", "unmap": "unmap", "on": "unmap"}
_ZEROES = ("off", "on", "unmap")
_PER_DEVICE = (
    "cache", "aio", "discard", "export", "description", "offset", "device", "format", "snapshot", "disconnect", "bitmaps", "depth",
)  # fmt: skip


class Settings:
    """The options of one command line. None: not given."""

    def __init__(self) -> None:
        self.port: str | None = None
        self.bind: str | None = None
        self.socket: str | None = None
        self.shared = 1
        self.persistent = False
        self.verbose = False
        self.export: str | None = None
        self.description: str | None = None
        self.offset: int | None = None
        self.depth = False
        self.bitmaps: list[str] = []
        self.list = False
        self.tls_creds: str | None = None
        self.tls: ssl.SSLContext | None = None  #: made of the credentials
        self.tls_authz: str | None = None
        self.tls_hostname: str | None = None
        self.fork = False
        self.pid_file: str | None = None
        self.selinux: str | None = None
        self.device: str | None = None
        self.disconnect = False
        self.format: str | None = None
        self.read_only = False
        self.temporary = False
        self.snapshot: dict[str, str] | str | None = None
        self.cache: str | None = None
        self.aio: str | None = None
        self.discard: str | None = None
        self.detect_zeroes: str | None = None
        self.image_opts = False
        self.handshake_limit: int | None = None
        self.image: str | None = None

    def take(self, key: str, value: str) -> None:
        """Set what option *key* says. Raises Failure in the tool's words."""
        simple = {"b": "bind", "p": "port", "x": "export", "D": "description", "f": "format", "c": "device"}
        switches = {"t": "persistent", "v": "verbose", "A": "depth", "L": "list", "d": "disconnect", "r": "read_only"}
        if key in simple:
            setattr(self, simple[key], value)
        elif key in switches:
            setattr(self, switches[key], True)
        elif key == "k":
            if not value.startswith("/"):
                raise Failure("socket path must be absolute")
            self.socket = value
        elif key == "s":
            self.temporary = True
        elif key == "B":
            self.bitmaps.append(value)
        elif key == "e":
            self.shared = _number(value, "shared device number")
        elif key == "o":
            self.offset = _number(value, "offset", negative=True)
        elif key == "l":
            self.snapshot = snapshot_of(value)
        elif key in ("n", "cache"):
            self._take_cache("none" if key == "n" else value)
        elif key in ("tls-creds", "tls-authz", "tls-hostname", "pid-file"):
            setattr(self, key.replace("-", "_"), value)
        else:
            self._take_other(key, value)

    def _take_cache(self, value: str) -> None:
        if self.cache is not None:
            raise Failure("-n and --cache can only be specified once")
        if value not in CACHE_MODES:
            raise Failure(f"Invalid cache mode `{value}'")
        self.cache = value

    def _take_other(self, key: str, value: str) -> None:
        if key == "aio":
            if self.aio is not None:
                raise Failure("--aio can only be specified once")
            if value not in _AIO:
                raise Failure(f"Invalid aio mode '{value}'")
            self.aio = value
        elif key == "discard":
            if self.discard is not None:
                raise Failure("--discard can only be specified once")
            if value not in _DISCARD:
                raise Failure(f"Invalid discard mode `{value}'")
            self.discard = _DISCARD[value]
        elif key == "detect-zeroes":
            if value not in _ZEROES:
                raise Failure(f"Failed to parse detect_zeroes mode: invalid parameter value: {value}")
            if value == "unmap" and self.discard != "unmap":
                raise Failure(
                    "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
                )
            self.detect_zeroes = value
        elif key == "handshake-limit":
            self.handshake_limit = _number(value, "handshake limit")
        elif key == "selinux-label":
            self.selinux = value
        elif key == "image-opts":
            self.image_opts = True
        elif key == "fork":
            self.fork = True

    def finish(self, positional: list[str]) -> None:
        """Take the rest of the command line, and check all. Raises Failure."""
        if self.list:
            self._check_list(positional)
        elif len(positional) != 1:
            raise Failure("Invalid number of arguments", hint=f"Try `{program.name()} --help' for more information.")
        else:
            self.image = positional[0]
        if self.tls_creds is not None:
            if self.device is not None and not self.list:
                raise Failure("TLS is not supported with a host device")
            if self.tls_authz is not None and self.list:
                raise Failure("TLS authorization is incompatible with export list")
            if self.tls_hostname is not None and not self.list:
                raise Failure("TLS hostname is incompatible with serving an image")
        else:
            for name, value in (("tls-authz", self.tls_authz), ("tls-hostname", self.tls_hostname)):
                if value is not None:
                    raise Failure(f"--{name} is not permitted without --tls-creds")
        if self.image_opts and self.format is not None:
            raise Failure("--image-opts and -f are mutually exclusive")
        for what, text in (("name", self.export), ("description", self.description)):
            if text is not None and len(text.encode("utf-8", "surrogateescape")) > 4096:
                raise Failure(f"export {what} '{text}' too long")

    def _check_list(self, positional: list[str]) -> None:
        if positional:
            raise Failure("List mode is incompatible with a file name")
        if any(getattr(self, name) not in (None, False, []) for name in _PER_DEVICE):
            raise Failure("List mode is incompatible with per-device settings")
        if self.fork:
            raise Failure("List mode is incompatible with forking")

    def check_activated(self) -> None:
        """Raise Failure for what makes no sense with sockets that the process was started with."""
        for given, text in (
            (self.device, "NBD device can't be set when using socket activation"),
            (self.socket, "Unix socket can't be set when using socket activation"),
            (self.bind, "The interface can't be set when using socket activation"),
            (self.port, "TCP port number can't be set when using socket activation"),
            (self.selinux, "SELinux label can't be set when using socket activation"),
            (self.list or None, "List mode is incompatible with socket activation"),
        ):
            if given is not None:
                raise Failure(text)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the image's node."""
        found: dict[str, Any] = {"discard": self.discard or "ignore"}
        if self.detect_zeroes is not None:
            found["detect-zeroes"] = self.detect_zeroes
        return found

    @property
    def host(self) -> str:
        """Return the address to listen on, or to ask."""
        return self.bind if self.bind is not None else "0.0.0.0"

    @property
    def service(self) -> str:
        """Return the port, or the name of one."""
        return self.port if self.port is not None else str(DEFAULT_PORT)


def _number(text: str, what: str, *, negative: bool = False) -> int:
    digits = text.strip()
    try:
        # C's strtol takes hexadecimal and octal numbers, too.
        value = int(digits, 0) if not digits.lstrip("+-").startswith("0") or "x" in digits else int(digits, 8)
    except ValueError:
        raise Failure(f"Invalid {what} '{text}'") from None
    if (value < 0 and not negative) or abs(value) >= 1 << 63:
        raise Failure(f"Invalid {what} '{text}'")
    return value


def snapshot_of(text: str) -> dict[str, str] | str:
    """Return what ``-l`` names: an id or a name, or {"id": ..., "name": ...} where it says which."""
    if not text.startswith("snapshot."):
        return text
    from cowhand.cli.compat.optionstrings import parse

    found: dict[str, str] = {}
    for pair in parse(text):
        if pair.name not in ("snapshot.id", "snapshot.name"):
            program.error(f"Invalid parameter '{pair.name}'")
            raise Failure(f"Failed in parsing snapshot param `{text}'")
        found[pair.name.removeprefix("snapshot.")] = str(pair.value)
    return found
