"""Tests of the tests: with one mistake put into the algebra, the check that is there for it fails.

A new mutant is one more row of `MUTANTS`: a name, what to replace by what, and the checks of which each must fail.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import repfx.algebra.kernel
import repfx.algebra.meaning
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.layers import Layer
from repfx.algebra.meaning import kernel_of
from repfx.testing import assert_same_map, randomize_batch_norm
from tests.algebra import test_kernel
from tests.blocks import test_spec

# torch warns that it copies the input there, which doesn't matter to these tests
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# Enough examples to meet the mistake. No shrinking, because any failure will do.
SEARCH = settings(max_examples=300, phases=[Phase.generate], derandomize=True, database=None)

Check = tuple[st.SearchStrategy[Any], Callable[[Any], None]]


def batch_norm(seed: int) -> None:
    norm = randomize_batch_norm(nn.BatchNorm2d(5), seed).double().eval()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    assert_same_map(kernel_of(norm, x, 5, 2), norm, x)


CHECKS: dict[str, Check] = {
    **test_kernel.LAWS,
    "alignment": (test_spec.windows(), test_spec.check_alignment),
    "batch_norm": (st.integers(0, 9), batch_norm),
}


# --- Mistakes -------------------------------------------------------------------------------------------------------


def fold_on_the_first_axis(kernel: Kernel, scale: Tensor, shift: Tensor | None = None) -> Kernel:
    """Right for plain convs; a transposed one has its outputs on the second axis."""
    shape = (-1,) + (1,) * (kernel.weight.ndim - 1)
    weight = kernel.weight * scale.reshape(shape) if len(scale) == len(kernel.weight) else kernel.weight
    bias = shift if kernel.bias is None else kernel.bias * scale + (0 if shift is None else shift)
    return replace(kernel, weight=weight, bias=bias)


def fold_without_the_bias(kernel: Kernel, scale: Tensor, shift: Tensor | None = None) -> Kernel:
    return replace(FOLD_AFFINE(kernel, scale, shift), bias=shift if kernel.bias is None else kernel.bias)


def fold_before_without_groups(kernel: Kernel, scale: Tensor, shift: Tensor | None = None) -> Kernel:
    """Takes the scales of the first group for all groups."""
    per_group = len(scale) // kernel.groups
    return FOLD_AFFINE_BEFORE(kernel, scale[:per_group].repeat(kernel.groups), shift)


def affine_without_eps(norm: Layer, like: Tensor) -> tuple[Tensor, Tensor]:
    scale = norm.weight.to(like) / norm.running_var.to(like).sqrt()
    return scale, norm.bias.to(like) - norm.running_mean.to(like) * scale


def affine_with_eps_outside(norm: Layer, like: Tensor) -> tuple[Tensor, Tensor]:
    scale = norm.weight.to(like) / (norm.running_var.to(like).sqrt() + norm.eps)
    return scale, norm.bias.to(like) - norm.running_mean.to(like) * scale


def composed_with_flipped_taps(first: Kernel, second: Kernel) -> tuple[Tensor, tuple[int, ...]]:
    axes = list(range(2, second.weight.ndim))
    return COMPOSED_WEIGHT(first, replace(second, weight=second.weight.flip(axes)))


def composed_without_stride(first: Kernel, second: Kernel) -> tuple[Tensor, tuple[int, ...]]:
    return COMPOSED_WEIGHT(replace(first, stride=(1,) * first.dimensions), second)


def composed_without_dilation(first: Kernel, second: Kernel) -> tuple[Tensor, tuple[int, ...]]:
    weight, dilation = COMPOSED_WEIGHT(first, second)
    return weight, (1,) * len(dilation)


def response_of_one_tap(kernel: Kernel, constant: Tensor) -> Tensor:
    """A first map's bias through the first tap alone."""
    taps = kernel.weight.reshape(*kernel.weight.shape[:2], -1)[..., :1]
    return RESPONSE(replace(kernel, weight=taps), constant)


def regroup_by_repeating(kernel: Kernel, groups: int) -> Kernel:
    """Fills the weights between groups with copies instead of zeros."""
    times = kernel.groups // groups
    repeated = kernel.weight.repeat(1, times, *(1,) * kernel.dimensions)
    return replace(kernel, weight=repeated, groups=groups)


def widen_on_the_other_side(kernel: Kernel, before: tuple[int, ...], after: tuple[int, ...]) -> Kernel:
    return replace(WIDEN(kernel, after, before), padding=WIDEN(kernel, before, after).padding)


def widen_with_axes_reversed(kernel: Kernel, before: tuple[int, ...], after: tuple[int, ...]) -> Kernel:
    """`F.pad` counts axes from the last."""
    sides = [side for pair in zip(before, after) for side in pair]
    wide = WIDEN(kernel, before, after)
    return replace(wide, weight=F.pad(kernel.weight, sides))


