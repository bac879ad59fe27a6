"""Models whose code writes into tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.inline_net import Net
from tests.tracing.traps.parts import Block


class Constrained(nn.Conv2d):
    """A conv that limits the norm of its weight (EEGNet's Conv2dWithConstraint)."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
        return super().forward(x)


class ClampsItsNorm(Block):
    def forward(self, x: Tensor) -> Any:
        self.bn.weight.data.clamp_(0)
        return super().forward(x)


class ClampsAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.w = nn.Conv2d(4, 4, 1), nn.Parameter(torch.rand(4, 1, 1) + 1)

    def forward(self, x: Tensor) -> Any:
        self.w.data.clamp_(0, 0.5)
        return self.c(x) * self.w


class Observer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.copy_(x.abs().max())  # type: ignore[operator]
        return x


class Observed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o, self.c = Observer(), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.o(x)
        return self.c(x) / self.o.seen


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid())


def swished(m: Any, x: Tensor) -> Any:
    x = x.sin()
    y = m.a(x)
    gate = m.act(x)
    return (y + x) * gate


def powered(m: Any, x: Tensor) -> Any:
    x = x.sin()
    y = x
    y **= 2
    return m.a(x).relu() + y


def buffered_conv() -> nn.Module:
    """A conv whose weight is a buffer."""
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    weight = conv.weight.data
    del conv.weight
    conv.register_buffer("weight", weight)
    return conv


class LoRA(nn.Module):
    """A conv that merges its weights when it is put into eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.delta = nn.Conv2d(4, 4, 3, padding=1), nn.Parameter(torch.randn(4, 4, 3, 3))
        self.merged = False

    def train(self, mode: bool = True) -> LoRA:
        super().train(mode)
        if mode == self.merged:
            self.conv.weight.data += (-1 if mode else 1) * self.delta.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Any:
        if self.merged:
            return self.conv(x)
        if x.sum() > 1e9:
            return x
        return F.conv2d(x, self.conv.weight + self.delta, self.conv.bias, padding=1)


def square_(x: Tensor) -> Tensor:
    return x.mul_(x)


class InPlaceByKeyword(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True)


class InPlaceByPosition(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2, True)


class InPlaceByAHelper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return square_(x)


def beside_convs(activation: nn.Module) -> nn.Module:
    """Two convs that take one tensor, into which an in-place activation writes between them; the second conv reads the new values."""

    def forward(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        first = m.a(x)
        m.act(x)
        return first + m.b(x)

    convs = {"stem": nn.Conv2d(4, 4, 1), "a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1)}
    return Net(forward, **convs, act=activation)


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "weight.data assigned": lambda: nn.Sequential(Constrained(4, 4, 3), nn.BatchNorm2d(4)),
    "norm written to": ClampsItsNorm,
    "parameter written to": ClampsAParameter,
    "buffer of an observer": Observed,
    "in place without saying so": lambda: Net(swished, a=nn.Conv2d(4, 4, 3, padding=1), act=Swish()),
    "**=": lambda: Net(powered, a=nn.Conv2d(4, 4, 1)),
    "buffer for a weight, called twice": lambda: Net(
        lambda m, x: m.b(m.a(x)).relu() + m.a(x), a=buffered_conv(), b=nn.BatchNorm2d(4)
    ),
    "merges in eval mode": lambda: nn.Sequential(LoRA(), nn.BatchNorm2d(4)),
    "in place, by keyword": lambda: beside_convs(InPlaceByKeyword()),
    "in place, by position": lambda: beside_convs(InPlaceByPosition()),
    "in place, by a helper": lambda: beside_convs(InPlaceByAHelper()),
}
