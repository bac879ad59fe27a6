"""`repfx inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

import repfx
from repfx.commands.app import command
from repfx.commands.arguments import (
    Classes,
    InputShape,
    Model,
    Options,
    Trust,
    example_input,
    load_model,
    shape_of_input,
)
from repfx.commands.names import spec_names
from repfx.commands.onnx_file import inspect_file, is_onnx_file
from repfx.commands.output import Json, listing, print_json, terminal_width
from repfx.commands.progress import busy
from repfx.errors import EquivalenceError, InvalidInput
from repfx.pages.model_page import Check, write_model_page
from repfx.tracing.sites import SiteTable
from repfx.training.run_folder import spec_of


@command("inspect")
def inspect(
    model: Model,
    spec: Annotated[
        str | None,
        typer.Option(
            help="Show what a preset, branch kinds or JSON would add to each conv.",
            show_default=False,
            autocompletion=spec_names,
        ),
    ] = None,
    fused: Annotated[
        bool, typer.Option("--fused", help="Fuse the model, and show why each conv and BatchNorm that is left stays.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write an HTML page in place of the list. It shows the model before and after fusing.",
            show_default=False,
        ),
    ] = None,
    timed: Annotated[
        bool, typer.Option("--timed", help="Measure each layer before and after fusing, for the HTML page.")
    ] = False,
    input_shape: InputShape = None,
    num_classes: Classes = None,
    option: Options = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """List the convs of a model, with their sizes and branches. With --spec, show what a spec would add to each, or why it can't.

    Of an ONNX file, show what would merge, and why each conv and BatchNormalization that is left stays.
    """
    if is_onnx_file(model):
        of_models = {
            "spec": spec,
            "html": html,
            "timed": timed or None,
            "num_classes": num_classes,
            "option": option,
            "input_shape": input_shape,
        }
        inspect_file(model, of_models, as_json=as_json)
        return
    found, setup = load_model(model, None, num_classes, option, trust=trust)
    if fused and spec is not None and html is None:
        raise InvalidInput("--spec asks about expanding and --fused about fusing: give only one of them.")
    if timed and html is None:
        raise InvalidInput("--timed is for the page of --html; `repfx profile` shows the same in the terminal.")
    if html is not None:
        x = example_input(found, shape_of_input(input_shape, setup))
        with busy("fusing, comparing and measuring" if timed else "fusing and comparing"):
            check = _write_page(found, html, model, spec, x, trained=setup is not None, timed=timed)
        _show(as_json, {"page": str(html), "not_compared": check.problem}, _told(html, check))
    elif fused:
        x = example_input(found, shape_of_input(input_shape, setup))
        with busy("fusing and comparing"):
            deployed, problem = _fuse(found, x)
        stays = repfx.report(deployed).stays
        rows = [{"path": skip.path, "reason": skip.reason} for skip in stays]
        _show(as_json, rows, "\n".join([*(f"{skip.path}: {skip.reason}" for skip in stays), *problem]))
    else:
        sites = repfx.sites(found, None if spec is None else spec_of(spec))
        _show(as_json, [asdict(site) for site in sites], _table(sites))


def _fuse(model: nn.Module, x: Tensor) -> tuple[nn.Module, list[str]]:
    """Fuse a model, and prove on x that it computes the same; also say why it could not be proven, if so."""
    try:
        return repfx.fuse(model, example=x), []
    except InvalidInput as error:
        return repfx.fuse(model), [f"Not compared: {error}"]


def _show(as_json: bool, rows: object, text: str) -> None:
    if as_json:
        print_json(rows)
    else:
        typer.echo(text)


def _write_page(
    model: nn.Module, html: Path, name: str, spec: str | None, x: Tensor, *, trained: bool, timed: bool
) -> Check:
    wanted = None if spec is None else spec_of(spec)
    check = write_model_page(model, html, x, name=name, spec=wanted, trained=trained, timed=timed)
    if check.report is not None and not check.report.equivalent:
        raise EquivalenceError(f"{check.report} The page {str(html)!r} has the details.")
    return check


def _table(sites: SiteTable) -> str:
    """Return the table of sites. On a terminal, what becomes of a conv is wrapped beside it."""
    longest = max(len(path) for path, _, _ in sites.rows)
    return listing(((f"{path:<{longest}}  {conv}", branches) for path, conv, branches in sites.rows), terminal_width())


def _told(html: Path, check: Check) -> str:
    return f"The page is {html}." + ("" if check.problem is None else f"\nNot compared: {check.problem}.")
