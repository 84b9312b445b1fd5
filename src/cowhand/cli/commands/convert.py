"""Copy a disk, or several concatenated, into a new image.

The new image appears under its name when it is complete; an existing one is overwritten only if you insist
(--overwrite), or written in place with -n. What is overwritten stays until the new image is complete. Without -O the
format is what the target's name ends with (.qcow2), or raw.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cowhand.cli import arguments
from cowhand.cli.guard import add_guard
from cowhand.core.errors import CowhandError, InvalidArgument
from cowhand.core.units import format_size

if TYPE_CHECKING:
    from cowhand.block.disk import Disk
    from cowhand.block.opening.policy import Policy
    from cowhand.cli.running import Context
    from cowhand.copy.ops.convert import ConvertResult

EXAMPLES = """\
  cowhand convert -O qcow2 disk.raw disk.qcow2                import a raw disk
  cowhand convert -O qcow2 -c disk.qcow2 small.qcow2          compressed, on all cores
  cowhand convert -O raw -l before-upgrade vm.qcow2 old.raw   take out a snapshot
  cowhand convert -O qcow2 -B base.qcow2 -F qcow2 work.qcow2 copy.qcow2
  cowhand convert --key-file old.key --encrypt --target-key-file new.key -O qcow2 disk.qcow2 copy.qcow2
  cowhand convert --verify -O qcow2 disk.raw disk.qcow2       read both again, and compare
