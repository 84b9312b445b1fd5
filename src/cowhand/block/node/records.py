"""Records that nodes answer with: findings and results of checks, internal snapshots.

Programs ask them for values; they become qemu-img's lines where a tool prints them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from cowhand.core.errors import CowhandError

#: What a finding means. ``NOTE`` tells of the check itself; ``UNREADABLE`` of what could not be looked at, or not be repaired.
ERROR, LEAK, REPAIRED, UNREADABLE, NOTE = "error", "leak", "repaired", "unreadable", "note"

#: How qemu-img's lines begin; a template says itself what its line begins with otherwise.
_VERBS = {ERROR: "ERROR", LEAK: "Leaked", REPAIRED: "Repairing"}


class Kind:
    """One thing that a check of some format can tell.

    ``name`` is stable, and means the same for ever. ``template`` are qemu-img's words: ``{verb}``, ``{cluster}``, ``{offset}`` and the facts of a
    finding are put in. Before a line that is ``as_tool``'s qemu-img puts its own name. Immutable.
    """

    __slots__ = ("as_tool", "name", "template")

    def __init__(self, name: str, template: str, *, as_tool: bool = False) -> None:
        self.name = name
        self.template = template
        self.as_tool = as_tool

    def __repr__(self) -> str:
        return f"<Kind {self.name}>"


class Finding:
    """One thing that a check found, or that a repair did. Immutable; compared by what it says.

    ``status`` is one of this file's constants. ``cluster`` is the number of the host cluster in question, ``offset`` the byte of the file at which
    what is wrong stands, both None where there is no such thing. ``owner`` names the structure of the image in which it stands, "" where that is
    not known. ``facts`` are further values, by name: numbers and words.
    """

    __slots__ = ("cluster", "facts", "kind", "offset", "owner", "status")

    def __init__(
        self,
        kind: Kind,
        status: str = ERROR,
        *,
        cluster: int | None = None,
        offset: int | None = None,
        owner: str = "",
        **facts: Any,
    ) -> None:
        self.kind = kind
        self.status = status
        self.cluster = cluster
        self.offset = offset
        self.owner = owner
        self.facts = facts

    @property
    def text(self) -> str:
        """qemu-img's words, one line or several."""
        verb = _VERBS.get(self.status, "")
        return self.kind.template.format(verb=verb, cluster=self.cluster, offset=self.offset, **self.facts)

    def to_json(self) -> dict[str, Any]:
        """Return the finding by names: kind, status, what is known of cluster, offset and owner, facts, text."""
        out: dict[str, Any] = {"kind": self.kind.name, "status": self.status}
        if self.cluster is not None:
            out["cluster"] = self.cluster
        if self.offset is not None:
            out["offset"] = self.offset
        if self.owner:
            out["owner"] = self.owner
        return {**out, **self.facts, "text": self.text}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Finding) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"<Finding {self.kind.name} {self.status}: {self.text!r}>"


Say: TypeAlias = Callable[[Finding], None]

#: Findings that a check tells, one check of the two of a repair; what it finds beyond them is counted, but not listed.
MAX_FINDINGS = 20_000


class CheckResult:
    """What a check found. Counts are of clusters or entries, as QEMU's ``ImageCheck`` (``qapi/block-core.json``) has them.

    ``failure`` is why the check could not come to its end; the counts are incomplete then.
    """

    __slots__ = (
        "allocated_clusters", "check_errors", "compressed_clusters", "corruptions", "corruptions_fixed", "failure", "filename", "findings", "format",
        "fragmented_clusters", "image_end_offset", "leaks", "leaks_fixed", "total_clusters",
    )  # fmt: skip

    def __init__(self) -> None:
        self.filename = ""
        self.format = ""
        self.corruptions = 0  #: what endangers data
        self.leaks = 0  #: clusters that nothing refers to: lost space, no harm
        self.check_errors = 0  #: what could not be looked at
        self.corruptions_fixed = 0
        self.leaks_fixed = 0
        self.image_end_offset = 0  #: bytes: behind the last cluster in use
        self.total_clusters = 0
        self.allocated_clusters = 0
        self.fragmented_clusters = 0
        self.compressed_clusters = 0
        self.failure: CowhandError | None = None
        self.findings: list[Finding] = []  #: in the order in which they were made; at most MAX_FINDINGS of each check

    @property
    def messages(self) -> list[str]:
        """The findings in qemu-img's words, line by line."""
        return [line for finding in self.findings for line in finding.text.split("\n")]

    @property
    def exit_code(self) -> int:
        """What qemu-img exits with: 0 sound, 1 not completed, 2 corrupt, 3 leaks only."""
        if self.failure is not None or self.check_errors:
            return 1
        return 2 if self.corruptions else 3 if self.leaks else 0

    @property
    def clean(self) -> bool:
        """Whether nothing was found wrong, and everything was looked at."""
        return self.exit_code == 0

    def to_json(self) -> dict[str, Any]:
        """Return QEMU's ``ImageCheck``: counts that are 0 are left out, but for check-errors."""
        out: dict[str, Any] = {"filename": self.filename, "format": self.format, "check-errors": self.check_errors}
        for name in (
            "image_end_offset", "corruptions", "leaks", "corruptions_fixed", "leaks_fixed", "total_clusters", "allocated_clusters",
            "fragmented_clusters", "compressed_clusters",
        ):  # fmt: skip
            value = getattr(self, name)
            if value:
                out[name.replace("_", "-")] = value
        return out

    def __repr__(self) -> str:
        return (
            f"<CheckResult {self.filename!r} corruptions={self.corruptions} leaks={self.leaks} check_errors={self.check_errors} "
            f"fixed={self.corruptions_fixed}+{self.leaks_fixed}>"
        )


class SnapshotInfo(NamedTuple):
    """A snapshot as users see it. Sizes are in bytes; ``date_sec`` counts from the epoch; ``icount`` is None where none was recorded."""

    id: str
    name: str
    disk_size: int
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    icount: int | None
