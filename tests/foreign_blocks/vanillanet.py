"""VanillaNet (arXiv 2305.12972)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign_blocks.parts import Block, conv_norm


class VanillaNet(nn.Module):
    """Two 1×1 convs with BatchNorms, between them an activation that has become the identity (arXiv 2305.12972)."""

    def __init__(self, activation: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self.first, self.second = conv_norm(1), conv_norm(1)
        self.activation, self.learned = activation, 1

    def forward(self, x: Tensor) -> Any:
        return F.relu(F.max_pool2d(self.second(self.activation(self.first(x), self.learned)), 2))


BLOCKS: dict[str, Block] = {
    "VanillaNet": (lambda: VanillaNet(F.leaky_relu), 1, 0),
    "VanillaNet, lerp": (lambda: VanillaNet(lambda x, learned: torch.lerp(F.relu(x), x, float(learned))), 1, 0),
    "VanillaNet, mixture": (lambda: VanillaNet(lambda x, learned: (1 - learned) * F.relu(x) + learned * x), 1, 0),
}
