"""`repfx train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from repfx.commands.app import app
from repfx.commands.arguments import MODEL_FORMS, Options, Weights, parse_options
from repfx.dataset import DataSource
from repfx.experiment import Experiment, run
from repfx.models import ModelReference
from repfx.progress import shown_progress
from repfx.run_folder import RunFolder
from repfx.schedule import SCHEDULES
from repfx.tables import metrics_table
from repfx.training import Recipe


@app.command()
def train(
    model: Annotated[str, typer.Option(help=f"The model: {MODEL_FORMS}.")] = "torchvision:resnet18",
    data: Annotated[
        str,
        typer.Option(
            help="The data: digits (scikit-learn's), a folder with one folder of images per class (or train/ and test/ of such), "
            "an .npz file with x_train, y_train, x_test and y_test, or the name of a torchvision data set."
        ),
    ] = "digits",
    spec: Annotated[
        str | None,
        typer.Option(
            help='A preset, branch kinds with commas between, or JSON: \'{"layer1.*": "acb"}\'.',
            show_default="dbb, or the schedule's own",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Begin with the plain model and change it while it trains, as this schedule says: "
            + ", ".join(SCHEDULES),
            show_default="expand it first",
        ),
    ] = None,
    schedule_option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE for the schedule, VALUE as JSON; may be repeated.", show_default="its paper's proportions"
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = Recipe.epochs,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("runs/first"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in --out already.")] = False,
    root: Annotated[Path, typer.Option(help="Where the files of a torchvision data set are.")] = Path("data"),
    download: Annotated[bool, typer.Option("--download", help="Let torchvision download them if they aren't.")] = False,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Height and width of an image.", show_default="16 for digits, 224 for a folder, else its own"
        ),
    ] = None,
    weights: Weights = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="How many classes the model tells apart.", show_default="the data's")
    ] = None,
    option: Options = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Images in a step.")] = Recipe.batch_size,
    learning_rate: Annotated[float, typer.Option(help="The highest of the cycle.")] = Recipe.learning_rate,
    seed: Annotated[int, typer.Option(help="Of weights and order; equal seeds give equal weights.")] = Recipe.seed,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, mps, …")] = Recipe.device,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = Recipe.workers,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON, and no progress.")] = False,
) -> None:
    """Expand a model, train it, fuse it, export it to ONNX, and show that it stayed the same.

    Without any option: ResNet-18 with Diverse Branch Blocks on handwritten digits. --out then holds model.onnx,
    checkpoint.safetensors with structure.json (see `repfx fuse`), and metrics.json.
    """
    experiment = Experiment(
        model=ModelReference(model, num_classes, parse_options(option)),
        data=DataSource(data, root, download),
        spec=spec,
        schedule=schedule,
        schedule_options=parse_options(schedule_option),
        recipe=Recipe(epochs, batch_size, learning_rate, seed=seed, device=device, workers=workers),
        out=out,
        overwrite=overwrite,
        weights=weights,
        image_size=image_size,
    )
    with shown_progress(quiet=as_json) as watcher:
        metrics = run(experiment, watcher)
    if as_json:
        typer.echo(json.dumps(metrics.as_dict(), indent=2))
        return
    found = RunFolder(out).architecture
    if found is not None:
        typer.echo(f"What the search has found (own conv first, 1 is kept):\n{found}")
    Console().print(metrics_table(metrics))
    typer.echo(
        f"Flips are against the model before fusing; MACs and latency are for one image. All files are in {out}."
    )
