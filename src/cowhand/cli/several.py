"""Several images in one call: each is dealt with, what is wrong with one is told when its turn comes, and the worst decides the exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from cowhand.core.errors import Cancelled, CowhandError

if TYPE_CHECKING:
    from cowhand.cli.running import Context

T = TypeVar("T")
#: Exit codes that are results of an image which could be looked at; all others come before them.
_RESULTS = {0: 0, 7: 1, 8: 2}


class Codes:
    """Collects exit codes; the worst counts: failures before damage, damage before lost space. Of equals the first."""

    def __init__(self) -> None:
        self.worst = 0

    def add(self, code: int) -> None:
        """Count *code*."""
        if _RESULTS.get(code, 3) > _RESULTS.get(self.worst, 3):
            self.worst = code


def each(
    images: Sequence[str], context: Context, look: Callable[[str], T], codes: Codes, *, separate: bool = False
) -> list[T]:
    """Return what *look* says of each image; the error of one is printed, and the others follow, unless there is one image only.

    With *separate* there is an empty line between them.
    """
    if len(images) == 1:
        return [look(images[0])]
    found = []
    for number, image in enumerate(images):
        context.cancel.check()
        if number and separate:
            context.out.line()
        try:
            found.append(look(image))
        except Cancelled:
            raise
        except CowhandError as error:
            if error.path is None and image not in error.message:
                error.path = image
            context.out.flush()
            context.out.error(context.name, error)
            codes.add(error.exit_code)
    return found


def run_each(images: Sequence[str], context: Context, run: Callable[[str], int], *, separate: bool = False) -> int:
    """Run *run* for each image, and return the exit code; with ``--output json`` several documents become one list."""
    if len(images) == 1:
        return run(images[0])
    codes = Codes()
    with context.out.gathering():
        each(images, context, lambda image: codes.add(run(image)), codes, separate=separate)
    return codes.worst
