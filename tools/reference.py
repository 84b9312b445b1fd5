"""Write the reference from what commands and drivers declare: ``docs/commands``, ``docs/drivers`` and the man pages in ``docs/man``.

``python tools/reference.py`` writes; ``--check`` only tells what is out of date. A test does the latter.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from cowhand.block.node.options import NodeOptions, Option, declared
from cowhand.block.opening.registry import DriverEntry
from cowhand.cli.compat import nbd
from cowhand.cli.reference import Argument, Command, commands
from cowhand.drivers import REGISTRY
from cowhand.image.create import create_options_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
#: Where the reference lies; files there that nothing declares any more are removed.
FOLDERS = ("commands", "drivers", "man")
MADE = "<!-- Made by tools/reference.py from what the code declares; make docs writes it. -->\n"

#: A reference of reStructuredText in a docstring, such as :meth:`name`.
_ROLE = re.compile(r":\w+:`~?([^`]+)`")

EXIT_CODES = (
    (0, "done"),
    (1, "failed: the message says why"),
    (2, "the command line makes no sense"),
    (3, "input or output failed, or the disk is full"),
    (4, "the image is broken, or of a kind or feature that is not supported"),
    (5, "the image is in use"),
    (6, "the disks differ (compare)"),
    (7, "lost space, which harms no data (check)"),
    (8, "damage (check)"),
    (9, "refused, because other images need this one as it is"),
    (70, "a mistake in cowhand itself"),
    (130, "ended by Ctrl-C (143 by SIGTERM, 129 by SIGHUP)"),
)


def pages() -> dict[str, str]:
    """Return {path below docs: text} of the whole reference."""
    known = commands()
    drivers = sorted(REGISTRY, key=lambda entry: entry.name)
    made = {f"commands/{command.name}.md": command_page(command) for command in known}
    made["commands/README.md"] = _index("Commands", ((c.name, c.summary) for c in known))
    made |= {f"drivers/{entry.name}.md": driver_page(entry) for entry in drivers}
    made["drivers/README.md"] = _index("Drivers", ((e.name, f"{e.kind}: {_first_line(e)}") for e in drivers))
    made |= {f"man/cowhand-{command.name}.1": command_man(command) for command in known}
    made["man/cowhand.1"] = overview_man(known)
    made["man/cowhand-nbd.1"] = server_man()
    return made


def _index(title: str, entries: Iterable[tuple[str, str]]) -> str:
    rows = [f"| [{name}]({name}.md) | {_cell(text)} |" for name, text in entries]
    return "\n".join([MADE, f"# {title}", "", "| | |", "|---|---|", *rows]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def command_page(command: Command) -> str:
    """Return the Markdown page of a command."""
    lines = [MADE, f"# cowhand {command.name}", "", f"    {command.synopsis()}", "", command.description, ""]
    for title, arguments in (("Operands", command.operands), ("Options", command.options)):
        if arguments:
            lines += [f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {_argument_words(one)} | {_cell(one.help)} |" for one in arguments]
            lines.append("")
    lines += ["## Examples", "", *(f"    {line.strip()}" for line in command.examples.splitlines()), ""]
    lines.append("What all commands share, and the JSON that they print: [the cowhand command](../cli.md).")
    return "\n".join(lines) + "\n"


def _argument_words(argument: Argument) -> str:
    words = ", ".join(f"`{flag}`" for flag in argument.flags)
    value = " ".join(part for part in (words, _cell(argument.placeholder)) if part)
    if not argument.flags and argument.choices:
        value += f": {', '.join(argument.choices)}"
    return value + (" (may be repeated)" if argument.repeated else "")


def _text_of(entry: DriverEntry) -> str:
    """Return what the driver's class says of itself and, after that, what its file says."""
    loaded = entry.load()
    texts = (loaded.__dict__.get("__doc__"), getattr(inspect.getmodule(loaded), "__doc__", None))
    told = "\n\n".join(inspect.cleandoc(text) for text in texts if text)
    return _ROLE.sub(r"`\1`", told).replace("``", "`")


def _first_line(entry: DriverEntry) -> str:
    return _text_of(entry).splitlines()[0]


