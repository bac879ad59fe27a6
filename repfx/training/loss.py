"""What a training makes smaller: cross entropy, with the labels and maybe a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repfx.change.checkpoint import is_checkpoint, load
from repfx.data.predictions import logits_of
from repfx.errors import InvalidInput
from repfx.training.distillation import distillation_loss
from repfx.training.models import ModelReference, load_weights
from repfx.training.recipe import Distillation, Recipe

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, images and labels


def loss_of(recipe: Recipe, teacher: nn.Module | None) -> Loss:
    """The recipe's.

    Args:
        teacher: as `teacher_of` gives it, on the device.
    """
    smoothing = recipe.label_smoothing
    if recipe.distillation is None:
        return lambda logits, x, labels: F.cross_entropy(logits, labels, label_smoothing=smoothing)
    known = recipe.distillation
    assert teacher is not None

    def loss(logits: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            told = logits_of(teacher(x)).float()
        if told.shape != logits.shape:
            found = f"{told.shape[1]} classes, and the model {logits.shape[1]}"
            raise InvalidInput(f"the teacher {known.teacher.name!r} tells apart {found}: they must be as many.")
        return distillation_loss(
            logits, told, labels, alpha=known.alpha, temperature=known.temperature, label_smoothing=smoothing
        )

    return loss


def teacher_of(recipe: Recipe, classes: int) -> nn.Module | None:
    """What the recipe lets a model learn from, in eval mode and without gradients, or None.

    Args:
        classes: how many there are; it gets as many.

    Raises:
        InvalidInput: it can't be built, or its weights don't fit.
    """
    if recipe.distillation is None:
        return None
    return _loaded(recipe.distillation, classes).eval().requires_grad_(False)


def _loaded(known: Distillation, classes: int) -> nn.Module:
    teacher = ModelReference(known.teacher.name, known.teacher.num_classes or classes, known.teacher.options).build()
    path = Path(known.weights)
    if is_checkpoint(path):
        return load(path, teacher, random_state=False)
    load_weights(teacher, path)
    return teacher
