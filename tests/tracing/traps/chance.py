"""Models whose code draws random numbers, from each source that code can draw from."""

from __future__ import annotations

import random
from collections.abc import Callable
from random import random as draw
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tracing.traps.parts import Block

OF_THIS_FILE = np.random.default_rng(5)


def seed(number: int) -> None:
    """Seed all generators that models of this file share."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    OF_THIS_FILE.bit_generator.state = np.random.PCG64(number).state


class DropsLayers(nn.Module):
    """Three blocks, each of which is left out with probability 0.3 in training mode, as `leaves_out` decides."""

    def __init__(self, leaves_out: Callable[[Any], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.leaves_out = leaves_out
        self.of_python, self.of_numpy = random.Random(1), np.random.RandomState(2)
        self.of_torch = torch.Generator("cpu").manual_seed(3)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            if self.training and self.leaves_out(self):
                continue
            x = block(x)
        return x


class DropsLayersInside(nn.Module):
    """Layers that are dropped in a part, between two blocks that don't know of it."""

    def __init__(self, leaves_out: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first, self.middle, self.last = Block(), DropsLayers(leaves_out), Block()

    def forward(self, x: Tensor) -> Any:
        return self.last(self.middle(self.first(x)))


def _on_cpu(size: Any = ()) -> Tensor:
    return torch.empty(size, device="cpu")


SOURCES: dict[str, Callable[[Any], Any]] = {
    "Python's random": lambda m: random.random() < 0.3,
    "Python's random, by its name": lambda m: draw() < 0.3,
    "Python's choice": lambda m: random.choice([True, False, False]),
    "Python's gauss": lambda m: random.gauss(0, 1) > 0.5,
    "numpy": lambda m: np.random.rand() < 0.3,
    "numpy's normal": lambda m: np.random.normal() > 0.5,
    "torch": lambda m: torch.rand((), device="cpu") < 0.3,
    "torch's bernoulli": lambda m: torch.bernoulli(_on_cpu().fill_(0.3)),
    "torch's randint": lambda m: int(torch.randint(0, 3, (), device="cpu")) == 0,
    "torch's randperm": lambda m: int(torch.randperm(3, device="cpu")[0]) == 0,
    "a tensor filled in place": lambda m: _on_cpu(1).uniform_() < 0.3,
    "nn.init": lambda m: float(nn.init.normal_(_on_cpu(1))) > 0.5,
    "a dropout of ones": lambda m: float(F.dropout(_on_cpu(1).fill_(1.0), 0.3)) == 0,
    "a generator of Python's as an attribute": lambda m: m.of_python.random() < 0.3,
    "a generator of numpy's as an attribute": lambda m: m.of_numpy.rand() < 0.3,
    "a generator of torch's as an attribute": lambda m: torch.rand((), generator=m.of_torch, device="cpu") < 0.3,
}


class DropsLayersByAGlobal(DropsLayers):
    """Layers that are dropped by a generator of this file."""

    def __init__(self) -> None:
        super().__init__(lambda m: OF_THIS_FILE.random() < 0.3)


class AddsNoise(nn.Module):
    """A block with noise of a fixed size in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Any:
        noise = torch.randn(4, 1, 1, dtype=torch.float64) if self.training else 0.0
        return self.block(x + noise)


class DrawsInBothModes(nn.Module):
    """A number that is drawn in both modes and used in training mode, as wav2vec 2.0 does."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Block(), Block()

    def forward(self, x: Tensor) -> Any:
        number = random.random()
        skip = self.training and number < 0.3
        return self.other(x if skip else self.block(x))


TRAPS: dict[str, Callable[[], nn.Module]] = {
    **{f"layers dropped by {name}": lambda source=source: DropsLayers(source) for name, source in SOURCES.items()},  # type: ignore[misc]
    **{
        f"… in a part, by {name}": lambda source=SOURCES[name]: DropsLayersInside(source)  # type: ignore[misc]
        for name in ("Python's gauss", "torch", "a generator of numpy's as an attribute")
    },
    "layers dropped by a generator of the file": DropsLayersByAGlobal,
    "noise in training mode": AddsNoise,
    "a number drawn in both modes": DrawsInBothModes,
}
