"""What an image is, and the chain that it stands on: facts for ``info``, for pictures and for plans."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.block.disk import Disk
from cowhand.block.graph.block_status import skip_filters
from cowhand.block.opening.filenames import combine
from cowhand.block.opening.opening import Opening
from cowhand.block.opening.policy import DEFAULT, Policy
from cowhand.core.errors import CowhandError, ImageInUse, InvalidFormat, NotSupported, UnsupportedFeature
from cowhand.drivers import REGISTRY
from cowhand.image.open import open_image

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.block.node.records import SnapshotInfo


def snapshot_document(snapshot: SnapshotInfo) -> dict[str, Any]:
    """Return a snapshot with the keys that JSON output has."""
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-nsec": snapshot.vm_clock_nsec,
        "vm-state-size": snapshot.vm_state_size,
        "disk-size": snapshot.disk_size,
    }


class ImageInfo(NamedTuple):
    """Facts about one image, without what lies under it.

    ``disk_size``: bytes that it takes on its medium. ``backing``: the base's name as the header has it, ``backing_path``: the name to open it by.
    ``snapshots_problem`` and ``bitmaps_problem`` say why snapshots or bitmaps that the image has cannot be read, or are "": what is listed of them
    may not be all, or nothing. ``in_use``: the message of whoever holds it for writing, or "". ``problem``: why nothing else is known of it, or "".
    """

    filename: str
    format: str = ""
    virtual_size: int = 0
    disk_size: int | None = None
    cluster_size: int | None = None
    backing: str | None = None
    backing_format: str | None = None
    backing_path: str | None = None
    corrupt: bool = False
    dirty: bool = False
    snapshots: tuple[SnapshotInfo, ...] = ()
    snapshots_problem: str = ""
    bitmaps_problem: str = ""
    details: Mapping[str, Any] | None = None
    in_use: str = ""
    problem: str = ""

    def document(self) -> dict[str, Any]:
        """Return it with the keys that JSON output has; those that qemu-img has too mean the same."""
        out: dict[str, Any] = {"filename": self.filename}
        if self.problem:
            return {**out, "problem": self.problem}
        out |= {"format": self.format, "virtual-size": self.virtual_size, "actual-size": self.disk_size}
        if self.cluster_size is not None:
            out["cluster-size"] = self.cluster_size
        if self.backing is not None:
            out |= {
                "backing-filename": self.backing,
                "full-backing-filename": self.backing_path,
                "backing-filename-format": self.backing_format,
            }
        out |= {"dirty-flag": self.dirty, "corrupt": self.corrupt, "in-use": bool(self.in_use)}
        out["snapshots"] = [snapshot_document(snapshot) for snapshot in self.snapshots]
        details = dict(self.details or {})
        # What cannot be read is null, and not nothing.
        if self.snapshots_problem:
            out |= {"snapshots": out["snapshots"] or None, "snapshots-problem": self.snapshots_problem}
        if self.bitmaps_problem:
            details.setdefault("bitmaps", None)
            out["bitmaps-problem"] = self.bitmaps_problem
        if details:
            out["format-specific"] = {"type": self.format, "data": details}
        return out


def describe(node: BlockNode, *, in_use: str = "") -> ImageInfo:
    """Return the facts of the open *node*, or of the first one below it that is not a filter."""
    node = skip_filters(node)
    details = dict(node.format_specific())
    # What only some formats have is asked for by name, so that those need not know of it that have it not.
    header: Any = getattr(node, "header", None)
    backing, backing_format = node.backing_link or (None, None)
    path = None
    if backing:
        try:
            path = combine(node.filename, backing)
        except CowhandError:
            path = backing
    keeper = node.bitmap_keeper()
    broken: CowhandError | None = keeper.broken_reason(node) if keeper is not None else None
    unread = node.snapshots_failure()
    return ImageInfo(
        filename=node.filename,
        format=node.driver,
        virtual_size=node.size,
        disk_size=node.allocated_size(),
        cluster_size=node.cluster_size,
        backing=backing or None,
        backing_format=backing_format,
        backing_path=path,
        corrupt=bool(details.get("corrupt")),
        dirty=bool(getattr(header, "incompatible", 0) & 1),
        snapshots=_snapshots(node),
        snapshots_problem=unread.message if unread is not None else "",
        bitmaps_problem=broken.message if broken is not None else "",
        details=details,
        in_use=in_use,
    )


def _snapshots(node: BlockNode) -> tuple[SnapshotInfo, ...]:
    try:
        return tuple(node.list_snapshots())
    except NotSupported:
        return ()


def image_info(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    force_share: bool = False,
    policy: Policy | None = None,
    options: Mapping[str, Any] | None = None,
) -> ImageInfo:
    """Return the facts of one image; nothing that it names is opened.

    An image that somebody is writing is described all the same (``in_use`` says so): its figures may be changing. Raises CowhandError.
    """
    in_use = ""
    try:
        disk = open_image(path, format=format, backing=False, force_share=force_share, policy=policy, options=options)
    except ImageInUse as error:
        in_use = error.message
        disk = open_image(path, format=format, backing=False, force_share=True, policy=policy, options=options)
    except InvalidFormat as error:
        return _without_snapshots(path, format, force_share, policy, options, error)
    with disk:
        return describe(disk.root, in_use=in_use)


def _without_snapshots(
    path: str | os.PathLike[str],
    format: str | None,
    force_share: bool,
    policy: Policy | None,
    options: Mapping[str, Any] | None,
    error: InvalidFormat,
) -> ImageInfo:
    """Describe an image that cannot be opened because its snapshots cannot be read; raise *error* where that is not the reason."""
    opening = Opening(REGISTRY, policy or DEFAULT, backing=False)
    opening.for_repair = True
    try:
        root = opening.open(
            path, format=format, options={"read-only": True, "force-share": force_share, **(options or {})}
        )
    except CowhandError:
        raise error from None
    try:
        disk = Disk(root)
    except BaseException:
        opening.abandon()
        raise
    with disk:
        if skip_filters(root).snapshots_failure() is None:
            raise error
        return describe(root)


def chain_info(
    path: str | os.PathLike[str], *, format: str | None = None, force_share: bool = False, policy: Policy | None = None
) -> list[ImageInfo]:
    """Return the facts of an image and of every one below it, the active one first.

    Where a base is missing, broken or refused by *policy* the list ends with an entry whose ``problem`` says so. Raises CowhandError
    only when the first image cannot be opened.
    """
    policy = policy or DEFAULT
    found = [image_info(path, format=format, force_share=force_share, policy=policy)]
    seen = {_identity(found[0])}
    while found[-1].backing_path is not None:
        above = found[-1]
        assert above.backing_path is not None
        try:
            below = _below(above, policy, force_share, len(found))
            if _identity(below) in seen:
                raise UnsupportedFeature("the chain of backing files comes back to this file", path=above.backing_path)
        except CowhandError as error:
            found.append(
                ImageInfo(filename=above.backing_path, format=above.backing_format or "", problem=error.message)
            )
            break
        seen.add(_identity(below))
        found.append(below)
    return found


def _below(above: ImageInfo, policy: Policy, force_share: bool, depth: int) -> ImageInfo:
    if depth > policy.max_depth:
        raise UnsupportedFeature(f"the chain of images is more than {policy.max_depth} deep", path=above.filename)
    try:
        return _named_by(above, policy, force_share)
    except ImageInUse as error:
        return _named_by(above, policy, True)._replace(in_use=error.message)


def _named_by(above: ImageInfo, policy: Policy, force_share: bool) -> ImageInfo:
    """Describe the base that *above* names, opened under the same rules as when *above* itself opens it."""
    assert above.backing is not None
    assert above.backing_path is not None
    options = {"read-only": True} | ({"force-share": True} if force_share else {})
    opening = Opening(REGISTRY, policy, backing=False)
    root = opening.open_implied(
        above.filename, above.backing, above.backing_path, above.backing_format, options=options
    )
    try:
        disk = Disk(root)
    except BaseException:
        opening.abandon()
        raise
    with disk:
        return describe(disk.root)


def _identity(info: ImageInfo) -> Any:
    try:
        stat = os.stat(info.filename)
    except (OSError, ValueError):
        return info.filename
    return stat.st_dev, stat.st_ino
