"""A LayerNorm keeps its scale and shift, although the linear layers behind it could take them over: no operation would be saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.inline_net import Net, convs, fused_exactly, image

SPELLINGS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a module": lambda m, x: m.second(m.first(m.norm(x)).relu()),
    "a function": lambda m, x: m.second(m.first(F.layer_norm(x, (6,), m.norm.weight, m.norm.bias)).relu()),
    "two readers": lambda m, x: (lambda y: m.second(m.first(y).relu()) + m.second(m.beside(y).sigmoid()))(m.norm(x)),
}

SIZES = {"channels": (5, 6), "tokens": (2, 7, 6), "an image": (2, 3, 4, 6)}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_layer_norm_in_front_of_linear_layers_keeps_its_scale(name: str, sizes: str) -> None:
    norm, layers = nn.LayerNorm(6), {"first": nn.Linear(6, 4), "beside": nn.Linear(6, 4), "second": nn.Linear(4, 5)}
    with torch.no_grad():
        for tensor in norm.parameters():
            tensor.normal_()
    model = Net(SPELLINGS[name], norm=norm, **layers)
    fused = fused_exactly(model, image(*SIZES[sizes]))
    assert torch.equal(fused.get_submodule("norm").weight, norm.weight)
    assert len(convs(fused)) == len(layers)
