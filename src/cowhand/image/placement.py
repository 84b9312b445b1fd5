"""Where the files of a new image are made: under temporary names until they are complete, or in place where nothing else does."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING

from cowhand.core.errors import CowhandError, ImageExists, from_os_error
from cowhand.image.leftovers import sweep
from cowhand.image.new_file import SECTOR, NewFile
from cowhand.image.replacing import CannotReplace, reason_for_place

if TYPE_CHECKING:
    from cowhand.image.create import Creation


class Placement:
    """The places of one image and of its data file. As a context manager it removes what did not :meth:`appear`.

    ``path`` and ``data_path`` are the names to write under (``data_path`` None: the option's own), ``image`` and ``data`` the new files (None:
    written in place). Used by one thread.
    """

    def __init__(
        self,
        creation: Creation,
        *,
        overwrite: bool = False,
        like_qemu: bool = False,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """Decide, and make the temporary files. With *like_qemu* what exists is written in place, and files end where qemu-img lets them.

        *warn* hears why something is written in place although that was not asked for. Raises ImageExists without *overwrite*, ImageInUse and
        AccessDenied for files that may not be replaced.
        """
        if creation.local is not None and not like_qemu:
            sweep(os.path.dirname(os.path.realpath(creation.local)))
        self.like_qemu = like_qemu
        self._warn = warn or (lambda message: None)
        self._local = creation.local if creation.protocol.name == "file" else None
        self.data: NewFile | None = None
        self.image = self._new(creation.local, creation.protocol.name, overwrite, creation.names_relative)
        try:
            data = creation.local_data
            if data is not None and not creation.options.get("keep_data_file"):
                self.data = self._new(data, creation.data_protocol, overwrite, False)
        except BaseException:
            if self.image is not None:
                self.image.discard()
            raise
        self.path = self.image.temporary if self.image is not None else creation.filename
        self.data_path = self.data.temporary if self.data is not None else None

    def _new(self, path: str | None, protocol: str, overwrite: bool, names_relative: bool) -> NewFile | None:
        if path is None or not os.path.lexists(path):
            return NewFile(path) if path is not None and protocol == "file" else None
        if not overwrite:
            raise ImageExists(
                f"'{path}' exists already", path=path, hint="Choose another name, or insist on overwriting it."
            )
        if self.like_qemu:
            return None
        reason = reason_for_place(path, names_relative=names_relative)
        if reason is None:
            try:
                return NewFile(path, replace=True)
            except CannotReplace as error:
                reason = error.message
        if protocol != "file" or os.path.isfile(path):
            self._warn(in_place_words(path, reason))
        return None

    def appear(self, *, durable: bool = False) -> None:
        """Give what was made its names: the data file first, since the image names it. Raises what :meth:`NewFile.appear` raises."""
        image, data = self.image, self.data
        if not self.like_qemu:
            self._round_up()
        if image is not None and data is not None and data.replaces:
            # The old image fits the new data as little as the reverse; so nothing has its name while the data changes.
            image.sync()
            data.sync()
            image.stand_aside()
        if data is not None:
            data.appear(durable=durable)
        if image is not None:
            try:
                image.appear(durable=durable)
            except CowhandError:
                if data is not None and not data.replaces:
                    with suppress(OSError):
                        os.unlink(data.path)
                raise

    def _round_up(self) -> None:
        if self.image is not None:
            self.image.round_up()
        elif self._local is not None and os.path.isfile(self._local):
            try:
                size = os.path.getsize(self._local)
                if size % SECTOR:
                    os.truncate(self._local, size + -size % SECTOR)
            except OSError as error:
                raise from_os_error(error, self._local, doing="finishing the image") from error

    def rename_in(self, error: CowhandError) -> None:
        """Let *error* tell of the names that the user knows."""
        for file in (self.image, self.data):
            if file is not None:
                file.rename_in(error)

    def discard(self) -> None:
        """Remove what was made and did not appear."""
        with ExitStack() as stack:
            for file in (self.data, self.image):
                if file is not None:
                    stack.callback(file.discard)

    def __enter__(self) -> Placement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.discard()
        except CowhandError as second:
            if error is None:
                raise
            error.add_note(str(second))
        if isinstance(error, CowhandError):
            self.rename_in(error)


def in_place_words(path: str, reason: str) -> str:
    """Return the sentence which says that *path* is written in place."""
    return (
        f"{path} is written in place ({reason}): if that is interrupted, neither the old nor the new content is there"
    )
