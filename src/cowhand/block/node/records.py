"""What a check tells: records that programs can ask, and that become qemu-img's lines where somebody reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

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
