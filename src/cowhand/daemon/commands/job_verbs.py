"""What users ask of jobs (QEMU ``qapi/job.json``, and ``block-job-*`` of ``qapi/block-core.json``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.core.errors import InvalidArgument, JobError
from cowhand.daemon.table import command
from cowhand.jobs.job import Job
from cowhand.jobs.state import Status

if TYPE_CHECKING:
    from cowhand.daemon.daemon import Daemon


def _block_job(daemon: Daemon, device: str) -> Job:
    job = daemon.jobs.find(device)
    if job is None or not job.is_block_job:
        error = JobError(f"Block job '{device}' not found")
        error.qmp_class = "DeviceNotActive"
        raise error
    return job


@command("job-pause", {"id": "str"})
def job_pause(daemon: Daemon, id: str) -> None:
    daemon.jobs.get(id).pause()


@command("job-resume", {"id": "str"})
def job_resume(daemon: Daemon, id: str) -> None:
    daemon.jobs.get(id).resume()


@command("job-cancel", {"id": "str"})
def job_cancel(daemon: Daemon, id: str) -> None:
    daemon.jobs.get(id).cancel(force=True)


@command("job-complete", {"id": "str"})
def job_complete(daemon: Daemon, id: str) -> None:
    daemon.jobs.get(id).complete()


@command("job-finalize", {"id": "str"})
def job_finalize(daemon: Daemon, id: str) -> None:
    daemon.jobs.get(id).finalize()


@command("job-dismiss", {"id": "str"})
def job_dismiss(daemon: Daemon, id: str) -> None:
    daemon.jobs.get(id).dismiss()


@command("block-job-pause", {"device": "str"})
def block_job_pause(daemon: Daemon, device: str) -> None:
    _block_job(daemon, device).pause()


@command("block-job-resume", {"device": "str"})
def block_job_resume(daemon: Daemon, device: str) -> None:
    _block_job(daemon, device).resume()


@command("block-job-set-speed", {"device": "str", "speed": "int"})
def block_job_set_speed(daemon: Daemon, device: str, speed: int) -> None:
    _block_job(daemon, device).set_speed(speed)


@command("block-job-cancel", {"device": "str", "*force": "bool"})
def block_job_cancel(daemon: Daemon, device: str, force: bool = False) -> None:
    job = _block_job(daemon, device)
    if job.user_paused and not force:
        raise InvalidArgument(f"The block job for device '{device}' is currently paused")
    job.cancel(force=force)


@command("block-job-complete", {"device": "str"})
def block_job_complete(daemon: Daemon, device: str) -> None:
    _block_job(daemon, device).complete()


@command("block-job-finalize", {"id": "str"})
def block_job_finalize(daemon: Daemon, id: str) -> None:
    _block_job(daemon, id).finalize()


@command("block-job-dismiss", {"id": "str"})
def block_job_dismiss(daemon: Daemon, id: str) -> None:
    _block_job(daemon, id).dismiss()


@command("query-jobs", {})
def query_jobs(daemon: Daemon) -> list[dict[str, Any]]:
    return [job.info() for job in daemon.jobs.all()]


@command("query-block-jobs", {})
def query_block_jobs(daemon: Daemon) -> list[dict[str, Any]]:
    return [_info(job) for job in daemon.jobs.all() if job.is_block_job]


def _info(job: Job) -> dict[str, Any]:
    paused = job.status in (Status.PAUSED, Status.STANDBY)
    out: dict[str, Any] = {
        "type": job.kind,
        "device": job.id,
        "len": job.progress.total,
        "offset": job.progress.done,
        "busy": not paused and job.status is Status.RUNNING,
        "paused": job.user_paused or paused,
        "speed": job.speed,
        "io-status": job.io_status,
        "ready": job.status in (Status.READY, Status.STANDBY),
        "status": job.status.value,
        "auto-finalize": job.auto_finalize,
        "auto-dismiss": job.auto_dismiss,
    }
    if job.error is not None:
        out["error"] = job.error.qemu()
    return out
