"""ECBSR (ACM MM 2021), by its description and with the code paths of its authors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block


class FixedEdge(nn.Module):
    """ECBSR's edge branch: a 1×1, padded with its bias, then a depthwise conv of a fixed mask with a learned scale (ACM MM 2021)."""

    def __init__(self, mask: list[list[float]]) -> None:
        super().__init__()
        conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.weight, self.bias = conv.weight, conv.bias
        self.scale = nn.Parameter(torch.randn(CHANNELS, 1, 1, 1))
        self.shift = nn.Parameter(torch.randn(CHANNELS))
        self.mask: Tensor
        self.register_buffer("mask", torch.tensor(mask).expand(CHANNELS, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Any:
        y = F.conv2d(input=x, weight=self.weight, bias=self.bias)
        y = F.pad(y, (1, 1, 1, 1), "constant", 0)
        border: Any = self.bias
        border = border.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        return F.conv2d(input=y, weight=self.scale * self.mask, bias=self.shift, groups=CHANNELS)


class ECBSR(nn.Module):
    """3×3 + (1×1, 3×3) + Sobel in both directions + Laplacian."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.squeeze, self.expand = (
            nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        )
        self.edges = nn.ModuleList(
            FixedEdge(mask)
            for mask in (
                [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]],
                [[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]],
                [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]],
            )
        )

    def forward(self, x: Tensor) -> Any:
        y = self.dense(x) + self.expand(self.squeeze(x))
        for edge in self.edges:
            y = y + edge(x)
        return F.relu(y)


class EdgeOrChain(nn.Module):
    """One of ECBSR's branches: a 1×1 and a 3×3 in training mode, in eval mode it only gives its weight."""

    def __init__(self, mask: list[list[float]] | None) -> None:
        super().__init__()
        conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.k0, self.b0 = conv.weight, conv.bias
        if mask is None:
            conv = nn.Conv2d(CHANNELS, CHANNELS, 3)
            self.k1, self.b1 = conv.weight, conv.bias
        else:
            self.scale, self.b1 = nn.Parameter(torch.randn(CHANNELS, 1, 1, 1)), nn.Parameter(torch.randn(CHANNELS))
            self.mask = nn.Parameter(torch.tensor(mask).expand(CHANNELS, 1, 3, 3).clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        y = F.pad(F.conv2d(input=x, weight=self.k0, bias=self.b0), (1, 1, 1, 1), "constant", 0)
        border: Any = self.b0
        border = border.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        if hasattr(self, "k1"):
            return F.conv2d(input=y, weight=self.k1, bias=self.b1)
        return F.conv2d(input=y, weight=self.scale * self.mask, bias=self.b1, groups=CHANNELS)

    def kernel(self) -> tuple[Tensor, Tensor]:
        full = (
            self.k1
            if hasattr(self, "k1")
            else torch.diag_embed((self.scale * self.mask)[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1)
        )
        weight = F.conv2d(input=full, weight=self.k0.permute(1, 0, 2, 3))
        bias: Any = self.b0
        spread = torch.ones(1, CHANNELS, 3, 3, device=self.k0.device) * bias.view(1, -1, 1, 1)
        last: Any = self.b1
        return weight, F.conv2d(input=spread.type_as(self.k0), weight=full).view(-1) + last


class ECBSRInItsOwnWords(nn.Module):
    """Branches in training mode, one conv of the weight that they add up to in eval mode (ACM MM 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        sobel, laplace = (
            [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]],
            [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]],
        )
        self.chain, self.sobel, self.laplace = EdgeOrChain(None), EdgeOrChain(sobel), EdgeOrChain(laplace)
        self.act = nn.PReLU(num_parameters=CHANNELS)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            y = self.dense(x) + self.chain(x) + self.sobel(x) + self.laplace(x)
        else:
            weight, bias = self.rep_params()
            y = F.conv2d(input=x, weight=weight, bias=bias, stride=1, padding=1)
        return self.act(y)

    def rep_params(self) -> tuple[Tensor, Any]:
        parts = [branch.kernel() for branch in (self.chain, self.sobel, self.laplace)]
        weights, biases = zip(*parts)
        return self.dense.weight + sum(weights), self.dense.bias + sum(biases)


BLOCKS: dict[str, Block] = {
    "ECBSR": (ECBSR, 1, 0),
    "ECBSR, in its own words": (ECBSRInItsOwnWords, 1, 0),
}
