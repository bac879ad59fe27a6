"""`Gated` and `Draw`: what a search decides by, and what it decides for one net of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from repfx.search.space import Code, Space


@dataclass(frozen=True)
class Gated:
    """What a search decides by.

    Args:
        space: the gated paths.
        alphas: what has been learned of each path.
        betas: what has been learned of each site's branches as a whole.
        population: the candidates of a search that has some.
        scores: theirs when they were last evaluated, the higher the better; empty before.
    """

    space: Space
    alphas: Sequence[float] = ()
    betas: Mapping[str, float] = field(default_factory=dict)
    population: Sequence[Code] = ()
    scores: Sequence[float] = ()


@dataclass(frozen=True)
class Draw:
    """One net of a step: which paths are open, and the noise ζ of their gates, if they have any."""

    code: Code
    noise: Sequence[float] = ()
