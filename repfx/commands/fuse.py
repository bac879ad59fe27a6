"""`repfx fuse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import repfx
from repfx.commands.app import app
from repfx.commands.arguments import Classes, InputShape, Model, Options, Weights, example_input, load_model
from repfx.onnx import export_onnx
from repfx.tables import fusion_table


@app.command()
def fuse(
    model: Model,
    onnx: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    weights: Weights = None,
    num_classes: Classes = None,
    option: Options = None,
    input_shape: InputShape = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators.", show_default="torch's")] = None,
) -> None:
    """Fuse a model into plain convs, check that it computes the same, and export it to ONNX, checked in onnxruntime."""
    original, shape = load_model(model, weights, num_classes, option)
    x = example_input(original, input_shape, shape)
    fused = repfx.fuse(original)
    report = repfx.check_equivalent(original, fused, x)
    exported = export_onnx(fused, onnx, x, opset=opset)
    Console().print(fusion_table({"before": original, "fused": fused}, x))
    typer.echo(f"Worst relative difference in float64 before and after fusing: {report.max_error:.1e}.")
    for skip in repfx.report(fused).skipped[:10]:
        typer.echo(str(skip))
    typer.echo(str(exported))
