"""`repfx evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from repfx.commands.app import command
from repfx.commands.arguments import ClassifierName, DataOptions, RuntimeName, Trust, open_classifier, parse_options
from repfx.commands.names import FILES, data_names
from repfx.commands.output import Json, print_json
from repfx.commands.progress import busy
from repfx.commands.tables import confusion_table
from repfx.data.dataset import DataSource
from repfx.data.reading import told
from repfx.records.number_text import plural
from repfx.training.evaluation import MANY_CLASSES, Evaluation
from repfx.training.evaluation import evaluate as evaluated

_CONFUSED = 5


@command("evaluate")
def evaluate(
    classifier: ClassifierName,
    data: Annotated[
        str,
        typer.Option(
            help="The data, as --data of repfx train takes it. Its test images are used.",
            show_default=False,
            autocompletion=data_names,
        ),
    ],
    data_option: DataOptions = None,
    root: Annotated[Path, typer.Option(help="Folder with the files of a torchvision data set.")] = DataSource.root,
    against: Annotated[
        str | None,
        typer.Option(
            help="Another file or run; count the images about which it decides otherwise.",
            show_default=False,
            autocompletion=lambda: [FILES],
        ),
    ] = None,
    runtime: RuntimeName = "onnxruntime",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure a classifier on labelled images, prepared as in its training. Classes are matched by their names."""
    source = DataSource(data, root, options=parse_options(data_option))
    found = open_classifier(classifier, runtime, trust=trust)
    other = None if against is None else open_classifier(against, runtime, trust=trust)
    with busy("evaluating"):
        result = evaluated(found, source, other)
    if as_json:
        print_json(result.as_dict())
        return
    Console().print(confusion_table(result))
    typer.echo(_summary(result))


def _summary(result: Evaluation) -> str:
    lines = [f"{told(result.unreadable, 'image')}."] if result.unreadable else []
    five = f"; {result.top5:.2%} among the first five" if len(result.labels) >= MANY_CLASSES else ""
    lines += [f"{result.accuracy:.2%} of {result.images} images right{five}."]
    if result.flips is not None:
        lines.append(f"The other classifier puts {plural(result.flips, 'image')} into another class.")
    if result.confused:
        pairs = [f"{true} for {predicted} ({count})" for true, predicted, count in result.confused[:_CONFUSED]]
        lines.append(f"Mistaken most often: {', '.join(pairs)}.")
    return "\n".join(lines)
