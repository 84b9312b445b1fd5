"""The help of the image tool."""

from __future__ import annotations

from cowhand.cli.compat import program

_COMMANDS = """\
  amend [--object objectdef] [--image-opts] [-p] [-q] [-f fmt] [-t cache] [--force] -o options filename
  bench [-c count] [-d depth] [-f fmt] [--flush-interval=flush_interval] [-i aio] [-n] [--no-drain] [-o offset] [--pattern=pattern] \
[-q] [-s buffer_size] [-S step_size] [-t cache] [-w] [-U] filename
  bitmap (--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [-b source_file [-F source_fmt]] [-g granularity] \
[--object objectdef] [--image-opts | -f fmt] filename bitmap
  check [--object objectdef] [--image-opts] [-q] [-f fmt] [--output=ofmt] [-r [leaks | all]] [-T src_cache] [-U] filename
  commit [--object objectdef] [--image-opts] [-q] [-f fmt] [-t cache] [-b base] [-r rate_limit] [-d] [-p] filename
  compare [--object objectdef] [--image-opts] [-f fmt] [-F fmt] [-T src_cache] [-p] [-q] [-s] [-U] filename1 filename2
  convert [--object objectdef] [--image-opts] [--target-image-opts] [--target-is-zero] [--bitmaps] [-U] [-C] [-c] [-p] [-q] [-n] \
[-f fmt] [-t cache] [-T src_cache] [-O output_fmt] [-B backing_file [-F backing_fmt]] [-o options] [-l snapshot_param] \
[-S sparse_size] [-r rate_limit] [-m num_coroutines] [-W] [--salvage] filename [filename2 [...]] output_filename
  create [--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] [-o options] filename [size]
  dd [--image-opts] [-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] [skip=blocks] if=input of=output
  info [--object objectdef] [--image-opts] [-f fmt] [--output=ofmt] [--backing-chain] [--limits] [-U] filename
  map [--object objectdef] [--image-opts] [-f fmt] [--start-offset=offset] [--max-length=len] [--output=ofmt] [-U] filename
  measure [--output=ofmt] [-O output_fmt] [-o options] [--size N | [--object objectdef] [--image-opts] [-f fmt] \
[-l snapshot_param] filename]
  rebase [--object objectdef] [--image-opts] [-U] [-q] [-f fmt] [-t cache] [-T src_cache] [-p] [-u] [-c] -b backing_file \
[-F backing_fmt] filename
  snapshot [--object objectdef] [--image-opts] [-U] [-q] [-l | -a snapshot | -c snapshot | -d snapshot] filename
  resize [--object objectdef] [--image-opts] [-f fmt] [--preallocation=prealloc] [-q] [--shrink] filename [+ | -]size"""

_PARAMETERS = """\
Command parameters:
  filename, output_filename: an image's path, a PROTOCOL: name, a json: description, or with --image-opts an option string
  fmt, output_fmt: an image's format; an input's is found out when it is not given, an output's is raw
  objectdef: an object that images can refer to: secret,id=ID,data=PASSWORD (or file=PATH, format=base64)
  cache, src_cache: how output and input are cached: none, writeback (default), writethrough, directsync, unsafe (convert's
    default for the output)
  size, offset, len, rate_limit, sparse_size: bytes, or with a suffix k, M, G, T, P or E of 1024 each
  options: NAME=VALUE,... for the new image; -o help lists those of the format, with those of filename when it is given
  snapshot_param: an internal snapshot's id or name, or snapshot.id=ID,snapshot.name=NAME
  ofmt: human or json
  -c  (convert) stores compressed clusters
  -d  (commit) leaves the image as it is instead of emptying it
  -h  anywhere shows this help
  -l, -a, -c, -d  (snapshot) list, apply, create, delete
  -m  (convert) number of workers, 1 to 16; -W lets them write out of order
  -n  (convert) writes into an image that exists
  -p  shows progress; without it SIGUSR1 prints it once
  -q  prints nothing but errors
  -r  (check) repairs leaks, or all errors: then a wrong guess may hide damage
  -s  (compare) also tells apart sizes and what is allocated
  -S  (convert) runs of zeroes that are left out are at least so long, 4k if not given; 0 writes everything
  -u  (create) does not look at the backing file
  -U  opens an image although another process is writing it
  bs=, count=, skip=  (dd) block size (512), blocks to the end from the input's beginning, blocks to leave out there"""


def text_of(command: str, short: dict[str, bool], long: dict[str, str]) -> str:
    """Return the help of one command, which knows the options *short* and *long*."""
    from cowhand.cli.compat.img.longnames import command_help

    lines = (line.strip() for line in _COMMANDS.splitlines())
    syntax = next((line for line in lines if line.split(" ", 1)[0] == command), command)
    return command_help(program.name(), command, syntax, short, long)


def text() -> str:
    """Return the help, the supported formats last: QEMU's own tests look for that line."""
    from cowhand.drivers import REGISTRY

    name = program.name()
    formats = " ".join(sorted(entry.name for entry in REGISTRY if entry.name != "memory"))
    return f"""{program.version_lines()}
usage: {name} [standard options] command [command options]
Disk image utility

    '-h', '--help'       display this help and exit
    '-V', '--version'    output version information and exit
    '-T', '--trace'      accepted; there are no trace events

Command syntax:
{_COMMANDS}

{_PARAMETERS}

Supported formats: {formats}"""
