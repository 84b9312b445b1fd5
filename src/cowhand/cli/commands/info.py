"""Show what an image is: format, sizes, snapshots, and its backing file.

With --chain all its backing files are shown as well, and which other images read through them (where a change would look). An image that is in
use is described too; its figures may be changing.
"""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING, Any

from cowhand.cli import arguments
from cowhand.cli.several import Codes, each
from cowhand.core.units import format_size
from cowhand.image.info import ImageInfo, chain_info, image_info

if TYPE_CHECKING:
    from cowhand.block.node.records import SnapshotInfo
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand info disk.qcow2
  cowhand info --chain work.qcow2                    with all images below it
  cowhand info --chain --svg chain.svg work.qcow2    a picture of them
  cowhand info --output json disk.qcow2              for programs
"""
WRITES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", help="image to look at")
    arguments.add_format(parser)
    parser.add_argument("--chain", "--backing-chain", action="store_true", help="show all images of its backing chain")
    arguments.add_picture(parser, of="the chain")
    arguments.add_share(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Tell about the images, or their chains."""
    if args.svg is not None:
        if len(args.image) > 1:
            raise arguments.Usage("--svg draws one image", hint="See: cowhand info --help")
        return _picture(args.image[0], args, context)
    codes = Codes()
    tell = _tell_chain if args.chain else _tell
    found = each(args.image, context, lambda image: tell(image, args, context, codes), codes, separate=True)
    if context.out.json:
        context.out.document(found if len(args.image) > 1 else found[0])
    return codes.worst


def _tell(image: str, args: argparse.Namespace, context: Context, codes: Codes) -> Any:
    info = image_info(image, format=args.format, force_share=args.force_share)
    if context.out.json:
        return info.document()
    _show(info, [], context)
    return None


def _tell_chain(image: str, args: argparse.Namespace, context: Context, codes: Codes) -> Any:
    chain = chain_info(image, format=args.format, force_share=args.force_share)
    others = other_overlays(chain)
    codes.add(_end(chain))
    if context.out.json:
        return [{**info.document(), "other-overlays": names} for info, names in zip(chain, others, strict=True)]
    for number, (info, names) in enumerate(zip(chain, others, strict=True)):
        if number:
            context.out.line()
        _show(info, names, context)
    return None


def _end(chain: list[ImageInfo]) -> int:
    # An incomplete chain cannot be read: scripts must see that, although all that could be said was said.
    return 1 if chain[-1].problem else 0


def other_overlays(chain: list[ImageInfo]) -> list[list[str]]:
    """Return for each image of *chain* the images that read directly through it, but for the one above it in the chain."""
    from cowhand.plans.dependents import Search

    search = Search()
    found = [[one.path for one in search.of([chain[0].filename]).overlays]]
    for above, info in itertools.pairwise(chain):
        overlays = () if info.problem else search.of([info.filename], [above.filename]).overlays
        found.append([one.path for one in overlays])
    return found


def _show(info: ImageInfo, overlays: list[str], context: Context) -> None:
    out = context.out
    rows = [("image", info.filename)]
    if info.problem:
        out.facts([*rows, ("problem", info.problem)])
        return
    rows.append(("format", _format_words(info)))
    rows.append(("disk size", f"{format_size(info.virtual_size)} ({info.virtual_size} bytes)"))
    if info.disk_size is not None:
        rows.append(("on disk", format_size(info.disk_size)))
    if info.cluster_size is not None:
        rows.append(("cluster size", format_size(info.cluster_size)))
    encryption = encryption_words(info)
    if encryption:
        rows.append(("encrypted", encryption))
    if info.backing is not None:
        rows.append(("backing file", _backing_words(info)))
    if info.in_use:
        rows.append(("in use", info.in_use))
    if info.corrupt:
        rows.append(("damage", "marked as corrupt: run cowhand check, then repair it"))
    if info.dirty:
        rows.append(("state", "not closed cleanly; it is repaired when it is next opened for writing"))
    if info.snapshots_problem:
        rows.append(("snapshots", f"unreadable: {info.snapshots_problem}"))
    if info.bitmaps_problem:
        rows.append(("bitmaps", f"unreadable: {info.bitmaps_problem}"))
    rows += [("overlays", path) for path in overlays]
    out.facts(rows)
    if info.snapshots:
        out.line()
        snapshot_table(info.snapshots, context)


def _format_words(info: ImageInfo) -> str:
    details = info.details or {}
    words = []
    if "compat" in details:
        words.append(f"compat {details['compat']}")
    if details.get("compression-type", "zlib") != "zlib":
        words.append(f"{details['compression-type']} compression")
    if details.get("refcount-bits", 16) != 16:
        words.append(f"{details['refcount-bits']}-bit reference counts")
    if details.get("lazy-refcounts"):
        words.append("lazy reference counts")
    return info.format + (f" ({', '.join(words)})" if words else "")


def encryption_words(info: ImageInfo) -> str:
    """Return how the image is encrypted and which key slots are in use; nothing for one that is not."""
    details = info.details or {}
    found = details if info.format == "luks" else details.get("encrypt") or {}
    if found.get("format") == "aes":
        return "the old AES, which is not safe: convert it"
    if "cipher-alg" not in found:
        return ""
    vectors = found["ivgen-alg"] + (f":{found['ivgen-hash-alg']}" if "ivgen-hash-alg" in found else "")
    used = [str(number) for number, slot in enumerate(found["slots"]) if slot["active"]]
    slots = f"key slot{'s' if len(used) != 1 else ''} {', '.join(used) or 'none'}"
    return f"LUKS, {found['cipher-alg']}-{found['cipher-mode']}-{vectors}, {found['hash-alg']}; {slots}"


def _backing_words(info: ImageInfo) -> str:
    text = info.backing or ""
    facts = [info.backing_format or "format not recorded"]
    if info.backing_path != info.backing:
        facts.append(f"that is {info.backing_path}")
    return f"{text} ({', '.join(facts)})"


def snapshot_table(snapshots: tuple[SnapshotInfo, ...], context: Context) -> None:
    """Print snapshots as a table."""
    import time

    rows = [
        (
            one.id,
            one.name,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.date_sec)),
            format_size(one.disk_size),
            format_size(one.vm_state_size) if one.vm_state_size else "",
        )
        for one in snapshots
    ]
    context.out.table(("id", "snapshot", "date", "disk size", "VM state"), rows, right=(3, 4))


def _picture(image: str, args: argparse.Namespace, context: Context) -> int:
    from cowhand.cli.chainpicture import draw_chain
    from cowhand.cli.picturefile import write_picture

    chain = chain_info(image, format=args.format, force_share=args.force_share)
    others = other_overlays(chain)
    text = draw_chain(image, args.format, chain, others, theme=args.theme, force_share=args.force_share)
    write_picture(args.svg, text, context)
    return _end(chain)
