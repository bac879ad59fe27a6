"""RepAn: fuse, restore and expand again, cycle by cycle; new branches are attached gently."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.presets import SpecLike
from repfx.blocks.selection import spec_at
from repfx.blocks.spec import Weights
from repfx.change.schedule import Observation, ObservedBlock, Schedule, require, require_conv_spec
from repfx.errors import InvalidInput, UnknownName
from repfx.passes.calibrate import Calibrate
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.passes.freeze import Freeze
from repfx.passes.fuse import Fuse
from repfx.passes.restore import Restore
from repfx.records.journal import Action

_RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
    "step": lambda share: share,
}


@dataclass(frozen=True)
class RepAn(Schedule):
    """Annealing through re-parameterization (RepAn, Algorithm 1).

    At the beginning of each cycle, all blocks are folded into their convs, BatchNorms are put back behind these, and new branches are
    attached beside them by λ (eq. 3). λ is 0 at first, so that nothing jumps, and 1 after the warm-up. The optimizers begin each cycle
    anew; let the learning rate do so, too. Blocks that the model has at first are folded as well, so a training can begin with a
    pretrained net of blocks, as Algorithm 1 does.

    Args:
        cycles: number of cycles.
        epochs: number of epochs of each cycle.
        warm_up: number of epochs of a cycle in which λ rises from 0 to 1. It rises with each step if the driver knows how many steps an
            epoch has, else with each epoch.
        spec: the branches that convs get, as far as they fit; or a dict of these by patterns of site paths.
        weights: first weights of the branches' convs, as in `Spec`.
        statistics: the source of the statistics of the BatchNorms put back. ``inherited``: those of the sum that was folded, measured in
            training mode if the driver has data, so that the function stays in both modes. ``measured``: those of the fused model in
            eval mode. Where the running statistics lag behind, as they do while λ rises, training mode then takes over what eval mode
            computes.
        freeze: whether the inherited convs and BatchNorms are frozen while λ rises.
        batches: number of batches on which BatchNorms are calibrated.
        rise: how λ rises over the warm-up: ``linear``; ``cosine``, slowly at both ends; or ``step``, as ``linear`` but once an epoch alone,
            as in Algorithm 1. With ``step`` the branches learn nothing in the first epoch of a cycle.
        settle: whether the running statistics of all BatchNorms are measured on data before blocks are folded. They lag behind while
            weights and λ change, and a fold then moves training mode. Settling moves eval mode to what training mode computes on the
            data; the fold then moves neither. The driver then needs data.

    >>> repan = RepAn(cycles=3, epochs=10, warm_up=4)
    >>> [repan.due(epoch) for epoch in (0, 10, 30)], [repan.attach_rate(time) for time in (0, 1, 11, 15)]
    ([True, True, False], [0.0, 0.25, 0.25, 1.0])
    """

    name: ClassVar[str] = "repan"
    cycles: int = 5
    epochs: int = 30
    warm_up: float = 5
    spec: SpecLike = "repvgg"
    weights: Weights = "small"
    statistics: Literal["inherited", "measured"] = "inherited"
    freeze: bool = False
    batches: int = 32
    rise: Literal["linear", "cosine", "step"] = "linear"
    settle: bool = False

    def __post_init__(self) -> None:
        for name in ("cycles", "epochs", "batches"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1.")
        require(
            0 <= self.warm_up <= self.epochs,
            f"warm_up is {self.warm_up} epochs; it must be from 0 to the {self.epochs} of a cycle.",
        )
        last = (self.cycles - 1) * self.epochs + math.ceil(self.warm_up)
        require(
            self.squeeze_from is None or self.squeeze_from > last,
            f"squeeze_from is {self.squeeze_from}; it must come after the warm-up of the last cycle, after epoch {last}.",
        )
        if self.statistics not in ("inherited", "measured"):
            raise UnknownName("statistics", str(self.statistics), ["inherited", "measured"])
        if self.rise not in _RISES:
            raise UnknownName("rise of λ", str(self.rise), _RISES)
        spec_at(self.spec, "")
        require_conv_spec(self.spec, self)

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.settle

    @property
    def cycle(self) -> int:
        return self.epochs

    def due(self, epoch: int) -> bool:
        begins = epoch % self.epochs == 0
        thaws = self.freeze and epoch % self.epochs == math.ceil(self.warm_up)
        return epoch < self.cycles * self.epochs and (begins or thaws)

    def decide(self, seen: Observation) -> Sequence[Action]:
        thaw = [Freeze(block.site, frozen=False) for block in seen.blocks if block.frozen]
        if seen.epoch % self.epochs:
            return thaw
        blocks = [block for block in seen.blocks if not block.depth]
        plain = {candidate.site: candidate.conv for candidate in seen.candidates if not candidate.depth}
        sites = plain | {block.site: block.conv for block in blocks}
        expands = [action for site, conv in sites.items() for action in self._expand(site, conv)]
        freezes = [Freeze(action.site) for action in expands] if self.freeze and self.warm_up else []
        settles = [Calibrate("")] if self.settle and blocks else []
        return [*thaw, *settles, *self._fold(blocks), *expands, *freezes]

    def _fold(self, blocks: list[ObservedBlock]) -> list[Action]:
        measured = self.statistics == "measured"
        normalised = [block.site for block in blocks if block.normalised]
        drops = [Drop(block.site, branch) for block in blocks if not block.normalised for branch in block.branches]
        return [*drops, *map(Fuse, normalised), *(Restore(site, measured) for site in normalised)]

    def _expand(self, site: str, conv: ConvSpec) -> list[Expand]:
        spec = spec_at(self.spec, site)
        return Expand.by(spec, site, conv, weights=self.weights, attach_rate=0.0)

    def attach_rate(self, time: float) -> float:
        time -= self.epochs * min(int(time) // self.epochs, self.cycles - 1)
        time = math.floor(time) if self.rise == "step" else time
        share = min(1.0, time / self.warm_up) if self.warm_up else 1.0
        return _RISES[self.rise](share)

    @classmethod
    def _proportions(cls, epochs: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Use as many equal cycles of at least three epochs as possible, up to the paper's 5; a sixth of each is warm-up."""
        longer = [number for number in (5, 4, 3, 2) if epochs % number == 0 and epochs // number >= 3]
        cycles = options.get("cycles", max(longer, default=1))
        if cycles < 1:
            return {"epochs": epochs}  # `__post_init__` refuses these cycles
        if epochs % cycles and "epochs" not in options:
            raise InvalidInput(f"{epochs} epochs can't be split into {cycles} cycles of equal length.")
        each = options.get("epochs", epochs // cycles)
        return {"cycles": cycles, "epochs": each, "warm_up": each / 6}
