"""Copying blocks of one image into a new one, as qemu-img dd does: bs=, count=, skip=, if=, of=."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from cowhand.copy.engine.source import Part, Source
from cowhand.copy.ops.convert import ConvertResult
from cowhand.copy.ops.overlap import refuse_own_source
from cowhand.copy.ops.settings import Settings
from cowhand.copy.ops.space import look_for_space
from cowhand.copy.ops.target import create_target
from cowhand.copy.ops.transfer import transfer
from cowhand.core.errors import InvalidArgument
from cowhand.core.progress import CancelToken, Progress
from cowhand.core.units import parse_size
from cowhand.image.create import prepare
from cowhand.image.open import Image, open_source

if TYPE_CHECKING:
    from cowhand.block.node.guard import Guard
    from cowhand.block.opening.policy import Policy
    from cowhand.block.opening.registry import Registry

DEFAULT_BLOCK = 512
MAX_BLOCK = (1 << 31) - 1


def dd(
    source: Image,
    target: str | os.PathLike[str],
    target_format: str = "raw",
    *,
    source_format: str | None = None,
    block_size: int | str = DEFAULT_BLOCK,
    count: int | str | None = None,
    skip: int | str = 0,
    overwrite: bool = False,
    like_qemu: bool = False,
    cache: str = "unsafe",
    force_share: bool = False,
    policy: Policy | None = None,
    registry: Registry | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
    warn: Callable[[str], None] | None = None,
    force: bool = False,
    guard: Guard | None = None,
) -> ConvertResult:
    """Copy blocks *skip* to *count* of *source* into a new image *target*.

    As in qemu-img, and unlike dd(1), *count* counts from the beginning of the source, so that count - skip blocks are copied. To skip past the end
    gives an empty image and a warning. Zeroes are left out. The target appears when it is complete; *overwrite*, *like_qemu*, *force* and *guard*
    are those of
    ``convert``.
    """
    block = parse_size(block_size)
    if not 1 <= block <= MAX_BLOCK:
        raise InvalidArgument(f"Invalid bs specified. Must be between 1 and {MAX_BLOCK}.")
    first = parse_size(skip) * block
    with ExitStack() as stack:
        disk = open_source(source, stack, source_format, force_share=force_share, unshared=True, policy=policy)
        end = disk.size if count is None else min(disk.size, parse_size(count) * block)
        if first > end:
            if warn is not None:
                warn(f"{disk.filename}: cannot skip to specified offset")
            first = end
        creation = prepare(target, target_format, end - first, registry=registry, policy=policy)
        part = Source([Part(disk, first, end - first)])
        if not like_qemu:
            refuse_own_source([disk], creation.local)
            look_for_space(part, creation, Settings(), warn=warn)
        with create_target(
            creation,
            overwrite=overwrite,
            cache=cache,
            policy=policy,
            like_qemu=like_qemu,
            warn=warn,
            force=force,
            guard=guard,
        ) as destination:
            moved = transfer(part, destination, Settings(), progress=progress, cancel=cancel)
    return ConvertResult(creation.filename, creation.format.name, part.size, moved.data, moved.zero, moved.skip)
