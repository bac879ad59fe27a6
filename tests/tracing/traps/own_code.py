"""Models whose code differs from that of their class."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.tracing.traps.parts import Block, Untraceable


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


class SetsAutocast(Decorated):
    """A product in bfloat16, by a switch that the code throws itself."""

    def forward(self, x: Tensor) -> Any:
        before = torch.is_autocast_enabled("cpu")
        self.switch(True)
        try:
            return torch.mm(self.block(x).float().flatten(1), torch.ones(256, 3))
        finally:
            self.switch(before)

    def switch(self, enabled: bool) -> None:
        torch.set_autocast_enabled("cpu", enabled)


class SetsAutocastByAName(SetsAutocast):
    def switch(self, enabled: bool) -> None:
        getattr(torch, "_".join(("set", "autocast", "enabled")))("cpu", enabled)


class SwitchesAutocastOff(Block):
    """A block that runs in float32 even inside autocast, by the switch."""

    def forward(self, x: Tensor) -> Any:
        before = torch.is_autocast_enabled("cpu")
        torch.set_autocast_enabled("cpu", False)
        try:
            return self.bn(self.conv(x))
        finally:
            torch.set_autocast_enabled("cpu", before)


def is_traced() -> bool:
    """Ask torch.fx, as code does that has a simpler form for a trace."""
    asked: Any = torch.fx._symbolic_trace
    names = ("is_fx_symbolic_tracing", "is_fx_tracing")  # torch 2.8 has the second one alone
    return any(getattr(asked, name)() for name in names if hasattr(asked, name))


class IsSimplerInATrace(Block):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y if is_traced() else y.sigmoid() * 3


class IsSimplerInATraceInside(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Block(), IsSimplerInATrace(), nn.ReLU())


@torch.compile(backend="eager")
def compiled_function(x: Tensor) -> Tensor:
    return x.sigmoid() * 3


class CallsACompiledFunction(Block):
    def forward(self, x: Tensor) -> Any:
        return compiled_function(super().forward(x))


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
    "autocast switched on by its function": SetsAutocast,
    "… by a function that is looked up": SetsAutocastByAName,
    "autocast switched off by its function": SwitchesAutocastOff,
    "simpler in a trace": IsSimplerInATrace,
    "… in a part": IsSimplerInATraceInside,
    "calls a compiled function": CallsACompiledFunction,
}
