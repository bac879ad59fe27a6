"""Models whose code differs from that of their class."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.graphs.traps.parts import Block, Untraceable


def patched() -> nn.Module:
    block = Block()
    block.forward = types.MethodType(lambda self, x: Block.forward(self, x).relu() * 3, block)  # type: ignore[method-assign]
    return block


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


class OwnCall(Block):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x * 2 + 1)


class Forgetful(Block):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class FreezesItsNorm(Block):
    def train(self, mode: bool = True) -> FreezesItsNorm:
        super().train(mode)
        self.bn.eval()
        return self


def under_autocast(enabled: bool) -> Callable[..., Any]:
    def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapped(*args: Any) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                return forward(*args)

        return wrapped

    return decorated


class Decorated(nn.Module):
    """A product in float32, which autocast would compute in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    @under_autocast(enabled=True)
    def forward(self, x: Tensor) -> Any:
        return torch.mm(self.block(x).float().flatten(1).float(), torch.ones(256, 3))


class StaysInFloat32(Block):
    """A block that runs in float32 even inside autocast."""

    @under_autocast(enabled=False)
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x))


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "forward replaced on the instance": patched,
    "… of a part": lambda: nn.Sequential(patched(), nn.ReLU()),
    "… of a part of what can't be traced": lambda: Untraceable(lambda m, x: m.b(x), patched()),
    "a call of its own": OwnCall,
    "a call of its own, in a part": lambda: nn.Sequential(OwnCall(), nn.Conv2d(4, 4, 1)),
    "compiled part": lambda: nn.Sequential(compiled(Block()), nn.ReLU()),
    "scripted part": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), torch.jit.script(nn.ReLU())),
    "train returns nothing": Forgetful,
    "a norm that stays frozen": FreezesItsNorm,
    "autocast in a decorator": Decorated,
    "no autocast, in a decorator": StaysInFloat32,
}
