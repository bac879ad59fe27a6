"""`Companion`: an object that acts in a run for a schedule, beside the actions that the schedule decides on.

The driver calls a companion at fixed moments and saves the companion's state with its own. Most schedules need no companion. A search
has one that opens gates and scores candidates (`repfx.search.searcher`).
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
    """The run that a companion works on.

    Args:
        model: the model that is trained.
        optimizers: the optimizers of its parameters.
        averages: modules that hold a copy of the model.
        score: a function from a plain net to a number, the higher the better.
        calibrate: inputs of the model, on which statistics are measured.
    """

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer] = ()
    averages: Sequence[nn.Module] = ()
    score: Score | None = None
    calibrate: Iterable[Any] | None = None


class Companion:
    """Base of all companions; by itself it does nothing.

    Epochs are counted from 0, and steps are counted from 0 in each epoch.
    """

    def begin(self, epoch: int) -> None:
        """Get ready for an epoch, after the structure has changed."""

    def before_step(self, epoch: int, step: int) -> None:
        """Get ready for one step."""

    def shares(self, epoch: int, step: int) -> Iterator[float]:
        """Yield, for each forward pass of a step, the factor by which its loss is multiplied."""
        yield 1.0

    def after_backward(self, epoch: int, scaler: torch.amp.GradScaler | None) -> None:
        """Read the gradients of a step before the optimizers do."""

    def after_epoch(self, epoch: int) -> None:
        """Do what is due after `epoch` epochs, before the structure changes."""

    def state_dict(self) -> dict[str, Any] | None:
        """Return the companion's state as plain values and tensors, or None if it has none."""
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""

    def require_fits(self) -> None:
        """Raise `InvalidInput` if a state that was loaded is about another model than the one in this run."""
