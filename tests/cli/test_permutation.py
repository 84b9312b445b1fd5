"""Options may stand anywhere between operands, in every command."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cowhand.cli import main
from cowhand.cli.permutation import permuted
from tests.cli.command import cowhand
from tests.cli.images import image

#: For each command operands that its parser takes.
OPERANDS = {
    "create": ["a", "1G"], "info": ["a"], "map": ["a"], "check": ["a"], "du": ["a", "b"], "locks": ["a"], "inspect": ["a"],
    "convert": ["a", "b", "c"], "compare": ["a", "b"], "checksum": ["a", "b"], "dd": ["if=a", "of=b", "bs=1k"], "measure": ["a"],
    "resize": ["a", "-1G"], "compact": ["a"], "snapshot": ["delete", "a", "n"], "bitmap": ["merge", "a", "n", "from"], "commit": ["a"],
    "rebase": ["a"], "serve": ["a", "b"], "completion": ["bash"], "flatten": ["a"], "passphrase": ["add", "a"],
}  # fmt: skip


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_option_of_every_command_stands_anywhere(name: str) -> None:
    module = main.load(name)
    words = OPERANDS[name]
    required = ["-b", "x"] if name == "rebase" else []
    plain = vars(main.build_parser(name, module).parse_args([*required, "--", *words]))
    for action in vars(main.build_parser(name, module))["_actions"]:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            continue
        for option in action.option_strings:
            value = [] if action.nargs == 0 else [str(next(iter(action.choices or ["7"])))]
            for place in range(len(words) + 1):
                line = [*words[:place], option, *value, *words[place:]]
                needed = [] if action.required else required
                found = vars(main.build_parser(name, module).parse_args([*line, *needed]))
                assert {**found, action.dest: None} == {**plain, action.dest: None}, line


def test_the_forms_of_options() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-f", "--format")
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("name", nargs="*")
    for given, options in (
        (["a", "-fraw", "b"], ["-fraw"]),
        (["a", "-qf", "raw", "b"], ["-qf", "raw"]),
        (["a", "--format=raw", "b"], ["--format=raw"]),
        (["a", "--form", "raw", "b"], ["--form", "raw"]),
        (["--unknown", "a", "b"], ["--unknown"]),
    ):
        assert permuted(parser, given) == [*options, "--", "a", "b"]
    assert permuted(parser, ["a", "-", "--", "-q"]) == ["--", "a", "-", "-q"]
    assert permuted(parser, ["-q"]) == ["-q"]


def test_as_people_type_it(image_dir: Path) -> None:
    assert cowhand("create", "vm.qcow2", "-f", "qcow2", "40G", cwd=image_dir).stdout.startswith(
        "created vm.qcow2: qcow2, 40 GiB"
    )
    image(image_dir / "a")
    cowhand("snapshot", "create", "a", "-q", "one", cwd=image_dir)
    assert "there is no option '--sise'" in cowhand("create", "b", "--sise", "1G", status=2, cwd=image_dir).stderr
