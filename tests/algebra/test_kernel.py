"""The laws of the algebra: a kernel made of others computes what they compute, borders included; what can't be one kernel is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repfx.algebra.kernel import Kernel, NoKernel, is_symmetric, pad
from repfx.algebra.layers import Layer
from repfx.algebra.meaning import kernel_of
from repfx.testing import assert_same_map
from repfx.testing.strategies import (
    PADDING_MODES,
    conv_modules,
    inputs_for,
    kernels,
    smallest_input,
    tensors,
    transposed_kernels,
)
from tests.random_numbers import numbers_from

# torch warns that it copies the input there, which doesn't matter to these tests
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

Law = tuple[st.SearchStrategy[Any], Callable[[Any], None]]
LAWS: dict[str, Law] = {}


def law(cases: st.SearchStrategy[Any]) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a check that holds for all `cases`. `test_law` runs it; test_mutants.py runs it on mistakes, where it must fail."""

    def register(check: Callable[[Any], None]) -> Callable[[Any], None]:
        LAWS[check.__name__] = (cases, check)
        return check

    return register


@pytest.mark.parametrize("name", LAWS)
def test_law(name: str) -> None:
    cases, check = LAWS[name]
    given(cases)(check)()


# --- Cases: pairs that are never refused, so that a refusal fails too -----------------------------------------------


def input_of(first: Kernel, second: Kernel) -> st.SearchStrategy[Tensor]:
    """An input large enough for `first`, whose output is large enough for `second`."""
    least = smallest_input(first, smallest_input(second))
    return inputs_for(first, least, channels=first.in_channels)


@st.composite
def single(draw: st.DrawFn) -> tuple[Kernel, Tensor]:
    kernel = draw(kernels())
    return kernel, draw(inputs_for(kernel, channels=kernel.in_channels))


@st.composite
def beside(draw: st.DrawFn) -> tuple[Kernel, Kernel, Tensor]:
    """Two kernels that can be added. Their strides and reaches are equal, and if both pad, they pad alike."""
    first = draw(kernels())
    second = draw(
        kernels(
            in_channels=first.in_channels,
            out_channels=first.out_channels,
            stride=first.stride,
            reach=first.reach,
            padding_modes=[first.padding_mode] if first.padded else PADDING_MODES,
        )
    )
    return first, second, draw(inputs_for(first, second, channels=first.in_channels))


@st.composite
def in_turn(draw: st.DrawFn) -> tuple[Kernel, Kernel, Tensor]:
    """Two kernels that can be composed. The first one's padding is derived from what the second one's padding needs."""
    second = draw(kernels())
    bias = False if second.padded and second.padding_mode == "zeros" else None
    first = draw(kernels(dimensions=second.dimensions, out_channels=second.in_channels, bias=bias))
    if draw(st.integers(0, 3)) == 0:
        first = diagonal_like(first)
    if second.padded and second.padding_mode == "zeros":
        first = replace(first, padding_mode="zeros", padding=reaching_out(first, second))
    elif second.padded:
        first = pointwise(first)
    return first, second, draw(input_of(first, second))


def diagonal_like(kernel: Kernel) -> Kernel:
    """A scale per channel with the padding of `kernel`, like a padding module."""
    scale = kernel.weight.flatten(1).sum(1)
    diagonal = Kernel.diagonal(scale, kernel.bias, kernel.dimensions, kernel.padding)
    return replace(diagonal, padding_mode=kernel.padding_mode)


def reaching_out(first: Kernel, second: Kernel) -> tuple[tuple[int, int], ...]:
    """The padding of `first`, enlarged until the output of `first` is zero (without bias) wherever `second` pads."""
    pairs = []
    for axis, ((p, q), (p2, q2)) in enumerate(zip(first.padding, second.padding)):
        extent = first.dilation[axis] * (first.kernel_size[axis] - 1)
        before = max(p, extent - first.stride[axis] + 1) if p2 > 0 else p
        pairs.append((before, max(q, extent) if q2 > 0 else q))
    return tuple(pairs)


