"""Look for damage and lost space in an image, and repair it if asked to.

Damage endangers data; lost space does not. Without --repair nothing is written. A repair first writes an undo log beside the image,
from which --undo takes the repair back, once, as long as nothing was written to the image since. The exit code is 0 for a sound image,
7 for lost space, 8 for damage.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cowhand.cli import arguments
from cowhand.cli.several import run_each
from cowhand.core.units import format_size

if TYPE_CHECKING:
    from cowhand.block.node.records import CheckResult
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand check disk.qcow2
  cowhand check -r leaks disk.qcow2    give lost space back
  cowhand check -r all disk.qcow2      repair damage, too
  cowhand check --plan disk.qcow2      say byte by byte what that would write
  cowhand check --explain disk.qcow2   say whose the clusters in question are
  cowhand check --undo disk.qcow2.undo disk.qcow2
"""
WRITES = True
EXIT_INCOMPLETE = 3
EXIT_LEAKS = 7
EXIT_DAMAGE = 8
#: Lines shown without --verbose.
SHOWN = 20


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", help="image to look at")
    arguments.add_format(parser)
    parser.add_argument(
        "-r", "--repair", choices=("leaks", "all"), help="give lost space back, or repair all that can be"
    )
    parser.add_argument("--explain", action="store_true", help="show what refers to every cluster concerned")
    parser.add_argument(
        "--plan", action="store_true", help="simulate the repair (all by default), and list what it would write"
    )
    log = parser.add_mutually_exclusive_group()
    log.add_argument(
        "--log", metavar="LOG", help="undo log of the repair; IMAGE.undo, or the next free name, if left out"
    )
    log.add_argument("--no-log", action="store_true", help="repair without an undo log")
    log.add_argument("--undo", metavar="LOG", help="undo the repair that LOG recorded")
    parser.add_argument(
        "--force", action="store_true", help="with --undo: ignore the image's modification time (it is a copy)"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help=f"print every finding, not just the first {SHOWN} alone"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors and warnings")
    arguments.add_share(parser)
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def writes(args: argparse.Namespace) -> bool:
    """Tell whether anything is going to be changed."""
    return (args.repair is not None or args.undo is not None) and not args.dry_run and not args.plan


def run(args: argparse.Namespace, context: Context) -> int:
    """Check, and repair, one image after the other."""
    images: list[str] = args.image
    if len(images) > 1 and (args.undo is not None or args.log is not None):
        raise arguments.Usage("an undo log is of one image", hint="Give --undo and --log with one image.")
    # The rest of the file, and check_repair, know of one.
    return run_each(images, context, lambda image: _run(argparse.Namespace(**{**vars(args), "image": image}), context))


def _run(args: argparse.Namespace, context: Context) -> int:
    from cowhand.image.check import check

    if args.undo is not None or args.plan or (args.repair and not args.dry_run and not args.no_log):
        from cowhand.cli.commands import check_repair

        return check_repair.run(args, context)
    repair = None if args.dry_run else args.repair
    options = {"force-share": True} if args.force_share and repair is None else None
    result = check(args.image, repair=repair, format=args.format, options=options)
    if result.failure is not None:
        if repair == "leaks" and result.failure.hint is None:
            result.failure.hint = (
                f"Lost space cannot be given back here before damage is repaired: cowhand check -r all {args.image} "
                f"({undo_words(args)})"
            )
        raise result.failure.within("the check could not be completed")
    if args.dry_run and args.repair:
        _plan(args, context, result)
    else:
        tell(args, context, result)
    return exit_code(result)


def tell(args: argparse.Namespace, context: Context, result: CheckResult, log: str | None = None) -> None:
    """Print *result*, with owners where they were asked for, and where the undo *log* of a repair is."""
    owners = None
    if args.explain:
        from cowhand.image.repair.plan import explain

        owners = explain(args.image, result.findings, format=args.format)
    if context.out.json:
        more: dict[str, Any] = {} if log is None else {"undo-log": log}
        if owners is not None:
            more["owners"] = {str(cluster): names for cluster, names in owners.items()}
        context.out.document({**document(result), **more})
        return
    _tell(args, context, result)
    for cluster, names in (owners or {}).items():
        context.out.line(f"cluster {cluster}: {', '.join(names) or 'nothing refers to it'}")
    if log is not None:
        context.out.line(f"  To undo: cowhand check --undo {log} {args.image}")


def exit_code(result: CheckResult) -> int:
    """Return what the command ends with."""
    if result.check_errors:
        return EXIT_INCOMPLETE
    return EXIT_DAMAGE if result.corruptions else EXIT_LEAKS if result.leaks else 0


def document(result: CheckResult) -> dict[str, Any]:
    """Return the result for JSON: all counts, also those that are zero, and the findings."""
    return {
        "filename": result.filename,
        "format": result.format,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "check-errors": result.check_errors,
        "corruptions-fixed": result.corruptions_fixed,
        "leaks-fixed": result.leaks_fixed,
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
        "findings": [finding.to_json() for finding in result.findings],
    }


def _tell(args: argparse.Namespace, context: Context, result: CheckResult) -> None:
    out = context.out
    tell_findings(args, context, result)
    if result.findings:
        out.line()
    if result.corruptions_fixed or result.leaks_fixed:
        out.line(f"repaired: {result.corruptions_fixed} damaged, {result.leaks_fixed} lost")
    out.line(f"{args.image}: {verdict(result)}")
    if result.total_clusters:
        percent = 100 * result.allocated_clusters / result.total_clusters
        words = f"{result.allocated_clusters} of {result.total_clusters} clusters in use ({percent:.1f} %)"
        if result.compressed_clusters:
            words += f", {result.compressed_clusters} of them compressed"
        out.line(f"{words}; the image ends at {format_size(result.image_end_offset)}")
    hint = advice(args, result)
    if hint:
        out.line(f"  {hint}")


def tell_findings(args: argparse.Namespace, context: Context, result: CheckResult) -> None:
    """Print the first findings, or all that were asked for."""
    shown = result.findings if args.verbose else result.findings[:SHOWN]
    for finding in shown:
        for line in finding.text.split("\n"):
            context.out.line(line)
    if len(result.findings) > len(shown):
        context.out.line(f"and {len(result.findings) - len(shown)} more (--verbose prints them)")


def verdict(result: CheckResult) -> str:
    """Return the result in words."""
    parts = []
    if result.corruptions:
        parts.append(f"damaged in {_count(result.corruptions, 'place')}")
    if result.leaks:
        parts.append(f"{_count(result.leaks, 'cluster')} lost, which harms no data")
    if result.check_errors:
        parts.append(f"{_count(result.check_errors, 'part')} could not be looked at")
    return "; ".join(parts) or "sound"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def undo_words(args: argparse.Namespace) -> str:
    """Return how a repair of the image can be taken back."""
    from cowhand.cli.commands.check_repair import free_name
    from cowhand.image.create import local_path

    path = local_path(args.image)
    if path is None:
        return "no undo log: a repair of what is not a file on this machine cannot be taken back, so copy it first"
    if args.no_log:
        return "copy the image first: without an undo log (--no-log) a repair cannot be taken back"
    log = args.log or free_name(path)
    return f"it first writes an undo log, from which it can be taken back: cowhand check --undo {log} {args.image}"


def advice(args: argparse.Namespace, result: CheckResult) -> str:
    """Return what to do next, or nothing."""
    if args.repair is not None or result.check_errors:
        return ""
    if result.corruptions:
        return f"Copy the image, then: cowhand check -r all {args.image} ({undo_words(args)})"
    return f"To get the space back: cowhand check -r leaks {args.image}" if result.leaks else ""


def _plan(args: argparse.Namespace, context: Context, result: CheckResult) -> None:
    from cowhand.cli.plan import Plan, Touch, show

    what = "reference counts" if args.repair == "leaks" else "reference counts and damaged entries"
    damaged = result.corruptions if args.repair == "all" else 0
    plan = Plan(
        action=f"repair {args.image}: {verdict(result)}",
        reads=[Touch(args.image, "all tables")],
        writes=[Touch(args.image, what)] if damaged or result.leaks else [],
        warnings=["entries that contradict themselves are cleared: what they named reads as zeroes"] if damaged else [],
        undo=undo_words(args),
    )
    show(plan, context.out)
