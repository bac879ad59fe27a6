"""The app that the commands of `repfx` join."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

import repfx
from repfx.commands.names import FILES
from repfx.errors import InvalidInput, RepfxError, first_line
from repfx.records.python_code import import_source

app = typer.Typer(
    name="repfx",
    help="Expand the convs of a network into trainable branches, train it, and fuse it back into plain convs, verified.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
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
    name: str | None = None, *, short: str, groups: Mapping[str, Sequence[str]] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a function be a command of the app, which also takes `--plugin`.

    Args:
        short: what it does, in few words, for the list of commands.
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
            except (
                BaseException
            ) as error:  # such as SystemExit(0), after which this process would say that all went well
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
        app.command(name, cls=cls, short_help=short)(run)
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