def pointwise(kernel: Kernel) -> Kernel:
    ones = (1,) * kernel.dimensions
    taps = kernel.weight.flatten(2)[..., 0].reshape(*kernel.weight.shape[:2], *ones)
    return replace(kernel, weight=taps, stride=ones, padding=((0, 0),) * kernel.dimensions)


@st.composite
def with_affine(draw: st.DrawFn, channels_of: str) -> tuple[Kernel, Tensor, Tensor | None, Tensor]:
    """A kernel, transposed or not, with a scale and a shift of its ``in_channels`` or ``out_channels``."""
    kernel = draw(st.one_of(kernels(), transposed_kernels()))
    channels = getattr(kernel, channels_of)
    scale = draw(tensors((channels,))) * draw(st.sampled_from((1.0, -2.0, 0.0)))
    shift = draw(st.one_of(st.none(), tensors((channels,))))
    return kernel, scale, shift, draw(inputs_for(taken_by(kernel), channels=kernel.in_channels))


def taken_by(kernel: Kernel) -> tuple[int, ...]:
    return (4,) * kernel.dimensions if kernel.transposed else smallest_input(kernel)


def channelwise(scale: Tensor, shift: Tensor | None, x: Tensor) -> Tensor:
    shape = (-1,) + (1,) * (x.ndim - 2)
    scaled = x * scale.reshape(shape)
    return scaled if shift is None else scaled + shift.reshape(shape)


# --- Laws -----------------------------------------------------------------------------------------------------------


@law(beside())
def add(case: tuple[Kernel, Kernel, Tensor]) -> None:
    a, b, x = case
    assert_same_map(a.add(b), lambda x: a(x) + b(x), x)
    assert_same_map(b.add(a), a.add(b), x)
    before = b.copy()
    assert_same_map(Kernel.sum([a.copy(), b], owned=True), a.add(b), x)
    assert torch.equal(b.weight, before.weight)


def one_after_another(parts: list[Kernel]) -> Callable[[Tensor], Tensor]:
    return lambda x: reduce(torch.add, [part(x) for part in parts])


@law(beside())
def sum_of_several(case: tuple[Kernel, Kernel, Tensor]) -> None:
    """A sum is right whichever part's window holds the others', and with one part several times."""
    a, b, x = case
    before = a.copy(), b.copy()
    for parts in ([a], [a, b], [a, b, a], [b, a, a.negate(), b]):
        assert_same_map(Kernel.sum(parts), one_after_another(parts), x)
    assert torch.equal(a.weight, before[0].weight)
    assert torch.equal(b.weight, before[1].weight)


@law(beside())
def subtract(case: tuple[Kernel, Kernel, Tensor]) -> None:
    a, b, x = case
    assert_same_map(a.subtract(b), lambda x: a(x) - b(x), x)


@law(single())
def negate(case: tuple[Kernel, Tensor]) -> None:
    kernel, x = case
    assert_same_map(kernel.negate(), lambda x: -kernel(x), x)
    assert_same_map(kernel.scaled(0.3), lambda x: 0.3 * kernel(x), x)


@law(in_turn())
def compose(case: tuple[Kernel, Kernel, Tensor]) -> None:
    a, b, x = case
    event(f"{'padded' if b.padded else 'unpadded'} second map")
    assert_same_map(a.compose(b), lambda x: b(a(x)), x)


@law(with_affine("out_channels"))
def fold_affine(case: tuple[Kernel, Tensor, Tensor | None, Tensor]) -> None:
    kernel, scale, shift, x = case
    assert_same_map(kernel.fold_affine(scale, shift), lambda x: channelwise(scale, shift, kernel(x)), x)
    if kernel.dimensions:
        affine = Kernel.diagonal(scale, shift, kernel.dimensions)
        assert_same_map(kernel.compose(affine), lambda x: affine(kernel(x)), x)


