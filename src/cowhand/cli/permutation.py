"""Options between operands: a command line put in the order that argparse understands.

argparse matches operands where the first of them stands, so "create vm.qcow2 -f qcow2 40G" fails, and its own answer to that
(``parse_intermixed_args``) differs between versions of Python. Here options and their values go to the front, as getopt(3) does it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

#: What looks like an option and is an amount: "resize disk.qcow2 -1G".
_NEGATIVE = re.compile(r"-\.?\d")


def permuted(parser: argparse.ArgumentParser, given: Sequence[str]) -> list[str]:
    """Return *given* with all options first, then "--" and the operands. Unknown options stay options, for the parser to refuse."""
    options: list[str] = []
    operands: list[str] = []
    rest = iter(given)
    for word in rest:
        if word == "--":
            operands += rest
            break
        if not word.startswith("-") or word == "-" or _NEGATIVE.match(word):
            operands.append(word)
            continue
        options.append(word)
        if _wants_value(parser, word):
            options += [value for value in [next(rest, None)] if value is not None]
    return [*options, "--", *operands] if operands else options


def _wants_value(parser: argparse.ArgumentParser, word: str) -> bool:
    """Tell whether the value of the option *word* is the next word."""
    known: dict[str, argparse.Action] = vars(parser)["_option_string_actions"]
    if word.startswith("--"):
        if "=" in word:
            return False
        # As argparse: the exact name, or a beginning of one.
        action = known.get(word) or next((known[name] for name in known if name.startswith(word)), None)
        return action is not None and action.nargs != 0
    for place, letter in enumerate(word[1:], 1):
        action = known.get(f"-{letter}")
        if action is None:
            return False
        if action.nargs != 0:
            return place == len(word) - 1  # "-fqcow2" has its value with it
    return False
