"""Checking images, and repairing them: what is the same for every format that can be checked.

Counts, messages and exit codes are those of qemu-img's check, whose users compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cowhand.core.errors import CowhandError, InvalidArgument, NotSupported

if TYPE_CHECKING:
    import os

    from cowhand.block.node.node import BlockNode
    from cowhand.block.node.records import Finding, Say
    from cowhand.block.opening.policy import Policy

#: Findings that a check tells, one check of the two of a repair; what it finds beyond them is counted, but not listed.
MAX_FINDINGS = 100_000
REPAIRS = (None, "leaks", "all")


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


def check(
    what: str | os.PathLike[str] | Mapping[str, Any],
    *,
    repair: str | None = None,
    format: str | None = None,
    on_finding: Say | None = None,
    on_repaired: Callable[[CheckResult], None] | None = None,
    backing: bool = False,
    policy: Policy | None = None,
    options: Mapping[str, Any] | None = None,
) -> CheckResult:
    """Check the image *what*, which nobody else may be writing, and *repair* "leaks" or "all" that can be repaired.

    After a repair that changed something, *on_repaired* is called with what was found and done, and the image is checked once more; the
    result is the second check's, with the counts of what was fixed. Damage is not an exception but a result; ``findings`` tells of it, and
    *on_finding* gets each as it arises, up to ``MAX_FINDINGS`` of each check. What lies under the image is only opened with *backing*. Raises
    NotSupported for a format that has no check, and whatever opening raises.
    """
    from cowhand.block.disk import Disk
    from cowhand.block.opening.opening import Opening
    from cowhand.block.opening.policy import DEFAULT
    from cowhand.drivers import REGISTRY

    if repair not in REPAIRS:
        raise InvalidArgument(f"'{repair}' is not a repair", hint="One of: leaks, all.")
    opening = Opening(REGISTRY, policy or DEFAULT, backing=backing)
    opening.for_repair = True
    root = opening.open(what, format=format, options={"read-only": repair is None, **(options or {})})
    try:
        disk = Disk(root, writable=repair is not None)
    except BaseException:
        opening.abandon()
        raise
    with disk:
        try:
            result = check_node(root, repair=repair, on_finding=on_finding, on_repaired=on_repaired)
        except NotSupported as error:
            error.facts["guessed"] = root.probed  # nobody said that it is of that format
            raise
        if result.failure is not None:
            # The repair stopped on its way, and said why: that closing such a node fails as well is no news.
            try:
                disk.close()
            except CowhandError as error:
                result.failure.add_note(str(error))
    result.filename = str(what) if not isinstance(what, Mapping) else root.filename
    return result


def check_node(
    node: BlockNode,
    *,
    repair: str | None = None,
    on_finding: Say | None = None,
    on_repaired: Callable[[CheckResult], None] | None = None,
) -> CheckResult:
    """Check *node*, which is open, without requests in flight meanwhile; see :func:`check`."""
    from cowhand.block.graph import graph

    findings: list[Finding] = []

    def say(finding: Finding) -> None:
        if len(findings) <= MAX_FINDINGS:
            findings.append(finding)
        if on_finding is not None:
            on_finding(finding)

    with graph.quiesce(node):
        hooks = node.hooks
        result = node.check(repair, say)
        if node.hooks is not hooks:
            graph.rebind_parents(node)
        if (result.corruptions_fixed or result.leaks_fixed) and result.failure is None:
            if on_repaired is not None:
                on_repaired(result)
            again = node.check(None, say)
            again.corruptions_fixed, again.leaks_fixed = result.corruptions_fixed, result.leaks_fixed
            result = again
    result.findings = findings
    result.format = node.driver
    result.filename = node.filename
    return result


def unsupported(driver: str) -> NotSupported:
    """Return the error of a format that has no check."""
    return NotSupported(
        f"images of format '{driver}' cannot be checked", qemu="This image format does not support checks"
    )