@law(with_affine("in_channels"))
def fold_affine_before(case: tuple[Kernel, Tensor, Tensor | None, Tensor]) -> None:
    kernel, scale, shift, x = case
    between = kernel.transposed or (kernel.padded and kernel.padding_mode == "zeros")
    if between and shift is not None:
        event("a shift that would not reach the border")
        with pytest.raises(NoKernel, match="does not reach the border"):
            kernel.fold_affine_before(scale, shift)
        shift = None
    folded = kernel.fold_affine_before(scale, shift)
    assert_same_map(folded, lambda x: kernel(channelwise(scale, shift, x)), x)
    composed = Kernel.diagonal(scale, shift, kernel.dimensions).compose(kernel)
    assert_same_map(composed, folded, x)


@st.composite
def several(draw: st.DrawFn) -> tuple[list[Kernel], Tensor]:
    first, second, x = draw(beside())
    modes = [first.padding_mode if first.padded else second.padding_mode]
    third = draw(kernels(in_channels=first.in_channels, stride=first.stride, reach=first.reach, padding_modes=modes))
    needs = (first, second, third)
    return [first, second, third], draw(inputs_for(*needs, channels=x.shape[1]))


@law(several())
def concat(case: tuple[list[Kernel], Tensor]) -> None:
    parts, x = case
    whole = Kernel.concat(parts)
    assert_same_map(whole, lambda x: torch.cat([part(x) for part in parts], 1), x)
    end = sum(part.out_channels for part in parts)
    last = whole.slice_channels(end - parts[-1].out_channels, end)
    assert_same_map(last, parts[-1], x)


@law(st.tuples(single(), st.integers(0, 5), st.integers(1, 6)))
def slice_channels(case: tuple[tuple[Kernel, Tensor], int, int]) -> None:
    (kernel, x), start, count = case
    start = start % kernel.out_channels
    stop = min(start + count, kernel.out_channels)
    assert_same_map(kernel.slice_channels(start, stop), lambda x: kernel(x)[:, start:stop], x)


@law(st.tuples(single(), st.integers(1, 3)))
def slice_inputs(case: tuple[tuple[Kernel, Tensor], int]) -> None:
    (kernel, x), size = case
    parts = [(start, min(start + size, kernel.in_channels)) for start in range(0, kernel.in_channels, size)]

    def of_parts(x: Tensor) -> Tensor:
        return torch.stack([kernel.slice_inputs(*part)(x[:, slice(*part)]) for part in parts]).sum(0)

    assert_same_map(replace(kernel, bias=None), of_parts, x)


@st.composite
def to_widen(draw: st.DrawFn) -> tuple[Kernel, Kernel, Tensor]:
    kernel = draw(kernels())
    before, after = (draw(st.tuples(*[st.integers(0, 2)] * kernel.dimensions)) for _ in range(2))
    wide = kernel.widen(before, after)
    assert wide.kernel_size == tuple(b + k + a for b, k, a in zip(before, kernel.kernel_size, after))
    return kernel, wide, draw(inputs_for(kernel, wide, channels=kernel.in_channels))


@law(to_widen())
def widen(case: tuple[Kernel, Kernel, Tensor]) -> None:
    kernel, wide, x = case
    assert wide.reach == kernel.reach
    assert_same_map(wide, kernel, x)


@law(single())
def densify(case: tuple[Kernel, Tensor]) -> None:
    kernel, x = case
    dense = kernel.densify()
    assert dense.dilation == (1,) * kernel.dimensions
    assert_same_map(dense, kernel, x)


@law(single())
def densify_in_part(case: tuple[Kernel, Tensor]) -> None:
    kernel, x = case
    finer = replace(kernel, dilation=tuple(2 * d for d in kernel.dilation), padding=stretched(kernel))
    halved = finer.densify((2,) * kernel.dimensions)
    assert halved.dilation == kernel.dilation
    long = F.interpolate(x, scale_factor=4, mode="nearest") if kernel.dimensions else x
    assert_same_map(halved, finer, long)


def stretched(kernel: Kernel) -> tuple[tuple[int, int], ...]:
    return tuple((p, q + d * (k - 1)) if q >= 0 else (p, q) for (p, q), d, k in _axes_of(kernel))


def _axes_of(kernel: Kernel) -> list[tuple[tuple[int, int], int, int]]:
    return list(zip(kernel.padding, kernel.dilation, kernel.kernel_size))


