"""The loss of a training: cross entropy with the labels and, if the recipe has a teacher, distillation from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repfx.data.predictions import logits_of
from repfx.errors import InvalidInput
from repfx.training.models import ModelReference
from repfx.training.objective.distillation import distillation_loss
from repfx.training.recipe import Distillation, Recipe
from repfx.training.run_folder import begin_from

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # takes logits, images and labels


def loss_of(recipe: Recipe, teacher: nn.Module | None) -> Loss:
    """Return the recipe's loss.

    Args:
        teacher: model that `teacher_of` returned, on the device; None without distillation.
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
            found = f"{told.shape[1]} classes and the model {logits.shape[1]}"
            raise InvalidInput(f"the teacher {known.teacher.name!r} has {found}; the two must be equal.")
        return distillation_loss(
            logits, told, labels, alpha=known.alpha, temperature=known.temperature, label_smoothing=smoothing
        )

    return loss


def teacher_of(recipe: Recipe, classes: int) -> nn.Module | None:
    """Build the recipe's teacher with its weights, in eval mode and without gradients; return None if it has none.

    Args:
        classes: number of classes that the teacher gets, unless the recipe sets the teacher's own.

    Raises:
        InvalidInput: the teacher can't be built, or its weights don't fit.
    """
    if recipe.distillation is None:
        return None
    return _loaded(recipe.distillation, classes).eval().requires_grad_(False)


def _loaded(known: Distillation, classes: int) -> nn.Module:
    teacher = ModelReference(known.teacher.name, known.teacher.num_classes or classes, known.teacher.options).build()
    return begin_from(teacher, Path(known.weights))
