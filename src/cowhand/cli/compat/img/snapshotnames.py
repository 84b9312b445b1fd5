"""``-l`` of convert and measure: which internal snapshot is meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowhand.cli.compat import program
from cowhand.cli.compat.optionstrings import parse, warn_of_short_form
from cowhand.cli.compat.program import Failure

if TYPE_CHECKING:
    from cowhand.block.disk import Disk


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

    def find(self, disk: Disk) -> str:
        """Return the id of the snapshot in *disk*. Raises Failure."""
        snapshots = getattr(disk.root, "snapshots", None)
        if snapshots is None:
            used = f"Block format '{disk.format}' used by device ''"
            raise Failure(f"Failed to load snapshot: {used} does not support temporarily loading internal snapshots")
        for record in snapshots:
            if self._matches(record):
                found: str = record.id
                return found
        raise Failure("Failed to load snapshot: Can't find snapshot")

    def _matches(self, record: Any) -> bool:
        if self._word is not None:
            return bool(self._word in (record.id, record.name))
        return (self._id is None or self._id == record.id) and (self._name is None or self._name == record.name)
