"""Opening images for the tools: names, option strings, cache modes, and the words of failures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cowhand.block.node.options import CACHE_MODES
from cowhand.cli.compat import program
from cowhand.cli.compat.optionstrings import as_description, parse
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.node.node import BlockNode


def cache_mode(text: str, what: str = "cache") -> str:
    """Return the cache mode *text*, or fail naming the *what* option ("source cache")."""
    if text not in CACHE_MODES:
        raise Failure(f"Invalid {what} option: {text}")
    return text


def describe(
    name: str, image_opts: bool, implied: str | None = "file", *, has_format: bool = False
) -> str | Mapping[str, Any]:
    """Return what :func:`cowhand.open` takes for the argument *name*. Raises Failure, CowhandError for what is not a description.

    *implied* is the option that a first word without a name sets; with *has_format* the format is told beside.
    """
    if image_opts:
        given: dict[str, Any] = dict(as_description(name, implied))
        reference = given.get("file")
        if isinstance(reference, str):
            if any(key.startswith("file.") for key in given):
                raise Failure("Cannot reference an existing block device with additional options or a new filename")
            raise Failure(f"Cannot find device='{reference}' nor node-name='{reference}'")
        for name, value in given.items():
            if value == "" and (name == "backing" or name.endswith(".backing")):
                program.warning('Use of "backing": "" is deprecated; use "backing": null instead')
                given[name] = None
        if "driver" not in given and not any(key.startswith("file.") for key in given):
            raise Failure("Must specify either driver or file")
        says_read_only(given)
        return given
    if name.startswith("json:"):
        return _parse_json(name, has_format)
    return name


def described(name: str, image_opts: bool, *, has_format: bool = False) -> str | Mapping[str, Any]:
    """The same, in the form in which the library's functions take it."""
    what = describe(name, image_opts, has_format=has_format)
    return _without_filename(what) if isinstance(what, Mapping) else what


def _parse_json(name: str, has_format: bool) -> Mapping[str, Any]:
    from cowhand.block.opening.json_names import parse_json_name

    given = parse_json_name(name)
    has_file = any(key == "file" or key.startswith("file.") for key in given)
    if not has_format and "driver" not in given and not has_file:
        raise Failure("Must specify either driver or file")
    if has_format and has_file:
        given.pop("driver", None)  # the format that is told beside stands
    says_read_only(given)
    return given


