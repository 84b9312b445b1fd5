"""Making images: what is the same for every format and protocol.

A format's class declares ``create_options`` and formats an open, empty, writable protocol node in ``create``; a protocol's class makes the
file. Here options are checked, the size is taken from the backing file, and an existing image is left alone unless the caller insists.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from cowhand.block.node.create_options import FILE_OPTIONS, CreateOption, merge, parse, with_defaults
from cowhand.block.opening.filenames import combine, has_protocol
from cowhand.core.errors import CowhandError, ImageExists, InvalidArgument, NotSupported
from cowhand.core.units import MAX_SIZE, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from cowhand.block.node.guard import Guard
    from cowhand.block.node.node import BlockNode
    from cowhand.block.opening.policy import Policy
    from cowhand.block.opening.registry import DriverEntry, Registry
    from cowhand.image.placement import Placement

SECTOR = 512
#: Options that the file takes, never the format, when both declare them or only the file does.
_FILE_ONLY = ("nocow", "extent_size_hint")
#: Protocols that can be named in the place of a format: bytes without any, which a raw image is too.
_BARE = ("file", "host_device")
_DEVICE_OPTIONS = (
    FILE_OPTIONS[0],
    CreateOption("preallocation", "str", help="Preallocation mode (allowed values: off)"),
)
#: Options of making an image that opening it takes as well.
_SECRETS = ("key-secret", "encrypt.key-secret")


class Creator(Protocol):
    """What a format's class offers when it can make images."""

    create_options: ClassVar[tuple[CreateOption, ...]]

    @classmethod
    def create(cls, file: BlockNode, size: int, options: Mapping[str, Any]) -> None:
        """Make the empty, writable *file* an image of *size* bytes; *options* hold values of the declared kinds, defaults filled in.

        A class may have ``check_creation(size, options)`` as well, which raises what can be known before a file is touched.
        """


