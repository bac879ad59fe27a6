"""Arguments that several commands share (a model, its weights and options, and an input for it)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from repfx.commands.names import FILES, model_names
from repfx.data.dataset import InputForm
from repfx.errors import InvalidInput, UnknownName
from repfx.records.json_text import parse_json
from repfx.training.classifier import RUNTIMES, Classifier
from repfx.training.models import ModelReference, load_weights
from repfx.training.run_folder import STRUCTURE, RunFolder, Setup

MODEL_FORMS = "torchvision:NAME, timm:NAME, package.module:callable or file.py:callable"
_AXES = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}

# typer reads these annotations at run time; its options work with `X | None` on Python 3.10 and typer 0.15, too.
Model = Annotated[
    str,
    typer.Argument(
        help=f"{MODEL_FORMS}; or the folder of a training run, or a checkpoint in it; or an ONNX file.",
        show_default=False,
        autocompletion=model_names,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="A file of weights: .safetensors, or .pt, which is read without running code from it.",
        show_default="fresh ones",
    ),
]
Classes = Annotated[int | None, typer.Option(min=1, help="Number of classes of the model.", show_default="its own")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", help="NAME=VALUE, an option for building the model; VALUE is JSON or text. May be repeated."
    ),
]

DataOptions = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=VALUE, an option of hf: or wds: data, such as label=fine_label; VALUE is JSON or text. May be repeated.",
        show_default=False,
    ),
]

Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Call any code that a recipe or a run folder names. Without it, these may name models of torchvision, timm and repfx only.",
    ),
]

ClassifierName = Annotated[
    str,
    typer.Argument(
        help="An ONNX file that repfx wrote, the folder of a training run, or a checkpoint in it.",
        show_default=False,
        autocompletion=lambda: [FILES],
    ),
]
RuntimeName = Annotated[
    str,
    typer.Option(help=f"What runs an ONNX file: {', '.join(RUNTIMES)}.", autocompletion=lambda: list(RUNTIMES)),
]

InputShape = Annotated[
    str | None,
    typer.Option(
        help="Shape of one input without the batch, such as 3x224x224.", show_default="what the model takes, at 224x224"
    ),
]


def open_classifier(name: str, runtime: str, *, trust: bool) -> Classifier:
    """Open a classifier.

    Raises:
        UnknownName: there is no such runtime.
    """
    if runtime not in RUNTIMES:
        raise UnknownName("runtime", runtime, RUNTIMES)
    return Classifier.open(name, trust=trust, runtime=runtime)


def load_model(
    name: str, weights: Path | None, num_classes: int | None, option: list[str] | None, *, trust: bool
) -> tuple[nn.Module, Setup | None]:
    """Load a model in eval mode. If it comes from a training run, also return the run's setup."""
    folder = RunFolder.at(Path(name))
    if not Path(name).exists() and ":" not in name:
        raise InvalidInput(f"there is no run {name!r}: no such folder. A model has the form {MODEL_FORMS}.")
    if not folder.path.is_dir():
        model = ModelReference(name, num_classes, parse_options(option)).build()
        if weights is not None:
            load_weights(model, weights)
        return model.eval(), None
    if not (folder.path / STRUCTURE).is_file():
        raise InvalidInput(f"folder {name!r} holds no training run: it has no {STRUCTURE}.")
    if weights is not None or num_classes is not None or option:
        raise InvalidInput(f"{name!r} is a training run, which has its own weights and options: leave them out.")
    return folder.load(trust=trust), folder.setup


def shape_of_input(asked: str | None, setup: Setup | None) -> tuple[int, ...] | None:
    """Return the shape of one input, as the user or the training run gives it; None if neither does."""
    if asked is None:
        return None if setup is None or setup.preprocessing is None else setup.preprocessing.shape
    parts = asked.replace(",", "x").split("x")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise InvalidInput(
            f"input shape {asked!r} must be whole numbers from 1 with x between them, such as 3x224x224."
        )
    return tuple(map(int, parts))


def example_input(model: nn.Module, shape: tuple[int, ...] | None) -> torch.Tensor:
    """Return a batch of two random inputs. Equal shapes give equal inputs on every call."""
    form = InputForm.of(model)
    own: Any = getattr(model, "default_cfg", None) or {}
    shape = shape or own.get("input_size") or (form.channels, *_AXES[form.dimensions])
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), device="cpu")


def parse_options(given: list[str] | None) -> dict[str, Any]:
    """Parse options of the form NAME=VALUE. VALUE is read as JSON; if it is no JSON, it is text."""
    options = {}
    for text in given or []:
        name, separator, value = text.partition("=")
        if not (name and separator):
            raise InvalidInput(f"option {text!r} must be NAME=VALUE.")
        try:
            options[name] = parse_json(value)
        except ValueError:
            options[name] = value
    return options
