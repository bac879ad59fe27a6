"""OREPA (arXiv 2204.00826)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block


class OREPA(nn.Module):
    """One conv whose weight is computed from the weights of its branches (arXiv 2204.00826)."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3))
        self.inner = nn.Parameter(torch.randn(CHANNELS, CHANNELS))
        self.outer = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3))
        self.average = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 1, 1))
        self.scales = nn.Parameter(torch.rand(3, CHANNELS))
        self.norm = nn.BatchNorm2d(CHANNELS)

    def weight(self) -> Tensor:
        branches = (
            self.dense,
            torch.einsum("ti,othw->oihw", self.inner, self.outer),
            F.pad(self.average, (1, 1, 1, 1)) + self.average.expand(-1, -1, 3, 3) / 9,
        )
        return sum(torch.einsum("oihw,o->oihw", w, s) for w, s in zip(branches, self.scales))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.norm(F.conv2d(x, self.weight(), padding=1)))


class OREPAInGroups(nn.Module):
    """OREPA in groups: the weight's parts are viewed group by group, by sizes of what was computed (arXiv 2204.00826)."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.groups, per_group = groups, CHANNELS // groups
        self.origin = nn.Parameter(torch.randn(CHANNELS, per_group, 3, 3))
        self.pointwise = nn.Parameter(torch.randn(CHANNELS, per_group, 1, 1))
        self.unit: Tensor
        self.register_buffer("unit", torch.eye(per_group).repeat(groups, 1)[:, :, None, None])
        self.inner, self.outer = (
            nn.Parameter(torch.randn(CHANNELS, per_group, 1, 1)),
            nn.Parameter(self.origin.detach() / 2),
        )
        self.prior: Tensor
        self.register_buffer("prior", torch.rand(per_group, 3, 3))
        self.scales = nn.Parameter(torch.rand(4, CHANNELS))
        self.norm = nn.BatchNorm2d(CHANNELS)

    def in_groups(self) -> Tensor:
        inner = (self.inner + self.unit).squeeze(3).squeeze(2)
        through, per_group = inner.size()
        out, between, height, width = self.outer.size()
        inner = inner.view(self.groups, int(through / self.groups), per_group)
        outer = self.outer.view(self.groups, int(out / self.groups), between, height, width)
        return torch.einsum("gti,gothw->goihw", inner, outer).reshape(out, per_group, height, width)

    def weight(self) -> Tensor:
        padded = F.pad(self.pointwise, (1, 1, 1, 1))
        filtered = torch.einsum("oi,ihw->oihw", self.pointwise.squeeze(3).squeeze(2), self.prior)
        parts = (self.origin, padded, filtered, self.in_groups())
        total: Any = 0
        for index, part in enumerate(parts):
            total = total + torch.einsum("oihw,o->oihw", part, self.scales[index, :])
        result: Tensor = total
        return result

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.norm(F.conv2d(x, self.weight(), padding=1, groups=self.groups)))


class OREPALargeConv(nn.Module):
    """Weights of 3×3 convolved with one another: a chain of convs as one of a larger window (arXiv 2204.00826)."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = layers
        for index in range(layers):
            setattr(self, f"layer{index}", nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False))
        self.norm = nn.BatchNorm2d(CHANNELS)

    def weight(self) -> Tensor:
        weight: Any = None
        for index in range(self.layers):
            own = getattr(self, f"layer{index}").weight
            weight = own.transpose(0, 1) if weight is None else F.conv2d(weight, own, padding=2)
        result: Tensor = weight.transpose(0, 1)
        return result

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.norm(F.conv2d(x, self.weight(), stride=2, padding=self.layers)))


BLOCKS: dict[str, Block] = {
    "OREPA": (OREPA, 1, 0),
    "OREPA, in groups": (OREPAInGroups, 1, 0),
    "OREPA, large": (OREPALargeConv, 1, 0),
}
