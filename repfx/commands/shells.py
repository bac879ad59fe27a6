"""Scripts that let bash, zsh and fish complete a command line. A script holds all words itself, so that Tab starts no other program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PROGRAM = "repfx"


@dataclass(frozen=True)
class Values:
    """The values that an option or an argument may have.

    Args:
        names: names that can be listed. One that ends in `=` is continued by hand.
        files: whether a file or a folder will do, too.
    """

    names: tuple[str, ...] = ()
    files: bool = False


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Args:
        names: its names, such as `--epochs` and `-e`.
        values: the values that it may have; None if it takes none.
    """

    names: tuple[str, ...]
    help: str
    values: Values | None = None


@dataclass(frozen=True)
class Command:
    """A command with its options and its arguments in order.

    Args:
        repeats: whether the last argument may be given several times.
    """

    name: str
    help: str
    options: tuple[Option, ...]
    arguments: tuple[Values, ...] = ()
    repeats: bool = False


def _lists(commands: Sequence[Command]) -> dict[tuple[str, ...], str]:
    """Return the name of a function for each list of names in a script. Commands share these lists."""
    taken = [option.values for command in commands for option in command.options]
    taken += [values for command in commands for values in command.arguments]
    found = dict.fromkeys(values.names for values in taken if values is not None and values.names)
    return {names: f"_{PROGRAM}_names_{number}" for number, names in enumerate(found)}


def _quoted(text: str) -> str:
    """Quote a text for bash and zsh."""
    return "'" + text.replace("'", r"'\''") + "'"


# ---- bash

_BASH = r"""# bash completion of PROGRAM
_PROGRAM() {
    local line=${COMP_LINE:0:COMP_POINT} words word command= with_value= value_of= place=0 current names= files= option cut
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current=${words[${#words[@]} - 1]}
    for word in "${words[@]:1:${#words[@]}-2}"; do
        if [[ -n $value_of ]]; then value_of=
        elif [[ $word == -* ]]; then [[ " $with_value " == *" $word "* ]] && value_of=$word
        elif [[ -z $command ]]; then
            command=$word
            case $command in
WITH_VALUE
            esac
        else place=$((place + 1))
        fi
    done
    [[ -z $value_of && $current == --*=* ]] && value_of=${current%%=*} current=${current#*=}
    if [[ -z $command ]]; then names="COMMANDS"
    elif [[ -n $value_of ]]; then
        case "$command $value_of" in
VALUES
        esac
    elif [[ $current == -* ]]; then
        case $command in
OPTIONS
        esac
    else
        case "$command $place" in
ARGUMENTS
        esac
    fi
    COMPREPLY=($(compgen -W "$names" -- "$current"))
    [[ -z $files ]] && compopt +o default 2>/dev/null
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
    for cut in : =; do  # bash replaces only what follows the last of these signs
        if [[ $COMP_WORDBREAKS == *$cut* && $current == *$cut* ]]; then
            cut=${current%"${current##*$cut}"}
            COMPREPLY=("${COMPREPLY[@]#"$cut"}")
            break
        fi
    done
}
complete -o default -F _PROGRAM PROGRAM"""


def bash(commands: Sequence[Command]) -> str:
    """Return a script for bash 3.2 or later."""
    lists = _lists(commands)

    def offer(values: Values) -> str:
        parts = [f'names="$({lists[values.names]})"'] if values.names else []
        return " ".join([*parts, *(["files=yes"] if values.files else [])])

    with_value, of_options, options, arguments = [], [], [], []
    for command in commands:
        named = [option for option in command.options if option.values is not None]
        with_value += [f"{command.name}) with_value='{' '.join(each for option in named for each in option.names)}' ;;"]
        options += [
            f"{command.name}) names='{' '.join(name for option in command.options for name in option.names)}' ;;"
        ]
        for option in named:
            pattern = "|".join(f'"{command.name} {name}"' for name in option.names)
            of_options += [f"{pattern}) {offer(option.values)} ;;"] if option.values not in (None, Values()) else []
        for place, values in enumerate(command.arguments):
            last = command.repeats and place == len(command.arguments) - 1
            pattern = f'"{command.name} "*' if last else f'"{command.name} {place}"'
            arguments += [f"{pattern}) {offer(values)} ;;"]
    parts = {
        "WITH_VALUE": _indented(with_value, 16),
        "VALUES": _indented(of_options, 12),
        "OPTIONS": _indented(options, 12),
        "ARGUMENTS": _indented(arguments, 12),
        "COMMANDS": " ".join(command.name for command in commands),
    }
    script = _BASH
    for mark, text in parts.items():
        script = script.replace(mark, text)
    functions = [f"{name}() {{ echo {_quoted(' '.join(names))}; }}" for names, name in lists.items()]
    return "\n".join([script.replace("PROGRAM", PROGRAM), *functions])


