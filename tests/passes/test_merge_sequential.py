"""A chain of convs is divided as a whole, so that the convs that are left cost the least."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import repfx
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.cost import weights
from repfx.algebra.layers import is_conv
from repfx.testing import randomize_batch_norm, relative_error
from tests.random_numbers import numbers_from

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def picture(channels: int, dimensions: int = 2) -> Tensor:
    return torch.randn(2, channels, *(7, 9, 6)[:dimensions], dtype=torch.float64, generator=numbers_from(0))


def fused(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """Fuse a model, and check that it computes what it did."""
    model = randomize_batch_norm(model.double()).eval()
    result: nn.Module = repfx.fuse(model, **options)
    assert relative_error(result(x), model(x)) < 1e-10
    return result


def windows(model: nn.Module) -> list[str]:
    return [str(ConvSpec.of(conv)) for conv in model.modules() if is_conv(conv)]


def triple(dimensions: int, narrow: int = 6, wide: int = 36) -> list[nn.Module]:
    conv = CONVS[dimensions]
    depthwise = conv(wide, wide, 3, padding=1, groups=wide)
    return [conv(narrow, wide, 1, bias=False), depthwise, conv(wide, narrow, 1)]


@pytest.mark.parametrize("dimensions", CONVS)
def test_three_become_one_where_no_two_of_them_would(dimensions: int) -> None:
    convs = triple(dimensions)
    for pair in (convs[:2], convs[1:]):
        x = picture(pair[0].in_channels, dimensions)  # type: ignore[arg-type]
        assert len(windows(fused(nn.Sequential(*pair), x))) == 2
    assert len(windows(fused(nn.Sequential(*convs), picture(6, dimensions)))) == 1


@pytest.mark.parametrize("dimensions", CONVS)
def test_batch_norms_between_them_are_folded_first(dimensions: int) -> None:
    first, second, third = triple(dimensions)
    norms = [NORMS[dimensions](channels) for channels in (36, 6)]
    model = nn.Sequential(first, second, norms[0], third, norms[1], nn.ReLU())
    assert windows(fused(model, picture(6, dimensions))) == ["×".join("3" * dimensions) + " 6→6"]


def test_a_wider_middle_stays_three() -> None:
    assert len(windows(fused(nn.Sequential(*triple(2, narrow=36, wide=6)), picture(36)))) == 3


def test_a_pair_that_costs_nothing_does_not_keep_a_better_one_apart() -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 100, 1))
    assert windows(fused(model, picture(8))) == ["1×1 8→4", "1×1 4→100"]


def test_the_steps_may_be_squeezed() -> None:
    model = nn.Sequential(*triple(2), nn.ReLU(), nn.Conv2d(6, 4, 1)).double()
    x = picture(6)
    before = model(x)
    repfx.squeeze(model)
    assert relative_error(model(x), before) < 1e-10
    model(x).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in model.parameters())


def test_a_conv_that_others_read_ends_a_chain() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = triple(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.first(x))
            z: Tensor = self.third(y).relu() + y.mean()
            return z

    result = fused(Reads(), picture(6))
    assert len(windows(result)) == 3
    assert "has a second user" in str(repfx.report(result).stays)


# ---- a bias in front of zero padding


def bottleneck(dimensions: int, wide: int = 36, **options: Any) -> nn.Sequential:
    """1×1 with a bias → depthwise 3×3 with padding → 1×1, each with a BatchNorm."""
    conv, norm = CONVS[dimensions], NORMS[dimensions]
    depthwise = conv(wide, wide, 3, groups=wide, **{"padding": 1, **options})
    layers = [conv(6, wide, 1), norm(wide), depthwise, norm(wide), conv(wide, 6, 1), norm(6)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """A bottleneck in a residual block, behind a nonlinearity."""

    def __init__(self, dimensions: int = 2) -> None:
        super().__init__()
        self.first, self.body = CONVS[dimensions](6, 6, 3), bottleneck(dimensions)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y: Tensor = x + self.body(x)
        return y.relu()


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"padding": 3}])
@pytest.mark.parametrize("dimensions", CONVS)
def test_a_bias_passes_zero_padding_on_a_channel_of_ones(dimensions: int, options: dict[str, int]) -> None:
    result = fused(bottleneck(dimensions, **options), picture(6, dimensions))
    assert [each.split()[1] for each in windows(result)] == ["7→6"]
    assert len(windows(fused(result, picture(6, dimensions)))) == 1
    convs = nn.Sequential(*bottleneck(dimensions, **options)[::2])
    assert [each.split()[1] for each in windows(fused(convs, picture(6, dimensions)[0]))] == ["7→6"]


@pytest.mark.parametrize("dimensions", CONVS)
def test_ones_inside_a_residual_block(dimensions: int) -> None:
    result = fused(Residual(dimensions), picture(6, dimensions))
    assert [each.split()[1] for each in windows(result)] == ["6→6", "7→6"]


def test_no_ones_where_nothing_needs_them() -> None:
    padded = nn.Sequential(nn.ZeroPad2d(1), *bottleneck(2, padding=0))
    assert windows(fused(padded, picture(6))) == ["3×3 6→6"]
    assert windows(fused(bottleneck(2, padding_mode="reflect"), picture(6))) == ["3×3 6→6 reflect"]


def test_the_weights_on_the_ones_count() -> None:
    """Three convs with 16 channels inside have 336 weights. One conv has 324, and with a channel of ones it has 378."""
    without: list[Any] = [layer for layer in bottleneck(2, wide=16) if is_conv(layer)]
    without[0].bias = None
    assert windows(fused(nn.Sequential(*without), picture(6))) == ["3×3 6→6"]
    assert len(windows(fused(bottleneck(2, wide=16), picture(6)))) == 3


def test_a_bias_of_each_conv_in_front() -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 36, 1), *list(bottleneck(2))[2:])
    assert windows(fused(model, picture(6))) == ["3×3 7→6"]


def test_the_cost_is_told_of_the_ones() -> None:
    def cost(conv: ConvSpec, shape: Any) -> float:
        seen.setdefault(str(conv), shape)
        return weights(conv)

    seen: dict[str, Any] = {}
    x = picture(6)
    fused(bottleneck(2), x, example=x, cost=cost)
    assert seen["3×3 7→6"] == (2, 7, 7, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ones_have_the_dtype_of_the_picture(dtype: torch.dtype) -> None:
    model = randomize_batch_norm(bottleneck(2)).eval().to(dtype)
    x = picture(6).to(dtype).to(memory_format=torch.channels_last)
    result = repfx.fuse(model)
    assert result(x).dtype == dtype
    assert result(x).is_contiguous(memory_format=torch.channels_last)
    assert relative_error(result(x).double(), model.double()(x.double())) < 0.1


def test_a_sequence_that_code_may_index_gets_no_ones() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = bottleneck(2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x) if float(x.sum()) < 1e9 else x
            return y

    result: Any = fused(Around(), picture(6))
    assert len(windows(result)) == 3
    assert isinstance(result.body[0], nn.Conv2d)


def test_a_squeezed_region_reads_its_input_alone() -> None:
    model = randomize_batch_norm(Residual().double()).eval()
    x = picture(6)
    before = model(x)
    repfx.squeeze(model, statistics="frozen")
    assert relative_error(model(x), before) < 1e-10


def test_what_was_merged_with_ones_trains_again() -> None:
    """Restored, the conv with the channel of ones has a BatchNorm behind it."""
    model, x = randomize_batch_norm(Residual().double()).eval(), picture(6)
    restored = repfx.restore(repfx.fuse(model))
    assert relative_error(restored.eval()(x), model(x)) < 1e-10
    assert [type(each) for each in restored.modules()].count(nn.BatchNorm2d) == 1


def test_a_long_chain_becomes_few_convs() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 4, 1) for _ in range(40)]
    assert len(windows(fused(nn.Sequential(*convs), picture(4)))) == 1


@pytest.mark.slow
@given(st.lists(st.integers(1, 9), min_size=3, max_size=6))
def test_no_other_division_has_fewer_weights(channels: list[int]) -> None:
    """1×1 convs: any of them in a row make one, so every division can be counted."""
    pairs = list(itertools.pairwise(channels))
    model = nn.Sequential(*(nn.Conv2d(ins, outs, 1) for ins, outs in pairs))
    left = sum(weights(ConvSpec.of(conv)) for conv in fused(model, picture(channels[0])).modules() if is_conv(conv))
    inside = range(1, len(pairs))
    divisions = (cuts for count in range(len(pairs)) for cuts in itertools.combinations(inside, count))
    ends = ([channels[0], *(channels[cut] for cut in cuts), channels[-1]] for cuts in divisions)
    assert left == min(sum(ins * outs for ins, outs in itertools.pairwise(each)) for each in ends)


# ---- another cost


def test_the_cost_decides() -> None:
    def convs(conv: ConvSpec, shape: Any) -> float:
        return 1

    def positions(conv: ConvSpec, shape: Any) -> float:
        seen.append(shape)
        return weights(conv) if conv.is_pointwise else 1e9

    seen: list[Any] = []
    model, x = nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 3)), picture(8)
    assert windows(fused(model, x)) == ["1×1 8→2", "3×3 2→8"]
    assert windows(fused(model, x, cost=convs)) == ["3×3 8→8"]
    assert len(windows(fused(nn.Sequential(*triple(2)), picture(6), cost=positions))) == 1
    assert seen
    assert not any(seen)


def test_the_cost_is_told_the_shape_of_each_input() -> None:
    def cost(conv: ConvSpec, shape: Any) -> float:
        seen[str(conv)] = shape
        return weights(conv)

    seen: dict[str, Any] = {}
    strided = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.ReLU(), strided, nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 11, 14, dtype=torch.float64, generator=numbers_from(0))
    fused(model, x, example=x, cost=cost)
    assert seen["3×3 4→8 stride 2×2"] == (2, 4, 7, 10)
    assert seen["1×1 8→4"] == (2, 8, 4, 5)
    assert seen["3×3 4→4 stride 2×2"] == (2, 4, 7, 10)


def test_a_cost_decides_on_sums_but_not_on_folding() -> None:
    def dear(conv: ConvSpec, shape: Any) -> float:
        return 0 if conv.is_pointwise else 1e6

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.point, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.wide(x) + self.point(x))
            return y

    assert windows(fused(Block(), picture(4))) == ["3×3 4→4"]
    assert len(windows(fused(Block(), picture(4), cost=lambda conv, shape: -weights(conv)))) == 2
    assert windows(fused(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), picture(4), cost=dear)) == ["3×3 4→4"]
