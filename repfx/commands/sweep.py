"""`repfx sweep`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from repfx.commands.app import command
from repfx.commands.arguments import MODEL_FORMS, Trust, parse_options
from repfx.commands.names import data_names, model_names, recipe_keys, recipe_names
from repfx.commands.output import Json, print_json
from repfx.commands.progress import shown_progress
from repfx.commands.tables import sweep_table
from repfx.errors import InvalidInput, RepfxError
from repfx.records.json_text import parse_json
from repfx.records.number_text import plural
from repfx.records.plain_values import put
from repfx.training.experiment import Experiment
from repfx.training.recipe_file import is_file, parse_recipe
from repfx.training.sweep import Sweep, rows_of, run_sweep
from repfx.training.trust import require_trusted

_DEFAULT = Experiment()


@command("sweep")
def sweep(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe: a .toml file, or a name that `repfx list recipes` shows.",
            show_default="the defaults of repfx train",
            autocompletion=recipe_names,
        ),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE,VALUE,… for any key of a recipe, such as training.learning_rate=0.1,0.2. Values are JSON or text; a JSON list "
            "of values can hold commas. May be repeated, for all combinations.",
            show_default=False,
            autocompletion=recipe_keys,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds for each choice of values.")] = 1,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=f"The model: {MODEL_FORMS}.",
            show_default="the recipe's",
            autocompletion=model_names,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="The data, as in `repfx train`.",
            show_default="the recipe's",
            autocompletion=data_names,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs", "-e", min=1, help="Number of passes over the training images.", show_default="the recipe's"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE for any key of a recipe, for all runs; VALUE is JSON or text. May be repeated.",
            show_default=False,
            autocompletion=recipe_keys,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the sweep, with a folder for each run.")] = Path(
        "sweeps/first"
    ),
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Train a recipe with each combination of values of its options, and with several seeds.

    Each run is a folder as `repfx train` leaves it, below --out. The same command again keeps what is finished, continues what was
    interrupted and tries again what failed. `repfx report` makes a page of the folder.
    """
    values = {"model": {"name": _DEFAULT.model.name}} if recipe is None else parse_recipe(recipe)
    by_hand = parse_options(set_)
    given = {"model.name": model, "data.name": data, "training.epochs": epochs, **by_hand}
    for key, value in given.items():
        if value is not None or key in by_hand:
            put(values, key, value)
    options = _options(over or [])
    asked = Sweep.over(values, options, seeds)
    if recipe is not None and is_file(recipe):
        named = [
            each for each in (*given.values(), *(v for vs in options.values() for v in vs)) if isinstance(each, str)
        ]
        for point in asked.points:
            require_trusted(asked.values(point), repr(recipe), True if trust else named, ", or name it yourself")
    done = run_sweep(asked, out, partial(shown_progress, quiet=as_json))
    rows = rows_of(done, out)
    failed = [point for point in done.points if point.problem is not None]
    if as_json:
        problems = {point.folder: point.problem for point in failed}
        print_json({"out": str(out), "rows": [row.as_dict() for row in rows], "failed": problems})
    else:
        Console().print(sweep_table(done.keys, rows))
        typer.echo("Accuracy is that of the fused models on the test images, ± the deviation among the seeds.")
        typer.echo("MACs are for one image forward: in training, the mean over all epochs; and fused.")
        typer.echo(f"All runs are in {out}; `repfx report {out}` makes a page of them.")
    if failed:
        reasons = " ".join(f"{point}: {point.problem}" for point in failed)
        raise RepfxError(f"{plural(len(failed), 'run')} of {len(done.points)} failed. {reasons}")


def _options(given: list[str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for text in given:
        key, separator, values = text.partition("=")
        if not (key and separator):
            raise InvalidInput(f"--over {text!r} must be KEY=VALUE,VALUE.")
        if key in found:
            raise InvalidInput(f"--over has {key} twice: give all its values together.")
        found[key] = _values(values)
    return found


def _values(text: str) -> list[Any]:
    """Read the values of an option: a JSON list, or values with commas between them, outside of brackets.

    >>> _values("0.1,null,dbb"), _values('["dbb", ["1x1", "1xk"]]'), _values('[0.5, 0.9],[0.9, 0.999]')
    ([0.1, None, 'dbb'], ['dbb', ['1x1', '1xk']], [[0.5, 0.9], [0.9, 0.999]])
    """
    try:
        whole = parse_json(text)
    except ValueError:
        whole = None
    if isinstance(whole, list):
        return whole
    parts = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,])+", text)
    return [next(iter(parse_options([f"value={part.strip()}"]).values())) for part in parts]
