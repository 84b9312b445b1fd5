"""Jobs: long operations on disks in use, with QEMU's states, verbs, errors and events (``qapi/job.json``, ``qapi/block-core.json``).

A job has one thread. It copies piece by piece; between two pieces, with no lock and no request held, it looks whether it shall pause,
end, or wait for its speed limit (:meth:`Job.pause_point`). Its changes of the graph are short actions inside a drain, at its end.

Lock: one condition for each transaction guards the states of its jobs (rank: none is taken inside but that of listeners).
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import StrEnum
from typing import Any, ClassVar

from cowhand.core import clock
from cowhand.core.errors import Cancelled, CowhandError, JobError, NoSpace
from cowhand.core.progress import CancelToken, Progress
from cowhand.jobs.state import ALLOWED, TRANSITIONS, Status, Verb

#: QEMU's rule for names that users give.
_ID = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*\Z")
_ACTIVE = frozenset((Status.RUNNING, Status.PAUSED, Status.READY, Status.STANDBY))


class OnError(StrEnum):
    """BlockdevOnError: what a job does after an error of one side."""

    REPORT = "report"  #: end with it
    IGNORE = "ignore"  #: go on, and try that piece again later
    ENOSPC = "enospc"  #: stop where space ran out, report otherwise
    STOP = "stop"  #: pause, and try the same piece again after resume


class JobListener:
    """Hears of a job. Called from the job's thread or from that of a verb, in the order in which things happen; must not wait for the job."""

    def status_changed(self, job: Job, status: Status) -> None:
        """*job* is in another state now (JOB_STATUS_CHANGE)."""

    def ready(self, job: Job) -> None:
        """*job* can be completed (BLOCK_JOB_READY)."""

    def pending(self, job: Job) -> None:
        """*job* waits to be finalized (BLOCK_JOB_PENDING)."""

    def completed(self, job: Job) -> None:
        """*job* has ended, perhaps with ``job.error`` (BLOCK_JOB_COMPLETED)."""

    def cancelled(self, job: Job) -> None:
        """*job* was cancelled (BLOCK_JOB_CANCELLED)."""

    def io_error(self, job: Job, operation: str, action: str, error: CowhandError) -> None:
        """A request of *job* failed; *operation* is read or write, *action* report, ignore or stop (BLOCK_JOB_ERROR)."""


class Transaction:
    """Jobs that end together: all of them, or none. A job that was given none has one of its own."""

    def __init__(self) -> None:
        self.condition = threading.Condition(threading.RLock())
        self.jobs: list[Job] = []
        self.aborting = False


