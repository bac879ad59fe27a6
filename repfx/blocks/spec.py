"""What a site is (`ConvSpec`), and what it is to become (`Spec`), with the presets of the literature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from repfx.algebra.conv_spec import ConvSpec
from repfx.errors import InvalidInput, UnknownName


@dataclass(frozen=True)
class BranchSpec:
    """A branch kind with its options, such as ``BranchSpec("dilated", {"kernel_size": 5, "dilation": 2})``."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = field(
        default=None, repr=False
    )  # in its block; by default its kind, with a number from the second on
    scale: float = field(default=1.0, repr=False)  # what its scale begins with, where `Spec.norm` is "scale"


Normalisation = Literal["batch_norm", "scale", "none"]
Weights = Literal["default", "fan_out", "small", "shared"]
BranchesOf = Callable[[ConvSpec], Sequence[BranchSpec | str]]


@dataclass(frozen=True)
class Spec:
    """What every site becomes: which branches stand beside its own conv, and how they are normalised and begin.

    Args:
        branches: branch kinds or `BranchSpec`s, or a function that gives them for a site.
        norm: ``batch_norm``: one at the end of every branch, the site's own BatchNorm moves behind its own conv. ``none`` and ``scale``:
            nothing, or a learned scale per channel, in the branches; the site's own BatchNorm stays where it is, after the sum.
        gamma: γ of each branch's last BatchNorm where the function is not preserved.
        weights: first values of the branches' convs: ``default`` is torch's own, ``fan_out`` is DyRep's N(0, √(2 / (window · out))),
            ``small`` is RepAn's U(−0.1 / √out, 0.1 / √out). ``shared``: as far as channels and window allow, they have no weights of their
            own but the centre crop of the site's (RepNAS, eq. 5).
        origin: whether the site's own conv runs. Without it the block is the sum of its branches alone, another function.
        origin_scale: with ``scale``, what a learned factor per channel behind the site's own conv begins with; None for none.

    >>> Spec(["1x1", "1xk"], norm="none").branches
    (BranchSpec(kind='1x1', options={}), BranchSpec(kind='1xk', options={}))
    """

    branches: Sequence[BranchSpec | str] | BranchesOf
    norm: Normalisation = "batch_norm"
    gamma: float = 1.0
    weights: Weights = "default"
    origin: bool = True
    origin_scale: float | None = None

    def __post_init__(self) -> None:
        scale = self.origin_scale
        if scale is not None and (self.norm != "scale" or not scale or not math.isfinite(scale)):
            raise InvalidInput(f'origin_scale={scale} needs norm="scale", and to be a finite number other than zero.')
        if self.norm not in get_args(Normalisation):
            raise UnknownName("norm", str(self.norm), get_args(Normalisation))
        if self.weights not in get_args(Weights):
            raise UnknownName("first value of weights", str(self.weights), get_args(Weights))
        if self.weights == "shared" and self.norm != "batch_norm":
            raise InvalidInput(
                f'weights="shared" needs norm="batch_norm": with {self.norm!r} a branch that begins is taken off the weights it shares.'
            )
        if not callable(self.branches):
            object.__setattr__(self, "branches", _branch_specs(self.branches))

    def branches_for(self, site: ConvSpec) -> tuple[BranchSpec, ...]:
        """The branches that this spec wants at a site, whether they fit or not."""
        return _branch_specs(self.branches(site) if callable(self.branches) else self.branches)


def _branch_specs(branches: Sequence[BranchSpec | str]) -> tuple[BranchSpec, ...]:
    if not isinstance(branches, (list, tuple)):
        raise InvalidInput(f"branches is the {type(branches).__name__} {branches!r}; it takes a list of branch kinds.")
    return tuple(_branch_spec(branch) for branch in branches)


def _branch_spec(branch: BranchSpec | str) -> BranchSpec:
    if not isinstance(branch, (BranchSpec, str)):
        raise InvalidInput(f"a branch is named by its kind or a BranchSpec, not by {branch!r}.")
    return branch if isinstance(branch, BranchSpec) else BranchSpec(branch)