def driver_page(entry: DriverEntry) -> str:
    """Return the Markdown page of a driver."""
    node = entry.load()
    lines = [MADE, f"# {entry.name} ({entry.kind})", "", _text_of(entry), ""]
    if entry.prefixes:
        lines += ["File names that begin with " + ", ".join(f"`{p}:`" for p in entry.prefixes) + " mean it.", ""]
    if entry.kind == "format":
        how = "is recognised by its first bytes" if entry.probe else "is what nothing else recognises, or what you name"
        lines += [f"The format {how}.", ""]
    common = declared(NodeOptions)
    own = {name: option for name, option in declared(node.options_class).items() if name not in common}
    lines += ["## Options when opening", ""]
    lines += _option_table(own) if own else ["None of its own.", ""]
    lines += ["Every node takes these, too:", "", *_option_table(common)]
    if entry.kind == "format" and entry.creatable:
        lines += ["## Options when creating", "", "| option | value | default | |", "|---|---|---|---|"]
        for item in create_options_of(entry):
            default = "" if item.default is None else f"`{_plain(item.default)}`"
            lines.append(f"| `{item.name}` | {item.kind} | {default} | {_cell(item.help)} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _plain(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _option_table(options: dict[str, Option]) -> list[str]:
    lines = ["| option | value | default | |", "|---|---|---|---|"]
    for name, option in options.items():
        default = "" if option.default is None else f"`{_plain(option.default)}`"
        value = " or ".join(option.choices) or option.kind
        lines.append(f"| `{name}` | {value} | {default} | {_cell(option.help)} |")
    return [*lines, ""]


def _roff(text: str) -> str:
    """Escape for roff: backslashes, dashes that are meant as such, and lines that would be requests."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in escaped.split("\n"))


def _paragraphs(text: str) -> str:
    return "\n.PP\n".join(_roff(part.replace("\n", " ")) for part in text.split("\n\n"))


def _man(name: str, summary: str, body: Iterable[str]) -> str:
    head = [
        '.\\" Made by tools/reference.py from what the code declares.',
        f'.TH {name.upper()} 1 "" cowhand "User Commands"',
    ]
    return "\n".join([*head, ".SH NAME", f"{_roff(name)} \\- {_roff(summary)}", *body]) + "\n"


def _man_arguments(arguments: Iterable[Argument]) -> list[str]:
    lines = []
    for argument in arguments:
        flags = ", ".join(f"\\fB{_roff(flag)}\\fR" for flag in argument.flags)
        value = f"\\fI{_roff(argument.placeholder)}\\fR" if argument.placeholder else ""
        choices = f" One of: {', '.join(argument.choices)}." if not argument.flags and argument.choices else ""
        lines += [".TP", " ".join(filter(None, (flags, value))), _roff(argument.help + "." + choices)]
    return lines


def command_man(command: Command) -> str:
    """Return the man page of a command."""
    body = [".SH SYNOPSIS", f"\\fB{_roff(command.synopsis())}\\fR", ".SH DESCRIPTION", _paragraphs(command.description)]
    if command.operands:
        body += [".SH OPERANDS", *_man_arguments(command.operands)]
    body += [".SH OPTIONS", *_man_arguments(command.options)]
    body += [".SH EXAMPLES", ".nf", _roff("\n".join(line.strip() for line in command.examples.splitlines())), ".fi"]
    body += [".SH EXIT STATUS", "Those of \\fBcowhand\\fR(1).", ".SH SEE ALSO", "\\fBcowhand\\fR(1)"]
    return _man(f"cowhand-{command.name}", command.summary, body)


def overview_man(known: list[Command]) -> str:
    """Return the man page of the command as a whole."""
    body = [".SH SYNOPSIS", "\\fBcowhand\\fR \\fICOMMAND\\fR ...", ".SH DESCRIPTION"]
    body.append("Keeps virtual machines' disks: images, overlays, snapshots, copies. Needs no QEMU, and works with it.")
    body.append(".SH COMMANDS")
    for command in known:
        body += [".TP", f"\\fBcowhand\\-{command.name}\\fR(1)", _roff(command.summary)]
    body.append(".SH EXIT STATUS")
    for code, meaning in EXIT_CODES:
        body += [".TP", str(code), _roff(meaning)]
    body += [".SH ENVIRONMENT", ".TP", "NO_COLOR, FORCE_COLOR", "turn colour off or on, whatever the output is"]
    body += [".SH SEE ALSO", ", ".join(f"\\fBcowhand\\-{command.name}\\fR(1)" for command in known)]
    return _man("cowhand", "keep virtual machines' disks", body)


def server_man() -> str:
    """Return the man page of the drop-in server, whose help is its reference."""
    usage, _, options = nbd.usage("cowhand-nbd").partition("\n\n")
    synopsis = usage.splitlines()[:-1]
    body = [
        ".SH SYNOPSIS",
        ".nf",
        *[_roff(line.removeprefix("Usage: ").removeprefix("  or:  ")) for line in synopsis],
        ".fi",
    ]
    body += [".SH DESCRIPTION", _paragraphs(inspect.cleandoc(nbd.__doc__ or "").replace("``", ""))]
    body += [".SH OPTIONS", ".nf", _roff(options), ".fi"]
    body += [".SH EXIT STATUS", "0 when it has served, or listed; 1 after an error."]
    body += [".SH SEE ALSO", "\\fBcowhand\\-serve\\fR(1), \\fBqemu\\-nbd\\fR(8)"]
    return _man("cowhand-nbd", "serve a disk by NBD, with qemu-nbd's options", body)


def outdated(made: dict[str, str], docs: Path) -> list[str]:
    """Return the paths below *docs* that are absent, differ, or that nothing declares any more."""
    there = {str(path.relative_to(docs)) for folder in FOLDERS for path in (docs / folder).glob("*")}
    differing = {
        name
        for name, text in made.items()
        if not (docs / name).is_file() or (docs / name).read_text(encoding="utf-8") != text
    }
    return sorted(differing | (there - set(made)))


def write(made: dict[str, str], docs: Path) -> list[str]:
    """Bring the pages below *docs* up to date; return those that changed."""
    changed = outdated(made, docs)
    for name in changed:
        path = docs / name
        if name not in made:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made[name], encoding="utf-8")
    return changed


def main() -> int:
    """Write the pages, or check them; return 1 where --check finds some out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    made = pages()
    changed = outdated(made, DOCS) if check else write(made, DOCS)
    for name in changed:
        print(f"{'out of date' if check else 'wrote'}: docs/{name}")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
