"""Shell completion: scripts for bash, zsh and fish, made from what the commands declare.

Sources: bash(1) "Programmable Completion", zshcompsys(1) "_arguments", fish's complete(1).
"""

from __future__ import annotations

from collections.abc import Sequence

from cowhand.cli.reference import Argument, Command

SHELLS = ("bash", "zsh", "fish")


def script(shell: str, commands: Sequence[Command], formats: Sequence[str]) -> str:
    """Return the completion script for *shell*, one of SHELLS. *formats* complete the formats of images."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands, formats)


def _quote(text: str) -> str:
    """Quote for a POSIX shell, always: descriptions hold blanks."""
    return "'" + text.replace("'", "'\\''") + "'"


def _words(argument: Argument, formats: Sequence[str]) -> tuple[str, ...]:
    return tuple(formats) if argument.completes == "format" else argument.choices


_BASH = """\
# bash completion of cowhand: eval "$(cowhand completion bash)", or a file in bash-completion's folder.
_cowhand() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    COMPREPLY=()
    compopt +o default 2>/dev/null
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W {names} -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}} $before" in
{values}
    esac
    if [[ $word == -* ]]; then
        case "${{COMP_WORDS[1]}}" in
{flags}
        esac
        return
    fi
    case "${{COMP_WORDS[1]}}:$COMP_CWORD" in
{operands}
        *) compopt -o default 2>/dev/null ;;
    esac
}}
complete -F _cowhand cowhand
"""


def _bash(commands: Sequence[Command], formats: Sequence[str]) -> str:
    values, flags, operands = [], [], []
    for command in commands:
        for option in command.options:
            if option.takes_value:
                pattern = "|".join(f'"{command.name} {flag}"' for flag in option.flags)
                values.append(f"        {pattern}) {_bash_value(option, formats)} return ;;")
        given = " ".join(flag for option in command.options for flag in option.flags)
        flags.append(f'            {command.name}) COMPREPLY=($(compgen -W {_quote(given)} -- "$word")) ;;')
        for place, operand in enumerate(command.operands):
            if operand.choices:
                operands.append(f"        {command.name}:{place + 2}) {_bash_value(operand, formats)} ;;")
    return _BASH.format(
        names=_quote(" ".join(command.name for command in commands)),
        values="\n".join(values),
        flags="\n".join(flags),
        operands="\n".join(operands),
    )


def _bash_value(argument: Argument, formats: Sequence[str]) -> str:
    words = _words(argument, formats)
    if words:
        return f'COMPREPLY=($(compgen -W {_quote(" ".join(words))} -- "$word"));'
    if argument.completes == "folder":
        return "compopt -o dirnames 2>/dev/null;"
    return "compopt -o default 2>/dev/null;" if argument.completes == "file" else ""


def _zsh(commands: Sequence[Command], formats: Sequence[str]) -> str:
    lines = ["#compdef cowhand", "# zsh completion of cowhand: a file _cowhand in a folder of fpath.", "_cowhand() {"]
    lines += ["    local -a names=("]
    lines += [f"        {_quote(f'{command.name}:{command.summary}')}" for command in commands]
    lines += ["    )", "    if (( CURRENT == 2 )); then", "        _describe command names", "        return", "    fi"]
    lines += ["    local name=$words[2]", "    shift words", "    (( CURRENT-- ))", '    case "$name" in']
    for command in commands:
        specs = [spec for option in command.options for spec in _zsh_option(option, formats)]
        for place, operand in enumerate(command.operands, 1):
            position = "*" if operand.repeated else f"{place}" if operand.required else f"{place}:"
            specs.append(f"{position}:{_zsh_text(operand.placeholder.lower())}:{_zsh_action(operand, formats)}")
        lines += [f"        {command.name})", "            _arguments -s \\"]
        lines += [f"                {_quote(spec)} \\" for spec in specs[:-1]]
        lines += [f"                {_quote(specs[-1])}", "            ;;"]
    lines += ["    esac", "}", 'if [[ "$funcstack[1]" == _cowhand ]]; then', '    _cowhand "$@"', "else"]
    return "\n".join([*lines, "    compdef _cowhand cowhand", "fi"]) + "\n"


def _zsh_text(text: str) -> str:
    for special in "\\:[]":
        text = text.replace(special, "\\" + special)
    return text


def _zsh_option(option: Argument, formats: Sequence[str]) -> list[str]:
    value = f":{_zsh_text(option.placeholder)}:{_zsh_action(option, formats)}" if option.takes_value else ""
    star = "*" if option.repeated else ""
    return [f"{star}{flag}[{_zsh_text(option.help)}]{value}" for flag in option.flags]


def _zsh_action(argument: Argument, formats: Sequence[str]) -> str:
    words = _words(argument, formats)
    if words:
        return f"({' '.join(words)})"
    return {"file": "_files", "folder": "_files -/"}.get(argument.completes, " ")


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish(commands: Sequence[Command], formats: Sequence[str]) -> str:
    lines = ["# fish completion of cowhand: cowhand completion fish | source", "complete -c cowhand -f"]
    for command in commands:
        lines.append(
            f"complete -c cowhand -n __fish_use_subcommand -a {command.name} -d {_fish_quote(command.summary)}"
        )
    for command in commands:
        here = f"complete -c cowhand -n '__fish_seen_subcommand_from {command.name}'"
        for option in command.options:
            names = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
            lines.append(f"{here} {names}{_fish_value(option, formats)} -d {_fish_quote(option.help)}")
        for operand in command.operands:
            if operand.choices:
                lines.append(f"{here} -a {_fish_quote(' '.join(operand.choices))}")
        if any(operand.completes == "file" for operand in command.operands):
            lines.append(f"{here} -F")
    return "\n".join(lines) + "\n"


def _fish_value(option: Argument, formats: Sequence[str]) -> str:
    words = _words(option, formats)
    if words:
        return f" -x -a {_fish_quote(' '.join(words))}"
    if not option.takes_value:
        return ""
    if option.completes == "folder":
        return " -x -a '(__fish_complete_directories)'"
    return " -r -F" if option.completes == "file" else " -x"
