"""`repfx profile`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console

from repfx.commands.app import command
from repfx.commands.arguments import (
    Classes,
    InputShape,
    Model,
    Options,
    Trust,
    Weights,
    example_input,
    load_model,
    shape_of_input,
)
from repfx.commands.onnx_file import is_onnx_file, refuse_options
from repfx.commands.output import Json, print_json
from repfx.commands.progress import busy
from repfx.commands.tables import profile_table
from repfx.profiling.profile import RUNTIMES, Profile, Runtime, profile_onnx
from repfx.profiling.profile import profile as profiled
from repfx.records.number_text import engineering, plural


@command("profile")
def profile(
    model: Model,
    weights: Weights = None,
    num_classes: Classes = None,
    option: Options = None,
    input_shape: InputShape = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images in the batch.")] = 1,
    runtime: Annotated[
        str, typer.Option(help=f"What runs the model: {', '.join(RUNTIMES)}.", autocompletion=lambda: list(RUNTIMES))
    ] = "torch",
    rounds: Annotated[int, typer.Option(min=1, help="Number of runs that count.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a run.", show_default="torch's")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of layers to list.")] = 10,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Show where the time of a model goes, layer by layer, before and after fusing, and what limits each layer.

    Nodes of an ONNX file are measured in onnxruntime.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if is_onnx_file(model):
        given = {"weights": weights, "num_classes": num_classes, "option": option, "input_shape": input_shape}
        refuse_options(given)
        with busy("fusing and measuring"):
            found = profile_onnx(model, rounds=rounds)
    else:
        original, setup = load_model(model, weights, num_classes, option, trust=trust)
        x = example_input(original, shape_of_input(input_shape, setup))
        with busy("fusing and measuring"):
            batch = x[torch.arange(batch_size) % len(x)]
            found = profiled(original, batch, runtime=cast(Runtime, runtime), rounds=rounds)
    if as_json:
        print_json(_plain(found))
        return
    Console().print(profile_table(found, rows))
    typer.echo(_summary(found, rows))


def _summary(found: Profile, rows: int) -> str:
    shown = found.share_of(found.rows[:rows])
    roof = f"{engineering(found.machine.macs)}MAC/s and {engineering(found.machine.moved)}B/s"
    return "\n".join(
        [
            f"A run in {found.runtime}: {found.before.text} → {found.after.text}, {found.speed_up:.2f} times as quick.",
            f"The layers above take {shown:.0%} of the time after fusing. All layers together take {found.sum_after * 1e3:.2f} ms.",
            f"This machine reaches {roof} with {plural(torch.get_num_threads(), 'thread')}.",
            "A layer limited by memory moves too many bytes for its arithmetic: fewer multiply-adds don't make it quicker.",
        ]
    )


def _plain(found: Profile) -> dict[str, Any]:
    return {
        "runtime": found.runtime,
        "before": found.before.as_dict(),
        "after": found.after.as_dict(),
        "machine": {"macs_per_second": found.machine.macs, "bytes_per_second": found.machine.moved},
        "rows": [
            {
                "path": row.path,
                "layer": row.layer,
                "merged": row.merged,
                "before": None if row.before is None else row.before.as_dict(),
                "after": None if row.after is None else row.after.as_dict(),
                "macs": None if row.work is None else row.work.macs,
                "bytes": None if row.work is None else row.work.moved,
                "limit": row.limit,
                "reason": row.reason,
            }
            for row in found.rows
        ],
    }