"""
WRITES = True
#: Ranges that could not be read which are named; JSON has all.
_RANGES_SHOWN = 10


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="+", help="image to copy; several are concatenated")
    parser.add_argument("target", help="image to make; - writes raw bytes to standard output")
    arguments.add_format(parser, "the sources")
    parser.add_argument("-O", "--target-format", metavar="FMT", help="format of the new image")
    parser.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE,...", help="options of the new image"
    )
    parser.add_argument(
        "-B",
        "--backing",
        metavar="BASE",
        help="make an overlay of BASE, storing only what the source's own layer stores",
    )
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="format of BASE")
    parser.add_argument("-l", "--snapshot", metavar="NAME", help="copy the disk as it was at this snapshot")
    parser.add_argument(
        "--snapshots",
        action="store_true",
        help="copy the internal snapshots too: ids, names, dates, VM states, and what they share stays shared",
    )
    parser.add_argument(
        "--bitmaps", action="store_true", help="copy the dirty bitmaps too; what the copy itself writes is not recorded"
    )
    parser.add_argument(
        "--skip-broken-bitmaps", action="store_true", help="with --bitmaps: skip bitmaps that are inconsistent"
    )
    arguments.add_encrypt(parser)
    parser.add_argument(
        "--target-secret", action="store_true", help="ask for a passphrase of the new image's own on the terminal"
    )
    parser.add_argument(
        "--target-key-file", action="append", metavar="FILE", help="take the new image's passphrase from FILE"
    )
    parser.add_argument("-c", "--compress", action="store_true", help="store compressed")
    parser.add_argument("--compression-level", type=int, metavar="N", help="denser and slower than the fast default")
    parser.add_argument("-n", "--no-create", action="store_true", help="write into an existing image, in place")
    parser.add_argument(
        "--target-is-zero", action="store_true", help="promise that the existing image reads as zeroes (with -n)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what has the target's name")
    parser.add_argument("--verify", action="store_true", help="compare both when the copy is made")
    parser.add_argument(
        "--untrusted",
        action="store_true",
        help="refuse sources that inspect --untrusted rejects; open no file that they name",
    )
    _tuning(parser)
    arguments.add_talk(parser)
    arguments.add_share(parser)
    add_guard(parser, "write over what is there although other images read through it")
    arguments.add_dry_run(parser)
    arguments.add_output(parser)


def _tuning(parser: argparse.ArgumentParser) -> None:
    tuning = parser.add_argument_group("how bytes are moved")
    tuning.add_argument(
        "-S",
        "--sparse-size",
        type=arguments.size,
        default=4096,
        metavar="SIZE",
        help="leave out zeroes from this size on; 0 writes every byte",
    )
    tuning.add_argument("-m", "--workers", type=int, metavar="N", help="threads, 1 to 16")
    tuning.add_argument("-W", "--out-of-order", action="store_true", help="let space be taken in any order")
    tuning.add_argument("-C", "--copy-range", action="store_true", help="let the system copy inside the file system")
    tuning.add_argument(
        "-r", "--rate-limit", type=arguments.size, default=0, metavar="SIZE", help="bytes a second, at most"
    )
    tuning.add_argument(
        "-t",
        "--cache",
        choices=arguments.CACHE_NAMES,
        metavar="MODE",
        default="unsafe",
        help="the target's cache; unsafe does not wait for the medium",
    )
    tuning.add_argument(
        "-T",
        "--source-cache",
        choices=arguments.CACHE_NAMES,
        metavar="MODE",
        default="writeback",
        help="the sources' cache",
    )
    tuning.add_argument("--salvage", action="store_true", help="put zeroes where a source cannot be read, and go on")


def run(args: argparse.Namespace, context: Context) -> int:
    """Convert."""
    from cowhand.cli.guard import guard_of, refuse_existing, tidy
    from cowhand.cli.own_source import refuse_own_source
    from cowhand.cli.standard_output import is_stream

    _check(args)
    if is_stream(args.target):
        return _to_stream(args, context)
    refuse_own_source(args.source, args.target, args.format)
    there = refuse_existing(args.target, args.overwrite or args.no_create)
    policy = _refuse_unsafe(args) if args.untrusted else None
    tidy(context, args.target, remove=not args.dry_run)
    if args.dry_run:
        return _plan(args, context, there)
    from cowhand.copy.ops.convert import convert

    label = f"{os.path.basename(args.source[0])} → {os.path.basename(args.target)}"
    result = convert(
        args.source,
        args.target,
        args.target_format if args.no_create else arguments.format_for(args.target, args.target_format),
        source_format=args.format,
        options=_options(args),
        backing=args.backing,
        backing_format=args.backing_format,
        skip_create=args.no_create,
        target_is_zero=args.target_is_zero,
        overwrite=args.overwrite,
        snapshot=args.snapshot,
        compressed=args.compress,
        compression_level=args.compression_level,
        sparse_size=args.sparse_size,
        workers=args.workers,
        in_order=not args.out_of_order,
        salvage=args.salvage,
        snapshots=args.snapshots,
        bitmaps=args.bitmaps,
        skip_broken_bitmaps=args.skip_broken_bitmaps,
        copy_range=args.copy_range,
        rate_limit=args.rate_limit,
        cache=args.cache,
        source_cache=args.source_cache,
        force_share=args.force_share,
        policy=policy,
        progress=context.progress(label),
        cancel=context.cancel,
        warn=context.out.warn,
        guard=guard_of(args, context),
    )
    _warn_of_losses(args, context)
    if args.verify:
        _verify(args, result, context)
    return _tell(args, result, context)


def _to_stream(args: argparse.Namespace, context: Context) -> int:
    """Write raw bytes to standard output, or a pipe: what asks for more than their order is refused."""
    from cowhand.cli.standard_output import opened
    from cowhand.copy.ops.stream import stream

    wrong = {
        "-n": args.no_create, "-B": args.backing, "-c": args.compress, "-o": args.option, "--encrypt": args.encrypt,
        "--snapshots": args.snapshots, "--bitmaps": args.bitmaps, "--verify": args.verify, "--dry-run": args.dry_run,
    }  # fmt: skip
    for option, given in wrong.items():
        if given:
            raise arguments.Usage(f"{option} cannot be used when the target is a stream of bytes ('{args.target}')")
    policy = _refuse_unsafe(args) if args.untrusted else None
    with opened(args.target, args.target_format, context) as descriptor:
        result = stream(
            args.source,
            descriptor,
            name="standard output" if args.target == "-" else args.target,
            source_format=args.format,
            snapshot=args.snapshot,
            salvage=args.salvage,
            rate_limit=args.rate_limit,
            source_cache=args.source_cache,
            force_share=args.force_share,
            policy=policy,
            progress=context.progress(f"{os.path.basename(args.source[0])} → {args.target}"),
            cancel=context.cancel,
            warn=context.out.warn,
        )
    _warn_of_losses(args, context)
    return _tell(args, result, context)


def _check(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself before anything is read."""
    if args.bitmaps and args.snapshot is not None:
        raise arguments.Usage(
            "dirty bitmaps describe the disk as it is now, not as it was at a snapshot",
            hint="Leave out --bitmaps, or -l.",
        )
    if args.no_create and args.encrypt:
        raise InvalidArgument(
            "an image that exists is encrypted already, or it is not",
            hint="Leave out --encrypt: the passphrase is taken from --target-key-file or --target-secret.",
        )
    if args.verify and len(args.source) > 1:
        raise arguments.Usage("--verify works with one source only", hint="Leave out --verify.")


def _options(args: argparse.Namespace) -> dict[str, str]:
    given = arguments.driver_options(args.option)
    if args.no_create:
        return given  # passphrases of an image that exists are offered to it when it is opened
    if not (args.encrypt or args.target_secret or args.target_key_file):
        return given
    from cowhand.cli.secrets import creation_options

    return creation_options(args, arguments.format_for(args.target, args.target_format), given)