def align_without_dilation(kernels: list[Kernel]) -> list[Kernel]:
    return ALIGN([replace(kernel, dilation=(1,) * kernel.dimensions) for kernel in kernels])


def densify_by_name_alone(kernel: Kernel, factors: tuple[int, ...] | None = None) -> Kernel:
    """Divides the dilation without spreading the taps."""
    dense = DENSIFY(kernel, factors)
    return replace(kernel, dilation=dense.dilation)


def pad_with_sides_swapped(x: Tensor, padding: repfx.algebra.kernel.Padding, mode: str = "zeros") -> Tensor:
    return PAD(x, tuple((after, before) for before, after in padding), mode)


def pad_with_zeros(x: Tensor, padding: repfx.algebra.kernel.Padding, mode: str = "zeros") -> Tensor:
    return PAD(x, padding)


def reach_without_dilation(kernel: Kernel) -> tuple[int, ...]:
    return tuple(sum(pair) - (k - 1) for pair, k in zip(kernel.padding, kernel.kernel_size))


def require_nothing(*kernels: Kernel, **options: bool) -> None:
    """A guard that is off."""


def borders_without_stride(first: Kernel, second: Kernel) -> None:
    """Uses the border law that is right for stride 1 only."""
    SAME_BORDERS(replace(first, stride=(1,) * first.dimensions), second)


def borders_before_alone(first: Kernel, second: Kernel) -> None:
    """Looks only at the padding before, and assumes the same after."""
    SAME_BORDERS(first, replace(second, padding=tuple((before, 0) for before, _ in second.padding)))


def borders_of_window_alone(first: Kernel, second: Kernel) -> None:
    """Forgets the bias."""
    SAME_BORDERS(replace(first, bias=None), second)


def negate_weight_alone(kernel: Kernel) -> Kernel:
    return replace(kernel, weight=-kernel.weight)


def mean_without_area(like: Tensor, **sizes: Any) -> Kernel:
    return AVERAGE_POOL(like, **{**sizes, "area": math.prod(sizes["kernel_size"])})


def slice_with_whole_bias(kernel: Kernel, start: int, stop: int) -> Kernel:
    return replace(SLICE_CHANNELS(kernel, start, stop), bias=kernel.bias)


def slice_of_inputs(kernel: Kernel, start: int, stop: int) -> Kernel:
    """Slices the first axis of a transposed kernel too, which holds its inputs."""
    sliced = SLICE_CHANNELS(replace(kernel, transposed=False), start, stop)
    return replace(sliced, transposed=kernel.transposed)


def inner_without_own_dilation(site: ConvSpec, window: tuple[int, ...], dilation: Any = None) -> ConvSpec:
    """Computes the padding as if the site had no dilation."""
    plain = replace(site, dilation=(1,) * site.dimensions)
    return replace(INNER(site, window, dilation), padding=INNER(plain, window, dilation).padding)


def inner_with_sides_swapped(site: ConvSpec, window: tuple[int, ...], dilation: Any = None) -> ConvSpec:
    inner = INNER(site, window, dilation)
    return replace(inner, padding=tuple((after, before) for before, after in inner.padding))


def inner_in_the_corner(site: ConvSpec, window: tuple[int, ...], dilation: Any = None) -> ConvSpec:
    inner = INNER(site, window, dilation)
    pairs = zip(site.padding, inner.padding)
    return replace(inner, padding=tuple((own[0], sum(pair) - own[0]) for own, pair in pairs))


def inputs_with_the_bias(kernel: Kernel, start: int, stop: int) -> Kernel:
    return replace(SLICE_INPUTS(kernel, start, stop), bias=kernel.bias)


# The originals, before any test replaces them.
FOLD_AFFINE, FOLD_AFFINE_BEFORE, RESPONSE = Kernel.fold_affine, Kernel.fold_affine_before, Kernel._response
WIDEN, DENSIFY, SLICE_CHANNELS, AVERAGE_POOL = Kernel.widen, Kernel.densify, Kernel.slice_channels, Kernel.average_pool
SLICE_INPUTS = Kernel.slice_inputs
COMPOSED_WEIGHT, ALIGN, PAD = (
    repfx.algebra.kernel._composed_weight,
    repfx.algebra.kernel._align,
    repfx.algebra.kernel.pad,
)
SAME_BORDERS, INNER = repfx.algebra.kernel._require_same_borders, ConvSpec.inner


class Mutant(NamedTuple):
    name: str
    owner: object
    attribute: str
    mistake: Any
    checks: tuple[str, ...]


