"""Calls of functions that take several tensors are read where they are a linear map of one of them, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repfx
from repfx.graphs.checks import with_axes
from tests.inline_net import Net, convs, error_of, fused_exactly, image, ready, reasons

Function = Callable[[Any, Any], Any]
DIMENSIONS = {1: (nn.Conv1d, (2, 4, 9)), 2: (nn.Conv2d, (2, 4, 9, 10)), 3: (nn.Conv3d, (2, 4, 5, 3, 4))}


def between_convs(function: Function, dimensions: int = 2, **members: Any) -> Net:
    """A conv, the function, and another conv."""
    conv: Any = DIMENSIONS[dimensions][0]
    layers = {"first": conv(4, 6, 3, groups=2), "second": conv(6, 5, 1, bias=False)}
    return Net(lambda m, x: m.second(function(m, m.first(x))), dimensions=dimensions, **layers, **members)


def calls_beside_convs(fused: Any) -> list[str]:
    """The calls in a fused graph that aren't convs."""
    nodes = [node for node in fused.graph.nodes if node.op.startswith("call") and node.target is not with_axes]
    return [str(node.target) for node in nodes if node.target not in convs(fused)]


def input_for(dimensions: int) -> torch.Tensor:
    return image(*DIMENSIONS[dimensions][1])


HANDED_ON: dict[str, Function] = {
    "F.leaky_relu": lambda m, x: F.leaky_relu(x, 1),
    "F.leaky_relu by keyword": lambda m, x: F.leaky_relu(x, negative_slope=1.0),
    "F.leaky_relu in place": lambda m, x: F.leaky_relu(x, 1.0, inplace=True),
    "F.leaky_relu_": lambda m, x: F.leaky_relu_(x, 1.0),
    "nn.LeakyReLU": lambda m, x: m.leaky(x),
    "nn.PReLU": lambda m, x: m.prelu(x),
    "F.prelu": lambda m, x: F.prelu(x, m.slopes),
    "method prelu": lambda m, x: x.prelu(m.slope),
    "torch.lerp at its end": lambda m, x: torch.lerp(F.relu(x), x, 1.0),
    "torch.lerp at its start": lambda m, x: torch.lerp(x, torch.tanh(x), 0),
    "method lerp": lambda m, x: m.relu(x).lerp(x, 1.0),
    "method lerp in place": lambda m, x: x.relu().lerp_(x, weight=1.0),
    "torch.lerp by a buffer": lambda m, x: torch.lerp(x.sigmoid(), x, m.one),
    "mixture": lambda m, x: 0.0 * F.relu(x) + 1.0 * x,
    "mixture, the other way round": lambda m, x: x + F.gelu(x) * 0,
    "mixture by a number of the module": lambda m, x: (1 - m.rate) * F.relu(x) + m.rate * x,
    "F.dropout": lambda m, x: F.dropout(x, 0.0),
    "F.dropout in the mode": lambda m, x: F.dropout(x, p=0.0, training=m.training),
    "torch.dropout": lambda m, x: torch.dropout(x, 0.0, True),
    "F.alpha_dropout": lambda m, x: F.alpha_dropout(x, 0.0, training=m.training),
}


def settings() -> dict[str, Any]:
    return {
        "leaky": nn.LeakyReLU(1.0),
        "prelu": nn.PReLU(6, init=1.0),
        "slopes": nn.Parameter(torch.ones(6)),
        "slope": nn.Parameter(torch.ones(1)),
        "relu": nn.ReLU(),
        "one": nn.Buffer(torch.tensor(1.0)),
        "rate": 1.0,
    }


@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.parametrize("way", HANDED_ON)
def test_what_hands_its_input_on_is_removed(way: str, dimensions: int) -> None:
    model = between_convs(HANDED_ON[way], dimensions, **settings())
    fused = fused_exactly(model, input_for(dimensions))
    assert not calls_beside_convs(fused), reasons(fused)


STAYS: dict[str, Function] = {
    "a slope of nearly 1": lambda m, x: F.leaky_relu(x, 1 + 1e-9),
    "slopes, one of which is another": lambda m, x: F.prelu(x, m.slopes),
    "slopes from the input": lambda m, x: F.prelu(x, x.mean((0, 2, 3))),
    "lerp on its way": lambda m, x: torch.lerp(F.relu(x), x, 0.999),
    "lerp by what depends on the input": lambda m, x: torch.lerp(F.relu(x), x, x.mean()),
    "lerp to something smaller": lambda m, x: torch.lerp(x, x.mean((2, 3), keepdim=True), 1.0),
    "lerp from what is summed": lambda m, x: torch.lerp(x.relu().sum((2, 3), keepdim=True), x, 1.0),
    "mixture that counts": lambda m, x: 1e-9 * F.relu(x) + x,
    "F.dropout": lambda m, x: F.dropout(x, 0.5, training=m.training),
}


@pytest.mark.parametrize("way", STAYS)
def test_what_may_change_its_input_stays(way: str) -> None:
    slopes = nn.Parameter(torch.ones(6))
    slopes.data[2] = 0.5
    model = between_convs(STAYS[way], slopes=slopes)
    fused = fused_exactly(model, image())
    assert calls_beside_convs(fused)


def copied_then_written(m: Any, x: Any) -> Any:
    y = m.first(x)
    z = F.leaky_relu(y, 1.0)
    z += 1
    return m.second(y.relu()) + z.relu()


