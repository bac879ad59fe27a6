"""The app that the commands of `repfx` join."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

import repfx
from repfx.commands.names import FILES
from repfx.errors import InvalidInput, RepfxError, first_line
from repfx.records.python_code import import_source

# each command's file and what it does, in few words. A file is imported once its command is asked for, because most need torch
_COMMANDS = {
    "completion": ("completion", "Write a script by which a shell completes commands."),
    "evaluate": ("evaluate", "Measure a classifier on labelled images."),
    "fuse": ("fuse", "Fuse a model or an ONNX file, and write ONNX."),
    "inspect": ("inspect", "List the convs of a model."),
    "list": ("list_names", "List branch kinds, presets, passes, schedules and recipes."),
    "predict": ("predict", "Say what images show."),
    "profile": ("profile", "Show where the time goes, by layer."),
    "recipe": ("recipe", "Check and print a recipe, or write the schema of recipes."),
    "report": ("report", "Write an HTML page about a run, several, or a sweep."),
    "sweep": ("sweep", "Train a recipe with several values of its options."),
    "train": ("train", "Expand, train, fuse and export a model."),
}
_made: dict[str, Any] = {}  # the commands of the files that are imported


class _Made(Mapping[str, Any]):
    """The commands by name. A command is made when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        importlib.import_module(f"repfx.commands.{_COMMANDS[name][0]}")
        return _made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)


class _Group(TyperGroup):
    """All commands. Their list needs none of their files."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": _Made()})

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, as their list shows them."""
        return list(_COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in _COMMANDS.items()])


_SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}

app = typer.Typer(
    name="repfx",
    cls=_Group,
    help="Expand the convs of a network into trainable branches, train it, and fuse it back into plain convs, verified.",
    no_args_is_help=True,
    **_SETTINGS,
)


_INTERRUPTED = 130
# the error of the package that parses: click's own, or typer's copy of it
_WRONG_USE: Any = typer.BadParameter.__mro__[2]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"repfx {repfx.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    pass


Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="Import a file.py or a package.module first, for the branch kinds, passes and schedules that it defines; may be repeated.",
        show_default=False,
        autocompletion=lambda: [FILES],
    ),
]


class _Command(TyperCommand):
    """A command whose help lists its options in groups, at any width of the terminal. It knows the annotations of its parameters."""

    groups: ClassVar[Mapping[str, Sequence[str]]] = {}
    kinds: ClassVar[Mapping[str, Any]] = {}

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each group under its name. What no group names comes last."""
        titles = {name: title for title, names in self.groups.items() for name in names}
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in self.groups}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = (
                    "Arguments"
                    if parameter.param_type_name == "argument"
                    else titles.get(str(parameter.name), "Options")
                )
                rows.setdefault(title, []).append(_tidied(*record))
        for title, listed in sorted(rows.items(), key=lambda item: item[0] != "Arguments"):
            if listed:
                with formatter.section(title):
                    formatter.write_dl(listed)


def _tidied(name: str, text: str) -> tuple[str, str]:
    """Return what help says of an option without what only a program needs: the name of a list, and brackets in brackets."""
    name = re.sub(r"<list\[(\w+)\]>", r"<\1>", name).replace(" range>", ">")
    return name, re.sub(r"\[default: \((.*?)\)(;.*)?\]$", r"[default: \1\2]", text)


def command(
    name: str, *, groups: Mapping[str, Sequence[str]] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a function be a command of the app, which also takes `--plugin`.

    Args:
        name: the command's name in `_COMMANDS`.
        groups: names of its parameters by the titles under which its help lists them.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, plugin: list[str] | None = None, **options: Any) -> None:
            for source in plugin or []:
                import_source(source)
            try:
                function(**options)
            except (Exception, KeyboardInterrupt):
                raise
            except BaseException as error:
                # such as SystemExit(0), after which this process would say that all went well
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise RepfxError(f"the model's code stopped the command: {reason}.") from error

        # eval_str, not get_type_hints, which in Python 3.10 hides the options of parameters whose default is None
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        alone = inspect.Parameter.KEYWORD_ONLY
        own = [each.replace(kind=alone) for each in parameters]
        added = inspect.Parameter("plugin", alone, default=None, annotation=Plugins)
        run.__signature__ = inspect.Signature([*own, added])  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in [*own, added]}
        cls = type("Command", (_Command,), {"groups": groups or {}, "kinds": run.__annotations__})
        single = typer.Typer(**_SETTINGS)
        single.command(name, cls=cls, short_help=_COMMANDS[name][1])(run)
        _made[name] = typer.main.get_command(single)
        return function

    return register


def run_app(arguments: Sequence[str] | None) -> int:
    """Run the app on arguments, or on those of the process. Return the exit code.

    Raises:
        RepfxError: the arguments don't fit, or the command failed; KeyboardInterrupt: it was interrupted.
    """
    try:
        code = app(None if arguments is None else list(arguments), prog_name="repfx", standalone_mode=False)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except _WRONG_USE as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            typer.echo(error.format_message(), err=True)
            return int(error.exit_code)
        context = getattr(error, "ctx", None)
        advice = "" if context is None else f" `{context.command_path} --help` lists what there is."
        message = error.format_message().rstrip(".")
        raise InvalidInput(f"{message[:1].lower()}{message[1:]}.{advice}") from error
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
