"""What a copy writes: a new image that appears when it is complete, or an existing one, in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cowhand.block.disk import Disk
from cowhand.block.format_io.format_node import FormatNode
from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.image.create import Creation

if TYPE_CHECKING:
    from cowhand.block.node.guard import Guard
    from cowhand.block.opening.policy import Policy
    from cowhand.image.placement import Placement


class Target:
    """A target while it is being written. As a context manager: left in peace the image is closed and appears; left with an error, what is
    new is removed, and what stands in its place stays.

    ``disk`` is open for writing, ``is_new`` tells that it reads as zeroes where nothing was written (unless it has a backing file).
    """

    def __init__(
        self, disk: Disk, *, is_new: bool, owned: bool, place: Placement | None = None, durable: bool = False
    ) -> None:
        self.disk = disk
        self.is_new = is_new
        self._owned = owned
        self._place = place
        self._durable = durable

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = error
        try:
            if self._owned:
                self.disk.close()
            elif error is None:
                self.disk.flush()
            if error is None and self._place is not None:
                self._place.appear(durable=self._durable)
        except CowhandError as second:
            if error is None:
                failure = second
                raise
            error.add_note(f"closing '{self.disk.name}' failed too: {second}")
        finally:
            if self._place is not None:
                if isinstance(failure, CowhandError):
                    self._place.rename_in(failure)
                self._place.discard()


def create_target(
    creation: Creation,
    *,
    overwrite: bool,
    cache: str,
    policy: Policy | None = None,
    discard: bool = True,
    like_qemu: bool = False,
    warn: Callable[[str], None] | None = None,
    force: bool = False,
    guard: Guard | None = None,
) -> Target:
    """Make the image that *creation* describes and return it open; on an error nothing new is left.

    With *overwrite* an existing file stays what it is until the new one is complete and takes its place; where that is not possible, and always
    with *like_qemu*, it is emptied and formatted in place. *warn* hears of the former. Arguments as for :meth:`Creation.run`.
    """
    from cowhand.image.placement import Placement

    if guard is not None and (overwrite or not os.path.lexists(creation.local or "")):
        creation.refuse_harm(guard, force=force)

    creation.check_places(overwrite=overwrite)
    durable = cache != "unsafe"
    place = Placement(creation, overwrite=overwrite, like_qemu=like_qemu, warn=warn)
    try:
        creation.write(place, durable=durable)
        options = creation.opening_options()
        if place.data_path is not None:
            options["data-file"] = {"driver": "file", "filename": place.data_path}
        disk = _open(place.path, creation.format.name, cache, policy, discard, options)
    except BaseException as error:
        if isinstance(error, CowhandError):
            place.rename_in(error)
        place.discard()
        raise
    # A device or an export keeps its bytes, and a format that maps its clusters does not show them; a data file that was kept may hold anything.
    if creation.protocol.name == "file":
        zeroed = not creation.options.get("keep_data_file")
    else:
        zeroed = isinstance(disk.root, FormatNode) and not creation.options.get("data_file")
    return Target(disk, is_new=zeroed, owned=True, place=place, durable=durable)


def existing_target(
    what: str | os.PathLike[str] | Mapping[str, Any] | Disk,
    format: str | None,
    *,
    cache: str,
    policy: Policy | None = None,
    discard: bool = True,
    force: bool = False,
    guard: Guard | None = None,
) -> Target:
    """Return an image that exists, open for writing in place, if *guard* does not refuse that (OverlaysExist, SearchIncomplete)."""
    from cowhand.block.node.guard import change_of

    if isinstance(what, Disk):
        target = Target(what, is_new=False, owned=False)
        if guard is None and what.guard is not None:
            guard = what.guard()
    else:
        target = Target(_open(what, format, cache, policy, discard), is_new=False, owned=True)
    if guard is not None:
        try:
            disk = target.disk
            guard.refuse(change_of(disk.root, f"writing over '{disk.filename}'"), force=force)
        except BaseException:
            if not isinstance(what, Disk):
                target.disk.close()
            raise
    return target


def _open(
    what: str | os.PathLike[str] | Mapping[str, Any],
    format: str | None,
    cache: str,
    policy: Policy | None,
    discard: bool,
    secrets: Mapping[str, Any] | None = None,
) -> Disk:
    from cowhand.image.open import open_image

    options = {"discard": "unmap"} if discard and not isinstance(what, Mapping) else {}
    return open_image(
        what, writable=True, format=format, cache=cache, policy=policy, options={**options, **(secrets or {})}
    )


def check_room(disk: Disk, size: int) -> None:
    """Raise InvalidArgument when *disk* is shorter than the *size* bytes that are to be copied."""
    if disk.size < size:
        raise InvalidArgument(
            f"the target has {disk.size} bytes, {size - disk.size} fewer than what is to be copied",
            qemu="output file is smaller than input file",
            path=disk.filename,
            hint="Resize it first, or let a new one be made.",
        )
