"""Checking images, and repairing them: what is the same for every format that can be checked.

Counts, messages and exit codes are those of qemu-img's check, whose users compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cowhand.block.node.records import MAX_FINDINGS
from cowhand.core.errors import CowhandError, InvalidArgument, NotSupported

if TYPE_CHECKING:
    import os

    from cowhand.block.node.node import BlockNode
    from cowhand.block.node.records import CheckResult, Finding, Say
    from cowhand.block.opening.policy import Policy

REPAIRS = (None, "leaks", "all")


def check(
    what: str | os.PathLike[str] | Mapping[str, Any],
    *,
    repair: str | None = None,
    format: str | None = None,
    on_finding: Say | None = None,
    on_repaired: Callable[[CheckResult], None] | None = None,
    backing: bool = False,
    policy: Policy | None = None,
    like_qemu: bool = False,
    options: Mapping[str, Any] | None = None,
) -> CheckResult:
    """Check the image *what*, which nobody else may be writing, and *repair* "leaks" or "all" that can be repaired.

    After a repair that changed something, *on_repaired* is called with what was found and done, and the image is checked once more; the
    result is the second check's, with the counts of what was fixed. Damage is not an exception but a result; ``findings`` tells of it, and
    *on_finding* gets each as it arises, up to ``MAX_FINDINGS`` of each check.
    What lies under the image is only opened with *backing*. With *like_qemu* a file becomes as long as a wrong entry says, as in QEMU. Raises
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
    opening.like_qemu = like_qemu
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
