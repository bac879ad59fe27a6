"""Hypothesis strategies for authors of branch kinds and passes: random convs, as modules, as sizes and as kernels.

Nothing in repfx imports this module, and it alone needs Hypothesis. Everything is float64, so that a test may ask for 1e-9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Ints, Kernel, Padding
from repfx.algebra.layers import CONVS

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_CHANNELS = (1, 2, 3, 4, 6)
_LARGEST_WINDOW = {0: 0, 1: 4, 2: 4, 3: 2}


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int]) -> Tensor:
    """Draw normal numbers in float64. Hypothesis draws and shrinks the seed alone.

    >>> from hypothesis import find
    >>> find(tensors((2, 3)), lambda drawn: bool((drawn > 1).any())).dtype
    torch.float64
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**16)))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


@st.composite
def conv_specs(
    draw: st.DrawFn,
    *,
    dimensions: int | None = None,
    in_channels: int | None = None,
    out_channels: int | None = None,
    stride: Ints | None = None,
    reach: Ints | None = None,
    padding_modes: Sequence[str] = PADDING_MODES,
) -> ConvSpec:
    """Draw the sizes of a conv in 1 to 3 dimensions.

    They have even and rectangular windows, any stride, dilation and groups, uneven and negative padding.

    Args:
        dimensions: number of dimensions. 0 is a linear layer, which is drawn only if it is asked for.
        in_channels, out_channels, stride: fixed values; None draws them.
        reach: padding minus the extent of the window, per axis. Convs of equal reach and stride have outputs of equal size.
        padding_modes: padding modes to draw from.
    """
    if dimensions is None:
        dimensions = draw(st.integers(1, 3)) if stride is None else len(stride)
    source = draw(st.sampled_from(_CHANNELS)) if in_channels is None else in_channels
    target = draw(st.sampled_from((source, 2 * source, *_CHANNELS))) if out_channels is None else out_channels
    window = draw(_per_axis(dimensions, 1, _LARGEST_WINDOW[dimensions]))
    dilation = draw(_per_axis(dimensions, 1, 3 if dimensions < 3 else 2))
    padding = draw(_paddings(window, dilation, reach))
    return ConvSpec(
        source,
        target,
        window,
        draw(_per_axis(dimensions, 1, 3)) if stride is None else stride,
        padding,
        dilation,
        draw(_divisors(math.gcd(source, target))),
        draw(st.sampled_from(padding_modes)),
    )


def _per_axis(dimensions: int, low: int, high: int) -> st.SearchStrategy[Ints]:
    return st.tuples(*[st.integers(low, high)] * dimensions)


def _divisors(number: int) -> st.SearchStrategy[int]:
    return st.sampled_from([divisor for divisor in range(1, number + 1) if number % divisor == 0])


@st.composite
def _paddings(draw: st.DrawFn, window: Ints, dilation: Ints, reach: Ints | None) -> Padding:
    padding = []
    for axis, (k, d) in enumerate(zip(window, dilation)):
        extent = d * (k - 1)
        before = draw(st.integers(-1, min(extent + 1, 4)))
        after = draw(st.integers(-1, min(extent + 1, 4))) if reach is None else reach[axis] + extent - before
        padding.append((before, after))
    return tuple(padding)


