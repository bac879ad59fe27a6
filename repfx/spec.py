"""What a site is (`ConvSpec`), and what it is to become (`Spec`), with the presets of the literature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from repfx.errors import InvalidInput, UnknownName
from repfx.kernel import Ints, Kernel, Padding
from repfx.meaning import Layer, padding_of


@dataclass(frozen=True)
class ConvSpec:
    """One conv's sizes, without its weights. Padding is (before, after) per axis; negative crops.

    >>> from torch import nn
    >>> site = ConvSpec.of(nn.Conv2d(8, 16, (3, 5), padding=(1, 2)))
    >>> str(site), site.inner((1, 1)).padding
    ('3×5 8→16', ((0, 0), (0, 0)))
    """

    in_channels: int
    out_channels: int
    kernel_size: Ints
    stride: Ints
    padding: Padding
    dilation: Ints
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, conv: Layer) -> ConvSpec:
        """The sizes of a conv module, or of a `Kernel`'s twin."""
        window, stride, dilation = tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.dilation)
        padding = padding_of(conv)
        return cls(
            conv.in_channels, conv.out_channels, window, stride, padding, dilation, conv.groups, conv.padding_mode
        )

    @classmethod
    def of_kernel(cls, kernel: Kernel) -> ConvSpec:
        """The sizes of a kernel."""
        return cls(
            kernel.in_channels,
            kernel.out_channels,
            kernel.kernel_size,
            kernel.stride,
            kernel.padding,
            kernel.dilation,
            kernel.groups,
            kernel.padding_mode,
        )

    @property
    def dimensions(self) -> int:
        return len(self.kernel_size)

    @property
    def is_pointwise(self) -> bool:
        return all(k == 1 for k in self.kernel_size)

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.in_channels and self.groups > 1

    def inner(self, kernel_size: Ints, dilation: Ints | None = None) -> ConvSpec:
        """A smaller window in the middle of this one, whose outputs line up with this one's, position by position.

        `dilation` counts in taps of this window. Its padding may be negative: then the input is cropped.
        """
        dilation = tuple(d * own for d, own in zip(dilation or (1,) * self.dimensions, self.dilation))
        padding = []
        for k, d, inner_k, inner_d, (before, after) in zip(
            self.kernel_size, self.dilation, kernel_size, dilation, self.padding
        ):
            spare = d * (k - 1) - inner_d * (inner_k - 1)
            if spare < 0:
                raise InvalidInput(f"a window of {inner_k} taps with dilation {inner_d} doesn't fit into {self}.")
            left = spare // (2 * d) * d
            padding.append((before - left, after - (spare - left)))
        return replace(self, kernel_size=kernel_size, dilation=dilation, padding=tuple(padding))

    def __str__(self) -> str:
        parts = ["×".join(map(str, self.kernel_size)), f"{self.in_channels}→{self.out_channels}"]
        if any(s != 1 for s in self.stride):
            parts.append("stride " + "×".join(map(str, self.stride)))
        if any(d != 1 for d in self.dilation):
            parts.append("dilation " + "×".join(map(str, self.dilation)))
        if self.groups > 1:
            parts.append("depthwise" if self.is_depthwise else f"groups {self.groups}")
        if self.padding_mode != "zeros" and any(side for pair in self.padding for side in pair):
            parts.append(self.padding_mode)
        return " ".join(parts)


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


@dataclass(frozen=True)
class Preset:
    """A `Spec` with a name and one line on where it comes from."""

    name: str
    description: str
    spec: Spec


_DILATED_SETS: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    17: ((5, 9, 3, 3, 3), (1, 2, 4, 5, 7)),
    13: ((5, 7, 3, 3, 3), (1, 2, 3, 4, 5)),
    11: ((5, 5, 3, 3, 3), (1, 2, 3, 4, 5)),
    9: ((5, 5, 3, 3), (1, 2, 3, 4)),
    7: ((5, 3, 3), (1, 2, 3)),
    5: ((3, 3), (1, 2)),
}


def _dilated_set(site: ConvSpec) -> tuple[BranchSpec, ...]:
    sizes, dilations = _DILATED_SETS.get(site.kernel_size[0], ((), ()))
    if not site.is_depthwise or len(set(site.kernel_size)) > 1:
        return ()
    return tuple(BranchSpec("dilated", {"kernel_size": k, "dilation": d}) for k, d in zip(sizes, dilations))


_DBB = ["1x1", "1x1-kxk", "1x1-avg"]
_OREPA = [
    BranchSpec("1x1-avg", scale=0.25),
    BranchSpec("frequency-prior", scale=0.0),
    BranchSpec("1x1-kxk", {"residual": True}, scale=0.5),
    BranchSpec("1x1"),
    BranchSpec("separable", scale=0.5),
]
_ALL_SIX = [*_DBB, "1xk", "kx1", "identity"]

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in [
        Preset("repvgg", "1×1 and identity beside the k×k (RepVGG)", Spec(["1x1", "identity"])),
        Preset("acb", "1×k and k×1 beside the k×k (ACNet)", Spec(["1xk", "kx1"])),
        Preset("dbb", "1×1, 1×1–k×k and 1×1–average (Diverse Branch Block)", Spec(_DBB)),
        Preset("dyrep", "the six kinds that DyRep grows", Spec(_ALL_SIX, gamma=0.01, weights="fan_out")),
        Preset("odbb", "the six kinds that RepNAS searches over", Spec(_ALL_SIX)),
        Preset(
            "ireps",
            "the nine kinds of the IREPS space (IRepNAS)",
            Spec([*_ALL_SIX, "dilated-2x2", "dilated-1x2", "dilated-2x1"]),
        ),
        Preset(
            "mobileone",
            "three further k×k, 1×1 and identity (MobileOne)",
            Spec(["kxk", "kxk", "kxk", "1x1", "identity"]),
        ),
        Preset("dilated", "dilated convs inside a large depthwise window (UniRepLKNet)", Spec(_dilated_set)),
        Preset(
            "qarepvgg",
            "1×1 and identity without BatchNorm, one after the sum; quantizes well (QARepVGG)",
            Spec(["1x1", "identity"], norm="none"),
        ),
        Preset(
            "orepa",
            "five branches without BatchNorm, scaled, one after the sum; squeezed, it trains at about the price of a conv (OREPA)",
            Spec(_OREPA, norm="scale", origin_scale=0.25),
        ),
    ]
}

SpecLike = str | Sequence[str | BranchSpec] | Spec | Mapping[str, Any]


def resolve_spec(spec: SpecLike) -> Spec:
    """A `Spec` from a preset's name, a list of branch kinds or a `Spec`.

    Raises:
        UnknownName: no preset of that name.
    """
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, str):
        if spec not in PRESETS:
            raise UnknownName("preset", spec, PRESETS)
        return PRESETS[spec].spec
    if isinstance(spec, (list, tuple)):
        return Spec(list(spec))
    raise InvalidInput(
        f"a spec is a preset's name, a list of branch kinds, a repfx.Spec or a dict of those, not {type(spec).__name__}."
    )
