"""Modules that are registered under several names and called once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import repfx
from repfx.testing import relative_error
from repfx.tracing.aliases import Alias
from tests.inline_net import convs, error_of, fused_exactly, image, norms, ready, reasons


class Block(nn.Module):
    def __init__(self, dimensions: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.conv = getattr(nn, f"Conv{dimensions}d")(channels, channels, 3, padding=1, bias=False)
        self.norm = getattr(nn, f"BatchNorm{dimensions}d")(channels)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.norm(self.conv(x)))


class Skip(nn.Module):
    """A level of a U-Net as MONAI's DynUNet has it: it holds its parts, which the net holds in lists, too."""

    def __init__(self, down: nn.Module, inner: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.inner, self.up = down, inner, up

    def forward(self, x: Any) -> Any:
        y = self.down(x)
        return self.up(y + self.inner(y))


class Unet(nn.Module):
    def __init__(self, dimensions: int = 2) -> None:
        super().__init__()
        self.first, self.bottom = Block(dimensions), Block(dimensions)
        self.downs = nn.ModuleList([Block(dimensions) for _ in range(2)])
        self.ups = nn.ModuleList([Block(dimensions) for _ in range(3)])
        self.skips = Skip(
            self.first,
            Skip(self.downs[0], Skip(self.downs[1], self.bottom, self.ups[0]), self.ups[1]),
            self.ups[2],
        )

    def forward(self, x: Any) -> Any:
        return self.skips(x)


class Layers(nn.Module):
    """Layers that stand in a list, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.tail = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.layers = nn.ModuleList([self.conv, self.norm, self.tail])

    def forward(self, x: Any) -> Any:
        for layer in self.layers[:2]:
            x = layer(x)
        return self.tail(torch.relu(x))


class PlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.layers = [self.conv, self.norm]

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Opaque(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Any) -> Any:
        return self.conv(x) if float(x.sum()) < 1e9 else x


class SharedWithOpaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.opaque = Opaque(self.conv)

    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(x)) + self.opaque(x)


class CalledByBothNames(Layers):
    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(x))[..., 1:-1, 1:-1] + self.layers[0](self.conv(x))


class InUntracedCode(nn.Module):
    """The net is an island, and names of its parts outside it belong to code that can't be traced."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.net = Unet()
        if outside:
            self.again = self.net.downs[0]

    def forward(self, x: Any) -> Any:
        return self.net(x) if float(x.sum()) < 1e9 else x


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_net_of_aliases_is_fused_and_restored(dimensions: int) -> None:
    model, x = ready(Unet(dimensions)), image(2, 4, *(9, 10, 7)[:dimensions])
    fused = fused_exactly(model, x)
    assert norms(fused) == []
    assert len(convs(fused)) == 7
    assert list(dict(fused.named_modules(remove_duplicate=False))["skips.inner.down"].children()) == [
        fused.get_submodule("downs.0.conv")
    ]
    restored = repfx.restore(fused)
    plain = Unet(dimensions).double().eval()
    plain.load_state_dict(restored.state_dict(), strict=True)
    assert error_of(plain, model, x) < 1e-9
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), repfx.fuse(fused), repfx.fuse(restored)):
        assert error_of(again, model, x) < 1e-9
        assert norms(again) == []


def test_layers_that_a_list_holds_too() -> None:
    model = ready(Layers())
    fused = fused_exactly(model, image())
    assert norms(fused) == []
    layers = fused.get_submodule("layers")
    assert [type(layer) for layer in layers.children()] == [nn.Conv2d, Alias, nn.Conv2d]
    assert layers.get_submodule("0") is fused.get_submodule("conv")
    restored = repfx.restore(fused)
    plain = Layers().double().eval()
    plain.load_state_dict(restored.state_dict(), strict=True)
    assert error_of(plain, model, image()) < 1e-9


@pytest.mark.parametrize("cls", [PlainList, SharedWithOpaque])
def test_names_in_other_code_keep_a_module_as_it_is(cls: type[nn.Module]) -> None:
    fused = fused_exactly(cls(), image())
    assert "norm" in norms(fused)
    assert "registered under 2 names" in reasons(fused)


def test_calls_by_all_names_are_counted() -> None:
    fused = fused_exactly(CalledByBothNames(), image())
    assert norms(fused) == ["norm"]
    assert "called 3 times" in reasons(fused)


@pytest.mark.parametrize(("outside", "left"), [(False, 0), (True, 1)])
def test_aliases_inside_an_island(outside: bool, left: int) -> None:
    fused = fused_exactly(InUntracedCode(outside), image())
    assert len(norms(fused)) == left


def test_squeezed_it_trains_every_parameter() -> None:
    model = ready(Unet())
    squeezed, x = repfx.squeeze(copy.deepcopy(model)), image()
    assert len(repfx.report(squeezed).applied) == 7
    assert relative_error(squeezed(x), model(x)) < 1e-9
    squeezed(x).square().sum().backward()
    model(x).square().sum().backward()
    for (name, a), b in zip(squeezed.named_parameters(), model.parameters()):
        assert relative_error(a.grad, b.grad) < 1e-8, name


def test_the_model_is_not_touched() -> None:
    model = ready(Unet())
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for verb in (repfx.fuse, repfx.sites, repfx.squeeze, lambda m: repfx.restore(repfx.fuse(m))):
        verb(model)
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == names
