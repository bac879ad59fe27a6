"""The commands of `repfx`: each parses, calls, prints."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

import repfx
from repfx.branch import KINDS
from repfx.dataset import DataSource, InputForm
from repfx.errors import InvalidInput
from repfx.experiment import Experiment, run
from repfx.models import ModelReference, load_weights
from repfx.onnx import export_onnx
from repfx.progress import shown_progress
from repfx.rule import PASSES
from repfx.run_folder import STRUCTURE, RunFolder, spec_of
from repfx.schedule import SCHEDULES
from repfx.spec import PRESETS
from repfx.tables import fusion_table, listing, metrics_table
from repfx.training import Recipe

app = typer.Typer(
    name="repfx",
    help="Expand the convs of a network into trainable branches, train it, and fuse it back into plain convs, verified.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_MODEL = "torchvision:NAME, timm:NAME, package.module:callable or file.py:callable"
_AXES = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}

# typer reads these at run time, where Python 3.10 and `X | None` with options of typer 0.15 work together too.
Model = Annotated[str, typer.Argument(help=f"{_MODEL}; or the folder of a training run.", show_default=False)]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights: .safetensors, or .pt, of which no code is run.", show_default="fresh ones"),
]
Classes = Annotated[
    int | None, typer.Option(min=1, help="How many classes the model tells apart.", show_default="its own")
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="NAME=VALUE for what builds the model, VALUE as JSON; may be repeated."),
]


@app.command()
def train(
    model: Annotated[str, typer.Option(help=f"The model: {_MODEL}.")] = "torchvision:resnet18",
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
        model=ModelReference(model, num_classes, _options(option)),
        data=DataSource(data, root, download),
        spec=spec,
        schedule=schedule,
        schedule_options=_options(schedule_option),
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


@app.command()
def fuse(
    model: Model,
    onnx: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    weights: Weights = None,
    num_classes: Classes = None,
    option: Options = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="One input without the batch, as 3x224x224.", show_default="what the model takes, at 224x224"
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators.", show_default="torch's")] = None,
) -> None:
    """Fuse a model into plain convs, check that it computes the same, and export it to ONNX, checked in onnxruntime."""
    original, shape = _load(model, weights, num_classes, option)
    x = _example(original, input_shape, shape)
    fused = repfx.fuse(original)
    report = repfx.check_equivalent(original, fused, x)
    exported = export_onnx(fused, onnx, x, opset=opset)
    Console().print(fusion_table({"before": original, "fused": fused}, x))
    typer.echo(f"Worst relative difference in float64 before and after fusing: {report.max_error:.1e}.")
    for skip in repfx.report(fused).skipped[:10]:
        typer.echo(str(skip))
    typer.echo(str(exported))


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
    found, _ = _load(model, None, num_classes, option)
    if fused and spec is not None:
        raise InvalidInput("--spec asks about expanding and --fused about fusing: give one of them.")
    if fused:
        typer.echo("\n".join(f"{skip.path}: {skip.reason}" for skip in repfx.report(repfx.fuse(found)).stays))
    else:
        typer.echo(str(repfx.sites(found, None if spec is None else spec_of(spec))))


class Registry(str, Enum):
    """What can be listed."""

    branches = "branches"
    presets = "presets"
    passes = "passes"
    schedules = "schedules"


@app.command("list")
def list_names(what: Annotated[Registry, typer.Argument(help="Which names.", show_default=False)]) -> None:
    """List the branch kinds, the presets, the passes or the schedules, with one line on each."""
    rows = {
        Registry.branches: [(kind, (branch.__doc__ or "").splitlines()[0]) for kind, branch in KINDS.items()],
        Registry.presets: [(preset.name, preset.description) for preset in PRESETS.values()],
        Registry.passes: [(found.name, found.description) for found in PASSES.values()],
        Registry.schedules: [(name, (found.__doc__ or "").splitlines()[0]) for name, found in SCHEDULES.items()],
    }[what]
    typer.echo(listing(rows))


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


def _load(
    name: str, weights: Path | None, num_classes: int | None, option: list[str] | None
) -> tuple[nn.Module, tuple[int, ...] | None]:
    """A model in eval mode and, if it is of a run, the shape of its images."""
    folder = RunFolder(Path(name))
    if not Path(name).is_dir():
        model = ModelReference(name, num_classes, _options(option)).build()
        if weights is not None:
            load_weights(model, weights)
        return model.eval(), None
    if not (folder.path / STRUCTURE).is_file():
        raise InvalidInput(f"folder {name!r} holds no training run: it has no {STRUCTURE}.")
    if weights is not None or num_classes is not None or option:
        raise InvalidInput(f"{name!r} is a training run, which has its own weights and options: leave them out.")
    return folder.load(), tuple(folder.structure.preparation["shape"])


def _example(model: nn.Module, asked: str | None, known: tuple[int, ...] | None) -> torch.Tensor:
    """A batch of two random inputs, the same ones every time."""
    if asked is not None:
        parts = asked.replace(",", "x").split("x")
        if not all(part.strip().isdigit() and int(part) for part in parts):
            raise InvalidInput(f"input shape {asked!r} must be whole numbers from 1 with x between, as 3x224x224.")
        shape = tuple(map(int, parts))
    else:
        form = InputForm.of(model)
        own: Any = getattr(model, "default_cfg", None) or {}
        shape = known or own.get("input_size") or (form.channels, *_AXES[form.dimensions])
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def _options(given: list[str] | None) -> dict[str, Any]:
    options = {}
    for text in given or []:
        name, separator, value = text.partition("=")
        if not (name and separator):
            raise InvalidInput(f"option {text!r} must be NAME=VALUE.")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
