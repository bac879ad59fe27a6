"""What several commands take, a model, its weights and options, and an input for it; and how they print JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from repfx.data.dataset import InputForm
from repfx.errors import InvalidInput
from repfx.training.models import ModelReference, load_weights
from repfx.training.run_folder import STRUCTURE, RunFolder

MODEL_FORMS = "torchvision:NAME, timm:NAME, package.module:callable or file.py:callable"
_AXES = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}

# typer reads these at run time, where Python 3.10 and `X | None` with options of typer 0.15 work together too.
Model = Annotated[str, typer.Argument(help=f"{MODEL_FORMS}; or the folder of a training run.", show_default=False)]
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

Json = Annotated[bool, typer.Option("--json", help="Print what was found as JSON, for other programs.")]

InputShape = Annotated[
    str | None,
    typer.Option(help="One input without the batch, as 3x224x224.", show_default="what the model takes, at 224x224"),
]


def load_model(
    name: str, weights: Path | None, num_classes: int | None, option: list[str] | None
) -> tuple[nn.Module, Mapping[str, Any] | None]:
    """A model in eval mode and, if it is of a run, what its images went through."""
    folder = RunFolder(Path(name))
    if not Path(name).is_dir():
        model = ModelReference(name, num_classes, parse_options(option)).build()
        if weights is not None:
            load_weights(model, weights)
        return model.eval(), None
    if not (folder.path / STRUCTURE).is_file():
        raise InvalidInput(f"folder {name!r} holds no training run: it has no {STRUCTURE}.")
    if weights is not None or num_classes is not None or option:
        raise InvalidInput(f"{name!r} is a training run, which has its own weights and options: leave them out.")
    return folder.load(), folder.setup.preparation


def shape_of_input(asked: str | None, preparation: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    """Of one input, if the user or a run says so."""
    if asked is None:
        return None if preparation is None else tuple(preparation["shape"])
    parts = asked.replace(",", "x").split("x")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise InvalidInput(f"input shape {asked!r} must be whole numbers from 1 with x between, as 3x224x224.")
    return tuple(map(int, parts))


def example_input(model: nn.Module, shape: tuple[int, ...] | None) -> torch.Tensor:
    """A batch of two random inputs, the same ones every time."""
    form = InputForm.of(model)
    own: Any = getattr(model, "default_cfg", None) or {}
    shape = shape or own.get("input_size") or (form.channels, *_AXES[form.dimensions])
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), device="cpu")


def print_json(found: object) -> None:
    """What `--json` prints; sizes and reasons, so never a number that JSON doesn't know."""
    typer.echo(json.dumps(found, indent=2, allow_nan=False))


def parse_options(given: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE each, VALUE as JSON, or as text where it is none."""
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
