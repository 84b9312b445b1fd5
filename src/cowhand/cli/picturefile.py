"""Writing a picture where the user wants it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from cowhand.core.errors import ImageExists, from_os_error
from cowhand.image.new_file import write_whole

if TYPE_CHECKING:
    from cowhand.cli.running import Context


def write_picture(path: str, text: str, context: Context) -> None:
    """Write the picture *text* to *path*, or to standard output for "-". A file that is no picture is never replaced.

    Raises ImageExists for such a file (somebody has exchanged the arguments), IOFailed and its like.
    """
    from cowhand.cli.standard_output import is_output, is_stream

    if is_output(path):
        sys.stdout.write(text)
        return
    if is_stream(path):
        try:
            with open(path, "w", encoding="utf-8", errors="replace") as pipe:
                pipe.write(text)
        except OSError as error:
            raise from_os_error(error, path, doing="writing the picture") from error
        return
    try:
        if os.path.lexists(path) and not _replaceable(path):
            raise ImageExists(
                f"'{path}' exists, and is not a picture",
                path=path,
                hint="Choose another name for the picture, or delete that file.",
            )
    except OSError as error:
        raise from_os_error(error, path, doing="writing the picture") from error
    write_whole(path, text.encode("utf-8", "replace"), replace=True, doing="writing the picture")
    if context.out.json:
        context.out.document({"svg": path})
    else:
        context.out.line(f"wrote {path}")


def _replaceable(path: str) -> bool:
    if not os.path.isfile(path):
        return not os.path.isdir(path)  # a device such as /dev/stdout, or a link to nothing
    with open(path, "rb") as file:
        head = file.read(256).lstrip()
    return not head or head.startswith((b"<svg", b"<?xml"))
