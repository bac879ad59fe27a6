"""RepNAS: learn the importance of each branch while the weights are trained, and run only the most important ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from repfx.blocks.spec import Weights
from repfx.change.schedule import require
from repfx.search.base import Search
from repfx.search.observation import Draw, Gated
from repfx.search.space import Code


@dataclass(frozen=True)
class RepNAS(Search):
    """Differentiable search under a budget (Zhang et al., RepNAS: Searching for Efficient Re-parameterizing Blocks).

    Each step runs only the branches with the highest α + ζ in the whole net, ζ ~ Logistic(0, 1), so time and memory follow the budget.
    α learns by a straight-through gradient (eq. 11 to 13). In eval mode, the branches with the highest α run; at the end of the
    search, they stay.

    Args:
        budget: number of branches that run: a whole number, or a fraction of all. With `origin`, a site's own conv counts as a branch,
            and each site keeps at least one path.
        warm_up: number of epochs in which all sets of branches are equally likely, and α isn't trained.
        epochs: number of epochs after which the branches with the highest α stay, the warm-up included. Training can go on.
        spec: the search space; a dict by patterns of site paths leaves the other sites alone.
        weights: ``shared``: branches use the centre of the site's own weights (eq. 5); ``default``: branches have weights of their own.
        origin: whether the site's own conv can be closed, too.
        preserve: whether branches add nothing at first, which is for a trained model, together with ``origin=False``.
        learning_rate, betas, weight_decay: settings of Adam, which trains α. The authors' code has a weight decay of 5e-4.
        batches: number of batches on which BatchNorms are measured at the end.
        seed: seed of ζ.

    >>> search = RepNAS(budget=0.5, warm_up=10, epochs=40)
    >>> search.trains_gates(9), search.trains_gates(10), search.due(40)
    (False, True, True)
    """

    name: ClassVar[str] = "repnas"

    weights: Weights = "shared"
    origin: bool = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.origin and self.preserve), "a conv that can be closed can't be preserved: give origin=False.")

    def draws(self, seen: Gated, epoch: int, step: int) -> Sequence[Draw]:
        numbers = self.random(epoch, step)
        noise = [_logistic(numbers.random()) for _ in seen.space.paths]
        return [Draw(self._best(seen, [alpha + each for alpha, each in zip(seen.alphas, noise)]), noise)]

    def choice(self, seen: Gated) -> Code:
        return self._best(seen, seen.alphas)

    def _best(self, seen: Gated, scores: Sequence[float]) -> Code:
        return seen.space.best(scores, seen.space.budget(self.budget))


def _logistic(uniform: float) -> float:
    uniform = min(max(uniform, 1e-12), 1 - 1e-12)
    return math.log(uniform / (1 - uniform))
