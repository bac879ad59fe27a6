"""Random search: the control that every search has to beat at equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from repfx.search.base import PopulationSearch
from repfx.search.observation import Gated
from repfx.search.space import Code


@dataclass(frozen=True)
class RandomSearch(PopulationSearch):
    """Draw candidates at random under the budget, and score them like those of `DES`; the best one stays.

    This trains and evaluates as much as `DES` with the same settings, but it learns nothing about branches on the way. The best
    candidate of each generation is kept, and the others are new.

    Args:
        budget, warm_up, epochs, spec, weights, preserve, batches, seed: the options of `DES`.
        population, generation, nets, statistics: the options of `DES`.

    >>> RandomSearch(warm_up=10, epochs=40, generation=15).evaluates(25)
    True
    """

    name: ClassVar[str] = "random_search"

    def trains_gates(self, epoch: int) -> bool:
        return False

    def next_population(self, seen: Gated, epoch: int) -> Sequence[Code]:
        best, numbers = self.choice(seen), self.random(epoch)
        return [best, *self._distinct(lambda: self._any(seen.space, numbers), self.population - 1, [best])]
