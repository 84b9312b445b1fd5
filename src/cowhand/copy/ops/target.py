"""What a copy writes: a new image that appears when it is complete, or an existing one, in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cowhand.block.disk import Disk
from cowhand.block.format_io.format_node import FormatNode
from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.image.create import Creation, local_path

if TYPE_CHECKING:
    from cowhand.block.opening.policy import Policy
    from cowhand.image.new_file import NewFile


class Target:
    """A target while it is being written. As a context manager: left in peace the image is closed and appears; left with an error, a new
    file is removed, and an existing one stays as it was written so far.

    ``disk`` is open for writing, ``is_new`` tells that it reads as zeroes where nothing was written (unless it has a backing file).
    """

    def __init__(
        self, disk: Disk, *, is_new: bool, owned: bool, file: NewFile | None = None, durable: bool = False
    ) -> None:
        self.disk = disk
        self.is_new = is_new
        self._owned = owned
        self._file = file
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
            if error is None and self._file is not None:
                self._file.appear(durable=self._durable)
        except CowhandError as second:
            if error is None:
                failure = second
                raise
            error.add_note(f"closing '{self.disk.name}' failed too: {second}")
        finally:
            if self._file is not None:
                if isinstance(failure, CowhandError):
                    self._file.rename_in(failure)
                self._file.discard()


def create_target(
    creation: Creation, *, overwrite: bool, cache: str, policy: Policy | None = None, discard: bool = True
) -> Target:
    """Make the image that *creation* describes and return it open; on an error nothing new is left.

    With *overwrite* an existing file is emptied and formatted in place: its links, owner, labels and holders count.
    """
    creation.check_places(overwrite=overwrite)
    path = local_path(creation.filename)
    if path is None or os.path.lexists(path):
        creation.run(overwrite=overwrite)
        disk = _open(creation.filename, creation.format.name, cache, policy, discard, creation.opening_options())
        # A device or an export keeps its bytes; a format that maps its clusters does not show them.
        if creation.protocol.name == "file":
            zeroed = not creation.options.get("keep_data_file")
        else:
            zeroed = isinstance(disk.root, FormatNode) and not creation.options.get("data_file")
        return Target(disk, is_new=zeroed, owned=True)
    if not os.path.isdir(os.path.dirname(path) or "."):
        creation.run()  # says in its own words that the folder is not there
    from cowhand.image.new_file import NewFile

    file = NewFile(path)
    try:
        creation.write(file.temporary, fresh=True, durable=cache != "unsafe")
        disk = _open(file.temporary, creation.format.name, cache, policy, discard, creation.opening_options())
    except BaseException as error:
        if isinstance(error, CowhandError):
            file.rename_in(error)
        file.discard()
        raise
    # A data file that was kept may hold anything.
    return Target(
        disk, is_new=not creation.options.get("keep_data_file"), owned=True, file=file, durable=cache != "unsafe"
    )


def existing_target(
    what: str | os.PathLike[str] | Mapping[str, Any] | Disk,
    format: str | None,
    *,
    cache: str,
    policy: Policy | None = None,
    discard: bool = True,
) -> Target:
    """Return an image that exists, open for writing in place."""
    if isinstance(what, Disk):
        return Target(what, is_new=False, owned=False)
    return Target(_open(what, format, cache, policy, discard), is_new=False, owned=True)


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
