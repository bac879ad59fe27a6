"""`repfx completion`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from repfx.commands import shells
from repfx.commands.app import app, command
from repfx.commands.names import FILES
from repfx.commands.shells import Command, Option, Values


class Shell(str, Enum):
    """The shells that have scripts."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


@command("completion")
def completion(
    shell: Annotated[Shell, typer.Argument(help="The shell to write a script for.", show_default=False)],
) -> None:
    """Write a script by which a shell completes the commands, options and names of repfx when Tab is pressed.

    The script holds the names that are known now, so Tab starts no Python. Write it anew after an update.
    """
    typer.echo({"bash": shells.bash, "zsh": shells.zsh, "fish": shells.fish}[shell.value](commands_of_app()))


def commands_of_app() -> tuple[Command, ...]:
    """Return the commands of `repfx` with what each takes, as their functions declare it."""
    group: Any = typer.main.get_command(app)
    return tuple(_command(name, each) for name, each in group.commands.items())


def _command(name: str, found: Any) -> Command:
    context = found.make_context(name, [], resilient_parsing=True)
    parameters = found.get_params(context)

    def values_of(parameter: Any) -> Values:
        names = [item.value for item in parameter.shell_complete(context, "") if item.type == "plain"]
        files = FILES in names or _is_path(found.kinds.get(parameter.name))
        return Values(tuple(each for each in names if each != FILES), files)

    def option(parameter: Any) -> Option:
        told = (parameter.help or "").partition(". ")[0].rstrip(".")
        values = None if parameter.is_flag else values_of(parameter)
        return Option((*parameter.opts, *parameter.secondary_opts), told, values)

    options = tuple(option(each) for each in parameters if each.param_type_name == "option")
    arguments = [each for each in parameters if each.param_type_name == "argument"]
    repeats = bool(arguments) and arguments[-1].nargs == -1
    return Command(name, found.short_help, options, tuple(map(values_of, arguments)), repeats)


def _is_path(annotation: Any) -> bool:
    return annotation is Path or any(map(_is_path, get_args(annotation)))