class Creation:
    """An image that is about to be made: checked, nothing written yet. ``options`` are complete, in the order that the drivers declare.

    Made by :func:`prepare`; :meth:`run` makes the image.
    """

    def __init__(
        self,
        filename: str,
        format: DriverEntry,
        protocol: DriverEntry,
        size: int,
        options: dict[str, Any],
        registry: Registry,
    ) -> None:
        self.filename = filename
        self.format = format
        self.protocol = protocol
        self.size = size
        self.options = options
        self._registry = registry
        self._backing_facts: dict[str, Any] = {}

    def line(self) -> str:
        """Return the line that qemu-img prints of it: "Formatting 'x', fmt=qcow2 cluster_size=65536 ..."."""
        parts = [f"Formatting '{self.filename}', fmt={self.format.name}"]
        for name, value in self.options.items():
            if isinstance(value, bool):
                value = "on" if value else "off"
            parts.append(f"{name}={str(value).replace(',', ',,')}")
        return " ".join(parts)

    def opening_options(self) -> dict[str, Any]:
        """Return the options without which what is made cannot be opened: the ids of its secrets."""
        return {name: self.options[name] for name in _SECRETS if self.options.get(name) is not None}

    @property
    def local(self) -> str | None:
        """The path of the image where it is a file of this system, else None."""
        return local_path(self.filename)

    @property
    def local_data(self) -> str | None:
        """The path of the data file where there is one, and it is a file of this system, else None."""
        name = self.options.get("data_file")
        return local_path(name) if name else None

    @property
    def data_protocol(self) -> str:
        """The name of the data file's protocol. Raises InvalidArgument and NotSupported."""
        return protocol_of(self.options["data_file"], self._registry).name

    @property
    def names_relative(self) -> bool:
        """Whether the image will name a backing file relative to its own folder."""
        name: str = self.options.get("backing_file") or ""
        return bool(name) and not os.path.isabs(name) and not has_protocol(name) and not name.startswith("json:")

    def refuse_loop(self, *, force: bool = False) -> None:
        """Raise ChainLoop when the image would read through itself; *force* only matters where that cannot be found out (SearchIncomplete)."""
        from cowhand.block.links.reading import refuse_loop
        from cowhand.block.links.records import BACKING, Link

        name = self.options.get("backing_file")
        if name:
            # The data file is written by the image, too: what reads through it may not lie under it.
            for own in self._own_files():
                refuse_loop(own, Link(BACKING, name, self.options.get("backing_fmt")), self._registry, force=force)

    def refuse_harm(self, guard: Guard, *, force: bool = False) -> None:
        """Raise what :meth:`refuse_loop` does, and what *guard* raises when others show what would be overwritten."""
        from cowhand.block.node.guard import Change

        self.refuse_loop(force=force)
        files = tuple(own for own in self._own_files(kept=False) if os.path.exists(own))
        if files:
            guard.refuse(Change(f"overwriting '{self.filename}'", files, files), force=force)

    def _own_files(self, *, kept: bool = True) -> list[str]:
        """Return the local files that will be the image's; *kept*: also a data file whose content stays."""
        names = [self.filename]
        data_file = self.options.get("data_file")
        if data_file and (kept or not self.options.get("keep_data_file")):
            names.append(data_file)
        return [path for path in map(local_path, names) if path] + self.extents()

    def extents(self) -> list[str]:
        """Return the local files beside the image's own that it will be made of."""
        own = local_path(self.filename)
        if own is None or self.format.kind != "format":
            return []
        return self.format.load().extent_names(own, self.size, self.options)

    def run(
        self,
        *,
        overwrite: bool = False,
        like_qemu: bool = False,
        warn: Callable[[str], None] | None = None,
        force: bool = False,
        guard: Guard | None = None,
    ) -> None:
        """Make the image. Raises ImageExists when something has that name and *overwrite* is not set; then nothing was changed.

        A new file appears under its name when it is complete, and so it does in the place of another one, whose mode, owner and attributes it
        keeps. A device, and a file that cannot be replaced (several hard links, another owner), is formatted in place if nobody uses it, which
        *warn* hears before; so is every existing file with *like_qemu*, where what fails is removed if it is empty. *guard* and *force* as in
        :func:`create`.
        """
        from cowhand.image.placement import Placement

        if guard is not None:
            if self.local is not None and os.path.lexists(self.local) and not overwrite:
                raise _exists(self.local)
            self.refuse_harm(guard, force=force)
        try:
            self.check_places(overwrite=overwrite)
        except CowhandError:
            if like_qemu and overwrite and self.local is not None and _is_empty(self.local):
                os.unlink(self.local)
            raise
        with Placement(self, overwrite=overwrite, like_qemu=like_qemu, warn=warn) as place:
            self.write(place)
            place.appear()

    def _creator(self) -> type[Creator]:
        format = self._registry.get("raw") if self.format.kind == "protocol" else self.format
        return cast("type[Creator]", format.load())

    def _no_device(self) -> CowhandError:
        name = self.filename
        reason = f"Could not open '{name}': {'Is a directory' if os.path.isdir(name) else 'No such file or directory'}"
        if os.path.isfile(name):
            reason = f"'host_device' driver requires '{name}' to be either a character or block device"
        text = f"Protocol driver 'host_device' does not support image creation, and opening the image failed: {reason}"
        return NotSupported(f"'{name}' is no device", qemu=text, path=name)

    def check_places(self, *, overwrite: bool) -> None:
        """Raise when the image, or its data file, cannot be made: it exists and is not to be *overwritten*, or options are wrong."""
        if self.format.name == "host_device" != self.protocol.name:
            raise self._no_device()
        if overwrite and self.local is not None:
            from cowhand.block.locking import device_use

            device_use.check(self.local)
        if self.options.get("data_file") == "":
            raise InvalidArgument("the data file has no name", qemu="Could not create '': No such file or directory")
        below = self.options.get("backing_fmt")
        if below is not None and self.options.get("backing_file") is None and self._registry.find(below) is None:
            # Without a backing file nobody has looked for the driver yet.
            raise InvalidArgument(f"Parameter 'backing-fmt' does not accept value '{below}'")
        check = getattr(self._creator(), "check_creation", None)
        if not overwrite and (extents := self.extents()):
            from cowhand.image.extents import refuse_existing

            refuse_existing(extents)
        own = local_path(self.filename)
        if check is not None and (own is None or os.path.isdir(os.path.dirname(own) or ".")):
            check(self.size, self.options)  # before an existing image is emptied
        name = self.options.get("data_file")
        path = local_path(name) if name else None
        if not path:
            return
        own = local_path(self.filename)
        if own is not None and os.path.realpath(path) == os.path.realpath(own):
            raise InvalidArgument("an image cannot be its own data file", path=path)
        if os.path.exists(path) and not overwrite and not self.options.get("keep_data_file"):
            raise ImageExists(
                f"the data file '{path}' exists already", path=path, hint="Keep its content with keep_data_file=on, or insist on overwriting it."
            )  # fmt: skip

    def write(self, place: Placement, *, durable: bool = True) -> None:
        """Make the image where *place* says; what is written in place, and is empty or new, is removed on an error.

        Without *durable* nothing waits for the medium.
        """
        path = place.path
        made = not os.path.lexists(path)
        self._make_file(path)
        try:
            self._format_file(place, durable)
        except BaseException:
            if place.image is None and local_path(path) is not None and (made or _is_empty(path)):
                os.unlink(path)
            raise

    def _make_file(self, path: str) -> None:
        if self.protocol.name == "host_device":
            return  # a device is there already
        cls: Any = self.protocol.load()
        settings = {name: self.options[name] for name in _FILE_ONLY if self.options.get(name) is not None}
        cls.create(path, 0, **settings)

    def _format_file(self, place: Placement, durable: bool) -> None:
        from cowhand.block.graph import graph
        from cowhand.block.opening.filenames import FileName
        from cowhand.block.opening.opening import Opening

        node = Opening(self._registry, backing=False).open(
            {
                "driver": self.protocol.name,
                "filename": FileName(place.path),
                "read-only": False,
                "discard": "unmap",
                "cache.no-flush": not durable,
            }
        )
        try:
            creator = self._creator()
            options = {name: value for name, value in self.options.items() if name not in _FILE_ONLY and name != "size"}
            if options.get("data_file"):
                self._with_data_file(creator, node, options, place.data_path, durable)
            elif extents := self.extents():
                self._with_extents(node, extents, options, durable)
            else:
                creator.create(node, self.size, {**options, **self._backing_facts, "image_name": self.filename})
        finally:
            graph.close_node(node)

    def _with_extents(self, node: BlockNode, names: list[str], options: dict[str, Any], durable: bool) -> None:
        from cowhand.image.extents import Extents

        options = {**options, **self._backing_facts, "image_name": self.filename}
        with Extents(self.format.load(), names, self._registry, durable=durable) as extents:
            extents.make(self.size, options)
            self._creator().create(node, self.size, options)

    def _with_data_file(
        self, creator: type[Creator], node: BlockNode, options: dict[str, Any], data_path: str | None, durable: bool
    ) -> None:
        """Format *node* with the data file that *options* name; it is made if need be, and emptied by the format once nothing was refused."""
        from cowhand.block.graph import graph
        from cowhand.block.opening.filenames import FileName
        from cowhand.block.opening.opening import Opening

        name = data_path or options["data_file"]
        protocol = protocol_of(name, self._registry)
        path = local_path(name)
        made = path is not None and not os.path.lexists(path)
        if (made or path is None) and not options.get("keep_data_file") and protocol.name != "host_device":
            cls: Any = protocol.load()
            cls.create(name, 0)
        try:
            data = Opening(self._registry, backing=False).open(
                {"driver": protocol.name, "filename": FileName(name), "read-only": False, "cache.no-flush": not durable}
            )
            try:
                creator.create(node, self.size, {**options, "data_file_node": data})
            finally:
                if not data.closed:
                    graph.close_node(data)
        except BaseException:
            if made and path is not None and os.path.lexists(path):
                os.unlink(path)
            raise