@st.composite
def kernels(
    draw: st.DrawFn,
    *,
    dimensions: int | None = None,
    in_channels: int | None = None,
    out_channels: int | None = None,
    stride: Ints | None = None,
    reach: Ints | None = None,
    padding_modes: Sequence[str] = PADDING_MODES,
    bias: bool | None = None,
) -> Kernel:
    """Draw a `Kernel` of 0 to 3 dimensions, with or without bias unless `bias` decides. See `conv_specs` for the other arguments."""
    if dimensions is None:
        dimensions = draw(st.sampled_from((2, 1, 3, 0))) if stride is None else len(stride)
    sizes = draw(
        conv_specs(
            dimensions=dimensions,
            in_channels=in_channels,
            out_channels=out_channels,
            stride=stride,
            reach=reach,
            padding_modes=padding_modes,
        )
    )
    if dimensions == 0:
        sizes = replace(sizes, padding_mode="zeros")
    weight = draw(tensors((sizes.out_channels, sizes.in_channels // sizes.groups, *sizes.kernel_size)))
    with_bias = draw(st.booleans()) if bias is None else bias
    return Kernel(
        weight,
        draw(tensors((sizes.out_channels,))) if with_bias else None,
        sizes.stride,
        sizes.padding,
        sizes.dilation,
        sizes.groups,
        sizes.padding_mode,
    )


@st.composite
def transposed_kernels(draw: st.DrawFn) -> Kernel:
    """Draw the `Kernel` of a transposed convolution of 1 to 3 dimensions, in groups or not, with any output padding that torch takes."""
    dimensions = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    source, target = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    window = draw(_per_axis(dimensions, 1, 3))
    stride, dilation = draw(_per_axis(dimensions, 1, 3)), draw(_per_axis(dimensions, 1, 2))
    # torch needs an output padding below the stride or the dilation
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
    cut = tuple(draw(st.integers(0, d * (k - 1) // 2)) for d, k in zip(dilation, window))
    return Kernel(
        draw(tensors((source, target // groups, *window))),
        draw(st.one_of(st.none(), tensors((target,)))),
        stride,
        tuple((side, side) for side in cut),
        dilation,
        groups,
        transposed=True,
        output_padding=more,
    )


@st.composite
def conv_modules(
    draw: st.DrawFn, *, dimensions: int | None = None, padding_modes: Sequence[str] = PADDING_MODES
) -> nn.Module:
    """Draw an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` in float64; padding may be torch's ``same`` or ``valid``."""
    sizes = draw(conv_specs(dimensions=dimensions, padding_modes=padding_modes))
    named = draw(st.sampled_from((None, "same", "valid")))
    # torch refuses the padding `same` for a conv with a stride
    stride = (1,) * sizes.dimensions if named == "same" else sizes.stride
    conv = CONVS[sizes.dimensions - 1](
        sizes.in_channels,
        sizes.out_channels,
        sizes.kernel_size,
        stride,
        named or tuple(max(before, 0) for before, _ in sizes.padding),
        sizes.dilation,
        sizes.groups,
        draw(st.booleans()),
        sizes.padding_mode,
        dtype=torch.float64,
    )
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(draw(tensors(parameter.shape)))
    return conv


def smallest_input(kernel: Kernel | ConvSpec, least: Ints | None = None) -> Ints:
    """Return the smallest input sizes, per axis, for which a conv gives an output of `least`, by default 1.

    >>> site = ConvSpec(1, 1, (3,), (2,), ((1, 1),), (1,))
    >>> smallest_input(site), smallest_input(site, (4,)), smallest_input(replace(site, padding_mode="reflect"))
    ((1,), (7,), (2,))
    """
    sizes = []
    for axis, (before, after) in enumerate(kernel.padding):
        reach = before + after - kernel.dilation[axis] * (kernel.kernel_size[axis] - 1)
        wanted = (least[axis] - 1 if least else 0) * kernel.stride[axis] + 1 - reach
        longest = max(before, after, 0)
        seen = {"zeros": 1, "replicate": 1, "circular": longest, "reflect": longest + 1}[kernel.padding_mode]
        sizes.append(max(wanted, seen, 1))
    return tuple(sizes)


@st.composite
def inputs_for(draw: st.DrawFn, *needs: Kernel | ConvSpec | Ints, channels: int) -> Tensor:
    """Draw a batch of two inputs that each of `needs`, convs or sizes, takes. No two spatial axes are equally long."""
    least = [need if isinstance(need, tuple) else smallest_input(need) for need in needs]
    sizes: list[int] = []
    for wanted in zip(*least):
        size = max(wanted) + draw(st.integers(0, 3))
        while size in sizes:
            size += 1
        sizes.append(size)
    return draw(tensors((2, channels, *sizes)))
