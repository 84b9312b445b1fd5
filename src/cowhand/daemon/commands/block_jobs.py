"""The commands that start block jobs (QEMU ``qapi/block-core.json``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.block.disk import Disk
from cowhand.block.graph.block_status import skip_filters
from cowhand.block.graph.reopen import reopen
from cowhand.core.errors import InvalidArgument
from cowhand.daemon.commands.nodes import find_node
from cowhand.daemon.table import command
from cowhand.image.bitmaps import find_bitmap
from cowhand.jobs.job import Job, OnError, Transaction
from cowhand.jobs.live.backup import BackupJob
from cowhand.jobs.live.commit import CommitJob
from cowhand.jobs.live.layers import overlays_of
from cowhand.jobs.live.mirror import ActiveCommitJob, MirrorJob
from cowhand.jobs.live.stream import StreamJob
from cowhand.jobs.state import Status

if TYPE_CHECKING:
    from cowhand.block.node.node import BlockNode
    from cowhand.daemon.daemon import Daemon

_COMMON = {"*job-id": "str", "device": "str", "*speed": "int", "*auto-finalize": "bool", "*auto-dismiss": "bool"}


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that every job has of a command's arguments."""
    out: dict[str, Any] = {name: given[name] for name in ("speed", "auto_finalize", "auto_dismiss") if name in given}
    for name in ("on_source_error", "on_target_error"):
        if name in given:
            out[name] = OnError("report" if given[name] == "auto" else given[name])
    if "on_error" in given:
        out["on_source_error"] = out["on_target_error"] = OnError(given["on_error"])
    return out


def _ident(given: dict[str, Any]) -> str:
    return str(given.get("job_id", ""))


def _device(daemon: Daemon, name: str) -> BlockNode:
    return find_node(daemon, name, name)


def begin(daemon: Daemon, job: BackupJob | MirrorJob | StreamJob | CommitJob, *, drained: bool = False) -> None:
    """Make *job* known, install it and start it; where it cannot be installed it is told as created, and gone."""
    job.check()
    daemon.add_job(job)
    try:
        job.install()
    except BaseException:
        forget(job)
        raise
    job.start(drained=drained)


def forget(job: Job) -> None:
    """Let a job that was never started go: its states are created and null."""
    job.status = Status.NULL
    job.listener.status_changed(job, Status.NULL)


_BACKUP = {
    **_COMMON, "target": "str", "sync": "MirrorSyncMode", "*bitmap": "str", "*bitmap-mode": "BitmapSyncMode",
    "*compress": "bool", "*on-source-error": "BlockdevOnError", "*on-target-error": "BlockdevOnError",
    "*filter-node-name": "str", "*x-perf": "any",
}  # fmt: skip


def make_backup(daemon: Daemon, transaction: Transaction | None = None, **given: Any) -> BackupJob:
    """Return the job that a blockdev-backup asks for, neither known nor installed. Raises CowhandError."""
    source, target = _device(daemon, given["device"]), _device(daemon, given["target"])
    bitmap = None
    if "bitmap" in given:
        with Disk(source, name="bitmap") as disk:
            bitmap = find_bitmap(disk, given["bitmap"])
    if given.get("compress"):
        target = _compressed(target)
    return BackupJob(
        _ident(given), source, target, sync=given["sync"], bitmap=bitmap, bitmap_mode=given.get("bitmap_mode"),
        filter_node_name=given.get("filter_node_name"), transaction=transaction, **_settings(given),
    )  # fmt: skip


def _compressed(target: BlockNode) -> BlockNode:
    from cowhand.block.opening.opening import Opening
    from cowhand.drivers import REGISTRY

    return Opening(REGISTRY).open({"driver": "compress", "file": target, "read-only": False})


@command("blockdev-backup", _BACKUP)
def blockdev_backup(daemon: Daemon, **given: Any) -> None:
    begin(daemon, make_backup(daemon, **given), drained=True)


_MIRROR = {
    **_COMMON, "target": "str", "*replaces": "str", "sync": "MirrorSyncMode", "*granularity": "int", "*buf-size": "int",
    "*on-source-error": "BlockdevOnError", "*on-target-error": "BlockdevOnError", "*filter-node-name": "str",
    "*copy-mode": "MirrorCopyMode",
}  # fmt: skip


@command("blockdev-mirror", _MIRROR)
def blockdev_mirror(daemon: Daemon, **given: Any) -> None:
    if given["sync"] in ("bitmap", "incremental"):
        raise InvalidArgument(f"Sync mode '{given['sync']}' not supported")
    granularity = given.get("granularity") or None
    if granularity is not None and (granularity & (granularity - 1) or not 512 <= granularity <= 64 << 20):
        raise InvalidArgument("Parameter 'granularity' expects a value in range [512B, 64MB]")
    job = MirrorJob(
        _ident(given), _device(daemon, given["device"]), _device(daemon, given["target"]), sync=given["sync"],
        granularity=granularity, copy_mode=given.get("copy_mode", "background"),
        filter_node_name=given.get("filter_node_name"), **_settings(given),
    )  # fmt: skip
    begin(daemon, job)


