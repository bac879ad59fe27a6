"""DyRep: grow the conv that matters most for the loss, and drop the branches that do little, every few epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, ClassVar

from repfx.blocks.presets import SpecLike
from repfx.blocks.selection import spec_at
from repfx.change.saliency import METRICS
from repfx.change.schedule import Candidate, Observation, ObservedBlock, Schedule, require, require_conv_spec
from repfx.errors import UnknownName
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.records.journal import Action


@dataclass(frozen=True)
class DyRep(Schedule):
    """Dynamic re-parameterization (Huang et al., DyRep: Bootstrapping Training with Dynamic Re-parameterization).

    Every `interval` epochs the conv of the highest saliency becomes a block, and every branch whose γ is small leaves its block. Convs
    inside a block are candidates as well. Neither step changes what the model computes in eval mode. In training mode the output moves by
    what batches differ from the data, because the origin's BatchNorm takes statistics that are measured. The authors' code leaves the
    net's own BatchNorm behind the sum: `norm_behind`. It resets the new one inside, which here is measured.

    Args:
        interval: number of epochs from one adjustment to the next.
        until: number of epochs from which on nothing is adjusted any more.
        metric: the saliency. ``synflow`` is Σ g·W over the weights, as in the paper; for a conv in front of a BatchNorm it is zero but for
            ε, because such a conv's scale makes no difference. ``snip`` is Σ |g·W|, ``gradient_norm`` is ‖g‖, and ``random`` is a random
            number.
        spec: the branches that a conv gets, as far as they fit; or a dict of these by patterns of site paths.
        norm_behind: whether the net's own BatchNorm stays behind the sum, and the conv gets a new one in the block; else it moves into the
            block.
        own_again: whether a block's own conv is a candidate again, with its BatchNorm behind it, as in the authors' code.
        gamma: first γ of the branches' last BatchNorms, relative to the origin's.
        depth: greatest number of blocks inside each other.
        drop: whether branches leave, too (the paper's Dep); else blocks only grow (Rep).
        deviation: branches leave a block only if the standard deviation of their scores is above this number.
        scale: a branch leaves only if its score (mean |γ| relative to the origin's) is below both this number and the block's mean score.
        batches: number of batches on which new BatchNorms are calibrated.

    >>> DyRep(interval=15, until=500).due(30)
    True
    """

    name: ClassVar[str] = "dyrep"
    needs_data: ClassVar[bool] = True

    interval: int = 15
    until: int = 500
    metric: str = "synflow"
    spec: SpecLike = "dyrep"
    gamma: float = 0.01
    depth: int = 2
    drop: bool = True
    deviation: float = 0.02
    scale: float = 0.1
    batches: int = 20
    norm_behind: bool = False
    own_again: bool = False

    def __post_init__(self) -> None:
        require(self.interval >= 1, f"interval is {self.interval} epochs; it must be at least 1.")
        require(self.depth >= 1, f"depth is {self.depth}; it must be at least 1.")
        require(self.batches >= 1, f"batches is {self.batches}; it must be at least 1.")
        require(self.gamma > 0, f"gamma is {self.gamma}; it must be positive, or the branches' convs get no gradient.")
        if self.metric not in METRICS:
            raise UnknownName("saliency", self.metric, METRICS)
        spec_at(self.spec, "")
        require_conv_spec(self.spec, self)

    @property
    def grows_own_convs(self) -> bool:
        return self.own_again

    def due(self, epoch: int) -> bool:
        return 0 < epoch < self.until and epoch % self.interval == 0

    def decide(self, seen: Observation) -> Sequence[Action]:
        drops: list[Drop] = []
        for block in seen.blocks if self.drop else ():  # an outer one comes before those in it
            if not block.site.startswith(_inside(drops)):
                drops += self._drops(block)
        open_ones = [
            candidate
            for candidate in seen.candidates
            if candidate.depth < self.depth and not candidate.site.startswith(_inside(drops))
        ]
        return [*self._growth(open_ones), *drops]

    def _growth(self, candidates: list[Candidate]) -> list[Action]:
        """Return the expansion of the candidate of the highest saliency that a branch fits."""
        for best in sorted(candidates, key=lambda candidate: -candidate.saliency):
            spec = spec_at(self.spec, best.site)
            behind = self.norm_behind or spec.norm_behind or best.own
            options: dict[str, Any] = {"gamma": self.gamma, "norm_behind": behind and spec.norm == "batch_norm"}
            expands = [] if best.conv.is_pointwise else Expand.by(spec, best.site, best.conv, **options)
            if expands:
                return [*expands]
        return []

    def _drops(self, block: ObservedBlock) -> list[Drop]:
        scores = block.scales
        if len(scores) < 2 or pstdev(scores.values()) <= self.deviation:
            return []
        limit = min(fmean(scores.values()), self.scale)
        return [Drop(block.site, branch) for branch, score in scores.items() if score < limit]

    @classmethod
    def _proportions(cls, epochs: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Use the paper's proportions: 40 intervals (15 epochs each in its 600), the last sixth of them without adjustments."""
        return {"interval": max(1, epochs // 40), "until": max(2, epochs * 5 // 6)}


def _inside(drops: list[Drop]) -> tuple[str, ...]:
    """Return the prefixes of all paths inside the branches that leave."""
    return tuple(f"{drop.site}.{drop.branch}." for drop in drops)
