"""Command lines as getopt_long of the GNU C library reads them: options after positionals, bundles, unambiguous abbreviations, "--".

Options come out one by one, in order, so that the first wrong one is the one that is told of.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from cowhand.cli.compat import program
from cowhand.cli.compat.program import Failure, UsageFailure


class OptionError(Exception):
    """An option that is unknown, ambiguous, lacks its argument or has one too much.

    ``kind`` says which; ``element`` is the word of the command line that it stood in, ``option`` the letter, or the long name with dashes.
    ``previous`` is the word before ``element`` as getopt has sorted them by then.
    """

    def __init__(self, kind: str, option: str, element: str, previous: str, possible: Sequence[str] = ()) -> None:
        super().__init__(kind, option)
        self.kind = kind
        self.option = option
        self.element = element
        self.previous = previous
        self.possible = possible

    def in_libc_words(self, program: str) -> str:
        """Return the line that the C library itself prints of it."""
        option = self.option
        text = {
            "unknown": f"unrecognized option '{option}'" if option[:2] == "--" else f"invalid option -- '{option}'",
            "missing": f"option '{option}' requires an argument"
            if option[:2] == "--"
            else f"option requires an argument -- '{option}'",
            "unexpected": f"option '{option}' doesn't allow an argument",
            "ambiguous": f"option '{option}' is ambiguous; possibilities: "
            + " ".join(f"'--{x}'" for x in self.possible),
        }[self.kind]
        return f"{program}: {text}"


class Grammar:
    """The options of one command.

    *short* is getopt's string ("hf:q"), *long* maps long names to the key that they yield: a letter of *short*, which then says whether an
    argument follows, or a word of its own, with "=" at its end when it takes one. Without *long* a word "--x" is a bundle of letters.
    *later* are long names that newer versions added: they may be abbreviated where such a version is asked for, and it means none of *long*.
    """

    def __init__(
        self,
        short: str,
        long: Mapping[str, str] | None = None,
        *,
        permute: bool = True,
        later: Mapping[str, str] | None = None,
    ) -> None:
        self.short = {letter: short[i + 1 : i + 2] == ":" for i, letter in enumerate(short) if letter != ":"}
        self.long = long
        self.later = {name: key for name, key in (later or {}).items() if len(key) > 1 or key in self.short}
        self.permute = permute and "POSIXLY_CORRECT" not in os.environ

    def scan(self, words: Sequence[str]) -> Scanner:
        """Return the scanner of *words*; the first one is the command's own name."""
        return Scanner(self, words)


class Scanner:
    """Iterates over (key, argument or ""); afterwards ``rest`` holds the positionals and ``index`` where scanning stopped."""

    def __init__(self, grammar: Grammar, words: Sequence[str]) -> None:
        self._grammar = grammar
        self._words = words
        self.rest: list[str] = []
        self.index = 1
        self._previous = words[0] if words else ""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        words = self._words
        while self.index < len(words):
            word = words[self.index]
            if word == "--":
                self.index += 1
                break
            if len(word) < 2 or word[0] != "-":
                if not self._grammar.permute:
                    break
                self.rest.append(word)
                self.index += 1
                continue
            before = self.index
            if word.startswith("--") and self._grammar.long is not None:
                yield self._long_option(word)
            else:
                yield from self._bundle(word)
            self.index += 1
            self._previous = words[min(self.index, len(words)) - 1] if self.index > before else word
        self.rest.extend(words[self.index :])

    def _error(self, kind: str, option: str, element: str, possible: Sequence[str] = ()) -> OptionError:
        return OptionError(kind, option, element, self.rest[-1] if self.rest else self._previous, possible)

    def _argument(self, option: str, element: str) -> str:
        if self.index + 1 >= len(self._words):
            raise self._error("missing", option, element)
        self.index += 1
        return self._words[self.index]

    def _long_option(self, word: str) -> tuple[str, str]:
        given, equals, value = word[2:].partition("=")
        names = self._grammar.long or {}
        found = [given] if given in names else [full for full in names if full.startswith(given)]
        if not found or (found != [given] and given in self._grammar.later):
            names = self._grammar.later
            found = [full for full in names if full == given or (program.since("10.0") and full.startswith(given))]
            if given in names:
                found = [given]
        if len({names[full] for full in found}) > 1:
            raise self._error("ambiguous", word, word, found)
        if not found:
            raise self._error("unknown", word, word)
        key = names[found[0]]
        takes = key.endswith("=") or self._grammar.short.get(key, False)
        if not takes:
            if equals:
                raise self._error("unexpected", f"--{found[0]}", word)
            return key, ""
        return key.rstrip("="), value if equals else self._argument(f"--{found[0]}", word)

    def _bundle(self, word: str) -> Iterator[tuple[str, str]]:
        for position, letter in enumerate(word[1:], 1):
            rest = word[position + 1 :]
            if letter not in self._grammar.short:
                # In the middle of a word getopt still points at the word before.
                error = self._error("unknown", letter, word)
                if rest:
                    error.element = error.previous
                raise error
            if self._grammar.short[letter]:
                yield letter, rest or self._argument(letter, word)
                return
            yield letter, ""


def options(grammar: Grammar, words: Sequence[str], positional: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of an image tool's command and fill *positional*; raises UsageFailure in the tool's own words."""
    scanner = grammar.scan(words)
    try:
        yield from scanner
    except OptionError as error:
        if program.since("10.0"):
            program.plain(error.in_libc_words(program.asked()))
            program.plain(program.help_hint())
            raise Failure from error
        if error.kind == "missing":
            raise UsageFailure(f"missing argument for option '{error.element}'") from error
        raise UsageFailure(f"unrecognized option '{error.element}'") from error
    positional.extend(scanner.rest)


def one_image(positional: Sequence[str]) -> str:
    """Return the only positional argument."""
    if len(positional) != 1:
        raise UsageFailure("Expecting one image file name")
    return positional[0]


def early_output_format(text: str) -> str:
    """Return ``--output``'s argument *text*; since 10.0 a wrong one is refused where it stands, before what follows it."""
    if program.since("10.0"):
        output_format(text)
    return text


def output_format(text: str) -> bool:
    """Return whether ``--output``'s argument asks for JSON."""
    if text not in ("human", "json"):
        if program.since("10.0"):
            raise UsageFailure(
                f"--output expects 'human' or 'json'{'' if program.is_debian_10_0() else ','} not '{text}'"
            )
        raise Failure("--output must be used with human or json as argument.")
    return text == "json"