_STREAM = {
    **_COMMON, "*base": "str", "*base-node": "str", "*backing-file": "str", "*bottom": "str",
    "*on-error": "BlockdevOnError", "*filter-node-name": "str",
}  # fmt: skip


@command("block-stream", _STREAM)
def block_stream(daemon: Daemon, **given: Any) -> None:
    top = _device(daemon, given["device"])
    base = None
    if "base_node" in given:
        base = find_node(daemon, "", given["base_node"])
    elif "bottom" in given:
        bottom = skip_filters(find_node(daemon, "", given["bottom"]))
        base = None if bottom.backing is None else bottom.backing.node
    elif "base" in given:
        base = _layer_named(top, given["base"])
    job = StreamJob(
        _ident(given), top, base=base, backing_name=given.get("backing_file"),
        filter_node_name=given.get("filter_node_name"), **_settings(given),
    )  # fmt: skip
    begin(daemon, job)


def _layer_named(top: BlockNode, name: str) -> BlockNode:
    layer = skip_filters(top)
    while layer.backing is not None:
        layer = skip_filters(layer.backing.node)
        if layer.filename == name:
            return layer
    raise InvalidArgument(f"Can't find '{name}' in the backing chain")


_COMMIT = {
    **_COMMON, "*base-node": "str", "*base": "str", "*top-node": "str", "*top": "str", "*backing-file": "str",
    "*on-error": "BlockdevOnError", "*filter-node-name": "str",
}  # fmt: skip


@command("block-commit", _COMMIT)
def block_commit(daemon: Daemon, **given: Any) -> None:
    device = daemon.names.find(given["device"])
    if device is None:
        error = InvalidArgument(f"Cannot find device='{given['device']}' nor node-name='{given['device']}'")
        error.qmp_class = "DeviceNotFound"
        raise error
    top = device
    if "top_node" in given:
        top = find_node(daemon, "", given["top_node"])
    elif "top" in given and given["top"] != device.filename:
        top = _layer_named(device, given["top"])
    if "base_node" in given:
        base = find_node(daemon, "", given["base_node"])
    elif "base" in given:
        base = _layer_named(device, given["base"])
    else:
        base = skip_filters(top)
        while base.backing is not None:
            base = skip_filters(base.backing.node)
    if skip_filters(base) is skip_filters(top):
        raise InvalidArgument("cannot commit an image into itself")
    settings = _settings(given)
    if overlays_of(top):
        begin(daemon, CommitJob(_ident(given), top, base, backing_name=given.get("backing_file"), **settings))
        return
    if "backing_file" in given:
        raise InvalidArgument("'backing-file' specified, but 'top' is the active layer")
    with Disk(base, name="commit") as disk:
        if not base.writable:
            reopen(disk, writable=True)
        begin(
            daemon,
            ActiveCommitJob(_ident(given), top, base, filter_node_name=given.get("filter_node_name"), **settings),
        )


# -- creating images


class CreateJob(Job):
    """Makes an image by a protocol or a format (``blockdev-create``)."""

    kind = "create"
    is_block_job = False

    def __init__(self, ident: str, daemon: Daemon, options: dict[str, Any]) -> None:
        super().__init__(ident, auto_dismiss=False)
        self._daemon = daemon
        self._options = options

    def run(self) -> None:
        from cowhand.drivers import REGISTRY

        given = {name.replace("-", "_"): value for name, value in self._options.items()}
        driver, size = given.pop("driver"), given.pop("size", None)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise InvalidArgument("Parameter 'options.size' is missing or no size")
        cls: Any = REGISTRY.get(driver).load()
        self.progress.total = 1
        if "filename" in given:
            cls.create(given.pop("filename"), size, **given)
        else:
            name = given.pop("file", None)
            node = self._daemon.names.find(name) if isinstance(name, str) else None
            if node is None:
                raise InvalidArgument(f"Cannot find device='' nor node-name='{name}'")
            cls.create(node, size, given)
        self.progress.advance(1)


@command("blockdev-create", {"job-id": "str", "options": "any"})
def blockdev_create(daemon: Daemon, job_id: str, options: Any) -> None:
    if not isinstance(options, dict):
        raise InvalidArgument("Invalid parameter type for 'options', expected: object")
    if "driver" not in options:
        raise InvalidArgument("Parameter 'options.driver' is missing")
    job = CreateJob(job_id, daemon, options)
    daemon.add_job(job)
    job.start()
