"""`repfx predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from repfx.commands.app import command
from repfx.commands.arguments import ClassifierName, RuntimeName, Trust, open_classifier
from repfx.commands.output import Json, print_json
from repfx.commands.tables import plain_table
from repfx.errors import InvalidInput
from repfx.training.classifier import Classifier


@command("predict")
def predict(
    classifier: ClassifierName,
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="Number of classes to show for each image.")] = 3,
    runtime: RuntimeName = "onnxruntime",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Say what images show, by an ONNX file or a training run that knows its classes and how images are prepared.

    A file that can't be read is named at the end, and the others are predicted.
    """
    found = open_classifier(classifier, runtime, trust=trust)
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for path in images:
        try:
            rows.append({"image": str(path), "classes": _best(found, path, top)})
        except InvalidInput as error:
            problems.append(str(error))
    if as_json:
        print_json(rows)
    elif rows:
        Console().print(_table(rows))
    if problems:
        raise InvalidInput(" ".join(problems))


def _best(classifier: Classifier, path: Path, top: int) -> list[dict[str, Any]]:
    """Return the most likely classes and their probabilities."""
    probabilities = classifier.probabilities_of(path)
    values, places = torch.topk(probabilities, min(top, len(classifier.labels)))
    return [
        {"class": classifier.labels[place], "probability": value}
        for place, value in zip(places.tolist(), values.tolist())
    ]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = plain_table("image", "class", "probability")
    for row in rows:
        for place, each in enumerate(row["classes"]):
            table.add_row(Text("" if place else row["image"]), Text(each["class"]), f"{each['probability']:.2%}")
    return table
