"""A copy over its own source is told as that, and before all else: "exists already" would lead people to --overwrite."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from cowhand.core.errors import CowhandError
from cowhand.image.create import local_path


def refuse_own_source(sources: Sequence[str], target: str, format: str | None) -> None:
    """Raise InvalidArgument when the existing *target* is one of *sources*, or what one of them reads through."""
    path = local_path(target)
    if path is None or not os.path.lexists(path):
        return
    from cowhand.copy.ops.overlap import refuse_own_source as refuse
    from cowhand.image.open import open_image

    with ExitStack() as stack:
        try:
            disks = [stack.enter_context(open_image(name, format=format, force_share=True)) for name in sources]
        except CowhandError:
            return  # the copy will say why
        refuse(disks, path)