class Job(ABC):
    """One job. Make it, then :meth:`start` it; all verbs may be called by any thread.

    *speed* is in bytes a second, 0 for no limit. Without *auto_finalize* it stays *pending* until :meth:`finalize`; without *auto_dismiss* it
    stays *concluded* until :meth:`dismiss`. Subclasses do their work in :meth:`run`, and what belongs to its end in :meth:`prepare` (may
    fail), then :meth:`commit` or :meth:`abort`, and :meth:`clean`, none of which may fail.
    """

    kind: ClassVar[str] = ""
    #: whether it is one of the jobs that QEMU's block-job-* commands and BLOCK_JOB_* events are for
    is_block_job: ClassVar[bool] = True

    def __init__(
        self,
        ident: str,
        *,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        transaction: Transaction | None = None,
        listener: JobListener | None = None,
        on_source_error: OnError = OnError.REPORT,
        on_target_error: OnError = OnError.REPORT,
    ) -> None:
        if not _ID.match(ident):
            raise JobError(f"Invalid job ID '{ident}'", hint="A letter, then letters, digits, '-', '.' or '_'.")
        if speed < 0:
            raise JobError("Invalid parameter 'speed'", hint="A speed is in bytes a second; 0 means no limit.")
        self.id = ident
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.transaction = transaction or Transaction()
        self.listener = listener or JobListener()
        self.on_source_error = on_source_error
        self.on_target_error = on_target_error
        self.progress = Progress()
        self.cancel_token = CancelToken()
        self.status = Status.CREATED
        self.error: CowhandError | None = None
        self.io_status = "ok"
        self.speed = speed
        self.user_paused = False
        self._pauses = 0  #: how many reasons there are to pause: the user, errors, drains
        self._force_cancel = False
        self._completing = False
        self._finalized = False
        self._prepared = False
        self._free_at = 0.0  #: when what was let pass by the speed limit is paid for
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self.transaction.jobs.append(self)

    # -- what subclasses do

    @abstractmethod
    def run(self) -> None:
        """Do the work; called once, in the job's thread. Raises what ends the job."""

    def prepare(self) -> None:
        """Do what can fail of the end: flush, write headers. Nothing is final yet."""

    def commit(self) -> None:
        """Make the end final, after every job of the transaction has prepared itself."""

    def abort(self) -> None:
        """Take back what can be taken back: this job, or another one of the transaction, failed or was cancelled."""

    def clean(self) -> None:
        """Let go of everything, after :meth:`commit` or :meth:`abort`."""

    # -- the life of the thread

    def start(self, *, drained: bool = False) -> None:
        """Let the job run. *drained*: it begins inside a drain, which shows as a pause (QEMU's backup)."""
        if drained:
            with self.transaction.condition:
                self._pauses += 1
        self._thread = threading.Thread(target=self._live, name=f"job-{self.id}", daemon=True)
        with self.transaction.condition:
            self._become(Status.RUNNING)
            if self._pauses:
                self._become(Status.PAUSED)
        self._thread.start()
        if drained:
            with self.transaction.condition:
                self._pauses -= 1
                self.transaction.condition.notify_all()
                # It has left the pause before anyone asks: whoever started it does not see what the drain did.
                self.transaction.condition.wait_for(lambda: self.status is not Status.PAUSED or self._pauses > 0, 30)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the job has concluded; tell whether it has."""
        return self._ended.wait(timeout)

    def result(self, timeout: float | None = None) -> None:
        """Wait for the end, and raise the error that the job ended with. Raises JobError when it has not after *timeout* seconds."""
        if not self.wait(timeout):
            raise JobError(f"Job '{self.id}' has not ended in {timeout:g} s")
        if self.error is not None:
            raise self.error

    def _live(self) -> None:
        try:
            self.pause_point()
            self.run()
            if self._force_cancel:
                self.cancel_token.check()
        except CowhandError as error:
            self._fail(error)
        except BaseException as error:  # noqa: BLE001 - a defect of ours ends the job, and is told
            self._fail(JobError(f"internal error in job '{self.id}': {type(error).__name__}: {error}"))
            self.error.__cause__ = error  # type: ignore[union-attr]
        self._end()

    def _fail(self, error: CowhandError) -> None:
        with self.transaction.condition:
            if self.error is None:
                self.error = error

    def _end(self) -> None:
        """Wait for the others of the transaction, for finalize, and conclude."""
        transaction = self.transaction
        with transaction.condition:
            if self.error is not None or transaction.aborting:
                self._abort_all()
            else:
                self._become(Status.WAITING)
                transaction.condition.notify_all()
                transaction.condition.wait_for(
                    lambda: (
                        transaction.aborting
                        or all(job.status not in _ACTIVE and job.status != Status.CREATED for job in transaction.jobs)
                    )
                )
                if not transaction.aborting:
                    self._become(Status.PENDING)
                    if not self.auto_finalize:
                        self.listener.pending(self)
                    transaction.condition.notify_all()
                    transaction.condition.wait_for(lambda: transaction.aborting or self._may_finalize())
        self._settle()

    def _may_finalize(self) -> bool:
        jobs = self.transaction.jobs
        if not all(job.status in (Status.PENDING, Status.CONCLUDED, Status.NULL) for job in jobs):
            return False
        return all(job.auto_finalize for job in jobs) or any(job._finalized for job in jobs)

    def _abort_all(self) -> None:
        """Have every job of the transaction end without success; the condition is held."""
        self.transaction.aborting = True
        for job in self.transaction.jobs:
            job._force_cancel = True
            if job is not self:
                job.cancel_token.cancel("Operation canceled")
        self.transaction.condition.notify_all()

    def _settle(self) -> None:
        """Prepare all jobs of the transaction, then commit or abort this one."""
        transaction = self.transaction
        if not transaction.aborting:
            try:
                self.prepare()
            except CowhandError as error:
                self._fail(error)
            with transaction.condition:
                self._prepared = True
                if self.error is not None:
                    self._abort_all()
                transaction.condition.notify_all()
                transaction.condition.wait_for(
                    lambda: transaction.aborting or all(job._prepared for job in transaction.jobs)
                )
        with transaction.condition:
            failed = transaction.aborting
            if failed:
                if self.error is None:
                    self.error = Cancelled("Operation canceled")
                self._become(Status.ABORTING)
        try:
            (self.abort if failed else self.commit)()
        finally:
            try:
                self.clean()
            finally:
                self._conclude()

    def _conclude(self) -> None:
        with self.transaction.condition:
            if isinstance(self.error, Cancelled):
                self.listener.cancelled(self)
            else:
                self.listener.completed(self)
            self._become(Status.CONCLUDED)
            self.transaction.condition.notify_all()
            if self.auto_dismiss:
                self._become(Status.NULL)
        self._ended.set()

    def _become(self, status: Status) -> None:
        if status not in TRANSITIONS[self.status]:
            raise JobError(f"Job '{self.id}' cannot become {status.value} from {self.status.value}")
        self.status = status
        self.listener.status_changed(self, status)

    # -- for the work

    def pause_point(self, amount: int = 0) -> None:
        """Wait here while the job is paused, and as its speed demands for *amount* bytes. Nothing may be held. Raises Cancelled."""
        condition = self.transaction.condition
        with condition:
            while self._pauses and not self.cancel_token.cancelled:
                before = self.status
                if before in (Status.RUNNING, Status.READY):
                    self._become(Status.PAUSED if before is Status.RUNNING else Status.STANDBY)
                condition.notify_all()
                condition.wait_for(lambda: not self._pauses or self.cancel_token.cancelled)
            if self.status is Status.PAUSED:
                self._become(Status.RUNNING)
            elif self.status is Status.STANDBY:
                self._become(Status.READY)
            if self.cancel_token.cancelled and (self._force_cancel or self.status is not Status.READY):
                raise Cancelled("Operation canceled")
            wait = self._wait_for_speed(amount)
        if wait > 0:
            self.cancel_token.wait(wait)

    def _wait_for_speed(self, amount: int) -> float:
        if not self.speed or not amount:
            return 0.0
        moment = clock.monotonic()
        begin = max(self._free_at, moment - 0.1)
        self._free_at = begin + amount / self.speed
        return self._free_at - moment

    def become_ready(self) -> None:
        """Say that the job can be completed from now on."""
        with self.transaction.condition:
            if self.status is Status.RUNNING:
                self._become(Status.READY)
                self.listener.ready(self)

    @property
    def completing(self) -> bool:
        """Whether the user asked a ready job to end; or to end without its effect (see :attr:`ending_early`)."""
        return self._completing or self.ending_early

    @property
    def ending_early(self) -> bool:
        """Whether a ready job was cancelled without force: it ends as it stands, at one moment, without changing the graph."""
        return self.cancel_token.cancelled and not self._force_cancel

    def handle_error(self, error: CowhandError, *, reading: bool) -> bool:
        """Do after a failed request what the job's policy says: raise *error* to end the job; True: try again; False: go on without it."""
        policy = self.on_source_error if reading else self.on_target_error
        no_space = isinstance(error, NoSpace)
        if policy is OnError.ENOSPC:
            policy = OnError.STOP if no_space else OnError.REPORT
        operation = "read" if reading else "write"
        self.listener.io_error(self, operation, policy.value, error)
        if policy is OnError.REPORT:
            raise error
        if policy is OnError.IGNORE:
            return False
        with self.transaction.condition:
            self.io_status = "nospace" if no_space else "failed"
            if not self.user_paused:
                self.user_paused = True
                self._pauses += 1
        self.pause_point()
        return True

    # -- verbs

    def _allow(self, verb: Verb) -> None:
        if self.status not in ALLOWED[verb]:
            raise JobError(f"Job '{self.id}' in state '{self.status.value}' cannot accept command verb '{verb.value}'")

    def pause(self) -> None:
        """Pause at the next point between two pieces. Raises JobError where it is paused already, or at its end."""
        with self.transaction.condition:
            self._allow(Verb.PAUSE)
            if self.user_paused:
                raise JobError("Job is already paused")
            self.user_paused = True
            self._pauses += 1

    def resume(self) -> None:
        """End :meth:`pause`, or the pause after an error. Raises JobError where it is not paused."""
        with self.transaction.condition:
            self._allow(Verb.RESUME)
            if not self.user_paused:
                raise JobError("Can't resume a job that was not paused")
            self.user_paused = False
            self.io_status = "ok"
            self._pauses -= 1
            self.transaction.condition.notify_all()

    def set_speed(self, speed: int) -> None:
        """Limit the job to *speed* bytes a second from now on; 0 for no limit. Raises JobError."""
        with self.transaction.condition:
            self._allow(Verb.SET_SPEED)
            if speed < 0:
                raise JobError("Invalid parameter 'speed'")
            self.speed = speed
            self._free_at = 0.0

    def cancel(self, *, force: bool = False) -> None:
        """End the job. A ready mirror that is not forced completes without its pivot; everything else is aborted."""
        with self.transaction.condition:
            self._allow(Verb.CANCEL)
            if self.status not in (Status.READY, Status.STANDBY) or not self.soft_cancel or force:
                self._force_cancel = True
            if self._force_cancel and self.status in (Status.CREATED, Status.WAITING, Status.PENDING):
                self._fail(Cancelled("Operation canceled"))
                self._abort_all()
            self.cancel_token.cancel("Operation canceled")
            self.transaction.condition.notify_all()

    #: whether cancelling a ready job without force ends it well
    soft_cancel: ClassVar[bool] = False

    def complete(self) -> None:
        """Let a ready job end. Raises JobError in other states."""
        with self.transaction.condition:
            self._allow(Verb.COMPLETE)
            self._completing = True
            self.transaction.condition.notify_all()

    def finalize(self) -> None:
        """Let a pending job, and its transaction, conclude. Raises JobError in other states."""
        with self.transaction.condition:
            self._allow(Verb.FINALIZE)
            self._finalized = True
            self.transaction.condition.notify_all()

    def dismiss(self) -> None:
        """Forget a concluded job. Raises JobError in other states."""
        with self.transaction.condition:
            self._allow(Verb.DISMISS)
            self._become(Status.NULL)

    # -- what is told

    def info(self) -> dict[str, Any]:
        """Return QEMU's JobInfo."""
        out: dict[str, Any] = {
            "id": self.id,
            "type": self.kind,
            "status": self.status.value,
            "current-progress": self.progress.done,
            "total-progress": self.progress.total,
        }
        if self.error is not None:
            out["error"] = self.error.qemu()
        return out

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.status.value} {self.progress.done}/{self.progress.total}>"


