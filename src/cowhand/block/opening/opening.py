"""Opening: from a file name or a description to a graph of nodes.

A description is QEMU's: a dictionary with "driver" and the driver's options, children nested or as dotted names ("file.filename"). A name is
a path, a "PROTOCOL:..." string, or "json:{...}". What the user named is opened as asked; what an image names goes through the policy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from cowhand.block.graph import graph
from cowhand.block.graph.names import NodeNames, check_name
from cowhand.block.node.node import BlockNode, Child, Role
from cowhand.block.node.options import NodeOptions, check_zero_detection, declared, flatten, is_on, nest, parse
from cowhand.block.opening.filenames import FileName, combine, has_protocol, location
from cowhand.block.opening.lookalikes import not_an_image
from cowhand.block.opening.policy import DEFAULT, Policy
from cowhand.block.opening.registry import PROBE_SIZE, DriverEntry, Registry
from cowhand.block.opening.signatures import looks_like_a_format
from cowhand.core.errors import (
    AccessDenied,
    CowhandError,
    ImageInUse,
    InvalidArgument,
    InvalidFormat,
    PolicyRefused,
    ReadOnly,
    UnsupportedFeature,
)

#: Options that a child takes over from its parent unless its own description says otherwise.
_INHERITED = ("cache_direct", "cache_no_flush", "force_share")


class _Path(NamedTuple):
    """A file, identified by device and inode, and those whose backing it is."""

    key: tuple[int, int]
    above: _Path | None
    depth: int


class _Asker(NamedTuple):
    """The image (its name) on whose word something is opened, and what that is to it."""

    owner: str
    what: str


class _Waiting(NamedTuple):
    """A backing file that is to be opened; ``asker`` is None when the user named it."""

    node: BlockNode
    description: Mapping[str, Any] | str | BlockNode
    reference: str
    path: _Path | None
    asker: _Asker | None
    layer: int = 1


class Opening:
    """One act of opening a graph: what it was asked, what it has opened so far, how deep it is. Used by one thread, once."""

    def __init__(
        self, registry: Registry, policy: Policy = DEFAULT, *, backing: bool = True, names: NodeNames | None = None
    ) -> None:
        self.registry = registry
        self.policy = policy
        self.names = (
            names  #: where nodes become known by name, and are referred to; None: a child's string is a file name
        )
        self.with_backing = backing  #: False opens a format without what lies under it
        self.opened: list[BlockNode] = []
        self.like_qemu = False  #: a repair does what QEMU's does, also where that is not the best
        self.for_repair = False  #: check and repair open what ordinary users are refused (corrupt, dirty)
        self.sealed = False  #: nobody will ask for data: encrypted images need no secret
        self.writable_layer = 0  #: which layer below the top is opened for writing, too: 1 is the backing file, 0 none
        self.probing = False  #: a filter that wants its child's format looked for, where none is named, sets this around its opening
        self._waiting: list[_Waiting] = []
        self._checks: list[Callable[[], object]] = []
        self._path: _Path | None = None  #: the files above the node that is being opened
        self._asker: _Asker | None = None  #: whose word is being followed, None for the user's
        self.nesting = 0  #: how many nodes stand over the one that is being opened, in one layer
        self._layer = 0  #: how many layers lie above the node that is being opened

    @property
    def unlocks(self) -> bool:
        """Whether encrypted images are to be opened with their secrets at once; otherwise they are when data is first asked for."""
        return self.with_backing and not self.for_repair and not self.sealed

    # -- from outside

    def open(
        self,
        what: str | os.PathLike[str] | Mapping[str, Any],
        *,
        format: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> BlockNode:
        """Open *what* the user named and return its root node, which belongs to nobody yet; on an error nothing stays open.

        *format* names the format instead of probing; *options* are common options (fields of NodeOptions by QEMU's names).
        """
        description = dict(what) if isinstance(what, Mapping) else self.describe(os.fspath(what))
        description.update(options or {})
        if format is not None:
            if self._is_file(description, format, named=not isinstance(what, Mapping)):
                description = {"driver": format, "file": description}
                for name in declared(NodeOptions):
                    if name in description["file"]:
                        description[name] = description["file"].pop(name)
            else:
                description["driver"] = format
                if not isinstance(description.get("filename", FileName()), FileName) and "file" not in description:
                    description["file"] = {"filename": description.pop("filename")}
        try:
            node = self.node(description, NodeOptions())
            self._open_waiting()
            for check in self._checks:
                check()
        except BaseException:
            self.abandon()
            raise
        return node

    def open_implied(
        self,
        owner: str,
        reference: str,
        path: str,
        format: str | None,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> BlockNode:
        """Open alone the backing file that *owner* names as *reference*, which means *path*, if the policy lets it; raises PolicyRefused."""
        what = "backing file"
        description = self._implied(owner, reference, path, format, what)
        self._asker = _Asker(owner, what)
        return self.open(description, options=options)

    def abandon(self) -> None:
        """Close everything that was opened (an error came later)."""
        for node in self.opened:
            if not node.closed and not node.parents:
                try:
                    graph.close_node(node)
                except CowhandError:
                    continue  # the error that led here is the one to tell
        self.opened.clear()

    def describe(self, name: str) -> dict[str, Any]:
        """Return the description that the file *name* means."""
        if name.startswith("json:"):
            from cowhand.block.opening.json_names import parse_json_name

            return parse_json_name(name)
        return {"filename": FileName(name)}

    # -- for drivers

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Open, inside the ``with`` block, what stands beside what comes after it: both may be the same file without being a loop."""
        before = self._path
        try:
            yield
        finally:
            self._path = before

    def afterwards(self, check: Callable[[], object]) -> None:
        """Have *check* called when the whole graph is there, backing files too. It may raise."""
        self._checks.append(check)

    @property
    def implied(self) -> bool:
        """Whether what is being opened was named by an image, and not by the user."""
        return self._asker is not None

    def track(self, node: BlockNode) -> None:
        """Close *node*, with its children, if this opening fails; a driver calls it before it opens children."""
        if node not in self.opened:
            if self.names is not None:
                self.names.add(node)
            self.opened.append(node)

    def node(self, description: Mapping[str, Any], parent: NodeOptions, *, role: Role | None = None) -> BlockNode:
        """Open one description. *role* is what it will be to its parent: PRIMARY and DATA children are protocols unless they say more."""
        given = nest(description)
        for name in ("cache", "cache.direct"):
            if isinstance(given.get(name), dict):
                for key, value in given.pop(name).items():
                    given[f"{name}.{key}"] = value
        for name in ("driver", "filename"):
            if not isinstance(given.get(name, ""), str):
                raise InvalidArgument(f"Parameter '{name}' expects a string")
        driver = given.pop("driver", None)
        if driver is None and "filename" in given and str(given["filename"]).startswith("json:"):
            inner = self.describe(str(given.pop("filename")))
            return self.node({**inner, **given}, parent, role=role)
        wants_format = role in (None, Role.BACKING) or (role is Role.FILTERED and self.probing)
        entry = self.registry.get(driver) if driver is not None else None
        if entry is not None:
            return self._make(entry, given, parent, role)
        if wants_format and isinstance(given.get("file"), (dict, BlockNode)):
            return self._probed_over(given, parent, role)
        protocol = self._protocol_of(given)
        if not wants_format:
            return self._make(protocol, given, parent, role)
        file = self._make(protocol, self._common_only(given, below=True), parent, Role.PRIMARY)
        return self._probed(file, given, parent, role)

    def child(
        self,
        node: BlockNode,
        name: str,
        description: Mapping[str, Any] | str | BlockNode,
        role: Role,
        *,
        read_only: bool | None = None,
    ) -> Child:
        """Open *description* (or take an open node) as child *name* of *node*. Backing files and read-only parents open for reading only."""
        if isinstance(description, BlockNode):
            return graph.attach(node, name, description, role)
        if isinstance(description, str) and self._asker is not None:
            raise InvalidArgument(
                f"Cannot find device='' nor node-name='{description}'", hint="An image cannot name nodes of this process.", path=self._asker.owner
            )  # fmt: skip
        if isinstance(description, str) and self.names is not None:
            known = self.names.find(description)
            if known is None:
                raise InvalidArgument(f"Cannot find device='{description}' nor node-name='{description}'")
            return graph.attach(node, name, known, role)
        if not isinstance(description, (str, Mapping)):
            raise InvalidArgument(f"Parameter '{name}' expects a description of a node")
        given = dict(self.describe(description) if isinstance(description, str) else description)
        if read_only is None:
            read_only = role is Role.BACKING or not node.writable
        if is_on("read-only", given.get("read-only")) is None or read_only:
            given["read-only"] = read_only
        given.setdefault("discard", "unmap")  # it is the parent's to say which discards go down
        self.nesting += 1
        try:
            opened = self.node(given, node.options, role=role)
        finally:
            self.nesting -= 1
        if role is Role.PRIMARY and node.writable and not opened.writable:
            raise ReadOnly(
                f"'{node.driver}' is to be written, but its '{name}' is read-only", qemu="Block node is read-only", path=opened.filename,
            )  # fmt: skip
        return graph.attach(node, name, opened, role)

    def backing(self, node: BlockNode, description: Mapping[str, Any] | str | BlockNode) -> None:
        """Open what the user gave as *node*'s backing file once *node* itself is complete (a chain is opened without recursion)."""
        self._waiting.append(_Waiting(node, description, "", self._path, self._asker, self._layer + 1))

    def implicit_backing(
        self, node: BlockNode, reference: str, format: str | None, given: Mapping[str, Any] | None = None
    ) -> None:
        """The same for the backing file that *node*'s header names as *reference*, if the policy lets it; raises PolicyRefused.

        *given* are options that the user gave for it beside.
        """
        if given and "driver" in given:
            format = None
        owner, what = node.filename, "backing file"
        implied = self._implied(owner, reference, combine(location(node), reference), format, what)
        description = {**implied, **(given or {})}
        asker = _Asker(owner, what)
        self._waiting.append(_Waiting(node, description, reference, self._path, asker, self._layer + 1))

    def implicit_file(self, node: BlockNode, name: str, path: str, role: Role, *, what: str) -> Child:
        """Open at once another file that *node*'s header names (a data file), if the policy lets it; raises PolicyRefused.

        The name is a plain *path*, whatever it looks like: relative to the working directory, of a file or a device.
        """
        owner = node.filename
        if has_protocol(path):
            path = "./" + path
        self.policy.check_implicit(path, owner=owner, what=what)
        driver = self._protocol_of({"filename": path}).name
        before, self._asker = self._asker, _Asker(owner, what)
        try:
            return self.child(node, name, {"driver": driver, "filename": path}, role)
        finally:
            self._asker = before

    def _is_file(self, description: Mapping[str, Any], format: str, *, named: bool) -> bool:
        """Tell whether what is *described* lies under the *format* that was asked for.

        In a ``json:`` name (*named*) a driver that is a format gives way to the one that is told beside, as in QEMU.
        """
        driver = description.get("driver")
        if driver in (None, format):
            return False
        entry = self.registry.find(driver) if named and isinstance(driver, str) else None
        return entry is None or entry.kind != "format"

    def _implied(self, owner: str, reference: str, path: str, format: str | None, what: str) -> dict[str, Any]:
        self.policy.check_implicit(reference, owner=owner, what=what)
        description = self.describe(path)
        if format is not None:
            if self._is_file(description, format, named=True):
                description = {"driver": format, "file": description}
            else:
                description["driver"] = format
        elif not self.policy.probe_backing:
            raise PolicyRefused(f"the {what} '{reference}' has no format recorded and is not probed", path=owner)
        return description

    def _open_waiting(self) -> None:
        while self._waiting:
            waiting = self._waiting.pop()
            self._path, self._asker, self._layer = waiting.path, waiting.asker, waiting.layer
            if self._path is not None and self._path.depth >= self.policy.max_depth:
                raise UnsupportedFeature(
                    f"the chain of images is more than {self.policy.max_depth} deep", path=waiting.node.filename
                )
            try:
                read_only = waiting.layer != self.writable_layer
                self.child(waiting.node, "backing", waiting.description, Role.BACKING, read_only=read_only)
            except CowhandError as error:
                name = waiting.reference or "given"
                where, frame = f"backing file '{name}' of '{waiting.node.filename}'", "Could not open backing file"
                if not read_only and isinstance(error, (ImageInUse, AccessDenied)):
                    # It would have done for reading: QEMU opens it so first, and has no such words when it wants more.
                    error.facts["for_writing"] = True
                    raise error.within(where) from None
                raise error.within(where, qemu=frame) from None

    # -- inside

    def _protocol_of(self, given: Mapping[str, Any]) -> DriverEntry:
        filename = given.get("filename")
        if filename is None:
            raise InvalidArgument(
                "A block device must be specified by a driver or a file name", qemu="Must specify either driver or file"
            )
        if isinstance(filename, FileName) and has_protocol(filename):
            prefix = filename.split(":", 1)[0]
            entry = self.registry.by_prefix(prefix)
            if entry is None:
                hint = f"If that is the name of a file, write ./{filename}" if os.path.exists(filename) else None
                raise InvalidArgument(f"Unknown protocol '{prefix}'", path=filename, hint=hint)
            return entry
        if filename.startswith("/dev/") or os.path.exists(filename):
            import stat

            try:
                mode = os.stat(filename).st_mode
            except OSError:
                mode = 0
            if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
                return self.registry.get("host_device")
        return self.registry.get("file")

    def _probed_over(self, given: dict[str, Any], parent: NodeOptions, role: Role | None) -> BlockNode:
        """Find the format of a description that tells of its file but names no driver; a file name beside it belongs to the file."""
        file = given.pop("file")
        if not isinstance(file, BlockNode):
            below = self._common_only(given, below=True)
            file = self.node({**below, **file}, parent, role=Role.PRIMARY)
        return self._probed(file, given, parent, role)

    def _probed(self, file: BlockNode, given: dict[str, Any], parent: NodeOptions, role: Role | None) -> BlockNode:
        head = bytearray(min(PROBE_SIZE, file.size))
        block = file.limits.request_alignment
        if len(head) % block:
            padded = bytearray(-(-len(head) // block) * block)
            file.read_into(0, padded)
            head = padded[: len(head)]
        elif head:
            file.read_into(0, head)
        entry = self.registry.probe(bytes(head), str(given.get("filename", "")))
        if entry.name == "raw":
            name = looks_like_a_format(bytes(head))
            # QEMU knows one version of LUKS only, and takes any other for a raw disk.
            if name is not None and not (name == "luks" and self.policy.as_qemu):
                raise UnsupportedFeature(
                    f"this is a {name} image, and there is no driver that reads it",
                    path=file.filename,
                    hint="Give the format as raw to look at its bytes as they are.",
                )
            self._refuse_lookalike(file, bytes(head))
        above = self._common_only(given, below=False)
        above["file"] = file
        node = self._make(entry, above, parent, role)
        node.probed = True
        if node.writable:
            node.lane_fd = -1  # what a guess forbids to write would get past the guard there
        return node

    def _refuse_lookalike(self, file: BlockNode, head: bytes) -> None:
        """Raise InvalidFormat where *file*, a raw disk by guess, is none. What a device or an export holds is a disk, whatever is on it."""
        if self.policy.as_qemu or not file.capabilities.resizable:
            return
        found = not_an_image(head, file.filename, file.size)
        if found is not None:
            what, advice = found
            raise InvalidFormat(
                f"this is {what}, and no disk image", path=file.filename, hint=f"{advice} (If its bytes are the disk, say so: format raw.)"
            )  # fmt: skip

    def _common_only(self, given: Mapping[str, Any], *, below: bool) -> dict[str, Any]:
        """Split a description without a driver: what the protocol takes (below) and what the probed format takes."""
        common = declared(NodeOptions)
        if below:
            return {
                n: v for n, v in given.items() if n not in ("node-name", "backing") and (n in common or n == "filename")
            }
        return {n: v for n, v in given.items() if n != "filename"}

    def _make(self, entry: DriverEntry, given: dict[str, Any], parent: NodeOptions, role: Role | None) -> BlockNode:
        cls = entry.load()
        filename = given.get("filename")
        if (
            entry.kind != "protocol" and filename is not None and not entry.prefixes and self.policy.as_qemu
            and not isinstance(filename, FileName)
        ):  # fmt: skip
            raise InvalidArgument(
                "a format takes no 'filename' but a 'file'", qemu='A block device must be specified for "file"'
            )
        if entry.kind != "protocol" and filename is not None and "file" not in given:
            if entry.prefixes:
                given = {**nest(cls.parse_filename(str(given.pop("filename")))), **given}
            elif "image" not in given:
                given["file"] = {"filename": given.pop("filename")}
        elif (
            entry.kind == "protocol"
            and filename is not None
            and (isinstance(filename, FileName) or not cls.named_by_path)
            and has_protocol(str(filename))
        ):
            prefix = str(filename).split(":", 1)[0]
            if prefix in entry.prefixes:
                given = {**given, **cls.parse_filename(str(filename))}
        if self._asker is not None:
            self._ask_policy(entry, given.get("filename"), self._asker)
        names = declared(cls.options_class)
        chosen = {name: given.pop(name) for name in list(given) if name in names}
        for name in given:
            if "." in name and isinstance(given.get(name.partition(".")[0]), str):
                raise InvalidArgument(
                    "Cannot reference an existing block device with additional options or a new filename",
                    hint=f"'{name.partition('.')[0]}' is given both as a name and as a group of options ('{name}').",
                )
        for name in _INHERITED:
            key = "cache." + name[6:].replace("_", "-") if name.startswith("cache_") else name.replace("_", "-")
            if key not in chosen and role is not None and getattr(parent, name):
                chosen[key] = True
        before, self.probing = self.probing, False
        try:
            try:
                options = parse(cls.options_class, chosen, driver=entry.name, kind=entry.kind)
                if options.force_share and not options.read_only and self.policy.as_qemu:
                    raise InvalidArgument("force-share=on can only be used with read-only images")
                check_zero_detection(options)
                self._check_name(options.node_name)
            except InvalidArgument:
                self._complain_of_file(entry, given, parent)
                raise
            node = cls.open(self, options, given)
        finally:
            self.probing = before
        self.track(node)
        self._look_at_file(node)
        if given:
            left = next(iter(flatten(given)), next(iter(given)))
            words = f"Block {entry.kind} '{entry.name}' does not support the option '{left}'"
            qemu = (
                f"Block protocol '{entry.name}' doesn't support the option '{left}'"
                if entry.prefixes
                else f"Block format '{entry.name}' does not support the option '{left}'"
            )
            raise InvalidArgument(words, qemu=qemu)
        return node

    def _complain_of_file(self, entry: DriverEntry, given: Mapping[str, Any], parent: NodeOptions) -> None:
        """Raise what is wrong with the file of a node whose own options are wrong: QEMU opens it before it looks at them."""
        file = given.get("file")
        if self.policy.as_qemu and isinstance(file, Mapping) and not entry.prefixes:
            self.node({"discard": "unmap", **file, "read-only": True}, parent, role=Role.PRIMARY)

    def _check_name(self, name: str | None) -> None:
        """Raise InvalidArgument unless *name* is one for a node, and new."""
        if name is None:
            return
        check_name(name)
        taken = self.names is not None and name in self.names
        if taken or any(node.name == name and not node.closed for node in self.opened):
            raise InvalidArgument(f"Duplicate nodes with node-name='{name}'")

    def _ask_policy(self, entry: DriverEntry, filename: Any, asker: _Asker) -> None:
        """Raise PolicyRefused unless a node of driver *entry*, and the file of that name, may be opened on an image's word."""
        self.policy.check_driver(entry.name, kind=entry.kind, owner=asker.owner, what=asker.what)
        if entry.kind == "protocol" and filename is not None:
            self.policy.check_path(str(filename), owner=asker.owner, what=asker.what)

    def _look_at_file(self, node: BlockNode) -> None:
        """Raise when the file that *node* has open is one that the chain came from, or has become one that the policy does not allow."""
        descriptor = getattr(node, "fd", None)
        if descriptor is None or node.children:
            return
        if self._asker is not None and self.policy.directories is not None and os.path.exists("/proc/self/fd"):
            # A link may have been turned between the look at the name and the opening.
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.policy.check_path(path, owner=self._asker.owner, what=self._asker.what)
        stat = os.fstat(descriptor)
        key = (stat.st_dev, stat.st_ino)
        above = self._path
        depth = above.depth + 1 if above is not None else 0
        while above is not None:
            if above.key == key:
                raise UnsupportedFeature("the chain of backing files comes back to this file", path=node.filename)
            above = above.above
        self._path = _Path(key, self._path, depth)
