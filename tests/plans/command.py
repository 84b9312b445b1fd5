"""The command, run in this process: a failure is the library's error."""

from __future__ import annotations

from argparse import Namespace

from cowhand.cli import main
from cowhand.cli.running import Context


def in_process(name: str, *words: str) -> int:
    """Run ``cowhand NAME WORDS`` and return the exit code. Raises CowhandError where the command would tell one."""
    module = main.load(name)
    args: Namespace = main.build_parser(name, module).parse_args(list(words))
    status: int = module.run(args, Context(name, args))
    return status