def _refuse_unsafe(args: argparse.Namespace) -> Policy:
    """Raise PolicyRefused when a source is not safe; return the policy under which the others are opened, as the format judged."""
    from cowhand.block.opening.policy import UNTRUSTED
    from cowhand.core.errors import PolicyRefused
    from cowhand.image.create import local_path
    from cowhand.image.untrusted import judge

    if args.backing:
        raise InvalidArgument("an untrusted source cannot be given a backing file")
    formats = set()
    for name in args.source:
        path = local_path(name)
        if path is None:
            raise PolicyRefused(f"'{name}' is not a file on this machine, and only local files can be judged")
        verdict = judge(path, args.format)
        if not verdict.sound:
            reasons = "; ".join(reason.text for reason in verdict.reasons[:5])
            raise PolicyRefused(
                f"'{name}' is not safe: {reasons}", path=name, hint=f"See: cowhand inspect --untrusted {name}"
            )
        formats.add(verdict.format)
    if len(formats) > 1:
        raise InvalidArgument("untrusted sources must all have the same format")
    args.format = formats.pop()
    return UNTRUSTED


def _makes_encrypted(args: argparse.Namespace) -> bool:
    """Tell whether the target is an encrypted image; of one that exists that is not asked."""
    if args.no_create or args.encrypt or arguments.format_for(args.target, args.target_format) == "luks":
        return True
    return bool({"encryption", "encrypt.format"} & arguments.driver_options(args.option).keys())


def _warn_of_losses(args: argparse.Namespace, context: Context) -> None:
    """Say what a copy does not carry over: that is easily forgotten."""
    if args.format == "raw":
        return  # keeps nothing beside the disk
    from cowhand.cli.commands.info import encryption_words
    from cowhand.image.info import image_info

    for name in args.source:
        try:
            info = image_info(name, format=args.format, force_share=True)
        except CowhandError:
            continue  # the source was a description, or is gone by now; the copy is made
        if encryption_words(info) and not _makes_encrypted(args):
            context.out.warn(f"{name}: it is encrypted, and the copy is not (use --encrypt to encrypt it)")
        if info.snapshots and args.snapshot is None and not args.snapshots:
            count = len(info.snapshots)
            words = "snapshot is" if count == 1 else "snapshots are"
            context.out.warn(f"{name}: {count} internal {words} not copied (--snapshots; take one out with -l NAME)")
        if info.bitmaps_problem and not args.bitmaps:
            context.out.warn(f"{name}: its bitmaps are unreadable, and are not copied: {info.bitmaps_problem}")
        elif (info.details or {}).get("bitmaps") and not args.bitmaps:
            context.out.warn(
                f"{name}: its dirty bitmaps are not copied (--bitmaps); an incremental backup of the copy must begin with a full one"
            )


def _verify(args: argparse.Namespace, result: ConvertResult, context: Context) -> None:
    from cowhand.copy.ops.compare import compare

    if result.unreadable_ranges:
        raise InvalidArgument("the copy was made, but parts of the source could not be read, so it cannot be verified")
    from cowhand.image.open import open_source

    with ExitStack() as stack:
        source = open_source(args.source[0], stack, args.format, snapshot=args.snapshot, force_share=args.force_share)
        if args.snapshots:
            _verify_snapshots(source, result.filename, result.format, context)
        found = compare(
            source,
            result.filename,
            second_format=result.format,
            progress=context.progress("verifying"),
            cancel=context.cancel,
        )
    if not found.identical:
        raise CowhandError(
            f"the copy differs from its source at {found.offset:#x}",
            path=result.filename,
            offset=found.offset,
            hint="Do not use it. Was the source written meanwhile? Otherwise check the medium.",
        )


def _verify_snapshots(source: Disk, target: str, format: str, context: Context) -> None:
    """Compare every snapshot with its copy."""
    import cowhand
    from cowhand.copy.ops.compare import compare
    from cowhand.image.snapshots import list_snapshots, open_snapshot

    with cowhand.open(target, format=format) as copy:
        for info, copied in zip(list_snapshots(source), list_snapshots(copy), strict=True):
            with open_snapshot(source, info) as left, open_snapshot(copy, copied) as right:
                found = compare(left, right, cancel=context.cancel)
                if not found.identical or left.size != right.size:
                    raise CowhandError(
                        f"snapshot '{info.name or info.id}' of the copy differs from its source at {found.offset:#x}",
                        path=target, offset=found.offset, hint="Do not use it. Check the medium.",
                    )  # fmt: skip


def _document(args: argparse.Namespace, result: ConvertResult) -> dict[str, Any]:
    return {
        "filename": result.filename,
        "format": result.format,
        "virtual-size": result.size,
        "copied": result.copied,
        "zeroes": result.zeroes,
        "left-to-backing": result.skipped,
        "unreadable": list(result.unreadable),
        "unreadable-ranges": [{"start": start, "length": length} for start, length in result.unreadable_ranges],
        "unreadable-bytes": sum(length for _, length in result.unreadable_ranges),
        "verified": args.verify,
    }


