"""`repfx inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

import repfx
from repfx.commands.app import app
from repfx.commands.arguments import Classes, Model, Options, load_model
from repfx.errors import InvalidInput
from repfx.run_folder import spec_of


@app.command()
def inspect(
    model: Model,
    spec: Annotated[
        str | None,
        typer.Option(help="Say what this preset, these branch kinds or this JSON would do.", show_default=False),
    ] = None,
    fused: Annotated[
        bool, typer.Option("--fused", help="Say of each conv and BatchNorm that is left after fusing why it stays.")
    ] = False,
    num_classes: Classes = None,
    option: Options = None,
) -> None:
    """List the convs of a model: their sizes, their branches, and what a spec would add or why it can't."""
    found, _ = load_model(model, None, num_classes, option)
    if fused and spec is not None:
        raise InvalidInput("--spec asks about expanding and --fused about fusing: give one of them.")
    if fused:
        typer.echo("\n".join(f"{skip.path}: {skip.reason}" for skip in repfx.report(repfx.fuse(found)).stays))
    else:
        typer.echo(str(repfx.sites(found, None if spec is None else spec_of(spec))))
