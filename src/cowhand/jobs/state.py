"""What states a job can be in, how it gets from one to another, and what users may ask of it in each.

Source: QEMU ``qapi/job.json`` (JobStatus, JobVerb). A job is *created*, then *running*; a mirror becomes *ready* when both sides are the
same. What pauses a running job makes it *paused*, what pauses a ready one *standby*. At its end it is *waiting* for the others of its
transaction, then *pending* until it is finalized; or *aborting* after an error or a cancel. *Concluded*, it can be dismissed, and is *null*.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """JobStatus."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class Verb(StrEnum):
    """JobVerb: what users ask."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    DISMISS = "dismiss"
    FINALIZE = "finalize"
    CHANGE = "change"


_S = Status
#: {from: to}
TRANSITIONS: dict[Status, frozenset[Status]] = {
    _S.CREATED: frozenset((_S.RUNNING, _S.ABORTING, _S.NULL)),
    _S.RUNNING: frozenset((_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING)),
    _S.PAUSED: frozenset((_S.RUNNING,)),
    _S.READY: frozenset((_S.STANDBY, _S.WAITING, _S.ABORTING)),
    _S.STANDBY: frozenset((_S.READY,)),
    _S.WAITING: frozenset((_S.PENDING, _S.ABORTING)),
    _S.PENDING: frozenset((_S.ABORTING, _S.CONCLUDED)),
    _S.ABORTING: frozenset((_S.ABORTING, _S.CONCLUDED)),
    _S.CONCLUDED: frozenset((_S.NULL,)),
    _S.NULL: frozenset(),
}

#: {verb: states in which it may be asked}
ALLOWED: dict[Verb, frozenset[Status]] = {
    Verb.CANCEL: frozenset((_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY, _S.WAITING, _S.PENDING)),
    Verb.PAUSE: frozenset((_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY)),
    Verb.RESUME: frozenset((_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY)),
    Verb.SET_SPEED: frozenset((_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY)),
    Verb.COMPLETE: frozenset((_S.READY, _S.STANDBY)),
    Verb.FINALIZE: frozenset((_S.PENDING,)),
    Verb.DISMISS: frozenset((_S.CONCLUDED,)),
    Verb.CHANGE: frozenset((_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY)),
}
