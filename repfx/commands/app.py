"""The app that the commands of `repfx` join."""

from __future__ import annotations

from typing import Annotated

import typer

import repfx

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