@law(st.tuples(single(), st.integers(0, 100)))
def regroup(case: tuple[tuple[Kernel, Tensor], int]) -> None:
    (kernel, x), choice = case
    divisors = [groups for groups in range(1, kernel.groups + 1) if kernel.groups % groups == 0]
    groups = divisors[choice % len(divisors)]
    assert kernel.regroup(groups).groups == groups
    assert_same_map(kernel.regroup(groups), kernel, x)
    assert_same_map(kernel.ungroup(), kernel, x)


@law(st.integers(0, 3).flatmap(lambda n: tensors((2, 3, *range(4, 4 + n)))))
def identity(x: Tensor) -> None:
    kernel = Kernel.identity(x, channels=3, dimensions=x.ndim - 2)
    assert kernel.is_channelwise_affine
    assert torch.equal(kernel(x), x)


@law(single())
def diagonal(case: tuple[Kernel, Tensor]) -> None:
    kernel, x = case
    if kernel.dimensions:
        x = F.pad(x, (4, 4) * kernel.dimensions)
    scale = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)
    map_ = Kernel.diagonal(scale, None, kernel.dimensions, kernel.padding)
    map_ = replace(map_, padding_mode=kernel.padding_mode)
    assert_same_map(map_, lambda x: channelwise(scale, None, pad(x, kernel.padding, kernel.padding_mode)), x)


