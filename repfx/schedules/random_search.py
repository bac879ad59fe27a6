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
    """Candidates drawn at random under the budget, scored like those of `DES`; the best one stays.

    It trains and evaluates as much as `DES` of the same settings does, and learns nothing about branches on the way: of each
    generation the best candidate is kept, the others are new.

    Args:
        budget, warm_up, epochs, spec, weights, preserve, batches, seed: as in `DES`.
        population, generation, nets, statistics: as in `DES`.

    >>> RandomSearch(warm_up=10, epochs=40, generation=15).evaluates(25)
    True
    """

    name: ClassVar[str] = "random_search"

    def trains_gates(self, epoch: int) -> bool:
        return False

    def next_population(self, seen: Gated, epoch: int) -> Sequence[Code]:
        best, numbers = self.choice(seen), self.random(epoch)
        return [best, *self._distinct(lambda: self._any(seen.space, numbers), self.population - 1, [best])]
