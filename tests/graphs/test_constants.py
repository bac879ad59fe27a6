"""What layers compute from parameters alone is a constant, if they compute the same in both modes and nothing else sees them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.testing import TOLERANCE, relative_error
from tests.inline_net import convs, reasons

X = torch.randn(2, 3, 9, 7, dtype=torch.float64)


class Gated(nn.Module):
    """A conv whose output is scaled, channel by channel, by what a small net computes from a vector."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.conv, self.vector = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(1, 5))
        self.first, self.between, self.last = nn.Linear(5, 6), nn.Sequential(*layers), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        factors = self.last(self.between(self.first(self.vector)))
        return self.conv(x) * factors.view(1, -1, 1, 1)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


LAYERS: dict[str, tuple[tuple[nn.Module, ...], int]] = {  # and how many convs and linear layers are left
    "an activation": ((nn.SiLU(),), 1),
    "several": ((nn.GELU(), nn.Linear(6, 6, bias=False), nn.Sigmoid()), 1),
    "none": ((), 1),
    "a dropout": ((nn.Dropout(0.5),), 3),
    "a BatchNorm": ((nn.BatchNorm1d(6),), 3),
    "a layer of its own": ((Doubled(6, 6),), 4),
    "a hook": ((hooked(),), 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_constants(name: str) -> None:
    torch.manual_seed(0)
    layers, left = LAYERS[name]
    model = Gated(*copy.deepcopy(layers)).double().eval()
    fused = repfx.fuse(model)
    assert relative_error(fused(X), model(X)) <= TOLERANCE
    assert len(convs(fused)) <= left if left > 1 else len(convs(fused)) == left, reasons(fused)
    assert (len(convs(fused)) == 1) == (left == 1)


def test_a_layer_that_the_code_also_calls_with_its_input_stays() -> None:
    class Shared(Gated):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + self.last(self.first(x[:, 0, 0, :5])).mean()

    torch.manual_seed(0)
    model = Shared().double().eval()
    fused = repfx.fuse(model)
    assert relative_error(fused(X), model(X)) <= TOLERANCE
