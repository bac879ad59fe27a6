"""`Spec`: the branches that a site gets, and how they begin. `BranchSpec`: one branch kind with its options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.windows.autocorrelation import refusal_of_windows
from repfx.errors import InvalidInput, UnknownName


@dataclass(frozen=True)
class BranchSpec:
    """A branch kind with its options, such as ``BranchSpec("dilated", {"kernel_size": 5, "dilation": 2})``."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # name in the block; by default the kind, with a number from the second on
    name: str | None = field(default=None, repr=False)
    scale: float = field(default=1.0, repr=False)  # first value of the branch's `Scale`, if it has one


Normalisation = Literal["batch_norm", "scale", "none", "tracked"]
Weights = Literal["default", "fan_out", "small", "shared"]
Layers = Literal["conv", "linear", "both"]
BranchesOf = Callable[[ConvSpec], Sequence[BranchSpec | str]]


@dataclass(frozen=True)
class Spec:
    """The form that a site takes: the branches beside its own conv, how they are normalised, and how they begin.

    Args:
        branches: branch kinds or `BranchSpec`s, or a function that returns them for a site.
        norm: normalisation of the branches. ``batch_norm`` puts a BatchNorm at the end of every branch, and the site's own BatchNorm moves
            behind its own conv. ``none`` puts nothing into the branches, and ``scale`` a learned scale per channel; with both, the site's
            own BatchNorm stays where it is, after the sum. ``tracked``, which is experimental, divides each path by the standard deviation
            of its output, as a running covariance of the block's input gives it, and multiplies it by a learned factor. The site's own
            BatchNorm stays after the sum, and the block can be squeezed from the first step.
        gamma: γ of each branch's last BatchNorm or tracked norm if the function is not preserved.
        weights: first values of the branches' convs. ``default`` is torch's own, ``fan_out`` is DyRep's N(0, √(2 / (window · out))), and
            ``small`` is RepAn's U(−0.1 / √out, 0.1 / √out). With ``shared`` a conv whose channels and window allow it has no weights of its
            own; it takes the centre crop of the site's (RepNAS, eq. 5).
        origin: whether the site's own conv runs. Without it the block is the sum of its branches alone, another function.
        origin_scale: first value of a learned factor per channel behind the site's own conv, with ``scale`` only; None for no factor.
        norm_behind: with ``batch_norm``, whether the site's own BatchNorm stays where it is, after the sum, as in the code of DyRep's
            authors. The site's own conv then gets a new BatchNorm in the block. It begins with the running statistics of the site's
            BatchNorm, so neither mode moves where these have settled. With it, the own conv of a block can become a block itself, if a
            pattern names it by its exact path, such as ``layer1.0.conv1.origin.conv``. A conv without a BatchNorm behind it gets none.
        layers: the layers that become sites: ``conv``, ``linear``, or ``both``. By default linear layers stay as they are: branches for
            convs are made for windows, and most nets have linear layers that nobody means when they ask for such branches.

    >>> Spec(["1x1", "1xk"], norm="none").branches
    (BranchSpec(kind='1x1', options={}), BranchSpec(kind='1xk', options={}))
    >>> from torch import nn
    >>> Spec(["kxk"], layers="linear").takes(ConvSpec.of(nn.Linear(8, 4)))
    True
    """

    branches: Sequence[BranchSpec | str] | BranchesOf
    norm: Normalisation = "batch_norm"
    gamma: float = 1.0
    weights: Weights = "default"
    origin: bool = True
    origin_scale: float | None = None
    layers: Layers = "conv"
    norm_behind: bool = False

    def __post_init__(self) -> None:
        scale = self.origin_scale
        if scale is not None and (self.norm != "scale" or not scale or not math.isfinite(scale)):
            raise InvalidInput(f'origin_scale={scale} needs norm="scale", and to be a finite number other than zero.')
        if self.norm not in get_args(Normalisation):
            raise UnknownName("norm", str(self.norm), get_args(Normalisation))
        if self.norm_behind and self.norm != "batch_norm":
            raise InvalidInput(
                f'norm_behind=True needs norm="batch_norm": with {self.norm!r} the own BatchNorm is behind the sum already.'
            )
        if self.weights not in get_args(Weights):
            raise UnknownName("first value of weights", str(self.weights), get_args(Weights))
        if self.layers not in get_args(Layers):
            raise UnknownName("sort of layers", str(self.layers), get_args(Layers))
        if self.weights == "shared" and self.norm != "batch_norm":
            raise InvalidInput(
                f'weights="shared" needs norm="batch_norm": with {self.norm!r} a new branch would be subtracted from the weights it shares.'
            )
        if not callable(self.branches):
            object.__setattr__(self, "branches", _branch_specs(self.branches))

    def takes(self, site: ConvSpec) -> bool:
        """Return whether the layers that this spec is for include a site of these sizes."""
        return self.layers in ("both", "linear" if site.is_linear else "conv")

    def refusal(self, site: ConvSpec) -> str | None:
        """Why no branches of this spec can stand at a site, or None."""
        return refusal_of_windows(site) if self.norm == "tracked" else None

    def branches_for(self, site: ConvSpec) -> tuple[BranchSpec, ...]:
        """Return the branches that this spec asks for at a site, whether they fit or not."""
        return _branch_specs(self.branches(site) if callable(self.branches) else self.branches)


def _branch_specs(branches: Sequence[BranchSpec | str]) -> tuple[BranchSpec, ...]:
    if not isinstance(branches, (list, tuple)):
        raise InvalidInput(f"branches is the {type(branches).__name__} {branches!r}; it takes a list of branch kinds.")
    return tuple(_branch_spec(branch) for branch in branches)


def _branch_spec(branch: BranchSpec | str) -> BranchSpec:
    if not isinstance(branch, (BranchSpec, str)):
        raise InvalidInput(f"a branch is named by its kind or a BranchSpec, not by {branch!r}.")
    return branch if isinstance(branch, BranchSpec) else BranchSpec(branch)
