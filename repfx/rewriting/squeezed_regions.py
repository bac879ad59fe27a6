"""`SqueezeRegions`: linear regions outside blocks run as one conv each, such as a conv with its BatchNorm or another library's branches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from repfx.blocks.squeezed_form import forms_in, lead, release, take
from repfx.records.journal import Action, record
from repfx.rewriting.region_finder import find_forms


@dataclass(frozen=True)
class SqueezeRegions(Action):
    """The linear regions that consist of these modules run as one conv each, and no other regions do.

    Args:
        site: always "", for the model itself.
        parts: paths of the convs, BatchNorms and squeezed blocks of all regions; none to let the model run as its code says.
        held: paths of the BatchNorms that keep their statistics.
    """

    kind: ClassVar[str] = "squeeze_regions"
    parts: Sequence[str] = ()
    held: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("parts", "held"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists

    moves_kernels = False

    def do(self, model: nn.Module) -> None:
        _set_regions(model, self.parts, self.held)

    @classmethod
    def among(cls, model: nn.Module, parts: Collection[str], held: Collection[str]) -> None:
        """Squeeze regions among `parts` and record only those found. If nothing was squeezed before and nothing is now, record nothing."""
        before = forms_in(model)
        _set_regions(model, parts, held)
        after = forms_in(model)
        if before or after:
            parts = [part for region in regions_of(model).values() for part in region]
            record(model, [cls("", parts, held_in(model))])

    def __str__(self) -> str:
        if not self.parts:
            return "unsqueeze regions"
        return f"squeeze regions of {len(self.parts)} modules{': their statistics stay' if self.held else ''}"


def _set_regions(model: nn.Module, parts: Collection[str], held: Collection[str]) -> None:
    for form in forms_in(model).values():
        form.let_norms_go()
        release(form.root)
    if parts:
        take(find_forms(model, parts, held))
        lead(model)


def regions_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the paths of all modules of each region, by the path of the conv that lends the region its window."""
    found = [(path, region) for path, form in forms_in(model).items() for region in form.regions.values()]
    return {_full(path, region.template): tuple(_full(path, part) for part in region.modules) for path, region in found}


def held_in(model: nn.Module) -> list[str]:
    """Return the paths of the BatchNorms outside blocks that keep their statistics."""
    return [_full(path, norm) for path, form in forms_in(model).items() for norm in form.held]


def _full(path: str, inner: str) -> str:
    return f"{path}.{inner}" if path else inner