def _indented(lines: Sequence[str], by: int) -> str:
    return "\n".join(" " * by + line for line in lines)


# ---- zsh


def zsh(commands: Sequence[Command]) -> str:
    """Return a script for zsh, for a file `_repfx` in a folder of `fpath`."""
    lists = _lists(commands)

    def action(values: Values) -> str:
        parts = [lists[values.names]] if values.names else []
        parts += ["_files"] if values.files else []
        return parts[0] if len(parts) == 1 else f"{{ {'; '.join(parts)} }}" if parts else " "

    lines = [f"#compdef {PROGRAM}", f"_{PROGRAM}() {{", "    local -a commands=("]
    lines += [f"        {_quoted(f'{command.name}:{command.help}')}" for command in commands]
    lines += [
        "    )",
        "    if (( CURRENT == 2 )); then _describe command commands; return; fi",
        "    local name=$words[2]",
    ]
    lines += ["    shift words; (( CURRENT-- ))", "    case $name in"]
    for command in commands:
        lines += [f"    {command.name}) _arguments \\"]
        for option in command.options:
            told = option.help.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
            value = "" if option.values is None else f":value:{action(option.values)}"
            sign = "" if option.values is None else "="
            for name in option.names:
                spelled = f"*{name}{sign if name.startswith('--') else ''}[{told}]{value}"
                lines += [f"        {_quoted(spelled)} \\"]
        for place, values in enumerate(command.arguments, 1):
            where = "*" if command.repeats and place == len(command.arguments) else place
            lines += [f"        {_quoted(f'{where}:value:{action(values)}')} \\"]
        lines += ["        ;;"]
    lines += ["    esac", "}"]
    for names, name in lists.items():
        end = "-S '' " if all(each.endswith("=") for each in names) else ""
        lines += [f'{name}() {{ compadd "$@" {end}-- {" ".join(map(_quoted, names))}; }}']
    return "\n".join([*lines, f'[[ $funcstack[1] == _{PROGRAM} ]] && _{PROGRAM} "$@" || compdef _{PROGRAM} {PROGRAM}'])


# ---- fish


def fish(commands: Sequence[Command]) -> str:
    """Return a script for fish."""
    lists = _lists(commands)

    def taken(values: Values) -> str:
        names = f" -a '({lists[values.names]})'" if values.names else ""
        return f"{names}{' -F' if values.files else ' -f'}"

    lines = [
        f"function {name}; printf '%s\\n' {' '.join(map(_fish_quoted, names))}; end" for names, name in lists.items()
    ]
    lines += [f"complete -c {PROGRAM} -f"]
    for command in commands:
        lines += [
            f"complete -c {PROGRAM} -n __fish_use_subcommand -a {command.name} -d {_fish_quoted(command.help)}",
        ]
        begin = f"complete -c {PROGRAM} -n '__fish_seen_subcommand_from {command.name}'"
        for option in command.options:
            names = " ".join(f"-l {each[2:]}" if each.startswith("--") else f"-s {each[1:]}" for each in option.names)
            value = "" if option.values is None else f" -r{taken(option.values)}"
            lines += [f"{begin} {names}{value} -d {_fish_quoted(option.help)}"]
        lines += [f"{begin}{taken(values)}" for values in dict.fromkeys(command.arguments)]
    return "\n".join(lines)


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
