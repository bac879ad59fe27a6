"""`Gated` and `Draw`: the state that a search sees when it decides, and its decision for one net of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from repfx.search.space import Code, Space


@dataclass(frozen=True)
class Gated:
    """The state of a model with gates, as a search sees it when it decides.

    Args:
        space: the gated paths.
        alphas: the learned α of each path.
        betas: the learned β of each site's branches as a whole, by site.
        population: the candidates, if the search has any.
        scores: the candidates' scores, the higher the better; empty until they have been evaluated.
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
