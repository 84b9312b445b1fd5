"""How the I/O tool opens an image: from its command line, and by its commands ``open`` and ``reopen``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cowhand.block.node.options import CACHE_MODES
from cowhand.block.opening.filenames import FileName
from cowhand.cli.compat.images import describe, open_disk, open_temporary, refuse_unsharing, says_read_only
from cowhand.cli.compat.img.records import whole_sectors
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.disk import Disk

_DISCARD = {"ignore": "ignore", "off": "ignore", "unmap": "unmap", "on": "unmap"}
_AIO = ("threads", "native", "io_uring")
_DIRECT = ("none", "off", "directsync")


class How:
    """The switches of an opening; ``options`` are those of ``-o``."""

    def __init__(self) -> None:
        self.format: str | None = None
        self.image_opts = False
        self.writable = True
        self.snapshot = False
        self.force_share = False
        self.copy_on_read = False
        self.cache = "writethrough"
        self.discard = "unmap"
        self.aio = "threads"
        self.options: dict[str, Any] = {}

    def take(self, letter: str, value: str) -> None:
        """Set what option *letter* says. Raises Failure."""
        match letter:
            case "r":
                self.writable = False
            case "s":
                self.snapshot = True
            case "n":
                self.cache = "none"
            case "C":
                self.copy_on_read = True
            case "U":
                self.force_share = True
            case "k":
                self.aio = "native"
            case "t":
                if value not in CACHE_MODES:
                    raise Failure(f"Invalid cache option: {value}")
                self.cache = value
            case "d":
                if value not in _DISCARD:
                    raise Failure(f"Invalid discard option: {value}")
                self.discard = _DISCARD[value]
            case "i":
                if value not in _AIO:
                    raise Failure(f"Invalid aio option: {value}")
                self.aio = value


def open_as(name: str | None, how: How) -> Disk:
    """Open *name*, or what the options of *how* describe without a name. Raises Failure in the tool's words."""
    shown = f" device {name}" if name is not None and not how.image_opts else ""
    before = f"can't open{shown}: "
    if how.force_share:
        refuse_unsharing(name if name is not None and how.image_opts else how.options, "-U")
    try:
        if how.aio == "native" and how.cache not in _DIRECT:
            raise Failure("aio=native was specified, but it requires cache.direct=on, which was not specified.")
        disk = _open(_what(name, how), how)
        return _copying(disk) if how.copy_on_read else disk
    except CowhandError as error:
        raise Failure(f"{before}{error.qemu()}") from error
    except Failure as failure:
        raise Failure(f"{before}{failure.message}") from None


def _copying(disk: Disk) -> Disk:
    """Put a filter over *disk*'s root that copies what is read from below."""
    from cowhand.block.filters.copy_on_read import CopyOnReadNode, CopyOnReadOptions
    from cowhand.block.graph import graph
    from cowhand.block.node.node import Role

    root = disk.root
    if disk.read_only:
        disk.close()
        raise Failure("Can't use copy-on-read on read-only device")
    node = CopyOnReadNode(CopyOnReadOptions())
    graph.attach(node, "file", root, Role.FILTERED)
    node.start()
    disk.replace_root(node)
    return disk


def _what(name: str | None, how: How) -> str | Mapping[str, Any]:
    if how.image_opts:
        assert name is not None
        return describe(name, image_opts=True, implied=None)
    if name is not None and not how.options:
        return describe(name, image_opts=False)
    given = dict(how.options)
    if name is not None:
        told = describe(name, image_opts=False)
        if "file.filename" in given:
            raise Failure("Can't specify 'file' and 'filename' options at the same time")
        if isinstance(told, Mapping):
            return {**told, **given}
        given["file.filename" if any(key.startswith("file.") for key in given) else "filename"] = FileName(told)
    elif "driver" not in given and not any(key.startswith("file") for key in given):
        raise Failure("Must specify either driver or file")
    return given


def _open(what: str | Mapping[str, Any], how: How) -> Disk:
    options = {"discard": how.discard}
    if not how.snapshot:
        return _checked(
            open_disk(
                what,
                format=how.format,
                writable=_writable(what, how),
                cache=how.cache,
                force_share=how.force_share,
                options=options,
            )
        )
    return open_temporary(what, format=how.format, writable=how.writable, cache=how.cache, options=options)


def _writable(what: str | Mapping[str, Any], how: How) -> bool:
    """Tell whether the image is opened for writing: the option "read-only" counts more than the switch, but does not contradict it."""
    if not isinstance(what, dict) or "read-only" not in what:
        return how.writable
    writable = not says_read_only(what)
    del what["read-only"]
    if how.writable and not writable:
        raise Failure("Block node is read-only")
    return writable


def _checked(disk: Disk) -> Disk:
    """Return *disk*, or close it where a write would have to reach past its end to fill a block."""
    block = disk.root.limits.request_alignment
    if not disk.read_only and whole_sectors(disk.size) % block:
        disk.close()
        raise Failure(
            "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"
        )
    return disk
