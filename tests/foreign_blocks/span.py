"""SPAN (arXiv 2311.12770)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block


class Conv3XC(nn.Module):
    """SPAN's block: pad first, then 1×1, 3×3, 1×1 without padding, and a 1×1 beside them (arXiv 2311.12770)."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.chain = nn.Sequential(
            nn.Conv2d(CHANNELS, 2 * CHANNELS, 1),
            nn.Conv2d(2 * CHANNELS, 2 * CHANNELS, 3),
            nn.Conv2d(2 * CHANNELS, CHANNELS, 1),
        )

    def forward(self, x: Tensor) -> Any:
        return F.leaky_relu(self.chain(F.pad(x, (1, 1, 1, 1))) + self.beside(x), 0.05)


class Conv3XCInItsOwnWords(nn.Module):
    """The block as its authors run it: in eval mode it first writes the composed weight into a conv, and then calls this conv."""

    def __init__(self, dimensions: int = 2, channels: int = CHANNELS, out: int = CHANNELS, stride: int = 1) -> None:
        super().__init__()
        conv, wide = getattr(nn, f"Conv{dimensions}d"), 2 * out
        self.sk = conv(channels, out, 1, stride)
        self.conv = nn.Sequential(conv(channels, wide, 1), conv(wide, wide, 3, stride), conv(wide, out, 1))
        self.eval_conv = conv(channels, out, 3, stride, 1).requires_grad_(False)
        self.around = (1, 1) * dimensions
        self.weight_concat: Any = None
        self.bias_concat: Any = None

    def composed(self) -> tuple[Tensor, Tensor]:
        (first, own), (middle, middle_own), (last, last_own) = [
            (each.weight.data.clone().detach(), each.bias.data.clone().detach())  # type: ignore[operator]
            for each in self.conv
        ]
        middle_own = middle.flatten(2).sum(2) @ own + middle_own
        weight = torch.einsum("om...,mi->oi...", middle, first.flatten(1))
        weight = torch.einsum("om,mi...->oi...", last.flatten(1), weight)
        beside = F.pad(self.sk.weight.data.clone().detach(), self.around)
        return weight + beside, last.flatten(1) @ middle_own + last_own + self.sk.bias.data.clone().detach()

    def update_params(self) -> None:
        self.weight_concat, self.bias_concat = self.composed()
        self.eval_conv.weight.data = self.weight_concat
        self.eval_conv.bias.data = self.bias_concat

    def branches(self, x: Tensor) -> Any:
        return self.conv(F.pad(x, self.around, "constant", 0)) + self.sk(x)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            y = self.branches(x)
        else:
            self.update_params()
            y = self.eval_conv(x)
        return F.leaky_relu(y, negative_slope=0.05)


class SPAB(nn.Module):
    """Three blocks, whose output is also its own attention, without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = (Conv3XCInItsOwnWords() for _ in range(3))
        self.act1 = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        first = self.c1_r(x)
        last = self.c3_r(self.act1(self.c2_r(self.act1(first))))
        attention = torch.sigmoid(last) - 0.5
        return (last + x) * attention, first, attention


class SPAN(nn.Module):
    """The net: its own mean moves to the input's dtype, which no graph can hold, so its parts become graphs by themselves."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
        self.conv_1 = Conv3XCInItsOwnWords(2, 3)
        self.blocks = nn.ModuleList(SPAB() for _ in range(blocks))
        self.conv_2 = Conv3XCInItsOwnWords()
        self.conv_cat = nn.Conv2d(3 * CHANNELS, CHANNELS, 1)
        self.upsampler = nn.Sequential(nn.Conv2d(CHANNELS, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Any:
        self.mean = self.mean.type_as(x)
        feature = y = self.conv_1((x - self.mean) * 255.0)
        for block in self.blocks:
            y, first, _ = block(y)
        return self.upsampler(self.conv_cat(torch.cat([feature, self.conv_2(y), first], 1)))


BLOCKS: dict[str, Block] = {
    "Conv3XC": (Conv3XC, 1, 0),
    "Conv3XC, in its own words": (Conv3XCInItsOwnWords, 1, 0),
}
