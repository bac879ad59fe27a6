"""Names that Tab can write: what options and arguments may be, as far as that can be listed. Importing this needs no torch."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

FILES = "<files>"  # among names: a file or a folder will do, too


def model_names() -> list[str]:
    """Return the models of torchvision and timm, as far as these are installed, and `FILES`."""
    found = []
    for library, holder in (("torchvision", "torchvision.models"), ("timm", "timm")):
        try:
            found += [f"{library}:{name}" for name in importlib.import_module(holder).list_models()]
        except ModuleNotFoundError:
            continue
    return [*found, FILES]


def data_names() -> list[str]:
    """Return `digits`, torchvision's data sets with a training and a test part, and `FILES`."""
    try:
        kinds = vars(importlib.import_module("torchvision.datasets")).values()
    except ModuleNotFoundError:
        return ["digits", FILES]
    classes = {each.__name__: inspect.signature(each).parameters for each in kinds if inspect.isclass(each)}
    parted = [name for name, parameters in classes.items() if {"train", "split"} & parameters.keys()]
    return ["digits", *sorted(parted), FILES]


def spec_names() -> list[str]:
    """Return the presets, the branch kinds and `FILES`."""
    from repfx.blocks.branch import KINDS
    from repfx.blocks.presets import PRESETS

    return [*PRESETS, *KINDS, FILES]


def recipe_names() -> list[str]:
    """Return the recipes that have a name, and `FILES`."""
    from repfx.training.named_recipes import known_recipes

    return [*known_recipes(), FILES]


def recipe_keys() -> list[str]:
    """Return the keys of recipes, each with the sign behind which its value stands."""
    from repfx.training.experiment import OF_A_CALL, Experiment

    return [f"{key}=" for key in _keys(Experiment) if key not in OF_A_CALL]


def _keys(cls: Any) -> Iterator[str]:
    kinds = get_type_hints(cls)
    for field in fields(cls):
        inner = next((each for each in (kinds[field.name], *get_args(kinds[field.name])) if is_dataclass(each)), None)
        yield from [field.name] if inner is None else [f"{field.name}.{key}" for key in _keys(inner)]
