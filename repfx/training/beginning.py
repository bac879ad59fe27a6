"""The model that a training begins from: the plain one, one with weights of a file, or the training form of an earlier run."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from repfx.change.checkpoint import is_checkpoint, load
from repfx.errors import InvalidInput
from repfx.training.models import load_weights
from repfx.training.run_folder import CHECKPOINT, STRUCTURE, RunFolder


def begin_from(plain: nn.Module, weights: Path) -> nn.Module:
    """Give a plain model the weights of a file, in place, or the training form that a run or a checkpoint holds.

    Args:
        plain: the model of the run, as its class builds it.
        weights: file of weights, a checkpoint that `repfx.save` wrote, or the folder of a finished run. No code that they name is called.

    Returns:
        The model: `plain` itself.

    Raises:
        InvalidInput: there are no weights, or they don't fit the model; the model is then unchanged.
        OSError: a file can't be read.
    """
    if weights.is_dir():
        if not (weights / STRUCTURE).is_file():
            raise InvalidInput(f"folder {str(weights)!r} holds no training run: it has no {STRUCTURE}.")
        if not (weights / CHECKPOINT).is_file():
            raise RunFolder(weights).unfinished()
        weights = weights / CHECKPOINT
    if weights.suffix == ".safetensors" and is_checkpoint(weights):
        return load(weights, plain, random_state=False)
    load_weights(plain, weights)
    return plain
