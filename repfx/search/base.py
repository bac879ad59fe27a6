"""`Search`: a schedule that uses gates to find out which branches a net should have. Like every schedule, it is a pure function.

A search expands the model and gives it gates, says which gates are open in each step, and drops the closed paths at its end. Its random
numbers depend on the seed and the time alone, so all ranks draw the same ones, and a run that was killed resumes as if it had never
been interrupted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from repfx.blocks.presets import SpecLike
from repfx.blocks.selection import spec_at
from repfx.blocks.spec import Weights
from repfx.change.companion import Run
from repfx.change.schedule import Candidate, Observation, ObservedBlock, Schedule, require, require_conv_spec
from repfx.errors import UnknownName
from repfx.passes.calibrate import Calibrate
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.passes.gate import Gate, Ungate
from repfx.records.journal import Action
from repfx.search.observation import Draw, Gated
from repfx.search.searcher import Searcher
from repfx.search.space import Code, Space


@dataclass(frozen=True)
class Search(Schedule):
    """Base of all searches.

    Args:
        budget: number of the gated paths that may be open: a whole number, or a fraction of all.
        warm_up: number of epochs in which only the weights are trained.
        epochs: number of epochs after which the search ends, the warm-up included. The model then keeps the paths that were chosen, and
            training can go on.
        spec: the branches that convs with a window of more than 1×1 get at the beginning. Blocks that are there already are searched as
            they are. None: only these blocks are searched.
        weights: the branches' weights, as in `Spec`; with ``shared`` they are the centre of the site's own.
        preserve: whether the branches add nothing at first, so that a trained model keeps its function, as far as the search allows.
        learning_rate: the rate at which Adam, with `betas`, trains the parameters of the gates. The driver's optimizer trains the weights.
        weight_decay: Adam's weight decay of these parameters.
        batches: number of batches on which statistics are measured at the end, if the driver has data.
        seed: seed of the random numbers.
    """

    origin: ClassVar[bool] = False  # whether the sites' own convs have gates, too
    style: ClassVar[str] = "straight_through"
    needs_data: ClassVar[bool] = True  # statistics are measured at the end
    closes_paths: ClassVar[bool] = True

    budget: int | float = 0.5
    warm_up: int = 100
    epochs: int = 400
    spec: SpecLike | None = "odbb"
    weights: Weights = "default"
    preserve: bool = False
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)
    batches: int = 32
    seed: int = 0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require(
            isinstance(self.budget, (int, float)) and self.budget > 0,
            f"budget is {self.budget!r}; it must be a positive number.",
        )
        require(isinstance(self.epochs, int), f"epochs is {self.epochs!r}; it must be a whole number.")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas is {self.betas!r}; it must be two numbers from 0 to less than 1.",
        )
        require(
            isinstance(self.budget, int) or self.budget <= 1,
            f"budget is {self.budget!r}; a fraction is at most 1, a number of branches is a whole number.",
        )
        require(
            0 <= self.warm_up < self.epochs,
            f"warm_up is {self.warm_up} epochs; it must be less than the {self.epochs} of the search.",
        )
        require(
            self.squeeze_from is None or self.squeeze_from > self.epochs,
            f"squeeze_from is {self.squeeze_from}; blocks can be squeezed only after the {self.epochs} epochs of the search.",
        )
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be positive.")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must be at least 0.")
        require(self.batches >= 1, f"batches is {self.batches}; it must be at least 1.")
        if self.spec is not None:
            spec_at(self.spec, "")
            require_conv_spec(self.spec, self)

    # ---- structure

    def due(self, epoch: int) -> bool:
        return epoch in (0, self.epochs)

    def decide(self, seen: Observation) -> Sequence[Action]:
        self._require_searchable(seen.blocks)
        blocks = seen.blocks
        if seen.epoch == self.epochs:
            return self._settle(blocks)
        expands = [action for candidate in seen.candidates for action in self._expand(candidate)]
        sites = [block.site for block in blocks if block.gates is None] + [action.site for action in expands]
        require(bool(blocks or sites), f"{type(self).__name__} finds no conv that it could search branches for.")
        choices = {block.site: self._paths(block) for block in blocks}
        own = ("origin",) if self.origin else ()
        choices |= {action.site: (*own, *map(str, range(len(action.branches)))) for action in expands}
        space = Space(tuple((site, path) for site, paths in choices.items() for path in paths))
        space.budget(self.budget)  # raises before anything is changed
        return [*expands, *(Gate(site, self.style, self.origin) for site in sites)]

    def _require_searchable(self, blocks: Sequence[ObservedBlock]) -> None:
        for block in blocks:
            require(not block.depth, f"{block.site!r} is a block inside a block; a search can't handle such blocks.")
            require(
                block.gates in (None, self.style),
                f"{block.site!r} has {block.gates} gates, and {type(self).__name__} takes {self.style} ones: ungate it.",
            )

    def _paths(self, block: ObservedBlock) -> tuple[str, ...]:
        """Return the paths of a block that have gates, or that get gates."""
        own = ("origin",) if self.origin and "origin" in block.running else ()
        return (*own, *block.branches)

    def _expand(self, candidate: Candidate) -> list[Expand]:
        if self.spec is None or candidate.depth or candidate.conv.is_pointwise:
            return []
        spec = spec_at(self.spec, candidate.site)
        weights = self.weights if spec.weights == "default" else spec.weights
        gamma = 0.0 if self.preserve else spec.gamma
        options = {"weights": weights, "gamma": gamma, "preserve": self.preserve}
        return Expand.by(spec, candidate.site, candidate.conv, **options)

    def _settle(self, blocks: Sequence[ObservedBlock]) -> list[Action]:
        """Return the last actions of the search: drop closed paths, remove gates, and give BatchNorms the statistics of the final net."""
        gated = [block for block in blocks if block.gates is not None]
        drops = [
            Drop(block.site, branch, closed=True)
            for block in gated
            for branch in block.branches
            if branch not in block.running
        ]
        ungates = [
            Ungate(block.site, self.origin and "origin" not in block.running)
            for block in gated
            if set(block.branches) & set(block.running)
        ]
        return [*drops, *ungates, Calibrate("")]

    # ---- what runs

    def companion(self, run: Run) -> Searcher:
        return Searcher(self, run)

    @property
    def measures_statistics(self) -> bool:
        """Whether the statistics of a candidate's BatchNorms are measured before it is scored."""
        return False

    def trains_gates(self, epoch: int) -> bool:
        """Tell whether the parameters of gates are trained in this epoch, counted from 0."""
        return self.warm_up <= epoch < self.epochs

    def first_population(self, space: Space) -> Sequence[Code]:
        """Return the candidates of the first generation."""
        return ()

    def draws(self, seen: Gated, epoch: int, step: int) -> Sequence[Draw]:
        """Return the nets over which this step's gradient is averaged."""
        raise NotImplementedError

    def choice(self, seen: Gated) -> Code:
        """Return the code of the paths that run in eval mode. They stay if the search ends now."""
        raise NotImplementedError

    def evaluates(self, epoch: int) -> bool:
        """Tell whether the population is evaluated after `epoch` epochs."""
        return False

    def next_population(self, seen: Gated, epoch: int) -> Sequence[Code]:
        """Return the candidates of the next generation, after those of this one were evaluated."""
        return seen.population

    def random(self, *time: int) -> random.Random:
        """Return a source of random numbers that depends on the seed and the time alone."""
        return random.Random(repr((self.seed, *time)))

    @classmethod
    def _proportions(cls, epochs: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Use the first sixth of the epochs as warm-up, and the last third to train what was found."""
        end = int(options.get("epochs", max(1, epochs * 2 // 3)))
        require(end <= epochs, f"the search takes {end} epochs and the training {epochs}: give the search fewer.")
        return {"warm_up": min(epochs // 6, end - 1), "epochs": end}


@dataclass(frozen=True)
class PopulationSearch(Search):
    """Base of the searches that score candidates. Each step trains candidates of a population, which changes with each generation.

    Args:
        population: number of candidates.
        generation: number of epochs of a generation.
        nets: number of candidates over which each step averages, if the training loop uses `Driver.shares`; else it trains one.
        statistics: the source of the candidates' BatchNorm statistics when they are scored. ``running``: those of the supernet, which come
            from many nets. ``measured``: measured for each candidate on the driver's data, which takes longer.
    """

    needs_score: ClassVar[bool] = True

    budget: int | float = 2 / 3
    spec: SpecLike | None = "ireps"
    population: int = 128
    generation: int = 10
    nets: int = 5
    statistics: Literal["running", "measured"] = "running"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, lowest in (("population", 2), ("generation", 1), ("nets", 1)):
            require(getattr(self, name) >= lowest, f"{name} is {getattr(self, name)}; it must be at least {lowest}.")
        if self.statistics not in ("running", "measured"):
            raise UnknownName("statistics", str(self.statistics), ["running", "measured"])

    @property
    def nets_per_step(self) -> int:
        return self.nets

    @property
    def measures_statistics(self) -> bool:
        return self.statistics == "measured"

    def first_population(self, space: Space) -> Sequence[Code]:
        numbers = self.random(0)
        return self._distinct(lambda: self._any(space, numbers), self.population)

    def draws(self, seen: Gated, epoch: int, step: int) -> Sequence[Draw]:
        if epoch < self.warm_up:  # the whole supernet
            return [Draw((True,) * len(seen.space.paths))]
        chosen = self.random(epoch, step).sample(range(len(seen.population)), min(self.nets, len(seen.population)))
        return [Draw(seen.population[index]) for index in chosen]

    def choice(self, seen: Gated) -> Code:
        if not seen.scores:
            return (True,) * len(seen.space.paths)
        return seen.population[max(range(len(seen.scores)), key=lambda index: seen.scores[index])]

    def evaluates(self, epoch: int) -> bool:
        since = epoch - self.warm_up
        return epoch == self.epochs or (since > 0 and epoch < self.epochs and since % self.generation == 0)

    def _any(self, space: Space, numbers: random.Random) -> Code:
        """Draw a code with as many open paths as the budget allows; all such codes are equally likely."""
        chosen = set(numbers.sample(range(len(space.paths)), space.budget(self.budget)))
        return tuple(index in chosen for index in range(len(space.paths)))

    @staticmethod
    def _distinct(make: Any, count: int, known: Sequence[Code] = ()) -> list[Code]:
        """Make `count` codes that differ from each other and from the `known` ones; fewer, if 20 tries for each aren't enough."""
        found: dict[Code, None] = {}
        for _ in range(20 * count):
            if len(found) == count:
                break
            code = make()
            if code not in known:
                found[code] = None
        return list(found)

    @classmethod
    def _proportions(cls, epochs: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Use eight generations. Below 100 epochs the population is small and each step trains one net; the papers have hundreds."""
        own = super()._proportions(epochs, options)
        size = {} if epochs >= 100 else {"population": 32, "nets": 1}
        return {**own, **size, "generation": max(1, (own["epochs"] - own["warm_up"]) // 8)}
