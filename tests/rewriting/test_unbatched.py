"""Inputs without a batch times a constant with one: the constant gives them its axis, and a merged conv does so, too."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.graphs.checks import with_axes
from tests.inline_net import Net, error_of, image, ready

FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "scaled": lambda m, x: m.a(x.relu()) * m.scale,
    "scaled from the left": lambda m, x: m.scale * m.a(x.relu()),
    "scaled by a method": lambda m, x: m.a(x.relu()).mul(m.scale),
    "divided": lambda m, x: m.a(x.relu()) / m.scale,
    "shifted": lambda m, x: m.a(x.relu()) + m.scale,
    "shifted down": lambda m, x: m.scale - m.a(x.relu()),
    "scaled between two": lambda m, x: m.b(m.a(x.relu()) * m.scale),
    "one path scaled": lambda m, x: m.a(x.relu()) * m.scale + m.b(x.relu()),
    "scaled, plus the input": lambda m, x: m.a(x.relu()) * m.scale + x,
    "scaled by one number": lambda m, x: m.a(x.relu()) * m.one,
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "1d": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "2d": lambda: nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
    "3d": lambda: nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1)),
}
SIZES = {"linear": (), "1d": (5,), "2d": (5, 6), "3d": (5, 6, 7)}


def scaled(form: str, layer: str, axes: int = 0) -> Any:
    """A net with a constant of so many axes, by default those of a batch."""
    model = Net(FORMS[form], a=LAYERS[layer](), b=LAYERS[layer]())
    sizes = SIZES[layer]
    shape = (1, 4, *(1,) * len(sizes))
    shape = shape[len(shape) - axes :] if axes else shape
    model.register_buffer("scale", torch.rand(shape) + 0.5)
    model.register_buffer("one", torch.rand((1,) * len(shape)) + 0.5)
    return ready(model)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_output_has_the_axes_that_it_had(form: str, layer: str) -> None:
    model = scaled(form, layer)
    once = repfx.fuse(model)
    for after in (once, repfx.fuse(once), repfx.expand(model, "acb") if layer != "linear" else once):
        for x in (image(4, *SIZES[layer]), image(2, 4, *SIZES[layer])):
            assert after(x).shape == model(x).shape
            assert error_of(after, model, x) < 1e-9
    assert not any(node.op == "get_attr" for node in once.graph.nodes), "the constant was not merged"


@pytest.mark.parametrize("layer", LAYERS)
def test_a_constant_without_a_batch_costs_no_node(layer: str) -> None:
    fused = repfx.fuse(scaled("scaled", layer, axes=len(SIZES[layer]) + 1))
    assert not any(node.target is with_axes for node in fused.graph.nodes)
    for x in (image(4, *SIZES[layer]), image(2, 4, *SIZES[layer])):
        assert fused(x).ndim == x.ndim


def test_behind_a_batch_norm_no_node_is_needed() -> None:
    model = Net(lambda m, x: m.norm(m.a(x)) * m.scale, a=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))
    model.register_buffer("scale", torch.rand(1, 4, 1, 1))
    fused = repfx.fuse(ready(model))
    assert [node.op for node in fused.graph.nodes] == ["placeholder", "call_module", "output"]


def test_in_front_of_a_batch_norm_it_is() -> None:
    model = Net(lambda m, x: m.norm(m.a(x.relu()) * m.scale), a=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))
    model.register_buffer("scale", torch.rand(1, 4, 1, 1))
    ready(model)
    fused = repfx.fuse(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    for x in (image(4, 7, 8), image(2, 4, 7, 8)):
        assert error_of(fused, model, x) < 1e-9


def test_a_squeezed_net_keeps_the_axes_too() -> None:
    model = Net(lambda m, x: m.b(m.a(x.relu())) * 2.0 * m.scale, a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 1))
    model.register_buffer("scale", torch.rand(1, 4, 1, 1))
    ready(model)
    x = image(4, 7, 8)
    expected = model(x)
    after = repfx.squeeze(model, statistics="frozen")
    assert after(x).shape == expected.shape
    assert torch.allclose(after(x), expected)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Conv2d(4, 3, 3), nn.Parameter(torch.rand(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.a(x.relu()) * self.scale


def test_the_net_is_exported_and_saved() -> None:
    fused = repfx.fuse(ready(Scaled()))
    assert any(node.target is with_axes for node in fused.graph.nodes)
    x = image(2, 4, 5, 6)
    program: Tensor = torch.export.export(fused, (x,)).module()(x)
    assert torch.allclose(program, fused(x))
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), fused(x))
