"""Print a script that completes cowhand's commands, options, formats and file names in a shell."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cowhand.cli.running import Context

EXAMPLES = """\
  eval "$(cowhand completion bash)"                            in ~/.bashrc
  cowhand completion zsh > ~/.zfunc/_cowhand                   a folder of fpath
  cowhand completion fish > ~/.config/fish/completions/cowhand.fish
"""
WRITES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that reads the script")


def run(args: argparse.Namespace, context: Context) -> int:
    """Print the script."""
    from cowhand.cli import completion, reference
    from cowhand.drivers import REGISTRY

    formats = [entry.name for entry in REGISTRY if entry.kind == "format"]
    for line in completion.script(args.shell, reference.commands(), formats).splitlines():
        context.out.line(line)
    return 0
