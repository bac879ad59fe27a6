"""`repfx train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from repfx.change.schedule import SCHEDULES
from repfx.commands.app import app
from repfx.commands.arguments import MODEL_FORMS, Options, Weights, parse_options
from repfx.commands.progress import shown_progress
from repfx.commands.tables import metrics_table
from repfx.errors import InvalidInput
from repfx.records.plain_values import from_plain
from repfx.training.experiment import OF_A_CALL, Experiment, run
from repfx.training.recipe import PRECISIONS, Recipe
from repfx.training.recipe_file import read_recipe
from repfx.training.run_folder import RunFolder

_DEFAULT = Experiment()


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe: a .toml file, or the name of one that `repfx list recipes` shows. Other options go before it.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"The model: {MODEL_FORMS}.", show_default=_DEFAULT.model.name)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="The data: digits (scikit-learn's), a folder with one folder of images per class (or train/ and test/, or val/, of such), "
            "an .npz file with x_train, y_train, x_test and y_test, or the name of a torchvision data set.",
            show_default=_DEFAULT.data.name,
        ),
    ] = None,
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
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training images.", show_default=str(Recipe.epochs))
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = _DEFAULT.out,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in --out already.")] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, with its own recipe; begin it if there is none."),
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(help="Where the files of a torchvision data set are.", show_default=str(_DEFAULT.data.root)),
    ] = None,
    download: Annotated[
        bool | None, typer.Option("--download", help="Let torchvision download them if they aren't.")
    ] = None,
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
    batch_size: Annotated[
        int | None,
        typer.Option(min=2, help="Images in a step, of all processes together.", show_default=str(Recipe.batch_size)),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest one.", show_default=str(Recipe.learning_rate))
    ] = None,
    average: Annotated[
        float | None,
        typer.Option(
            help="Decay of a moving average of the model, as 0.999, which is then fused.", show_default="none"
        ),
    ] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(PRECISIONS)}.", show_default=Recipe.mixed_precision)
    ] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option(
            "--channels-last/--channels-first",
            help="How images and kernels lie in memory.",
            show_default="last where the model runs so",
        ),
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Train through torch.compile.", show_default="no")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of all that is drawn; equal seeds give equal weights.", show_default=str(Recipe.seed)),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic", help="Take deterministic algorithms alone, even if they are slower."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where to train: cpu, cuda, cuda:1, mps, …", show_default="the accelerator that is there, or cpu"
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that load images.", show_default=str(Recipe.workers))
    ] = None,
    log_with: Annotated[
        str | None, typer.Option(help="A tracker that Accelerate knows, as tensorboard.", show_default="none")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE for any key of a recipe, as training.clip=1; VALUE as JSON; may be repeated.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON, and no progress.")] = False,
) -> None:
    """Expand a model, train it, fuse it, export it to ONNX, and show that it stayed the same.

    Without any option: ResNet-18 with Diverse Branch Blocks on handwritten digits. --out then holds model.onnx,
    checkpoint.safetensors with structure.json (see `repfx fuse`), metrics.json, history.json and recipe.toml.
    Ctrl-C ends the training after the step, and --resume goes on from there.
    """
    values = _base(recipe, out, resume=resume)
    if schedule is not None:
        values["schedule"] = {"name": schedule}
    given = {
        "model.name": model,
        "model.num_classes": num_classes,
        "data.name": data,
        "data.root": root,
        "data.download": download,
        "spec": spec,
        "weights": weights,
        "image_size": image_size,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "training.learning_rate": learning_rate,
        "training.average": average,
        "training.mixed_precision": mixed_precision,
        "training.channels_last": channels_last,
        "training.compile": compile,
        "training.seed": seed,
        "training.deterministic": deterministic,
        "training.device": device,
        "training.workers": workers,
        "training.log_with": log_with,
    }
    given |= {f"model.options.{name}": value for name, value in parse_options(option).items()}
    given |= {f"schedule.{name}": value for name, value in parse_options(schedule_option).items()}
    for key, value in given.items():
        if value is not None:
            _set(values, key, value)
    for key, value in parse_options(set_).items():
        _set(values, key, value)
    misplaced = [key for key in OF_A_CALL if key in values]
    if misplaced:
        raise InvalidInput(f"{misplaced[0]} can't be set in a recipe: give the option --{misplaced[0]}.")
    experiment = from_plain(Experiment, {**values, "out": out, "overwrite": overwrite, "resume": resume})
    with shown_progress(quiet=as_json) as watcher:
        metrics = run(experiment, watcher)
    if metrics is None:  # in the other processes
        return
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


def _base(recipe: str | None, out: Path, *, resume: bool) -> dict[str, Any]:
    """The values that options change: those of the run that is gone on with, or of the recipe."""
    if recipe is not None:
        return read_recipe(recipe)
    begun = RunFolder(out).recipe if resume else None
    return {"model": {"name": _DEFAULT.model.name}} if begun is None else begun


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for name in outer:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise InvalidInput(f"{key} can't be set: {name} is no table.")
    if value is None:
        values.pop(last, None)
    else:
        values[last] = value