def copied_before_it_is_written(m: Any, x: Any) -> Any:
    y = m.first(x).relu()
    z = F.leaky_relu(y, 1.0)
    y += 1
    return m.second(z) + y


def copied_from_the_input(m: Any, x: Any) -> Any:
    y = F.leaky_relu(x, 1.0)
    y.mul_(2)
    return m.first(x) + y


@pytest.mark.parametrize("function", [copied_then_written, copied_before_it_is_written, copied_from_the_input])
def test_a_copy_on_which_others_count_stays(function: Function) -> None:
    model = Net(function, first=nn.Conv2d(4, 4, 1), second=nn.Conv2d(4, 4, 1))
    fused = fused_exactly(model, image())
    assert "changes in place what it hands on" in reasons(fused)


def test_a_copy_that_is_written_where_nobody_else_reads_goes() -> None:
    model = Net(lambda m, x: F.leaky_relu(m.first(x), 1.0).relu_(), first=nn.Conv2d(4, 4, 1))
    fused = fused_exactly(model, image())
    assert [node.target for node in fused.graph.nodes if node.op.startswith("call")] == ["first", "relu_"]


def batch_norm(m: Any, x: Any, *arguments: Any, **keywords: Any) -> Any:
    return F.batch_norm(x, m.mean, m.variance, *arguments, **keywords)


SCALED: dict[str, Function] = {
    "F.batch_norm": lambda m, x: batch_norm(m, x, m.scale, m.shift),
    "F.batch_norm, plain": lambda m, x: batch_norm(m, x),
    "F.batch_norm by keyword": lambda m, x: batch_norm(m, x, bias=m.shift, training=False, eps=0.1),
    "F.batch_norm in the mode": lambda m, x: batch_norm(m, x, m.scale, m.shift, m.training, 0.1, 1e-3),
    "F.batch_norm in the mode, by keyword": lambda m, x: batch_norm(m, x, m.scale, training=m.training),
    "F.batch_norm of what is computed": lambda m, x: F.batch_norm(x, m.mean + 1, m.variance * 2, m.scale**2),
    "torch.addcmul": lambda m, x: torch.addcmul(wide(m, m.shift), x, wide(m, m.scale)),
    "torch.addcmul with a factor": lambda m, x: torch.addcmul(wide(m, m.shift), wide(m, m.scale), x, value=3),
    "method addcmul": lambda m, x: x.addcmul(wide(m, m.shift), wide(m, m.scale), value=0.5),
}


def wide(m: Any, numbers: Any) -> Any:
    return numbers.reshape(-1, *(1,) * m.dimensions)


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.parametrize("way", SCALED)
def test_calls_that_scale_and_shift_are_folded(way: str, dimensions: int) -> None:
    numbers = {"mean": nn.Buffer(torch.rand(6)), "variance": nn.Buffer(torch.rand(6) + 0.5)}
    weights = {name: nn.Parameter(torch.randn(6)) for name in ("scale", "shift")}
    model = between_convs(SCALED[way], dimensions, **numbers, **weights)
    fused = fused_exactly(model, input_for(dimensions))
    assert not calls_beside_convs(fused), reasons(fused)


NOT_SCALED: dict[str, Function] = {
    "by the batch": lambda m, x: F.batch_norm(x, None, None, training=True),
    "statistics of the input": lambda m, x: F.batch_norm(x, x.mean((0, 2, 3)), m.numbers),
    "a scale of the input": lambda m, x: F.batch_norm(x, m.numbers, m.numbers, x.mean((0, 2, 3))),
    "a square": lambda m, x: torch.addcmul(m.numbers.reshape(6, 1, 1), x, x),
    "along a row": lambda m, x: torch.addcmul(m.row, x, m.row),
}


@pytest.mark.parametrize("way", NOT_SCALED)
def test_calls_that_do_anything_else_stay(way: str) -> None:
    model = between_convs(NOT_SCALED[way], numbers=nn.Buffer(torch.rand(6) + 1), row=nn.Parameter(torch.randn(8)))
    fused = fused_exactly(model, image())
    assert calls_beside_convs(fused)


class Normalised(nn.Module):
    """A conv and a linear layer, each followed by a call of `F.batch_norm` in the module's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 6, 3), nn.Linear(8, 8)
        self.norm_call_0 = nn.Identity()  # a name that is already taken
        self.mean, self.variance = nn.Buffer(torch.rand(6)), nn.Buffer(torch.rand(6) + 0.5)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Any) -> Any:
        x = self.norm_call_0(self.conv(x)).relu()
        return F.batch_norm(x, self.mean, self.variance, self.scale, None, self.training)


def test_a_call_that_is_not_folded_follows_the_mode() -> None:
    model = ready(Normalised())
    fused = repfx.fuse(model)
    x = image(3, 4, 8, 7)
    assert error_of(fused, model, x) < 1e-9
    outputs = [twin.train()(x) for twin in (fused, model)]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-12)
    assert torch.equal(fused.mean, model.mean)  # both have updated their statistics


def test_batch_norm_along_another_axis_than_a_linear_layer_s_stays() -> None:
    numbers = nn.Buffer(torch.rand(4) + 0.5)
    model = Net(lambda m, x: F.batch_norm(m.linear(x), m.numbers, m.numbers), linear=nn.Linear(4, 4), numbers=numbers)
    fused = fused_exactly(model, image(3, 4, 4))
    assert "isn't known to be (batch, channels)" in reasons(fused)
