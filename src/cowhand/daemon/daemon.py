"""The daemon's state: nodes by name, jobs, exports, objects; one command at a time changes it.

Locks: ``control`` is held by the command that runs, whichever monitor it came from, and never by a job's thread while that waits for I/O.
Events go from any thread to all monitors, in one order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cowhand.block.graph.names import NodeNames
from cowhand.core.errors import CowhandError
from cowhand.daemon.table import load
from cowhand.jobs.job import Job, JobListener, JobTable
from cowhand.jobs.state import Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cowhand.daemon.export_table import ExportTable

#: Answered before the daemon's own version: what the clients of QEMU's daemon expect to hear.
VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "cowhand"}


class CommandNotFound(CowhandError):
    """There is no such command, or not yet."""

    code = "command-not-found"
    qmp_class = "CommandNotFound"


class Daemon:
    """One storage daemon, without its sockets. Thread-safe."""

    def __init__(self, on_quit: Callable[[], None] = lambda: None) -> None:
        from cowhand.daemon.export_table import ExportTable

        self.control = threading.RLock()
        self.names = NodeNames()
        self.jobs = JobTable()
        self.exports: ExportTable = ExportTable(self)
        self.objects: dict[str, dict[str, Any]] = {}
        self.quitting = False
        self._on_quit = on_quit
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._events = threading.Lock()

    # -- events

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """Have *listener* called with each event; it must not block."""
        with self._events:
            self._listeners.append(listener)

    def stop_listening(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """End :meth:`listen`."""
        with self._events:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def event(self, name: str, **data: Any) -> None:
        """Tell all monitors; data by QMP's names with underscores for dashes."""
        moment = time.time()
        told = {
            "event": name,
            "data": {key.replace("_", "-"): value for key, value in data.items()},
            "timestamp": {"seconds": int(moment), "microseconds": int(moment % 1 * 1_000_000)},
        }
        with self._events:
            for listener in self._listeners:
                listener(told)

    # -- commands

    def execute(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Do one command and return its answer. Raises CowhandError."""
        known = load().get(name)
        if known is None:
            raise CommandNotFound(f"The command {name} has not been found")
        with self.control:
            answer = known.call(self, arguments)
        return {} if answer is None else answer

    def quit(self) -> None:
        """End: jobs are cancelled, exports deleted, nodes closed."""
        self.quitting = True
        self._on_quit()

    def close(self) -> None:
        """Let go of everything. The first error of closing a node is raised in the end."""
        with self.control:
            self.jobs.end_all()
            self.exports.close()
            failure: CowhandError | None = None
            for node in list(self.names):
                if self.names.owns(node):
                    try:
                        self.names.release(node)
                    except CowhandError as error:
                        failure = failure or error
        if failure is not None:
            raise failure

    # -- jobs

    def add_job(self, job: Job) -> None:
        """Make *job* known; its events are told from now on, the first of which is that it was created."""
        self.jobs.add(job)
        job.listener = JobEvents(self)
        job.listener.status_changed(job, Status.CREATED)


class JobEvents(JobListener):
    """Tells the events of jobs as QEMU does."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def _block(self, name: str, job: Job, **more: Any) -> None:
        if job.is_block_job:
            self._daemon.event(
                name,
                device=job.id,
                type=job.kind,
                len=job.progress.total,
                offset=job.progress.done,
                speed=job.speed,
                **more,
            )

    def status_changed(self, job: Job, status: Status) -> None:
        self._daemon.event("JOB_STATUS_CHANGE", id=job.id, status=status.value)

    def ready(self, job: Job) -> None:
        self._block("BLOCK_JOB_READY", job)

    def pending(self, job: Job) -> None:
        if job.is_block_job:
            self._daemon.event("BLOCK_JOB_PENDING", type=job.kind, id=job.id)

    def completed(self, job: Job) -> None:
        if job.error is not None:
            self._block("BLOCK_JOB_COMPLETED", job, error=job.error.qemu())
        else:
            self._block("BLOCK_JOB_COMPLETED", job)

    def cancelled(self, job: Job) -> None:
        self._block("BLOCK_JOB_CANCELLED", job)

    def io_error(self, job: Job, operation: str, action: str, error: CowhandError) -> None:
        if job.is_block_job:
            self._daemon.event("BLOCK_JOB_ERROR", device=job.id, operation=operation, action=action)