MUTANTS = [
    Mutant("wrong axis for transposed", Kernel, "fold_affine", fold_on_the_first_axis, ("fold_affine",)),
    Mutant("bias not scaled", Kernel, "fold_affine", fold_without_the_bias, ("fold_affine",)),
    Mutant("scales of one group", Kernel, "fold_affine_before", fold_before_without_groups, ("fold_affine_before",)),
    Mutant("bias through one tap", Kernel, "_response", response_of_one_tap, ("fold_affine_before", "compose")),
    Mutant("no eps", repfx.algebra.meaning, "affine_of", affine_without_eps, ("batch_norm",)),
    Mutant("eps outside the root", repfx.algebra.meaning, "affine_of", affine_with_eps_outside, ("batch_norm",)),
    Mutant("flipped taps", repfx.algebra.kernel, "_composed_weight", composed_with_flipped_taps, ("compose",)),
    Mutant("stride lost", repfx.algebra.kernel, "_composed_weight", composed_without_stride, ("compose",)),
    Mutant(
        "dilation lost in compose", repfx.algebra.kernel, "_composed_weight", composed_without_dilation, ("compose",)
    ),
    Mutant("dilation lost in alignment", repfx.algebra.kernel, "_align", align_without_dilation, ("add", "concat")),
    Mutant("dilation lost in reach", Kernel, "reach", property(reach_without_dilation), ("add", "concat")),
    Mutant("taps not spread", Kernel, "densify", densify_by_name_alone, ("densify", "densify_in_part", "add")),
    Mutant("groups ignored", Kernel, "regroup", regroup_by_repeating, ("regroup", "add", "compose", "concat")),
    Mutant("widened on the other side", Kernel, "widen", widen_on_the_other_side, ("widen", "add", "concat")),
    Mutant("widened on other axes", Kernel, "widen", widen_with_axes_reversed, ("widen", "add", "concat")),
    Mutant(
        "before and after swapped",
        repfx.algebra.kernel,
        "pad",
        pad_with_sides_swapped,
        ("add", "kernel_of_a_module", "widen"),
    ),
    Mutant("padding mode ignored", repfx.algebra.kernel, "pad", pad_with_zeros, ("kernel_of_a_module", "compose")),
    Mutant("bias not negated", Kernel, "negate", negate_weight_alone, ("negate", "subtract", "transposed")),
    Mutant("divisor ignored", Kernel, "average_pool", staticmethod(mean_without_area), ("average_pool",)),
    Mutant("whole bias kept", Kernel, "slice_channels", slice_with_whole_bias, ("slice_channels", "concat")),
    Mutant("inputs sliced", Kernel, "slice_channels", slice_of_inputs, ("transposed",)),
    Mutant("bias in every part", Kernel, "slice_inputs", inputs_with_the_bias, ("slice_inputs",)),
    *(
        Mutant(
            name, repfx.algebra.kernel, "_require_same_borders", mistake, ("compose_refuses_what_is_no_convolution",)
        )
        for name, mistake in [
            ("border law off", require_nothing),
            ("border law without stride", borders_without_stride),
            ("border law before alone", borders_before_alone),
            ("border law without bias", borders_of_window_alone),
        ]
    ),
    Mutant("inner without dilation", ConvSpec, "inner", inner_without_own_dilation, ("alignment",)),
    Mutant("inner sides swapped", ConvSpec, "inner", inner_with_sides_swapped, ("alignment",)),
    Mutant("inner in the corner", ConvSpec, "inner", inner_in_the_corner, ("alignment",)),
]
LONG = ("border law before alone", "border law without bias")  # rarely drawn
ROWS = [
    pytest.param(mutant, check, id=f"{mutant.name}-{check}", marks=[pytest.mark.slow] if mutant.name in LONG else [])
    for mutant in MUTANTS
    for check in mutant.checks
]


def run(check: str, search: settings = SEARCH) -> None:
    cases, body = CHECKS[check]
    search(given(cases)(body))()


@contextlib.contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mutant.owner, mutant.attribute, mutant.mistake)
        yield


@pytest.mark.parametrize(("mutant", "check"), ROWS)
def test_the_check_sees_the_mistake(mutant: Mutant, check: str) -> None:
    """The check fails by wrong numbers or by an error of the algebra, not because the mutant is an invalid program."""
    search = settings(SEARCH, max_examples=3000) if mutant.name in LONG else SEARCH
    with planted(mutant), pytest.raises((AssertionError, NoKernel, RuntimeError)):
        run(check, search)


@pytest.mark.parametrize("check", sorted({check for mutant in MUTANTS for check in mutant.checks}))
def test_the_check_passes_without_a_mistake(check: str) -> None:
    run(check, settings(SEARCH, max_examples=25))
