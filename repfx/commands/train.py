"""`repfx train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from repfx.change.schedule import SCHEDULES
from repfx.commands.app import command
from repfx.commands.arguments import MODEL_FORMS, DataOptions, Options, Trust, parse_options
from repfx.commands.names import FILES, data_names, model_names, recipe_keys, recipe_names, spec_names
from repfx.commands.progress import shown_progress
from repfx.commands.tables import metrics_table
from repfx.records.plain_values import put
from repfx.training.experiment import Experiment, run
from repfx.training.recipe import KEPT, PRECISIONS, Recipe
from repfx.training.recipe_file import is_file, parse_recipe
from repfx.training.run_folder import RECIPE, RunFolder
from repfx.training.runs.baseline import PLAIN, verdict
from repfx.training.trust import Trust as Trusted
from repfx.training.trust import require_trusted

_DEFAULT = Experiment()
_GROUPS = {
    "Model": ("model", "weights", "pretrained", "freeze", "num_classes", "option"),
    "Data": ("data", "data_option", "root", "download", "image_size", "strict_data"),
    "Method": ("recipe", "spec", "schedule", "schedule_option", "baseline", "set_", "trust", "plugin"),
    "Training": (
        "epochs",
        "qat",
        "keep",
        "patience",
        "batch_size",
        "learning_rate",
        "average",
        "mixed_precision",
        "channels_last",
        "compile",
        "seed",
        "deterministic",
        "device",
        "workers",
    ),
    "Output": ("out", "overwrite", "resume", "log_with", "as_json"),
}


@command("train", groups=_GROUPS)
def train(
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe: a .toml file, or a name that `repfx list recipes` shows. Other options override it.",
            show_default=False,
            autocompletion=recipe_names,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=f"The model: {MODEL_FORMS}.",
            show_default=_DEFAULT.model.name,
            autocompletion=model_names,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="The data: digits (from scikit-learn); a folder with one folder of images per class, or with such folders in train/ and "
            "test/ (or val/); an .npz file with x_train, y_train, x_test and y_test; hf:NAME or hf:FOLDER, a data set for Hugging Face's "
            "datasets; wds:FOLDER, shards of WebDataset; or the name of a torchvision data set.",
            show_default=_DEFAULT.data.name,
            autocompletion=data_names,
        ),
    ] = None,
    spec: Annotated[
        str | None,
        typer.Option(
            "--spec",
            "-s",
            help='A preset, branch kinds with commas between them, or JSON: \'{"layer1.*": "acb"}\'.',
            show_default="dbb, or the schedule's own",
            autocompletion=spec_names,
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Begin with the plain model and let this schedule change it while it trains: "
            f"{', '.join(SCHEDULES.known)}, file.py:Class or package.module:Class.",
            show_default="expand it first",
            autocompletion=lambda: [*SCHEDULES, FILES],
        ),
    ] = None,
    schedule_option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE, an option of the schedule; VALUE is JSON or text. May be repeated.",
            show_default="its paper's proportions",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="plain|RUN",
            help="Say whether branches help: train the plain model alike, too (plain), or compare with the folder of its run.",
            show_default=False,
            autocompletion=lambda: [PLAIN, FILES],
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs", "-e", min=1, help="Number of passes over the training images.", show_default=str(Recipe.epochs)
        ),
    ] = None,
    qat: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of further passes in which the fused model is trained on with its numbers rounded to 8 bits, and then written as "
            "model.int8.onnx.",
            show_default="none",
        ),
    ] = None,
    data_option: DataOptions = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files of the run.")] = _DEFAULT.out,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that --out already holds.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out with its own recipe; start one if there is none. More --epochs make a finished run longer.",
        ),
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder with the files of a torchvision data set.", show_default=str(_DEFAULT.data.root)),
    ] = None,
    download: Annotated[
        bool | None,
        typer.Option("--download", help="Let torchvision or datasets download the data set if it is missing."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Height and width of an image.",
            show_default="16 for digits, 224 for a folder, else the data's own",
        ),
    ] = None,
    strict_data: Annotated[
        bool | None,
        typer.Option(
            "--strict-data",
            help="Read all image files first, and stop if one can't be read. Without it, such a file is named and left out.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights to begin from: a file (.safetensors or .pt), or the folder of a finished run of this model, in training form.",
            show_default="fresh ones",
        ),
    ] = None,
    pretrained: Annotated[
        bool | None,
        typer.Option(
            "--pretrained",
            help="Begin from the weights that torchvision or timm has for the model, downloaded if they aren't in its cache. "
            "`--set training.layer_decay=0.7` lets earlier layers learn more slowly.",
        ),
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(
            help="Keep the weights of a module, such as layer1, and of all before it: they aren't trained and get no branches.",
            show_default="train all",
        ),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Number of classes of the model.", show_default="the data's")
    ] = None,
    option: Options = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="The epoch whose model is fused: last, best (on the test images), or both, which fuses the last and keeps the best, too.",
            show_default=Recipe.keep,
            autocompletion=lambda: list(KEPT),
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of epochs without a better accuracy after which the training ends early.",
            show_default="never",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of images in a step, over all processes together.", show_default=str(Recipe.batch_size)
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest learning rate.", show_default=str(Recipe.learning_rate))
    ] = None,
    average: Annotated[
        float | None,
        typer.Option(
            help="Decay of a moving average of the model, such as 0.999; the averaged model is then fused.",
            show_default="none",
        ),
    ] = None,
    mixed_precision: Annotated[
        str | None,
        typer.Option(
            help=f"Precision of training: {', '.join(PRECISIONS)}.",
            show_default=Recipe.mixed_precision,
            autocompletion=lambda: list(PRECISIONS),
        ),
    ] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option(
            "--channels-last/--channels-first",
            help="Memory format of images and kernels.",
            show_default="last if the model runs so",
        ),
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Train through torch.compile.", show_default="no")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of all random numbers; equal seeds give equal weights.", show_default=str(Recipe.seed)),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic", help="Use deterministic algorithms only, even if they are slower."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where to train: cpu, cuda, cuda:1, mps, …", show_default="the accelerator of the machine, or cpu"
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Number of processes that load images.", show_default=str(Recipe.workers))
    ] = None,
    log_with: Annotated[
        str | None, typer.Option(help="A tracker that Accelerate knows, such as tensorboard.", show_default="none")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE for any key of a recipe, such as training.clip=1; VALUE is JSON or text. May be repeated.",
            show_default=False,
            autocompletion=recipe_keys,
        ),
    ] = None,
    trust: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON, and show no progress.")] = False,
) -> None:
    """Expand a model, train it, fuse it and export it to ONNX, and check that its outputs stay the same.

    Without any option, this trains ResNet-18 with Diverse Branch Blocks on handwritten digits. --out then holds model.onnx,
    checkpoint.safetensors with structure.json (see `repfx fuse`), metrics.json, history.json and recipe.toml.
    Ctrl-C stops the training after the current step, and --resume continues from there.
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
        "data.strict": strict_data,
        "spec": spec,
        "weights": weights,
        "pretrained": pretrained,
        "baseline": baseline,
        "image_size": image_size,
        "training.freeze": freeze,
        "training.epochs": epochs,
        "training.qat.epochs": qat,
        "training.keep": keep,
        "training.patience": patience,
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
    given |= {f"data.options.{name}": value for name, value in parse_options(data_option).items()}
    given |= {f"schedule.{name}": value for name, value in parse_options(schedule_option).items()}
    for key, value in given.items():
        if value is not None:
            put(values, key, value)
    set_by_hand = parse_options(set_)
    for key, value in set_by_hand.items():
        put(values, key, value)
    named = [each for each in (model, schedule, *set_by_hand.values()) if isinstance(each, str)]
    _require_trusted(values, recipe, out, True if trust else named)
    experiment = Experiment.of(values, out=out, overwrite=overwrite, resume=resume)
    with shown_progress(quiet=as_json) as watcher:
        metrics = run(experiment, watcher)
    if metrics is None:  # in all processes but the first
        return
    if as_json:
        typer.echo(json.dumps(metrics.as_dict(), indent=2))
        return
    found = RunFolder(out).architecture
    if found is not None:
        typer.echo(f"What the search has found (own conv first; 1 is kept, 0 left out):\n{found}")
    Console().print(metrics_table(metrics))
    said = verdict(metrics)
    for sentence in [*metrics.notes, *([] if said is None else [said])]:
        typer.echo(sentence)
    rounded = "" if metrics.int8 is None else ", those in 8 bits from the fused one"
    typer.echo(
        f"Flips are predictions that differ from the model before fusing{rounded}. MACs and latency are for one image."
    )
    typer.echo(f"All files are in {out}.")


def _base(recipe: str | None, out: Path, *, resume: bool) -> dict[str, Any]:
    """Return the values that options then change: those of the recipe, of the run that is resumed, or the default model alone."""
    if recipe is not None:
        return parse_recipe(recipe)
    begun = RunFolder(out).recipe if resume else None
    return {"model": {"name": _DEFAULT.model.name}} if begun is None else begun


def _require_trusted(values: dict[str, Any], recipe: str | None, out: Path, trust: Trusted) -> None:
    """Raise if a file names code in `values` that the user neither names nor trusts."""
    advice = ", or name it yourself with --model, --schedule or --set"
    if recipe is None:
        require_trusted(values, repr(str(out / RECIPE)), trust, advice)
    elif is_file(recipe):
        require_trusted(values, repr(recipe), trust, advice)
