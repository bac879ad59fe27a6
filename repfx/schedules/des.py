"""DES: directional evolution, whose new candidates are led by what the supernet has learned about its branches."""

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

    What the branches of a site add is multiplied by σ(α) each and by σ(β) together (eq. 6 and 7), the site's own conv always runs. After
    the warm-up of the whole supernet each step trains candidates of a population. A generation on, all candidates are fused and
    scored; the next population is made of the best of them, of their crossings and mutations, and of candidates drawn from the
    supernet: the highest (σ(β) + noise) · (σ(α) + noise) of the whole net (eq. 8 to 10).

    Args:
        budget: how many branches a candidate has at most.
        warm_up: epochs in which all branches run.
        epochs: after so many in all, the best candidate stays, and training can go on.
        spec: the search space, as in `RepNAS`.
        population: how many candidates there are.
        generation: how many epochs one takes.
        nets: over how many candidates each step averages (eq. 3), in a loop over `Driver.shares`; else over one.
        parents: which part of the population stays.
        directed: which part of the next one is drawn from the supernet; the rest is crossed and mutated.
        crossover, mutation: probability of each for a candidate (the paper's 0.5).
        flips: probability of each gate to be flipped by a mutation.
        statistics: of the candidates' BatchNorms: ``running``, those of the supernet, which are of many nets; ``measured``, for each
            candidate on the driver's data, which takes longer.
        weights, preserve, learning_rate, betas, batches, seed: as in `RepNAS`; α and β learn by Adam.

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
        """Eq. 8 to 10."""
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
    """With so many paths closed at random that the budget is met, and one open at least."""
    opened = [index for index, is_open in enumerate(code) if is_open] or [numbers.randrange(len(code))]
    kept = set(opened if len(opened) <= budget else numbers.sample(opened, budget))
    return tuple(index in kept for index in range(len(code)))


def _noise(known: Collection[float], numbers: random.Random) -> float:
    """Between the distances of the beginning, σ(0), from the extremes."""
    return numbers.uniform(_sigmoid(0) - max(known), _sigmoid(0) - min(known))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
