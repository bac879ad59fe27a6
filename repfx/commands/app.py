"""The app that the commands of `repfx` join."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

import repfx
from repfx.errors import RepfxError, first_line
from repfx.records.python_code import import_source

app = typer.Typer(
    name="repfx",
    help="Expand the convs of a network into trainable branches, train it, and fuse it back into plain convs, verified.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    ),
]


def command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a function be a command of the app, which also takes `--plugin`."""

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

        hints = {**get_type_hints(function, include_extras=True), "plugin": Plugins}
        alone = inspect.Parameter.KEYWORD_ONLY
        own = [
            each.replace(kind=alone, annotation=hints[each.name])
            for each in inspect.signature(function).parameters.values()
        ]
        added = inspect.Parameter("plugin", alone, default=None, annotation=Plugins)
        run.__signature__ = inspect.Signature([*own, added])  # type: ignore[attr-defined]
        run.__annotations__ = hints
        app.command(name)(run)
        return function

    return register
