"""A border counts as padding with a conv's bias only if all of it holds the bias before any read, however code spells it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.graphs.indexing import whole_index
from repfx.testing import assert_equivalent
from tests.inline_net import Net, fused_exactly, image, reasons

X = torch.randn(2, 4, 6, 9, dtype=torch.float64)


class Bordered(nn.Module):
    """A 1×1 conv, padded by `border`, then a 3×3 conv."""

    def __init__(self, border: Callable[[Any, Tensor], Any], size: int = 1) -> None:
        super().__init__()
        self.first, self.second, self.border = nn.Conv2d(4, 4, size), nn.Conv2d(4, 4, 3), border

    def forward(self, x: Tensor) -> Any:
        return self.second(self.border(self, self.first(x)))


def padded(
    m: Any, y: Tensor, *, sides: tuple[int, ...] = (1, 1, 1, 1), width: int = 1, factor: float = 1.0, strips: int = 4
) -> Tensor:
    y = F.pad(y, sides)
    for index in [
        (slice(None), slice(None), slice(0, width), slice(None)),
        (slice(None), slice(None), slice(-1, None), slice(None)),
        (slice(None), slice(None), slice(None), slice(None, 1)),
        (slice(None), slice(None), slice(None), slice(-1, None)),
    ][:strips]:
        y[index] = m.value * factor
    return y


def read_too_early(m: Any, y: Tensor) -> Tensor:
    y = F.pad(y, (1, 1, 1, 1))
    total = y.sum()
    y[:, :, 0:1, :] = m.value
    y[:, :, -1:, :] = m.value
    y[:, :, :, 0:1] = m.value
    y[:, :, :, -1:] = m.value
    return y + total


def copied(m: Any, y: Tensor, *, read_between: bool = False, kept: bool = False) -> Any:
    """Write by `copy_` and `fill_` into views; maybe read the picture before the last write, or a view after it."""
    y = F.pad(y, (1, 1, 1, 1))
    y[:, :, 0:1].copy_(m.value)
    y[:, :, -1:].copy_(m.value.expand(y.shape[0], 4, 1, y.shape[3]))
    y[..., :1].copy_(m.value)
    total = y.mean() if read_between else 0.0
    last = y[..., -1:].copy_(m.value)
    return y + total + (last.mean() if kept else 0.0)


def scattered(m: Any, y: Tensor, *, read: bool = False, end: int | None = None) -> Any:
    """Write each strip into a copy of the picture; maybe read one of the copies, or write another strip than the last."""
    row, column = (m.value.expand(y.shape[0], -1, *sizes) for sizes in ((1, y.shape[3] + 2), (y.shape[2] + 2, 1)))
    y = torch.slice_scatter(F.pad(y, (1, 1, 1, 1)), row, 2, 0, 1)
    y = torch.slice_scatter(y, row, dim=-2, start=-1)
    half = torch.slice_scatter(y, column, 3, 0, 1)
    whole = torch.slice_scatter(half, column, 3, -1 if end is None else end - 1, end)
    return whole + half.mean() if read else whole


BORDERS: dict[
    str, tuple[Callable[[Any, Tensor], Any], int, int]
] = {  # with the first conv's window, and how many convs are left
    "the bias": (padded, 1, 1),
    "almost the bias": (lambda m, y: padded(m, y, factor=1 + 1e-6), 1, 2),
    "twice the bias": (lambda m, y: padded(m, y, factor=2.0), 1, 2),
    "three sides": (lambda m, y: padded(m, y, strips=3), 1, 2),
    "a wider strip": (lambda m, y: padded(m, y, width=2), 1, 2),
    "another padding": (lambda m, y: padded(m, y, sides=(1, 2, 1, 1)), 1, 2),
    "read before it is written": (read_too_early, 1, 2),
    "a first conv with a window": (padded, 3, 2),
    "copied": (copied, 1, 1),
    "copied after a read": (lambda m, y: copied(m, y, read_between=True), 1, 2),
    "copied, and read afterwards": (lambda m, y: copied(m, y, kept=True), 1, 2),
    "scattered": (scattered, 1, 1),
    "scattered, and a copy read": (lambda m, y: scattered(m, y, read=True), 1, 2),
    "scattered to another place": (lambda m, y: scattered(m, y, end=-1), 1, 2),
}


@pytest.mark.parametrize("name", BORDERS)
def test_only_a_border_that_is_the_bias_moves_in_front(name: str) -> None:
    torch.manual_seed(0)
    border, size, convs = BORDERS[name]
    model = Bordered(border, size).double().eval()
    bias: Any = model.first.bias
    model.register_buffer("value", bias.detach().clone().view(1, -1, 1, 1))
    fused = repfx.fuse(model)
    assert_equivalent(fused, model, X)
    assert sum(map(is_conv, fused.modules())) == convs, str(repfx.report(fused))


# ---- spellings


def index(axis: int, part: slice | int, dimensions: int) -> tuple[slice | int, ...]:
    """Return an index that is `part` along one spatial axis."""
    parts: list[slice | int] = [slice(None)] * (dimensions + 2)
    parts[axis + 2] = part
    return tuple(parts)


def by_strips(y: Any, value: Any, dimensions: int) -> Any:
    y = F.pad(y, (1,) * 2 * dimensions)
    for axis in range(dimensions):
        y[index(axis, slice(0, 1), dimensions)] = value
        y[index(axis, slice(-1, None), dimensions)] = value
    return y


def by_ellipsis(y: Any, value: Any, dimensions: int) -> Any:
    y = F.pad(y, (1,) * 2 * dimensions)
    for axis in range(dimensions):
        behind = (slice(None),) * (dimensions - axis - 1)
        y[(..., slice(1), *behind)] = value
        y[(..., slice(-1, None), *behind)] = value
    return y


def by_number(y: Any, value: Any, dimensions: int) -> Any:
    y = F.pad(y, (1,) * 2 * dimensions)
    for axis in range(dimensions):
        y[index(axis, 0, dimensions)] = value[..., 0]
        y[index(axis, -1, dimensions)] = value[..., 0]
    return y


def by_expansion(y: Any, value: Any, dimensions: int) -> Any:
    sizes = [y.size(axis) for axis in range(dimensions + 2)]
    for axis in range(2, dimensions + 2):
        shape = [sizes[0], -1, *sizes[2:]]
        shape[axis] = 1
        strip = value.expand(*shape)
        y = torch.cat([strip, y, strip], dim=axis)
        sizes[axis] = sizes[axis] + 2
    return y


def by_repetition(y: Any, value: Any, dimensions: int) -> Any:
    for axis in range(2, dimensions + 2):
        shape = [y.shape[other] for other in range(dimensions + 2)]
        shape[1], shape[axis] = 1, 1
        y = torch.concat((value.repeat(shape), y, value.repeat(shape)), axis - dimensions - 2)
    return y


SPELLINGS: dict[str, Callable[[Any, Any, int], Any]] = {
    "strips": by_strips,
    "strips by ellipsis": by_ellipsis,
    "strips by number": by_number,
    "expanded": by_expansion,
    "repeated": by_repetition,
}
CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = {1: (2, 4, 11), 2: (2, 4, 6, 9), 3: (1, 4, 4, 5, 6)}


def of_bias(m: Any, x: Any) -> Any:
    return m.spelling(m.first(x), m.first.bias.view(1, -1, *(1,) * m.dimensions), m.dimensions)


def of_norm(m: Any, x: Any) -> Any:
    norm = m.norm
    value = norm.bias.data - norm.running_mean * norm.weight.data / torch.sqrt(norm.running_var + norm.eps)
    return m.spelling(norm(m.first(x)), value.view(1, -1, *(1,) * m.dimensions), m.dimensions)


def bordered_net(forward: Callable[[Any, Any], Any], spelling: str, dimensions: int, **options: Any) -> Net:
    layers = {
        "first": CONVS[dimensions](4, 6, 1, bias="norm" not in forward.__name__),
        "norm": NORMS[dimensions](6),
        "second": CONVS[dimensions](6, 4, 3, **options),
    }
    return Net(forward, **layers, spelling=SPELLINGS[spelling], dimensions=dimensions)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("border", [of_bias, of_norm])
def test_each_spelling_of_a_border_moves_in_front(
    border: Callable[[Any, Any], Any], spelling: str, dimensions: int
) -> None:
    more: dict[int, dict[str, Any]] = {1: {"stride": 2}, 2: {}, 3: {"bias": False}}
    model = bordered_net(lambda m, x: m.second(border(m, x)), spelling, dimensions, **more[dimensions])
    if border is of_norm:
        model.first = CONVS[dimensions](4, 6, 1, bias=False, groups=2)
    fused = fused_exactly(model, image(*SIZES[dimensions]))
    assert sum(map(is_conv, fused.modules())) == 1, reasons(fused)


def of_norm_alone(m: Any, x: Any) -> Any:
    norm, y = m.norm, F.leaky_relu(m.first(x), 0.2)
    value = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
    return m.spelling(norm(y), value.view(1, -1, *(1,) * m.dimensions) * m.factor, m.dimensions)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("spelling", ["strips", "strips by ellipsis", "strips by number"])
@pytest.mark.parametrize(("factor", "left"), [(1.0, 0), (1.5, 1)])
def test_a_norm_alone_with_a_border_is_folded_into_the_conv_behind(
    factor: float, left: int, spelling: str, dimensions: int
) -> None:
    more: dict[int, dict[str, Any]] = {1: {"stride": 2}, 2: {"groups": 2}, 3: {"bias": False}}
    model: Any = bordered_net(lambda m, x: m.second(of_norm_alone(m, x)), spelling, dimensions, **more[dimensions])
    model.factor = factor
    fused = fused_exactly(model, image(*SIZES[dimensions]))
    norms = [module for module in fused.modules() if is_batch_norm(module)]
    assert (len(norms), sum(map(is_conv, fused.modules()))) == (left, 2), reasons(fused)


def test_what_is_squeezed_keeps_a_norm_with_a_border() -> None:
    """Squeezing looks for regions in a copy without numbers."""
    model: Any = bordered_net(lambda m, x: m.second(of_norm_alone(m, x)), "strips", 2)
    model.factor = 1.0
    x = image(*SIZES[2])
    expanded = repfx.expand(model.double().eval(), "repvgg")
    assert torch.allclose(repfx.squeeze(expanded, statistics="frozen")(x), model(x), rtol=1e-12, atol=1e-12)


def of_norm_read_twice(m: Any, x: Any) -> Any:
    padded = of_norm_alone(m, x)
    return m.second(padded) + padded.mean()


def of_norm_read_without_its_border(m: Any, x: Any) -> Any:
    norm, y = m.norm, F.relu(m.first(x))
    value = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
    y = norm(y)
    return m.second(m.spelling(y, value.view(1, -1, 1, 1), 2)) + y.mean()


def of_norm_padded_again(m: Any, x: Any) -> Any:
    return m.second(F.pad(of_norm_alone(m, x), (1, 0, 0, 1)))


@pytest.mark.parametrize("spelling", ["strips", "expanded"])
@pytest.mark.parametrize("forward", [of_norm_read_twice, of_norm_read_without_its_border, of_norm_padded_again])
def test_a_norm_with_a_border_stays_where_others_read_it(forward: Callable[[Any, Any], Any], spelling: str) -> None:
    model: Any = bordered_net(forward, spelling, 2)
    model.factor = 1.0
    fused = fused_exactly(model, image(*SIZES[2]))
    assert sum(map(is_batch_norm, fused.modules())) == 1, reasons(fused)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("spelling", ["strips", "expanded"])
def test_what_reads_the_picture_without_its_border_still_finds_it(spelling: str, dimensions: int) -> None:
    """RT4KSR and RepSR add the picture to the output of the conv that reads it with its border."""

    def forward(m: Any, x: Any) -> Any:
        y = m.first(x)
        value = m.first.bias.view(1, -1, *(1,) * m.dimensions)
        return m.third(m.second(m.spelling(y, value, m.dimensions)) + y) + x

    model = bordered_net(forward, spelling, dimensions)
    model.second, model.third = CONVS[dimensions](6, 6, 3), CONVS[dimensions](6, 4, 1)
    fused = fused_exactly(model, image(*SIZES[dimensions]))
    assert sum(map(is_conv, fused.modules())) == 1, reasons(fused)


def test_the_size_of_the_picture_is_that_without_its_border() -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.first(x)
        return m.second(by_strips(y, m.first.bias.view(1, -1, 1, 1), 2)) + y.shape[2] + y.amax()

    fused_exactly(bordered_net(forward, "strips", 2), image(*SIZES[2]))


def with_number(m: Any, y: Any) -> Any:
    return m.second(F.pad(y, (1, 1, 1, 1), value=0.5))


def with_layer(m: Any, y: Any) -> Any:
    return m.second(m.pad(y))


@pytest.mark.parametrize("border", [with_number, with_layer])
@pytest.mark.parametrize(("shift", "left"), [(0.5, 1), (0.25, 2)])
def test_padding_with_the_number_that_all_channels_have(
    border: Callable[[Any, Any], Any], shift: float, left: int
) -> None:
    model = Net(
        lambda m, x: border(m, m.first(x) + shift),
        first=nn.Conv2d(4, 6, 1, bias=False),
        pad=nn.ConstantPad2d(1, 0.5),
        second=nn.Conv2d(6, 4, 3, stride=2),
    )
    fused = fused_exactly(model, image(*SIZES[2]))
    assert sum(map(is_conv, fused.modules())) == left, reasons(fused)


def bias_read_outside(m: Any, x: Any) -> Any:
    return m.second(of_bias(m, x)) + m.first.bias.sum()


def weight_read_outside(m: Any, x: Any) -> Any:
    return m.second(of_bias(m, x)) * m.first.weight.mean()


def changed_in_place(m: Any, x: Any) -> Any:
    y = m.first(x)
    y.add_(1)
    return m.second(m.spelling(y, m.first.bias.view(1, -1, 1, 1), 2))


def changed_behind_its_back(m: Any, x: Any) -> Any:
    y = m.first(x)
    y[:, :, 1:3] = 0
    return m.second(m.spelling(y, m.first.bias.view(1, -1, 1, 1), 2)) + y


def of_the_input(m: Any, x: Any) -> Any:
    return m.second(m.spelling(m.first(x), m.first.bias.view(1, -1, 1, 1) + x[:1, :1, :1, :1], 2))


def of_another_conv(m: Any, x: Any) -> Any:
    return m.second(m.spelling(m.first(x), m.norm.bias.view(1, -1, 1, 1), 2))


STAYS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "a bias that is read elsewhere": (bias_read_outside, "its parameters are read elsewhere"),
    "a weight that is read elsewhere": (weight_read_outside, "its parameters are read elsewhere"),
    "changed in place": (changed_in_place, "its parameters are read elsewhere"),
    "changed behind its back": (changed_behind_its_back, ""),
    "of the input": (of_the_input, "its parameters are read elsewhere"),
    "of another layer": (of_another_conv, ""),
}


@pytest.mark.parametrize("spelling", ["strips", "expanded"])
@pytest.mark.parametrize("name", STAYS)
def test_another_border_stays(name: str, spelling: str) -> None:
    forward, reason = STAYS[name]
    model = bordered_net(forward, spelling, 2)
    model.second = nn.Conv2d(6, 6, 3, padding=0)
    fused = fused_exactly(model, image(*SIZES[2]))
    assert sum(map(is_conv, fused.modules())) == 2
    assert reason in reasons(fused)


def test_channels_that_are_repeated_are_no_border_of_each_channel() -> None:
    def forward(m: Any, x: Any) -> Any:
        y, v = m.first(x), m.first.bias[:3].view(1, -1, 1, 1)
        strip = v.repeat(2, 2, 1, 9)
        return m.second(torch.cat([strip, y, strip], 2))

    fused = fused_exactly(bordered_net(forward, "strips", 2), image(*SIZES[2]))
    assert sum(map(is_conv, fused.modules())) == 2


def test_indices_have_one_entry_for_each_axis() -> None:
    whole = slice(None)
    assert whole_index((..., 0), 3) == (whole, whole, 0)
    assert whole_index((0,), 2) == (0, whole)
    assert whole_index((0, ..., 1), 2) == (0, 1)
    assert [whole_index(bad, 2) for bad in (0, (0, 0, 0), (..., ...), (None, 0))] == [None] * 4
