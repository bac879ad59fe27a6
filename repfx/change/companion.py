"""`Companion`: what a schedule brings along to a run, beside the actions that it decides on.

The driver calls a companion at fixed moments and keeps its state with its own. Most schedules need none; a search brings the one that
opens gates and scores candidates (`repfx.search.searcher`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Run:
    """What a companion works on.

    Args:
        model: in training.
        optimizers: of its parameters.
        averages: modules that hold a copy of the model.
        score: gives what a plain net is worth, the higher the better.
        calibrate: inputs of the model, for statistics.
    """

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer] = ()
    averages: Sequence[nn.Module] = ()
    score: Score | None = None
    calibrate: Iterable[Any] | None = None


class Companion:
    """Base of all companions; by itself it does nothing.

    Epochs are counted from 0, steps from 0 in each epoch.
    """

    def begin(self, epoch: int) -> None:
        """Get ready for an epoch, after the structure has changed."""

    def before_step(self, epoch: int, step: int) -> None:
        """Get ready for one step."""

    def shares(self, epoch: int, step: int) -> Iterator[float]:
        """Give what the loss of each forward pass of a step is multiplied by."""
        yield 1.0

    def after_backward(self, epoch: int, scaler: torch.amp.GradScaler | None) -> None:
        """Look at the gradients, before the optimizers do."""

    def after_epoch(self, epoch: int) -> None:
        """Do what is due after so many epochs, before the structure changes."""

    def state_dict(self) -> dict[str, Any] | None:
        """Give where it stands, as plain values and tensors; None if there is nothing to say."""
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
