"""``-l`` of convert and measure: which internal snapshot is meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowhand.cli.compat import program
from cowhand.cli.compat.optionstrings import parse, warn_of_short_form
from cowhand.cli.compat.program import Failure

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.node.records import SnapshotInfo


class Wanted:
    """A snapshot by id and name, by either, or by a word that may be both."""

    def __init__(self, text: str) -> None:
        self._word: str | None = None
        self._id: str | None = None
        self._name: str | None = None
        if not text.startswith("snapshot."):
            self._word = text
            return
        for pair in parse(text):
            warn_of_short_form(pair)
            if pair.name == "snapshot.id":
                self._id = pair.value
            elif pair.name == "snapshot.name":
                self._name = pair.value
            else:
                program.error(f"Invalid parameter '{pair.name}'")
                raise Failure(f"Failed in parsing snapshot param '{text}'")

    def find(self, disk: Disk) -> SnapshotInfo:
        """Return the snapshot of *disk* that is meant. Raises Failure."""
        snapshots = getattr(disk.root, "snapshots", None)
        if snapshots is None:
            used = f"Block format '{disk.format}' used by device ''"
            raise Failure(f"Failed to load snapshot: {used} does not support temporarily loading internal snapshots")
        known: list[SnapshotInfo] = [record.info() for record in snapshots]
        for matches in (self._has_id, self._has_name) if self._word is not None else (self._matches,):
            for one in known:
                if matches(one):
                    return one
        raise Failure("Failed to load snapshot: Can't find snapshot")

    def _has_id(self, one: SnapshotInfo) -> bool:
        return one.id == self._word  # the ids of all come before any name

    def _has_name(self, one: SnapshotInfo) -> bool:
        return one.name == self._word

    def _matches(self, one: SnapshotInfo) -> bool:
        return (self._id is None or self._id == one.id) and (self._name is None or self._name == one.name)
