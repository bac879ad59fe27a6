"""Models that keep their layers in plain attributes, too, beside code that can't be traced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.tracing.traps.parts import Block, conv_norm_twice


class Keeps(nn.Module):
    """A model with three parts. A subclass keeps them once more, and runs what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Block(), Block(), conv_norm_twice()
        self.kept = self.keep()

    def keep(self) -> Any:
        return [self.first, self.second, self.third]

    def run(self, x: Tensor) -> Any:
        for part in self.kept:
            x = part(x)
        return x

    def forward(self, x: Tensor) -> Any:
        return self.run(-x if x.sum() > 1e9 else x)


class Tuple(Keeps):
    def keep(self) -> Any:
        return (self.first, self.third)


class Dict(Keeps):
    def keep(self) -> Any:
        return {"a": self.first, "b": self.second}

    def run(self, x: Tensor) -> Any:
        return self.kept["b"](self.kept["a"](x)) + self.first(x)


class Nested(Keeps):
    def keep(self) -> Any:
        return [(self.first, 2.0), (self.second, 3.0)]

    def run(self, x: Tensor) -> Any:
        for part, factor in self.kept:
            x = part(x) * factor
        return x


class Methods(Keeps):
    """A model that keeps bound methods of its parts."""

    def keep(self) -> Any:
        return [self.first.forward, self.second.__call__]


class OneMethod(Keeps):
    def keep(self) -> Any:
        return self.third.forward

    def run(self, x: Tensor) -> Any:
        return self.kept(x)


class Partial(Keeps):
    def keep(self) -> Any:
        return [functools.partial(self.first.forward), functools.partial(call, self.second)]


def call(part: nn.Module, x: Tensor) -> Any:
    return part(x)


class InAPart(nn.Module):
    """A model of which a part keeps another part's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), Keeps()
        self.head.kept = [self.block]

    def forward(self, x: Tensor) -> Any:
        return self.head(x) + self.block(x)


class Outermost(nn.Module):
    """A model that keeps what lies deep inside a part that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        tapped = Block()
        self.body = nn.Sequential(nn.Sequential(tapped, nn.ReLU()), Block())
        self.taps = [tapped]

    def forward(self, x: Tensor) -> Any:
        return self.body(x) + (self.taps[0](x) if x.sum() < 1e9 else x)


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "kept in a list": Keeps,
    "kept in a tuple": Tuple,
    "kept in a dict": Dict,
    "kept in pairs": Nested,
    "methods kept": Methods,
    "a method kept": OneMethod,
    "partial functions kept": Partial,
    "kept by a part": InAPart,
    "a part of a part kept": Outermost,
}
