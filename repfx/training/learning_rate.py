"""The learning rate over a training: the share of the highest rate that each step has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
