"""Fixed: the branches are there from the beginning to the end. The blocks can be squeezed for the last epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from repfx.blocks.presets import SpecLike
from repfx.blocks.selection import Selection, spec_at
from repfx.change.schedule import Candidate, Observation, Schedule, require
from repfx.passes.expand import Expand
from repfx.records.journal import Action


@dataclass(frozen=True)
class Fixed(Schedule):
    """Expand all convs before the first epoch, or the linear layers, too, if the spec takes them.

    With `squeeze_from`, the last epochs cost about what the plain model's do.

    Args:
        spec: the branches that convs get at the beginning. Blocks that are there already stay as they are. None: no conv is expanded.
        preserve: whether the branches add nothing at first, so that a trained model keeps its function.

    >>> Fixed("acb", squeeze_from=80).is_due(80)
    True
    """

    name: ClassVar[str] = "fixed"

    spec: SpecLike | None = "dbb"
    preserve: bool = False

    def __post_init__(self) -> None:
        specs = [] if self.spec is None else [spec for _, spec in Selection.of(self.spec).patterns]
        normalised = self.squeeze_from == 0 and any(spec.norm == "batch_norm" for spec in specs)
        require(not normalised, "squeeze_from is 0, but then BatchNorms in branches have measured nothing yet.")

    @property
    def takes_linear(self) -> bool:
        specs = [] if self.spec is None else [spec for _, spec in Selection.of(self.spec).patterns]
        return any(spec.layers != "conv" for spec in specs)

    def due(self, epoch: int) -> bool:
        return epoch == 0

    def decide(self, seen: Observation) -> Sequence[Action]:
        return [action for candidate in seen.candidates for action in self._expand(candidate)]

    def _expand(self, candidate: Candidate) -> list[Expand]:
        if self.spec is None or candidate.depth:
            return []
        spec = spec_at(self.spec, candidate.site)
        gamma = 0.0 if self.preserve else spec.gamma
        options = {"gamma": gamma, "preserve": self.preserve, "origin": spec.origin}
        return Expand.by(spec, candidate.site, candidate.conv, **options)