def prepare(
    filename: str | os.PathLike[str],
    format: str = "raw",
    size: int | str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    backing: str | None = None,
    backing_format: str | None = None,
    open_backing: bool = True,
    registry: Registry | None = None,
    policy: Policy | None = None,
) -> Creation:
    """Check what is to be made, and complete it; nothing is written. *size* comes from the backing file when it is not given.

    *options* are the format's and the file's by QEMU's names, values as strings or already converted. *backing* is written into the image as
    it is given, and looked up relative to the image; with ``open_backing=False`` it need not exist. Raises InvalidArgument, NotSupported,
    ImageNotFound and what opening the backing file raises, with QEMU's words in ``qemu()``.
    """
    registry = registry or _built_in()
    filename = os.fspath(filename)
    if "\0" in filename:
        raise InvalidArgument("a file name cannot contain a zero byte")
    entry = format_of(format, registry)
    protocol = protocol_of(filename, registry)
    known = merge(create_options_of(entry), FILE_OPTIONS)
    chosen = parse(known, options or {})
    if size is not None:
        if "size" in chosen:
            raise InvalidArgument("The image size must be specified only once")
        chosen["size"] = parse_size(size)
    for name, value, text in (
        ("backing_file", backing, "Backing file not supported"),
        ("backing_fmt", backing_format, "Backing file format not supported"),
    ):
        if value is not None:
            if name not in known:
                raise NotSupported(f"{text} for file format '{entry.name}'")
            chosen[name] = value
    facts: dict[str, Any] = {}
    if "backing_file" in chosen:
        facts = _check_backing(filename, entry, chosen, open_backing, registry, policy)
    if "size" not in chosen:
        raise InvalidArgument("Image creation needs a size parameter", hint="Give the size, such as 10G.")
    if chosen["size"] > MAX_SIZE:
        raise InvalidArgument(f"The image size is too large for file format '{entry.name}'")
    complete = with_defaults(known, chosen)
    creation = Creation(filename, entry, protocol, -(-chosen["size"] // SECTOR) * SECTOR, complete, registry)
    creation._backing_facts = facts
    return creation


def create(
    filename: str | os.PathLike[str],
    format: str = "raw",
    size: int | str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    like_qemu: bool = False,
    warn: Callable[[str], None] | None = None,
    backing: str | None = None,
    backing_format: str | None = None,
    open_backing: bool = True,
    registry: Registry | None = None,
    policy: Policy | None = None,
    force: bool = False,
    guard: Guard | None = None,
) -> Creation:
    """Make an image and return what was made.

    See :func:`prepare` for the arguments, and :meth:`Creation.run` for *overwrite*, *like_qemu* and *warn*. *guard* refuses a loop (ChainLoop,
    also with *force*), and to overwrite what other images read through (OverlaysExist, SearchIncomplete) unless *force* is set.
    ``cowhand.create`` always has one.
    """
    creation = prepare(
        filename,
        format,
        size,
        options,
        backing=backing,
        backing_format=backing_format,
        open_backing=open_backing,
        registry=registry,
        policy=policy,
    )
    creation.run(overwrite=overwrite, like_qemu=like_qemu, warn=warn, force=force, guard=guard)
    return creation


def create_options_of(entry: DriverEntry) -> tuple[CreateOption, ...]:
    """Return what the format takes at creation; raises NotSupported when it makes no images."""
    if entry.kind == "protocol" and entry.name in _BARE:
        return _DEVICE_OPTIONS if entry.name == "host_device" else FILE_OPTIONS
    if entry.kind != "format" or not entry.creatable:
        raise NotSupported(f"Format driver '{entry.name}' does not support image creation")
    return cast("type[Creator]", entry.load()).create_options


def local_path(filename: str) -> str | None:
    """Return the path of *filename* where it names a file of this system, None for everything else."""
    if filename.startswith("file:"):
        return filename[5:]
    return None if has_protocol(filename) or filename.startswith("json:") else filename


def _exists(path: str) -> ImageExists:
    return ImageExists(f"'{path}' exists already", path=path, hint="Choose another name, or insist on overwriting it.")


def _is_empty(path: str) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and not status.st_size


def protocol_of(filename: str, registry: Registry) -> DriverEntry:
    """Return the protocol driver that makes *filename*; raises InvalidArgument and NotSupported."""
    path = local_path(filename)
    if path is None:
        prefix = filename.split(":", 1)[0]
        entry = registry.by_prefix(prefix)
        if entry is None or entry.kind != "protocol":
            raise InvalidArgument(f"Unknown protocol '{prefix}'", path=filename)
        if not entry.creatable:
            raise NotSupported(f"Protocol driver '{entry.name}' does not support image creation")
        return entry
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        mode = 0
    return registry.get("host_device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "file")


def _built_in() -> Registry:
    from cowhand.drivers import REGISTRY

    return REGISTRY


def format_of(name: str, registry: Registry) -> DriverEntry:
    """Return the driver of that name; raises InvalidArgument in the words that creating uses."""
    entry = registry.find(name)
    if entry is None:
        known = ", ".join(sorted(entry.name for entry in registry if entry.kind == "format"))
        raise InvalidArgument(f"Unknown file format '{name}'", hint=f"Known formats: {known}")
    return entry


def _check_backing(
    filename: str,
    entry: DriverEntry,
    chosen: dict[str, Any],
    open_backing: bool,
    registry: Registry,
    policy: Policy | None,
) -> dict[str, Any]:
    """Check the backing file of *chosen* and take the size from it where none is given; return what the format keeps of it."""
    name, format = chosen["backing_file"], chosen.get("backing_fmt")
    missing = "Backing file specified without backing format"
    if name == filename:
        raise InvalidArgument("Error: Trying to create an image with the same filename as the backing file")
    if not name:
        raise InvalidArgument("Expected backing file name, got empty string")
    if not open_backing:
        if format is None:
            raise InvalidArgument(missing, hint="Name the backing file's format as well.")
        return {}
    from cowhand.block.graph import graph
    from cowhand.block.opening.opening import Opening
    from cowhand.block.opening.policy import DEFAULT

    options: dict[str, Any] = {"read-only": True, "force-share": True}
    opening = Opening(registry, policy or DEFAULT)
    opening.sealed = True  # its size is all that matters
    try:
        node = opening.open(combine(filename, name), format=format, options=options)
    except CowhandError as error:
        error.qemu_message += "\nCould not open backing image."
        raise error.within(f"the backing file of '{filename}'") from None
    try:
        if format is None:
            detected = f"Detected format of {node.driver}."
            raise InvalidArgument(missing, qemu=f"{missing}\n{detected}", hint=f"{detected} Name it if that is right.")
        chosen.setdefault("size", -(-node.size // SECTOR) * SECTOR)
        return entry.load().backing_facts(node) if entry.kind == "format" else {}
    finally:
        graph.close_node(node)
