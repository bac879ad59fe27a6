"""`PRESETS`: the branches that the literature puts beside a conv, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.spec import BranchSpec, Spec
from repfx.errors import InvalidInput, UnknownName
from repfx.records.registry import Registry


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
    if not site.is_depthwise or len(set(site.kernel_size)) > 1:
        return ()
    sizes, dilations = _DILATED_SETS.get(site.kernel_size[0], ((), ()))
    return tuple(BranchSpec("dilated", {"kernel_size": k, "dilation": d}) for k, d in zip(sizes, dilations))


_DBB = ["1x1", "1x1-kxk", "1x1-avg"]

_OREPA = [
    BranchSpec("1x1-avg", scale=0.25),
    BranchSpec("frequency-prior", scale=0.0),
    BranchSpec("1x1-kxk", {"residual": True}, scale=0.5),
    BranchSpec("1x1"),
    BranchSpec("separable", scale=0.5),
]

_ECBSR = [
    BranchSpec("1x1-kxk", {"expansion": 2}),
    *(BranchSpec(kind, scale=1e-3) for kind in ("1x1-sobel-x", "1x1-sobel-y", "1x1-laplacian")),
]

_SPAN = [BranchSpec("1x1-kxk-1x1", {"expansion": 2}), BranchSpec("1x1")]

_REPSR = ["1x1-kxk-1x1", "1x1-kxk-1x1", "identity"]

_ALL_SIX = [*_DBB, "1xk", "kx1", "identity"]

_PRESETS = [
    Preset("repvgg", "1×1 and identity beside the k×k (RepVGG)", Spec(["1x1", "identity"])),
    Preset("acb", "1×k and k×1 beside the k×k (ACNet)", Spec(["1xk", "kx1"])),
    Preset("dbb", "1×1, 1×1–k×k and 1×1–average (Diverse Branch Block)", Spec(_DBB)),
    Preset(
        "dyrep",
        "the six kinds that DyRep grows, which begin at γ = 0.01",
        Spec(_ALL_SIX, gamma=0.01, weights="fan_out"),
    ),
    Preset("odbb", "the six kinds that RepNAS searches over, which begin at γ = 1", Spec(_ALL_SIX)),
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
        "1×1 and identity without BatchNorm, one BatchNorm after the sum; quantizes well (QARepVGG)",
        Spec(["1x1", "identity"], norm="none"),
    ),
    Preset(
        "orepa",
        "five scaled branches without BatchNorm, one BatchNorm after the sum; squeezed, it trains at about the price of a conv (OREPA)",
        Spec(_OREPA, norm="scale", origin_scale=0.25),
    ),
    Preset("ecbsr", "1×1–k×k and three filters of edges without BatchNorm (ECBSR)", Spec(_ECBSR, norm="none")),
    Preset("span", "1×1–k×k–1×1 and 1×1 without BatchNorm (SPAN)", Spec(_SPAN, norm="none")),
    Preset("repsr", "two 1×1–k×k–1×1 and identity (RepSR)", Spec(_REPSR)),
    Preset(
        "lora",
        "a conv of rank 4 that begins at zero (LoRA); beside linear layers, too",
        Spec(["lora"], norm="none", layers="both"),
    ),
]
PRESETS: Registry[Preset] = Registry("repfx.branches", {preset.name: preset for preset in _PRESETS})

SpecLike = str | Sequence[str | BranchSpec] | Spec | Mapping[str, Any]


def resolve_spec(spec: SpecLike) -> Spec:
    """Make a `Spec` from a preset's name, a list of branch kinds or a `Spec`.

    Raises:
        UnknownName: there is no preset of that name.
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
