"""DES: directional evolution, in which the supernet's knowledge about its branches guides the choice of new candidates."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from repfx.change.schedule import require
from repfx.search.base import PopulationSearch
from repfx.search.observation import Gated
from repfx.search.space import Code, Space


@dataclass(frozen=True)
class DES(PopulationSearch):
    """Directional evolution strategy in the IREPS space (Yu et al., Efficient Re-parameterization Operations Search).

    The output of each branch is multiplied by σ(α), and the sum of a site's branches by σ(β) (eq. 6 and 7). The site's own conv always
    runs. In the warm-up the whole supernet is trained; afterwards each step trains candidates of a population. At the end of a
    generation all candidates are fused and scored. The next population consists of the best of them, of their crossings and
    mutations, and of candidates drawn from the supernet: those have the highest (σ(β) + noise) · (σ(α) + noise) of the whole net
    (eq. 8 to 10).

    Args:
        budget: greatest number of branches of a candidate: a whole number, or a fraction of all.
        warm_up: number of epochs in which all branches run.
        epochs: number of epochs after which the best candidate stays, the warm-up included. Training can go on.
        spec: the search space, as in `RepNAS`.
        population: number of candidates.
        generation: number of epochs of a generation.
        nets: number of candidates over which each step averages (eq. 3), if the training loop uses `Driver.shares`; else it trains one.
        parents: the part of the population that stays.
        directed: the part of the next population that is drawn from the supernet; the rest is crossed and mutated.
        crossover, mutation: probability of each for a candidate (0.5 in the paper).
        flips: probability that a mutation flips a gate.
        statistics: the source of the candidates' BatchNorm statistics. ``running``: those of the supernet, which come from many nets.
            ``measured``: measured for each candidate on the driver's data, which takes longer.
        weights, preserve, learning_rate, betas, batches, seed: the options of `RepNAS`; Adam trains α and β.

    >>> search = DES(warm_up=10, epochs=40, generation=10)
    >>> [epoch for epoch in range(41) if search.evaluates(epoch)]
    [20, 30, 40]
    """

    name: ClassVar[str] = "des"
    style: ClassVar[str] = "sigmoid"

    parents: float = 0.25
    directed: float = 0.25
    crossover: float = 0.5
    mutation: float = 0.5
    flips: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("parents", "directed", "crossover", "mutation", "flips"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is {value}; it must be from 0 to 1.")
        require(
            self.parents + self.directed <= 1,
            f"parents and directed are {self.parents} and {self.directed}; together they must be at most 1.",
        )

    def next_population(self, seen: Gated, epoch: int) -> Sequence[Code]:
        numbers = self.random(epoch)
        order = sorted(range(len(seen.scores)), key=lambda index: -seen.scores[index])
        parents = [seen.population[index] for index in order[: max(1, round(self.parents * self.population))]]
        directed_ones = min(round(self.directed * self.population), self.population - len(parents))
        directed = self._distinct(lambda: self._directed(seen, numbers), directed_ones, parents)
        rest = self.population - len(parents) - len(directed)
        children = self._distinct(lambda: self._child(parents, seen.space, numbers), rest, [*parents, *directed])
        known = [*parents, *directed, *children]
        missing = self.population - len(known)
        return [*known, *self._distinct(lambda: self._any(seen.space, numbers), missing, known)]

    def _directed(self, seen: Gated, numbers: random.Random) -> Code:
        """Draw a candidate from the supernet (eq. 8 to 10)."""
        alphas = [_sigmoid(alpha) for alpha in seen.alphas]
        betas = {site: _sigmoid(beta) for site, beta in seen.betas.items()}
        block_noise = {site: _noise(betas.values(), numbers) for site in betas}
        scores = [
            (betas[site] + block_noise[site]) * (alpha + _noise(alphas, numbers))
            for (site, _), alpha in zip(seen.space.paths, alphas)
        ]
        return seen.space.best(scores, seen.space.budget(self.budget))

    def _child(self, parents: Sequence[Code], space: Space, numbers: random.Random) -> Code:
        code = numbers.choice(parents)
        if numbers.random() < self.crossover:
            other = numbers.choice(parents)
            code = tuple(numbers.choice(pair) for pair in zip(code, other))
        if numbers.random() < self.mutation:
            code = tuple(is_open != (numbers.random() < self.flips) for is_open in code)
        return _within(code, space.budget(self.budget), numbers)


def _within(code: Code, budget: int, numbers: random.Random) -> Code:
    """Close paths at random until the budget is met. If no path is open, open one at random."""
    opened = [index for index, is_open in enumerate(code) if is_open] or [numbers.randrange(len(code))]
    kept = set(opened if len(opened) <= budget else numbers.sample(opened, budget))
    return tuple(index in kept for index in range(len(code)))


def _noise(known: Collection[float], numbers: random.Random) -> float:
    """Draw a number between the distances of σ(0), the value at the beginning, from the highest and the lowest known value."""
    return numbers.uniform(_sigmoid(0) - max(known), _sigmoid(0) - min(known))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
