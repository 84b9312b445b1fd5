"""``cowhand-io``: takes qemu-io's options and commands, and answers as it does."""

from __future__ import annotations

from collections.abc import Sequence

from cowhand.cli.compat import program
from cowhand.cli.compat.arguments import Grammar, OptionError
from cowhand.cli.compat.program import Failure

_LONG = {
    "help": "h",
    "version": "V",
    "cmd": "c",
    "format": "f",
    "read-only": "r",
    "snapshot": "s",
    "nocache": "n",
    "copy-on-read": "C",
    "misalign": "m",
    "native-aio": "k",
    "aio": "i",
    "discard": "d",
    "cache": "t",
    "trace": "T",
    "force-share": "U",
    "object": "object=",
    "image-opts": "image-opts",
}
_GRAMMAR = Grammar("hVc:d:f:rsnCmki:t:T:U", _LONG, later={"compat": "compat="})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool with *arguments*, ``argv[0]`` first (those of the process by default), and return the exit status."""
    return program.main(_run, arguments, "cowhand-io")


def _run(arguments: Sequence[str]) -> int:
    from cowhand.cli.compat.io.opening import How
    from cowhand.cli.compat.io.session import Session
    from cowhand.cli.compat.objects import Objects

    commands: list[str] = []
    how = How()
    objects = Objects()
    scanner = _GRAMMAR.scan(arguments)
    try:
        for key, value in scanner:
            match key:
                case "h":
                    print(_usage())
                    return 0
                case "V":
                    print(program.version_lines())
                    return 0
                case "compat":
                    program.use_profile(value)
                case "c":
                    commands.append(value)
                case "f":
                    how.format = value
                case "T":
                    from cowhand.cli.compat import tracing

                    tracing.accept(value)
                case "object":
                    objects.add(value)
                case "image-opts":
                    how.image_opts = True
                case "m":
                    pass  # memory of any alignment is fine here
                case _:
                    how.take(key, value)
    except OptionError as error:
        program.plain(error.in_libc_words(program.name()))
        print(_usage())
        return 1
    if len(scanner.rest) > 1:
        print(_usage())
        return 1
    if how.format is not None and how.image_opts:
        raise Failure("--image-opts and -f are mutually exclusive")
    session = Session()
    session.image_opts = how.image_opts
    if scanner.rest:
        session.open(scanner.rest[0], how)
    return session.run(commands)


def _usage() -> str:
    name = program.name()
    return f"""\
Usage: {name} [OPTIONS]... [-c STRING]... [file]
Disk exerciser

  --object OBJECTDEF   define an object such as 'secret' for
                       passwords and/or encryption keys
  --image-opts         treat file as option string
  -c, --cmd STRING     execute command with its arguments
                       from the given string
  -f, --format FMT     specifies the block driver to use
  -r, --read-only      export read-only
  -s, --snapshot       use snapshot file
  -n, --nocache        disable host cache, short for -t none
  -C, --copy-on-read   enable copy-on-read
  -m, --misalign       accepted; memory needs no alignment
  -k, --native-aio     accepted with -n, short for -i native
  -i, --aio=MODE       accepted: threads, native or io_uring
  -t, --cache=MODE     use the given cache mode for the image
  -d, --discard=MODE   use the given discard mode for the image
  -T, --trace PATTERN  accepted; there are no trace events
  -U, --force-share    force shared permissions
  -h, --help           display this help and exit
  -V, --version        output version information and exit

See '{name} -c help' for information on available commands."""