@st.composite
def pools(draw: st.DrawFn) -> tuple[Layer, Tensor]:
    dimensions = draw(st.integers(1, 3))
    window = draw(st.tuples(*[st.integers(1, 3)] * dimensions))
    padding = tuple(draw(st.integers(0, k // 2)) for k in window)
    stride = draw(st.tuples(*[st.integers(1, 3)] * dimensions))
    area = {} if dimensions == 1 else {"divisor_override": draw(st.sampled_from((None, 1, 5)))}
    pool: type[nn.Module] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dimensions - 1]
    return pool(window, stride, padding, **area), draw(inputs_for(window, channels=3))


@law(pools())
def average_pool(case: tuple[Layer, Tensor]) -> None:
    pool, x = case
    kernel = Kernel.average_pool(
        x,
        channels=3,
        kernel_size=pool.kernel_size,
        stride=pool.stride,
        padding=tuple((side, side) for side in pool.padding),
        area=getattr(pool, "divisor_override", None),
    )
    assert_same_map(kernel, pool, x)


@law(conv_modules().flatmap(lambda conv: st.tuples(st.just(conv), st.integers(12, 14))))
def kernel_of_a_module(case: tuple[Layer, int]) -> None:
    conv, size = case
    x = torch.randn(2, conv.in_channels, *range(size, size + len(conv.kernel_size)), dtype=torch.float64)
    assert_same_map(kernel_of(conv, x, conv.in_channels, x.ndim - 2), conv, x)


@law(st.tuples(transposed_kernels(), st.integers(0, 9)))
def transposed(case: tuple[Kernel, int]) -> None:
    kernel, seed = case
    generator = numbers_from(seed)
    x = torch.randn(2, kernel.in_channels, *range(4, 4 + kernel.dimensions), generator=generator, dtype=torch.float64)
    other = replace(kernel, weight=kernel.weight.flip(0, 1) * 2)
    assert_same_map(kernel.add(other), lambda x: kernel(x) + other(x), x)
    assert_same_map(kernel.subtract(other), lambda x: kernel(x) - other(x), x)
    middle = kernel.out_channels // 2
    if kernel.groups == 1:
        assert_same_map(kernel.slice_channels(middle, middle + 1), lambda x: kernel(x)[:, middle : middle + 1], x)


def windows_like(kernel: Kernel, axis: int) -> list[tuple[int, int, int, int]]:
    """Return taps, padding, dilation and output padding of all small windows whose output is as long."""
    sizes = itertools.product(range(1, 5), range(3), range(1, 4))
    extent = kernel.dilation[axis] * (kernel.kernel_size[axis] - 1)
    extent += kernel.output_padding[axis] - 2 * kernel.padding[axis][0]
    found = ((taps, cut, apart, extent - apart * (taps - 1) + 2 * cut) for taps, cut, apart in sizes)
    return [window for window in found if 0 <= window[3] < max(kernel.stride[axis], window[2])]


@st.composite
def transposed_pairs(draw: st.DrawFn) -> tuple[Kernel, Kernel]:
    """Two transposed convs of one size of input and output, with windows and groups of their own."""
    kernel = draw(transposed_kernels())
    windows = [draw(st.sampled_from(windows_like(kernel, axis))) for axis in range(kernel.dimensions)]
    taps, cut, apart, more = (tuple(sizes) for sizes in zip(*windows))
    groups = draw(st.sampled_from([1, kernel.groups]))
    weight = draw(tensors((kernel.in_channels, kernel.out_channels // groups, *taps)))
    padding = tuple((side, side) for side in cut)
    return kernel, replace(
        kernel, weight=weight, bias=None, padding=padding, dilation=apart, groups=groups, output_padding=more
    )


@law(transposed_pairs())
def add_transposed(pair: tuple[Kernel, Kernel]) -> None:
    kernel, other = pair
    x = torch.randn(2, kernel.in_channels, *range(4, 4 + kernel.dimensions), generator=numbers_from(0)).double()
    assert_same_map(kernel.add(other), lambda x: kernel(x) + other(x), x)
    assert_same_map(other.add(kernel), lambda x: kernel(x) + other(x), x)
    assert_same_map(kernel.ungroup(), kernel, x)


@law(st.tuples(transposed_kernels(), st.integers(1, 3), st.booleans()))
def compose_transposed(case: tuple[Kernel, int, bool]) -> None:
    up, factor, grouped = case
    groups, numbers = up.groups if grouped else 1, numbers_from(1)
    axes, ones = (1,) * up.dimensions, ((0, 0),) * up.dimensions

    def point(ins: int, outs: int, *, bias: bool) -> Kernel:
        weight = torch.randn(outs, ins // groups, *axes, generator=numbers).double()
        shift = torch.randn(outs, generator=numbers).double() if bias else None
        return Kernel(weight, shift, axes, ones, axes, groups)

    before = point(factor * groups, up.in_channels, bias=False)
    behind = point(up.out_channels, factor * groups, bias=True)
    x = torch.randn(2, factor * groups, *range(4, 4 + up.dimensions), generator=numbers).double()
    assert_same_map(before.compose(up), lambda x: up(before(x)), x)
    assert_same_map(before.compose(up).compose(behind), lambda x: behind(up(before(x))), x)


# --- Padding, and what a convolution is: by indices -----------------------------------------------------------------

NOWHERE = -1


def source(mode: str, position: int, size: int) -> int | None:
    """Return the index that padding by `mode` reads for `position`: `NOWHERE` for a zero, None where the mode is undefined."""
    if 0 <= position < size:
        return position
    if mode == "zeros":
        return NOWHERE
    if mode == "replicate":
        return min(max(position, 0), size - 1)
    if mode == "circular":
        return position % size if -size <= position < 2 * size else None
    mirrored = -position if position < 0 else 2 * (size - 1) - position
    return mirrored if 0 <= mirrored < size else None


@given(st.sampled_from(PADDING_MODES), st.integers(6, 8), st.integers(-3, 3), st.integers(-3, 3))
def test_padding_takes_its_values_from_where_torch_says(mode: str, size: int, before: int, after: int) -> None:
    sources = [source(mode, position, size) for position in range(-before, size + after)]
    padded = pad(torch.arange(1, size + 1), ((before, after),), mode)
    assert padded.tolist() == [0 if at is None else at + 1 for at in sources]


def is_convolution(map_: Callable[[Tensor], Tensor], size: int, stride: int) -> bool:
    """Whether a map of one channel along one axis is one convolution: any padding, any window up to `size`, one bias.

    Its matrix must be a sum of matrices that read at one fixed offset from each output's position.
    """
    constant = map_(torch.zeros(1, 1, size, dtype=torch.float64)).flatten()
    if (constant - constant[0]).abs().max() > 1e-9:
        return False
    matrix = (map_(torch.eye(size, dtype=torch.float64).unsqueeze(1)).squeeze(1) - constant).T
    return any(is_sum_of_shifts(matrix, stride, mode) for mode in PADDING_MODES)


def is_sum_of_shifts(matrix: Tensor, stride: int, mode: str) -> bool:
    count, size = matrix.shape
    shifts = []
    for offset in range(-size // 2, size // 2):
        sources = [source(mode, row * stride + offset, size) for row in range(count)]
        if None in sources:
            continue
        shift = matrix.new_zeros(count, size + 1)  # the last column collects reads from NOWHERE
        shift[torch.arange(count), torch.tensor(sources)] = 1
        shifts.append(shift[:, :size].flatten())
    basis, target = torch.stack(shifts, 1), matrix.flatten()
    weights = torch.linalg.pinv(basis.T @ basis, hermitian=True) @ (
        basis.T @ target
    )  # pinv, because shifts may coincide
    return bool((basis @ weights - target).abs().max() < 1e-9)


@st.composite
def lines(draw: st.DrawFn) -> tuple[Kernel, Kernel]:
    """Two kernels of one channel along one axis. The second pads both sides; in half of the cases the first pads enough for it."""
    first = draw(kernels(dimensions=1, in_channels=1, out_channels=1, bias=draw(st.sampled_from((False, False, True)))))
    second = draw(kernels(stride=(1,), in_channels=1, out_channels=1))
    side = draw(st.integers(1, 2))
    second = replace(second, padding=((side, side),), dilation=(1,))
    if draw(st.booleans()):
        first = replace(first, padding=reaching_out(first, second))
    return first, second


def refused_without_need(first: Kernel, second: Kernel) -> bool:
    """Whether `compose` refuses a pair that is one conv: the second map pads with values that are equal at the ends anyway."""
    extent, padding = first.dilation[0] * (first.kernel_size[0] - 1), min(first.padding[0])
    alike = first.padding_mode == second.padding_mode
    rotates = alike and second.padding_mode == "circular" and first.reach == (0,) and first.stride == (1,)
    constant = {"zeros": padding > extent, "replicate": padding >= extent}.get(first.padding_mode, False)
    return rotates or (constant and second.padding_mode in ("replicate", "reflect", "circular"))


def is_refused(first: Kernel, second: Kernel) -> bool:
    try:
        first.compose(second)
    except NoKernel:
        return True
    return False


@law(lines())
def compose_refuses_what_is_no_convolution(case: tuple[Kernel, Kernel]) -> None:
    first, second = case
    refused = is_refused(first, second)
    event(f"refused: {refused}")
    least = max(44, *smallest_input(first, smallest_input(second, (8,))))
    stride = first.stride[0]
    truths = [is_convolution(lambda x: second(first(x)), size, stride) for size in range(least, least + stride)]
    assert refused or all(truths), "composed, and is no convolution"
    assert not refused or not all(truths) or refused_without_need(first, second), "refused, and is a convolution"


def test_both_sides_of_the_border_law_are_drawn() -> None:
    seen: list[bool] = []

    @settings(max_examples=200, derandomize=True, database=None)
    @given(lines())
    def count(case: tuple[Kernel, Kernel]) -> None:
        seen.append(is_refused(*case))

    count()
    assert 0.05 < sum(seen) / len(seen) < 0.95


@pytest.mark.slow
def test_both_kinds_of_second_map_are_composed() -> None:
    padded: list[bool] = []

    @settings(max_examples=200, derandomize=True, database=None)
    @given(in_turn())
    def count(case: tuple[Kernel, Kernel, Tensor]) -> None:
        padded.append(case[1].padded)

    count()
    assert 0.2 < sum(padded) / len(padded) < 0.95


# --- Refusals -------------------------------------------------------------------------------------------------------


def conv(weight: tuple[int, ...], *, bias: bool = False, **sizes: Any) -> Kernel:
    ones = (1,) * (len(weight) - 2)
    form: dict[str, Any] = {"stride": ones, "padding": ((0, 0),) * len(ones), "dilation": ones, **sizes}
    shift = torch.randn(weight[0], dtype=torch.float64) if bias else None
    return Kernel(torch.randn(weight, dtype=torch.float64), shift, **form)


ROOMY: dict[str, Any] = {"padding": ((1, 1), (1, 1))}
LINE, LINE_OF_3 = conv((4, 2, 3)), conv((3, 2, 3))
PLANE = conv((4, 2, 3, 3), **ROOMY)
UP = conv((2, 4, 3), transposed=True, output_padding=(0,))

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "add other dimensions": (lambda: LINE.add(PLANE), "1 and 2 dimensions"),
    "add other channels": (lambda: LINE.add(LINE_OF_3), "channels differ: 2→4 and 2→3"),
    "add other strides": (lambda: LINE.add(conv((4, 2, 3), stride=(2,))), "strides differ"),
    "add other sizes": (lambda: LINE.add(conv((4, 2, 1))), "output sizes differ"),
    "add other modes": (
        lambda: PLANE.add(conv((4, 2, 3, 3), padding_mode="reflect", **ROOMY)),
        "padding modes differ: zeros and reflect",
    ),
    "add transposed to plain": (lambda: UP.add(LINE), "doesn't add to one that isn't"),
    "add plain to transposed": (lambda: LINE.add(UP), "doesn't add to one that isn't"),
    "add transposed of other strides": (lambda: UP.add(replace(UP, stride=(2,))), "strides differ"),
    "add transposed of other sizes": (lambda: UP.add(replace(UP, padding=((1, 1),))), "output sizes of transposed"),
    "add transposed of other channels": (lambda: UP.add(replace(UP, weight=UP.weight[:, :3])), "channels differ"),
    "concat other sizes": (lambda: Kernel.concat([LINE, conv((1, 2, 1))]), "output sizes differ"),
    "concat other inputs": (lambda: Kernel.concat([LINE, conv((4, 3, 3))]), "channels differ"),
    "concat other modes": (
        lambda: Kernel.concat([PLANE, conv((4, 2, 3, 3), padding_mode="circular", **ROOMY)]),
        "padding modes differ: zeros and circular",
    ),
    "concat transposed": (lambda: Kernel.concat([UP, UP]), "can't be concatenated"),
    "widen transposed": (lambda: UP.widen((1,), (1,)), "can't be widened"),
    "widen by less than nothing": (lambda: LINE.widen((-1,), (0,)), "can't be widened by"),
    "densify transposed": (lambda: UP.densify(), "can't be densified"),
    "densify by no divisor": (lambda: conv((4, 2, 3), dilation=(3,)).densify((2,)), "dilation \\(3,\\) can't be"),
    "regroup to more groups": (lambda: LINE.regroup(2), "1 groups can't be written as 2"),
    "compose other channels": (lambda: LINE.compose(LINE), "4 channels in 1 dimensions can't enter a map of 2"),
    "compose other dimensions": (lambda: conv((2, 4, 3)).compose(PLANE), "in 1 dimensions can't enter .* in 2"),
    "compose with a scale of other channels": (
        lambda: conv((1, 2, 3)).compose(Kernel.identity(torch.ones(1), channels=3, dimensions=1)),
        "1 channels in 1 dimensions can't enter a map of 3",
    ),
    "compose a scale of other channels": (
        lambda: Kernel.identity(torch.ones(1), channels=1, dimensions=1).compose(LINE),
        "1 channels in 1 dimensions can't enter a map of 2",
    ),
    "compose after transposed": (lambda: UP.compose(conv((2, 4, 3))), "composes with nothing but"),
    "compose before transposed": (lambda: conv((2, 2, 3)).compose(UP), "composes with nothing but"),
    "compose two transposed": (lambda: UP.compose(replace(UP, weight=UP.weight.mT)), "composes with nothing but|enter"),
    "compose a bias before transposed": (
        lambda: conv((2, 2, 1), bias=True).compose(UP),
        "the first map's bias does not reach the border: a transposed",
    ),
    "compose a bias into padding": (
        lambda: conv((2, 2, 1, 1), bias=True).compose(PLANE),
        "the first map's bias does not reach the border",
    ),
    "compose a window into padding": (lambda: conv((2, 2, 3, 3)).compose(PLANE), "window still sees the image"),
    "compose a stride into reflection": (
        lambda: conv((2, 2, 1, 1), stride=(2, 2)).compose(replace(PLANE, padding_mode="reflect")),
        "commutes only with a plain 1×1",
    ),
    "compose reflection into padding": (
        lambda: conv((2, 2, 3, 3), padding_mode="reflect", **ROOMY).compose(PLANE),
        "zero padding after reflect padding",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_kernel_is_refused_with_its_reason(name: str) -> None:
    ask, reason = REFUSED[name]
    with pytest.raises(NoKernel, match=reason):
        ask()


# --- What a kernel says of itself -----------------------------------------------------------------------------------


def test_a_kernel_moves_whole() -> None:
    moved = conv((4, 2, 3), bias=True).to(torch.float32).to("meta")
    assert moved.bias is not None
    assert (moved.weight.dtype, moved.bias.dtype) == (torch.float32, torch.float32)
    assert (moved.weight.device.type, moved.bias.device.type) == ("meta", "meta")
    assert conv((4, 2, 3)).to("meta").bias is None


@given(single())
def test_a_kernels_sizes_are_those_of_its_map(case: tuple[Kernel, Tensor]) -> None:
    kernel, x = case
    y = kernel(x)
    assert (x.shape[1], y.shape[1]) == (kernel.in_channels, kernel.out_channels)
    sizes = [(n + r - 1) // s + 1 for n, r, s in zip(x.shape[2:], kernel.reach, kernel.stride)]
    assert list(y.shape[2:]) == sizes


@given(single())
def test_a_channelwise_affine_kernel_is_a_scale_and_a_shift(case: tuple[Kernel, Tensor]) -> None:
    kernel, x = case
    if kernel.is_channelwise_affine:
        assert_same_map(kernel, lambda x: channelwise(kernel.weight.flatten(), kernel.bias, x), x)
    diagonal = Kernel.diagonal(torch.ones(kernel.in_channels), None, kernel.dimensions, kernel.padding)
    assert diagonal.is_channelwise_affine == all(pair == (0, 0) for pair in kernel.padding)


@pytest.mark.parametrize(
    ("padding", "alike"), [(((1, 1), (0, 0)), True), (((1, 0),), False), (((-1, -1),), False), ((), True)]
)
def test_symmetric_padding_is_what_torchs_convs_can_do(padding: tuple[tuple[int, int], ...], alike: bool) -> None:
    assert is_symmetric(padding) is alike


# --- The border law, at its border ----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_two_maps_are_one_up_to_the_border_and_no_further(axis: int, side: str, stride: int, dilation: int) -> None:
    """Padding between two convs is one of the image if the first window there sees no image: up to `stride - 1` less is needed before."""
    composed = {}
    extent = 2 * dilation
    for padding in range(extent + 2):
        first = _one_sided((2, 3), axis, side, padding, (stride, stride), dilation)
        second = _one_sided((3, 2), axis, side, 1, (1, 1), 1)
        x = torch.randn(1, 3, 13, 14, dtype=torch.float64)
        try:
            whole = first.compose(second)
        except NoKernel:
            composed[padding] = False
        else:
            composed[padding] = True
            assert (whole(x) - second(first(x))).abs().max() < 1e-9
    least = extent - (stride - 1) if side == "before" else extent
    assert composed == {padding: padding >= least for padding in range(extent + 2)}


def _one_sided(
    kernel_size: tuple[int, int], axis: int, side: str, padding: int, stride: tuple[int, int], dilation: int
) -> Kernel:
    """A kernel of 3 channels that pads one side of one axis, on which its window has 3 taps."""
    taps = [3 if each == axis else size for each, size in enumerate(kernel_size)]
    sides = [[0, 0], [0, 0]]
    sides[axis][side == "after"] = padding
    weight = torch.randn(3, 3, *taps, dtype=torch.float64)
    return Kernel(weight, None, stride, tuple((a, b) for a, b in sides), (dilation, dilation))
