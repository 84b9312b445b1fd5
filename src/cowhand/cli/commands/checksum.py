"""Print checksums of what a guest sees in a disk, or verify them.

They are the same whatever the format, the chain and the layout of the image, and those that sha256sum prints for the raw disk. Known zeroes are not
read. "tree-sha256" is a hash of hashes: all cores compute it, and empty space costs nothing; only cowhand knows it.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from cowhand.cli import arguments
from cowhand.cli.commands.compare import EXIT_DIFFERENT
from cowhand.cli.several import Codes, each
from cowhand.core.errors import CowhandError, InvalidArgument, from_os_error

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  cowhand checksum disk.qcow2
  cowhand checksum -a tree-sha256 *.qcow2 > SUMS
  cowhand checksum --check SUMS
  cowhand checksum -l before-upgrade disk.qcow2     the disk at a snapshot
"""
WRITES = False
#: Bytes of a file of checksums that are read.
_MAX_LIST = 16 << 20
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


class Line(NamedTuple):
    """One line of a file of checksums."""

    name: str
    algorithm: str
    digest: str


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="*", help="image whose disk is hashed")
    arguments.add_format(parser, "the images")
    parser.add_argument(
        "-a",
        "--algorithm",
        metavar="NAME",
        help="sha256 by default; md5, sha1, sha512, sha3_256, blake2b and others, each also with the prefix tree-",
    )
    parser.add_argument("-l", "--snapshot", metavar="NAME", help="the disk as it was at this snapshot")
    parser.add_argument("--tag", action="store_true", help='print lines that name the algorithm: "SHA256 (disk) = ..."')
    parser.add_argument("--check", metavar="FILE", help="verify the checksums that FILE lists (-: standard input)")
    parser.add_argument("-m", "--workers", type=int, metavar="N", help="threads, 1 to 16")
    arguments.add_talk(parser)
    arguments.add_share(parser)
    arguments.add_output(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Print or verify."""
    from cowhand.copy.ops.checksum import DEFAULT_ALGORITHM, check_algorithm

    if bool(args.image) == (args.check is not None):
        raise arguments.Usage("either images or --check FILE", hint="cowhand checksum IMAGE ... | --check FILE")
    if args.workers is not None and not 1 <= args.workers <= 16:
        raise arguments.Usage(f"{args.workers} threads are not possible, only 1 to 16")
    if args.check is not None:
        return _verify(args, context)
    algorithm = check_algorithm(args.algorithm or DEFAULT_ALGORITHM)

    def print_one(name: str) -> dict[str, Any]:
        found = _hash(name, algorithm, args, context)
        context.out.data(_line(name, algorithm, found.digest, tag=args.tag or algorithm.startswith("tree-")))
        return {"filename": name, "algorithm": algorithm, "digest": found.digest, "virtual-size": found.size}

    codes = Codes()
    documents = each(args.image, context, print_one, codes)
    if context.out.json:
        context.out.document(documents)
    return codes.worst


def _hash(name: str, algorithm: str, args: argparse.Namespace, context: Context) -> Any:
    from cowhand.copy.ops.checksum import checksum

    return checksum(
        name,
        algorithm,
        format=args.format,
        snapshot=args.snapshot,
        force_share=args.force_share,
        workers=args.workers,
        progress=context.progress(f"hashing {name}"),
        cancel=context.cancel,
    )


def _line(name: str, algorithm: str, digest: str, *, tag: bool) -> str:
    """Return a line as sha256sum prints it: with a backslash before it where the name had to be escaped."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "\\" if escaped != name else ""
    if tag:
        return f"{mark}{algorithm.upper()} ({escaped}) = {digest}"
    return f"{mark}{digest}  {escaped}"


def parse(text: str, algorithm: str | None) -> list[Line]:
    """Return the lines of a file of checksums; *algorithm* is that of lines which do not say (by their length, if it is None).

    Raises InvalidArgument for a line that is none.
    """
    import re

    tagged = re.compile(r"([A-Za-z0-9_-]+) \((.*)\) = ([0-9a-fA-F]+)", re.DOTALL)
    plain = re.compile(r"([0-9a-fA-F]+) [ *](.+)", re.DOTALL)
    lengths = {32: "md5", 40: "sha1", 56: "sha224", 64: "sha256", 96: "sha384", 128: "sha512"}
    out = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#"):
            continue
        escaped, line = line.startswith("\\"), line.removeprefix("\\")
        if found := tagged.fullmatch(line):
            name, kind, digest = found[2], found[1].lower(), found[3]
        elif found := plain.fullmatch(line):
            name, digest = found[2], found[1]
            kind = algorithm or lengths.get(len(digest), "")
        else:
            raise InvalidArgument(f"line {number} is not a checksum")
        if escaped:
            name = re.sub(r"\\[\\nr]", lambda part: _ESCAPES[part[0]], name)
        out.append(Line(name, kind, digest.lower()))
    if not out:
        raise InvalidArgument("there are no checksums to verify")
    return out


def _verify(args: argparse.Namespace, context: Context) -> int:
    from cowhand.copy.ops.checksum import check_algorithm

    documents: list[dict[str, Any]] = []
    different = failed = 0
    for line in parse(_read(args.check), args.algorithm):
        problem = None
        good = False
        try:
            good = _hash(line.name, check_algorithm(line.algorithm), args, context).digest == line.digest
            different += not good
        except CowhandError as error:
            context.cancel.check()
            problem = str(error.message)
            failed += 1
        documents.append({"filename": line.name, "algorithm": line.algorithm, "ok": good, "problem": problem})
        if good:
            context.out.line(f"{line.name}: OK")
        elif not context.out.json:
            context.out.fault(f"{line.name}: FAILED" + (f": {problem}" if problem is not None else ""))
    if context.out.json:
        context.out.document(documents)
    for count, words in ((different, "did not match"), (failed, "could not be read")):
        if count and not context.out.json:
            context.out.warn(f"{count} of {len(documents)} {words}")
    return EXIT_DIFFERENT if different else 1 if failed else 0


def _read(name: str) -> str:
    try:
        if name == "-":
            data = sys.stdin.buffer.read(_MAX_LIST + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(_MAX_LIST + 1)
    except OSError as error:
        raise from_os_error(error, name, doing="reading checksums") from error
    if len(data) > _MAX_LIST:
        raise InvalidArgument(f"a list of checksums has {_MAX_LIST >> 20} MiB at most", path=name)
    return data.decode("utf-8", "surrogateescape")