class JobTable:
    """The jobs of one program or monitor by their ids, the newest first. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def add(self, job: Job) -> None:
        """Make *job* known until it is dismissed. Raises JobError where another one has its id."""
        with self._lock:
            known = self._jobs.get(job.id)
            if known is not None and known.status is not Status.NULL:
                raise JobError(f"Job ID '{job.id}' already in use")
            self._jobs.pop(job.id, None)
            self._jobs[job.id] = job

    def find(self, ident: str) -> Job | None:
        """Return the job of that id, None where there is none any more."""
        job = self._jobs.get(ident)
        return None if job is None or job.status is Status.NULL else job

    def get(self, ident: str) -> Job:
        """Return the job of that id. Raises JobError."""
        job = self.find(ident)
        if job is None:
            raise JobError("Job not found")
        return job

    def all(self) -> list[Job]:
        """Return all jobs that are not dismissed, the newest first."""
        with self._lock:
            return [job for job in reversed(list(self._jobs.values())) if job.status is not Status.NULL]

    def end_all(self, on_each: Callable[[Job], None] | None = None) -> None:
        """Cancel every job and wait for its end: a program is about to exit."""
        for job in self.all():
            if on_each is not None:
                on_each(job)
            if job.status is Status.CONCLUDED:
                job.dismiss()
                continue
            try:
                job.cancel(force=True)
            except JobError:
                pass  # it is at its end already
            job.wait()
