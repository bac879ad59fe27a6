"""Small nets written as one expression, and helpers for tests of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.testing import randomize_batch_norm, relative_error


class Net(nn.Module):
    """A module whose forward is a function of itself and its input; the keywords are its children and attributes."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def ready(model: nn.Module, seed: int = 0) -> Any:
    """Put a model into float64 and eval mode, with random BatchNorms."""
    return randomize_batch_norm(model.double(), seed).eval()


def image(*size: int) -> Tensor:
    """A random input in float64, by default ``(2, 4, 9, 10)``."""
    return torch.randn(size or (2, 4, 9, 10), dtype=torch.float64)


@torch.no_grad()
def error_of(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    """Relative error of the output of `model`, each model in its present mode. Both run on copies of x, because a net may write to it."""
    return relative_error(model(x.clone()), reference(x.clone()))


def fused_exactly(model: Any, x: Tensor) -> Any:
    """Fuse `model`; check that the result computes the same and that `model` is unchanged."""
    ready(model)
    before = copy.deepcopy(model.state_dict())
    fused = repfx.fuse(model)
    assert error_of(fused, model, x) < 1e-9
    assert same_state(before, model.state_dict())
    return fused


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Tell whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def convs(model: nn.Module) -> list[str]:
    """The paths of all convs and linear layers."""
    return [path for path, module in model.named_modules() if is_conv(module) or isinstance(module, nn.Linear)]


def norms(model: nn.Module) -> list[str]:
    """The paths of all BatchNorms."""
    return [path for path, module in model.named_modules() if is_batch_norm(module)]


def reasons(model: nn.Module) -> str:
    """The report of what the model's last verb left alone, as text."""
    report = repfx.report(model)
    return "\n".join(map(str, (*report.skipped, *report.declined)))
