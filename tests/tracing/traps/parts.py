"""Parts that several traps share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x))


class Untraceable(nn.Module):
    """A block inside code that depends on the input's values."""

    def __init__(self, function: Callable[..., Any], b: nn.Module) -> None:
        super().__init__()
        self.function, self.b = function, b

    def forward(self, x: Tensor) -> Any:
        return self.function(self, -x if x.sum() > 1e9 else x)


def conv_norm_twice() -> nn.Sequential:
    convs, norms = (
        [make() for _ in range(2)] for make in (lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.BatchNorm2d(4))
    )
    return nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1])
