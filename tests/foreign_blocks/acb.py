"""ACB (arXiv 1908.03930)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block, conv_norm


class ACB(nn.Module):
    """3×3 + 1×3 + 3×1, the bars cropped where the padding is too small for them (arXiv 1908.03930)."""

    def __init__(self) -> None:
        super().__init__()
        self.square = conv_norm(3, padding=1)
        self.row = nn.Conv2d(CHANNELS, CHANNELS, (1, 3), padding=(0, 1), bias=False)
        self.column = nn.Conv2d(CHANNELS, CHANNELS, (3, 1), padding=(1, 0), bias=False)
        self.row_norm, self.column_norm = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return self.square(x) + self.row_norm(self.row(x)) + self.column_norm(self.column(x))


class ACBWithLittlePadding(nn.Module):
    """ACB whose padding is less than half its window: the bars see a picture that is cropped across them."""

    def __init__(self, kernel_size: int, padding: int) -> None:
        super().__init__()
        self.crop = kernel_size // 2 - padding
        self.square = conv_norm(kernel_size, padding=padding)
        bars = ((1, kernel_size), (0, padding)), ((kernel_size, 1), (padding, 0))
        self.row, self.column = (
            nn.Conv2d(CHANNELS, CHANNELS, window, padding=sides, bias=False) for window, sides in bars
        )
        self.row_norm, self.column_norm = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        out, crop = self.square(x), self.crop
        columns, rows = x[:, :, :, crop:-crop], x[:, :, crop:-crop, :]
        return F.relu(out + self.row_norm(self.row(rows)) + self.column_norm(self.column(columns)))


BLOCKS: dict[str, Block] = {
    "ACB": (ACB, 1, 0),
    "ACB, 3×3 without padding": (lambda: ACBWithLittlePadding(3, 0), 1, 0),
    "ACB, 5×5 with little padding": (lambda: ACBWithLittlePadding(5, 1), 1, 0),
}