def _tell(args: argparse.Namespace, result: ConvertResult, context: Context) -> int:
    if context.out.json:
        context.out.document(_document(args, result))
    else:
        parts = [f"copied {format_size(result.copied)} of {format_size(result.size)} to {result.filename}"]
        if result.skipped:
            parts.append(f"{format_size(result.skipped)} left to {args.backing or 'its base'}")
        if args.verify:
            parts.append("verified")
        context.out.line(", ".join(parts))
    if result.unreadable_ranges:
        context.out.warn(_lost(result))
    return 3 if result.unreadable_ranges else 0


def _lost(result: ConvertResult) -> str:
    """Return what salvaging could not read: how much, where, and why."""
    ranges = result.unreadable_ranges
    amount = format_size(sum(length for _, length in ranges))
    places = [f"{start:#x} ({format_size(length)})" for start, length in ranges[:_RANGES_SHOWN]]
    more = (
        f" and {len(ranges) - _RANGES_SHOWN} more places (--output json lists all)"
        if len(ranges) > _RANGES_SHOWN
        else ""
    )
    reason = f": {result.unreadable_reason.message}" if result.unreadable_reason is not None else ""
    return f"{amount} could not be read and {'is' if len(ranges) == 1 else 'are'} zero in the copy, at {', '.join(places)}{more}{reason}"


def _plan(args: argparse.Namespace, context: Context, there: bool) -> int:
    from cowhand.cli.guard import dependents, in_place_warning
    from cowhand.cli.plan import Plan, Touch, show
    from cowhand.plans.dependents import Dependents

    format = arguments.format_for(args.target, args.target_format)
    amounts = [_amount(name, args, format) for name in args.source]
    reads = [Touch(name, "data", data) for name, (data, _) in zip(args.source, amounts, strict=True)]
    needed = max((required for _, required in amounts), default=0) if len(amounts) == 1 else None
    if args.backing:
        _refuse_loop(args)
        reads.append(Touch(args.backing, "header of the base"))
    in_place = in_place_warning(args.target, backing=args.backing) if there and not args.no_create else []
    plan = Plan(
        action=f"copy {', '.join(args.source)} into {args.target}, {format}",
        reads=reads,
        writes=[Touch(args.target, _fate(args, there), needed)],
        moves=sum(data for data, _ in amounts),
        dependents=dependents(args.target, args) if there else Dependents(),
        warnings=[*in_place, *(_size_warning(args) if args.no_create else _space_warning(args.target, needed or 0))],
        undo="none: what the target holds now would be gone" if there else f"delete {args.target}",
    )
    return show(plan, context.out)


def _fate(args: argparse.Namespace, there: bool) -> str:
    if not there:
        return "new image, at most"
    if args.no_create:
        return "written in place, its present content would be lost"
    return "its present content would be lost when the new image is complete, which takes at most"


def _refuse_loop(args: argparse.Namespace) -> None:
    from cowhand.block.links.reading import refuse_loop
    from cowhand.block.links.records import BACKING, Link
    from cowhand.drivers import REGISTRY
    from cowhand.image.create import local_path

    path = local_path(args.target)
    if path is not None:
        refuse_loop(path, Link(BACKING, args.backing, args.backing_format), REGISTRY, force=args.force)


def _amount(name: str, args: argparse.Namespace, format: str) -> tuple[int, int]:
    """Return the bytes of data that would be read, and those that the new image would need."""
    from cowhand.copy.ops.measure import measure
    from cowhand.core.extents import by_content
    from cowhand.image.open import open_source

    with ExitStack() as stack:
        disk = open_source(name, stack, args.format, snapshot=args.snapshot, force_share=args.force_share)
        depth = 1 if args.backing else None
        data = sum(length for _, length, zero in by_content(disk.extents(depth=depth)) if not zero)
        return data, measure(disk, format).required


def _size_warning(args: argparse.Namespace) -> list[str]:
    """Return a sentence that the existing target is too short for what would be copied, if it is."""
    from cowhand.image.open import open_source

    with ExitStack() as stack:
        sources = [
            open_source(name, stack, args.format, snapshot=args.snapshot, force_share=args.force_share)
            for name in args.source
        ]
        wanted = sum(-(-disk.size // 512) * 512 for disk in sources)
        target = open_source(args.target, stack, args.target_format, force_share=True)
        if target.size >= wanted:
            return []
        return [
            f"it does not fit: {args.target} is a disk of {format_size(target.size)}, and {format_size(wanted)} would be copied"
        ]


def _space_warning(target: str, needed: int) -> list[str]:
    from cowhand.core.mounts import free_bytes

    free = free_bytes(target)
    if free is None or needed <= free:
        return []
    return [f"it may not fit: up to {format_size(needed)} are needed, {format_size(free)} are free"]
