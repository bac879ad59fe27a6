"""A channel of ones beside the input: the same map, with its bias as a weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.ones import bias_on_ones, with_ones
from repfx.testing import relative_error
from tests.random_numbers import numbers_from


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=numbers_from(sum(shape)))


def beside_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


@given(
    dimensions=st.integers(1, 3),
    size=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    padding=st.tuples(st.integers(-1, 4), st.integers(-1, 4)),
    groups=st.sampled_from([1, 2]),
)
def test_the_bias_becomes_a_weight_where_a_tap_stays_inside(
    dimensions: int, size: int, stride: int, dilation: int, padding: tuple[int, int], groups: int
) -> None:
    weight, bias = random(6, 4 // groups, *[size] * dimensions), random(6)
    all_axes = [(each,) * dimensions for each in (stride, dilation)]
    kernel = Kernel(weight, bias, all_axes[0], (padding,) * dimensions, all_axes[1], groups)
    x = random(2, 4, *(11, 13, 12)[:dimensions])
    wide = with_ones(kernel)
    assert wide.in_channels == 5
    moved = bias_on_ones(wide)
    inside = any(t * dilation >= padding[0] and (size - 1 - t) * dilation >= padding[1] for t in range(size))
    assert (moved.bias is None) == inside
    for each in (wide, moved):
        assert relative_error(each(beside_ones(x)), kernel(x)) < 1e-13
    form = bias_on_ones(with_ones(kernel.to("meta")))
    assert (form.weight.shape, form.bias is None) == (moved.weight.shape, inside)


def test_a_transposed_kernel_takes_no_ones() -> None:
    kernel = Kernel(random(4, 6, 3), random(6), (2,), ((1, 1),), (1,), transposed=True, output_padding=(0,))
    with pytest.raises(NoKernel, match="transposed"):
        with_ones(kernel)