def open_disk(
    what: str | Mapping[str, Any],
    *,
    format: str | None = None,
    writable: bool = False,
    cache: str = "writeback",
    force_share: bool = False,
    backing: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Disk:
    """Open *what*, warning of a guessed raw image that is to be written. Raises CowhandError, Failure."""
    from cowhand.block.opening.filenames import has_protocol
    from cowhand.block.opening.policy import AS_QEMU

    # As in QEMU, nothing looks for images that read through this one: this is not the guarded one of the library.
    from cowhand.image.open import open_image as open_unguarded

    if isinstance(what, Mapping):
        what = _without_filename(what)
    refuse_read_only(what, writable)
    if force_share and writable:
        if isinstance(what, str) and has_protocol(what):
            # Whether there is such a thing comes first.
            open_unguarded(what, format=format, backing=False, force_share=True).close()
        raise Failure("force-share=on can only be used with read-only images")
    settings = dict(options or {})
    if writable and cache != "unsafe":
        settings.setdefault("discard", "unmap")
    if isinstance(what, Mapping):  # what the image's own description says counts more than a switch
        settings = {name: value for name, value in settings.items() if name not in what}
    disk = open_unguarded(
        what,
        writable=writable,
        format=format,
        backing=backing,
        cache=cache,
        force_share=force_share,
        options=settings,
        policy=AS_QEMU,
    )
    if writable:
        warn_of_guess(disk)
        _hold_bitmaps(disk)
    return disk


def open_temporary(
    what: str | Mapping[str, Any],
    *,
    format: str | None = None,
    writable: bool = True,
    cache: str = "writeback",
    options: Mapping[str, Any] | None = None,
) -> Disk:
    """Open an overlay over *what*, which is only read, that is gone when it is closed. Raises CowhandError, Failure."""
    with open_disk(what, format=format, options=options) as base:
        size, driver = base.size, base.format
    from cowhand.block.opening.filenames import FileName
    from cowhand.image.create import create

    below: dict[str, Any] = dict(what) if isinstance(what, Mapping) else {"filename": FileName(what)}
    below.setdefault("driver", driver)
    with _temporary_name() as overlay:
        create(overlay, "qcow2", size)
        # The overlay's name is taken away at once; the file goes when it is closed.
        return open_disk(
            {"driver": "qcow2", "file": {"driver": "file", "filename": overlay}, "backing": below},
            writable=writable,
            cache=cache,
        )


@contextmanager
def _temporary_name() -> Iterator[str]:
    import os
    import tempfile

    folder = tempfile.mkdtemp(prefix=f"{program.name()}-", dir=os.environ.get("TMPDIR", "/var/tmp"))
    name = os.path.join(folder, "overlay.qcow2")
    try:
        yield name
    finally:
        if os.path.lexists(name):
            os.unlink(name)
        os.rmdir(folder)


def _hold_bitmaps(disk: Disk) -> None:
    """Say in the image that its bitmaps are in use: QEMU does that when it opens an image for writing, and not when it first writes."""
    directory = getattr(disk.root, "bitmap_directory", None)
    if not disk.root.is_filter and (directory is None or not (directory.entries or directory.outdated)):
        return  # most images: nothing is imported for them
    from cowhand.image.bitmaps import hold_bitmaps

    try:
        hold_bitmaps(disk)
    except CowhandError as error:
        disk.close()
        raise error.within(qemu="Can't update bitmap directory") from None


def _without_filename(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a description whose file has a driver's place: {"file.filename": X} alone means a format to be found."""
    if "driver" in given or set(given) - {"file.filename", "file.driver"} or given.get("file.driver", "file") != "file":
        return given
    return {"filename": given["file.filename"]} if "file.filename" in given else given


def warn_of_guess(disk: Disk) -> None:
    """Warn when *disk*, which is to be written, is raw only because nothing else was recognised."""
    root = disk.root
    if root.probed and root.driver == "raw":
        warn_of_raw(root.filename)


def warn_of_raw(filename: str) -> None:
    """Say that an image was taken for raw, which is dangerous when it is written."""
    program.plain(
        f"WARNING: Image format was not specified for '{filename}' and probing guessed raw.\n"
        "         Automatically detecting the format is dangerous for raw images, "
        "write operations on block 0 will be restricted.\n"
        "         Specify the 'raw' format explicitly to remove the restrictions."
    )


def says_read_only(what: Mapping[str, Any]) -> bool | None:
    """Return what *what* says of itself, None for nothing. Raises InvalidArgument."""
    from cowhand.block.node.options import is_on

    return is_on("read-only", what.get("read-only"))


def refuse_read_only(what: str | Mapping[str, Any], writable: bool) -> None:
    """Fail when *what*, which is to be written, says of itself that it is not."""
    if isinstance(what, Mapping) and says_read_only(what) and writable:
        raise Failure("Block node is read-only")


def refuse_unsharing(described: str | Mapping[str, Any], option: str, status: int = 1) -> None:
    """Fail when what describes an image that *option* has opened although others write it says the contrary."""
    given = {pair.name: pair.value for pair in parse(described)} if isinstance(described, str) else described
    if given.get("force-share", "on") != "on":
        raise Failure(f"{option} conflicts with image options", status=status)


def open_image(
    name: str,
    *,
    format: str | None = None,
    image_opts: bool = False,
    writable: bool = False,
    cache: str = "writeback",
    force_share: bool = False,
    backing: bool = True,
    unshared: bool = False,
    status: int = 1,
) -> Disk:
    """Open the image argument *name* of an image tool's command; *unshared* lets nobody else write it. Raises Failure with the exit *status*."""
    if image_opts and format is not None:
        raise Failure("--image-opts and --format are mutually exclusive", status=status)
    if image_opts and force_share:
        refuse_unsharing(name, "--force-share/-U", status)
    try:
        disk = open_disk(
            describe(name, image_opts, has_format=format is not None),
            format=format,
            writable=writable,
            cache=cache,
            force_share=force_share,
            backing=backing,
        )
        if unshared and not force_share:
            from cowhand.block.node.node import CONSISTENT_READ, WRITE_UNCHANGED

            try:
                disk.share(CONSISTENT_READ | WRITE_UNCHANGED)
            except CowhandError:
                disk.close()
                raise
        return disk
    except CowhandError as error:
        advice = error.facts.get("advice", "")
        raise Failure(f"Could not open '{name}': {error.qemu()}", status=status, hint=advice) from error
    except Failure as failure:
        raise Failure(f"Could not open '{name}': {failure.message}", status=status) from None


def shown_name(node: BlockNode) -> str:
    """Return the name that the tools print of *node*."""
    return node.filename
