"""Activation checkpointing: a graph has the code that is checkpointed, because checkpointing changes no number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import repfx
from repfx.testing import assert_equivalent, randomize_batch_norm
from repfx.tracing.trace import trace
from tests.inline_net import convs, norms, reasons

X = torch.randn(2, 3, 9, 7, dtype=torch.float64)


def conv_norm(channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 4, size, padding=size // 2, bias=False), nn.BatchNorm2d(4))


class Stages(nn.Module):
    """Sequences and blocks of a list, checkpointed one by one, with a BatchNorm in front of the last conv."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.stem = nn.ModuleList([conv_norm(3, 3).append(nn.ReLU()), conv_norm(4, 1)])
        self.norm, self.head, self.options = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), options

    def forward(self, x: Tensor) -> Any:
        for layers in self.stem:
            x = checkpoint(layers, x, **self.options)
        return self.head(self.norm(x))


class AsksForGradients(nn.Module):
    """Checkpointed if the input has a gradient and the net was told so. Another thing may depend on the gradient, too."""

    def __init__(self, *, factors: tuple[float, float] = (1.0, 1.0), crossed: bool = False) -> None:
        super().__init__()
        self.first, self.second = conv_norm(3, 3), conv_norm(4, 1)
        self.with_checkpoints, self.factors, self.crossed = True, factors, crossed

    def _inner(self, x: Tensor) -> Any:
        return self.second(self.first(x))

    def forward(self, x: Tensor) -> Any:
        if self.crossed and self.training != x.requires_grad:
            return -self._inner(x)
        if self.with_checkpoints and any(each.requires_grad for each in (x, x * 2)):
            return checkpoint(self._inner, x, use_reentrant=False) * self.factors[0]
        return self._inner(x) * self.factors[1]


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}])
def test_what_is_checkpointed_is_fused(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(Stages(**options)).double().eval()
    fused = repfx.fuse(model)
    assert_equivalent(fused, model, X)
    assert (len(convs(fused)), len(norms(fused))) == (2, 0), reasons(fused)
    assert_equivalent(repfx.expand(model, "acb"), model, X)


def test_checkpoints_work_after_tracing() -> None:
    model = Stages(use_reentrant=True).double()
    before = torch.utils.checkpoint.CheckpointFunction
    trace(model)
    assert torch.utils.checkpoint.CheckpointFunction is before
    twin = copy.deepcopy(model)
    twin.options = {"use_reentrant": False}
    gradients = []
    for each in (model, twin):
        x = X.clone().requires_grad_()
        each(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_both_answers_about_gradients_give_one_graph() -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(AsksForGradients()).double().eval()
    fused = repfx.fuse(model)
    for x in (X, X.clone().requires_grad_()):
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-12)
    assert (len(convs(fused)), len(norms(fused))) == (1, 0), reasons(fused)
    assert "requires_grad" not in str(fused.graph)


@pytest.mark.parametrize("options", [{"factors": (1.0, 2.0)}, {"crossed": True}])
def test_code_that_computes_something_else_for_gradients_isnt_traced(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(AsksForGradients(**options)).double().eval()
    fused = repfx.fuse(model)
    assert "" in reasons(fused)
    for x in (X, X.clone().requires_grad_()):
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-12)
