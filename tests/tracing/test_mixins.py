"""Members that a class gets from a mixin, before or behind `nn.Module` in the order of inheritance, read by code that can't be traced."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pytest
import torch
from torch import nn

import repfx
from tests.inline_net import error_of, fused_exactly, image, norms, ready, reasons


class Base:
    depth = 3

    @property
    def stride(self) -> int:
        return self.depth - 1


class Mixin(Base):
    kinds = ("a", "b")

    @cached_property
    def channels(self) -> tuple[int, ...]:
        return (4, 4)

    @staticmethod
    def power() -> int:
        return 2

    @classmethod
    def label(cls) -> str:
        return "encoder"

    def scale(self, x: Any) -> Any:
        return self.norm(x) * 2  # type: ignore[attr-defined]

    def layers(self) -> list[nn.Module]:
        return [self.conv, self.norm]  # type: ignore[attr-defined]


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(x))


class Behind(Body, Mixin):
    """As the encoders of segmentation_models_pytorch: `nn.Module` comes before the mixin."""


class Before(Mixin, Body):
    """The mixin comes before `nn.Module`."""


class Reads(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder

    def forward(self, x: Any) -> Any:
        y = self.encoder(x) if float(x.sum()) < 1e9 else x
        return y * self.read()

    def read(self) -> Any:
        raise NotImplementedError


class Property(Reads):
    def read(self) -> Any:
        return self.encoder.stride


class ClassAttribute(Reads):
    def read(self) -> Any:
        return self.encoder.depth + len(self.encoder.kinds)


class Cached(Reads):
    def read(self) -> Any:
        return self.encoder.channels[0]


class Static(Reads):
    def read(self) -> Any:
        return self.encoder.power()


class OfTheClass(Reads):
    def read(self) -> Any:
        return len(self.encoder.label())


class Method(Reads):
    def read(self) -> Any:
        return self.encoder.scale(torch.ones(1, 4, 9, 10, dtype=torch.float64))


class Layers(Reads):
    def read(self) -> Any:
        return self.encoder.layers()[1].weight.sum()


@pytest.mark.parametrize("encoder", [Behind, Before])
@pytest.mark.parametrize(
    ("reads", "stays"),
    [
        (Property, False),
        (ClassAttribute, False),
        (Cached, False),
        (Static, True),
        (OfTheClass, True),
        (Method, True),
        (Layers, True),
    ],
)
def test_what_a_mixin_gives_is_there_or_the_module_stays(reads: Any, encoder: type[nn.Module], stays: bool) -> None:
    model = fused_exactly(reads(encoder()), image())
    assert (norms(model) == ["encoder.norm"]) == stays
    assert ("reads its" in reasons(model) or "reaches for its" in reasons(model)) == stays


@pytest.mark.parametrize("encoder", [Behind, Before])
@pytest.mark.parametrize("reads", Reads.__subclasses__())
def test_expanded_it_is_the_same(reads: Any, encoder: type[nn.Module]) -> None:
    model = ready(reads(encoder()))
    assert error_of(repfx.expand(model, "acb"), model, image()) < 1e-9


def test_a_traced_encoder_s_mixin_is_traced() -> None:
    class Scaled(Behind):
        def forward(self, x: Any) -> Any:
            return self.scale(self.conv(x)) * self.stride

    assert norms(fused_exactly(nn.Sequential(Scaled(), nn.ReLU()), image())) == []
