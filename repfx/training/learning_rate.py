"""The learning rate over a training: the share of the highest rate that each step has."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from repfx.errors import InvalidInput, first_line

TIMM = "timm:"  # before the name of an optimizer or a curve of timm

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def share_of_rate(
    done: int,
    total: int,
    *,
    shape: str = "cosine",
    warm_up: int | None = None,
    steps_down: Sequence[int] = (),
    factor: float = 0.1,
) -> float:
    """Return the share of the highest learning rate for the next step: it rises linearly at first, then falls.

    Args:
        done, total: steps done so far, and steps in all.
        shape: curve after the warm-up: cosine, linear or constant.
        warm_up: steps over which the rate rises; None for a fifth of all.
        steps_down: numbers of steps after which the rate is multiplied by `factor`, each time.

    >>> [round(share_of_rate(done, 10), 2) for done in range(10)]
    [0.5, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04]
    >>> [round(share_of_rate(done, 4, shape="constant", warm_up=0, steps_down=[2, 3]), 2) for done in range(4)]
    [1.0, 1.0, 0.1, 0.01]
    """
    up = max(1, total // 5) if warm_up is None else warm_up
    if done < up:
        return (done + 1) / up
    share = SHAPES[shape]((done - up) / max(1, total - up))
    return share * factor ** sum(done >= step for step in steps_down)


def curve_of(
    shape: str,
    total: int,
    *,
    warm_up: int | None = None,
    steps_down: Sequence[int] = (),
    factor: float = 0.1,
) -> Callable[[int], float]:
    """Return the share of the highest learning rate for a number of steps done, by `share_of_rate` or by a scheduler of timm.

    Args:
        shape: curve after the warm-up: cosine, linear or constant; or `timm:` and the name of a scheduler that needs no accuracy.
        total, warm_up, steps_down, factor: as for `share_of_rate`. timm's `step` goes down after each of as many steps as the first of
            `steps_down`, its `poly` has `factor` as its power.

    Raises:
        InvalidInput: timm is missing, or has no such scheduler.
    """
    if not shape.startswith(TIMM):
        return lambda done: share_of_rate(
            done, total, shape=shape, warm_up=warm_up, steps_down=steps_down, factor=factor
        )
    unit = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    decay = {"decay_milestones": list(steps_down), "decay_epochs": steps_down[0]} if steps_down else {}
    up = max(1, total // 5) if warm_up is None else warm_up
    counted = {"num_epochs": total, "updates_per_epoch": 1, "step_on_epochs": False, "warmup_epochs": up}  # so in steps
    try:
        create = timm_part("scheduler").create_scheduler_v2
        scheduler, _ = create(unit, shape.removeprefix(TIMM), decay_rate=factor, **counted, **decay)
    except (ValueError, AssertionError, TypeError) as error:
        raise InvalidInput(f"rates = {shape!r} can't be used: {first_line(error)}.") from error

    def share(done: int) -> float:
        if scheduler is not None:  # timm's `none`
            scheduler.step_update(done)
        return float(unit.param_groups[0]["lr"])

    return share


def timm_part(name: str) -> Any:
    """Return a module of timm, which isn't imported until it is needed.

    Raises:
        InvalidInput: timm is missing.
    """
    try:
        return importlib.import_module(f"timm.{name}")
    except ImportError as error:
        raise InvalidInput(
            f"an optimizer or a learning rate of timm needs timm: pip install timm ({first_line(error)})."
        ) from error
