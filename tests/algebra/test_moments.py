"""A kernel put in front of a BatchNorm: it gives the right function in eval mode and, with the moments, in training mode too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer
from repfx.algebra.meaning import kernel_of
from repfx.algebra.moments import Moments, set_kernel
from repfx.testing import assert_same_map, randomize_batch_norm
from tests.inline_net import image

FORMS: dict[str, tuple[Callable[[], Layer], Callable[[], Layer], tuple[int, ...]]] = {
    "rectangular": (lambda: nn.Conv2d(4, 6, (3, 2), (1, 2), (1, 0)), lambda: nn.BatchNorm2d(6), (5, 4, 9, 10)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), lambda: nn.BatchNorm2d(6), (5, 4, 9, 10)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: nn.BatchNorm2d(8, eps=1e-2), (5, 4, 9, 10)),
    "1d": (lambda: nn.Conv1d(4, 3, 3, dilation=2), lambda: nn.BatchNorm1d(3), (5, 4, 9)),
    "3d": (lambda: nn.Conv3d(4, 3, (1, 2, 3)), lambda: nn.BatchNorm3d(3), (3, 4, 3, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), lambda: nn.BatchNorm2d(6), (5, 4, 4, 5)),
    "linear": (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (7, 4)),
}


def pair_of(form: str) -> tuple[Any, Tensor]:
    """A conv with a BatchNorm behind it, in float64 and random, and an input."""
    conv, norm, shape = FORMS[form]
    return randomize_batch_norm(nn.Sequential(conv(), norm()).double(), 1), image(*shape)


def another_kernel(conv: Layer, *, bias: bool = True) -> Kernel:
    """A random kernel of the same sizes as the conv."""
    kernel = kernel_of(conv, torch.ones((), dtype=torch.float64), 4, 2)
    shift = torch.randn(kernel.out_channels, dtype=torch.float64) if bias else None
    return replace(kernel, weight=torch.randn_like(kernel.weight), bias=shift)


def measured(output: Tensor) -> Moments:
    """Moments as BatchNorm measures them: over all axes but the channels, with the biased variance."""
    axes = tuple(axis for axis in range(output.ndim) if axis != 1)
    return Moments(output.mean(axes), output.var(axes, correction=0))


# ---- set_kernel


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("form", FORMS)
def test_with_the_true_moments_both_modes_are_the_kernel(form: str, bias: bool) -> None:
    pair, x = pair_of(form)
    kernel = another_kernel(pair[0], bias=bias)
    set_kernel(pair[0], pair[1], kernel, measured(kernel(x)))
    assert_same_map(pair.eval(), kernel, x, 1e-12)
    assert_same_map(pair.train(), kernel, x, 1e-12)


@pytest.mark.parametrize("moments", ["none", "another kernel's", "zero", "huge"])
@pytest.mark.parametrize("form", FORMS)
def test_whatever_the_moments_eval_mode_is_the_kernel(form: str, moments: str) -> None:
    pair, x = pair_of(form)
    kernel = another_kernel(pair[0])
    other = measured(another_kernel(pair[0])(x))
    known = {
        "none": None,
        "another kernel's": other,
        "zero": other.affine(torch.zeros_like(other.mean), None),
        "huge": other.affine(torch.full_like(other.mean, 1e3), None),
    }[moments]
    set_kernel(pair[0], pair[1], kernel, known)
    assert_same_map(pair.eval(), kernel, x, 1e-11)


def test_training_mode_gives_out_the_moments() -> None:
    pair, x = pair_of("rectangular")
    moments = Moments(torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.1)
    set_kernel(pair[0], pair[1], another_kernel(pair[0]), moments)
    output = measured(pair.train()(x).detach())
    torch.testing.assert_close(output.mean, moments.mean, rtol=1e-9, atol=1e-9)
    # (v + ε) · v' / (v' + ε), v' the variance of what comes in
    torch.testing.assert_close(output.variance, moments.variance, rtol=1e-4, atol=1e-4)


def test_a_channel_that_is_constant_divides_nothing() -> None:
    """A constant channel gets γ = √ε and σ² = 0, so in both modes the channel is its bias."""
    pair, x = pair_of("rectangular")
    kernel = another_kernel(pair[0])
    kernel.weight[1::2] = 0
    set_kernel(pair[0], pair[1], kernel, measured(kernel(x)))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in pair.state_dict().values())
    assert bool((pair[1].running_var[1::2] < 1e-20).all())
    assert_same_map(pair.eval(), kernel, x, 1e-12)
    assert_same_map(pair.train(), kernel, x, 1e-9)


@pytest.mark.parametrize("gamma", [0.0, 1e-12, -2.0])
def test_the_gamma_that_was_there_plays_no_part(gamma: float) -> None:
    pair, x = pair_of("depthwise")
    nn.init.constant_(pair[1].weight, gamma)
    kernel = another_kernel(pair[0])
    set_kernel(pair[0], pair[1], kernel, Moments.after(pair[1]))
    assert_same_map(pair.eval(), kernel, x, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_eval_mode_is_right_to_the_rounding_of_the_weights(dtype: torch.dtype) -> None:
    """γ is computed from the rounded variance, so that only the rounding of γ itself remains."""
    pair: Any = nn.Sequential(nn.Conv2d(4, 64, 3, bias=False), nn.BatchNorm2d(64)).to(dtype).eval()
    kernel = another_kernel(pair[0])
    set_kernel(pair[0], pair[1], kernel, Moments(torch.zeros(64).double(), torch.logspace(-3, 6, 64).double()))
    assert {tensor.dtype for tensor in pair.parameters()} == {dtype}
    exact = copy.deepcopy(pair).double()
    scale = exact[1].weight.detach() / (exact[1].running_var + exact[1].eps).sqrt()
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(scale, torch.ones_like(scale), rtol=0.51 * precision + 1e-15, atol=0)
    assert_same_map(exact, kernel, image(), 4 * precision)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_parameters_stay_the_same_objects(norm: bool, bias: bool) -> None:
    pair, _ = pair_of("rectangular" if bias else "no bias")
    before = dict(pair.named_parameters())
    set_kernel(pair[0], pair[1] if norm else None, another_kernel(pair[0], bias=bias or norm), None)
    after = dict(pair.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_batch_norm_the_bias_goes_to_the_conv(form: str) -> None:
    (conv, _), x = pair_of(form)
    had_bias = conv.bias is not None
    for bias in (False, True, False):
        kernel = another_kernel(conv, bias=bias)
        set_kernel(conv, None, kernel, None)
        assert_same_map(conv, kernel, x, 1e-12)
        had_bias = had_bias or bias
        assert (conv.bias is not None) is had_bias


@pytest.mark.parametrize("learns", [True, False])
def test_a_new_bias_learns_where_the_weight_does(learns: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, bias=False, dtype=torch.bfloat16).requires_grad_(learns)
    set_kernel(conv, None, another_kernel(conv), None)
    assert isinstance(conv.bias, nn.Parameter)
    assert (conv.bias.dtype, conv.bias.requires_grad) == (torch.bfloat16, learns)


def test_no_graph_is_recorded() -> None:
    pair, _ = pair_of("rectangular")
    kernel = kernel_of(pair[0], torch.ones((), dtype=torch.float64), 4, 2)
    assert kernel.weight.requires_grad
    set_kernel(pair[0], pair[1], kernel, None)
    assert all(parameter.is_leaf for parameter in pair.parameters())
    assert not any(buffer.requires_grad for buffer in pair.buffers())


# ---- Moments


def test_after_a_batch_norm_are_what_it_gives_out_in_training_mode() -> None:
    """Moments behind a BatchNorm don't depend on its input, but for ε: the variance fed here is so large that ε doesn't show."""
    norm = nn.BatchNorm2d(4).double()
    randomize_batch_norm(norm, 2)
    output = measured(norm.train()(image(7, 4, 9, 10) * 1e6 + 3).detach())
    moments = Moments.after(norm)
    torch.testing.assert_close(output.mean, moments.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.variance, moments.variance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("missing", "mean", "variance"),
    [("weight", 0.5, 1.0), ("bias", 0.0, 9.0), ("both", 0.0, 1.0)],
)
def test_a_missing_gamma_is_one_and_a_missing_beta_zero(missing: str, mean: float, variance: float) -> None:
    norm: Layer = nn.BatchNorm2d(4, affine=missing != "both")
    if missing != "both":
        nn.init.constant_(norm.weight, -3.0)
        nn.init.constant_(norm.bias, 0.5)
        setattr(norm, missing, None)
    moments = Moments.after(norm)
    assert (moments.mean.tolist(), moments.variance.tolist()) == ([mean] * 4, [pytest.approx(variance / 1.00001)] * 4)
    assert moments.mean.dtype == moments.variance.dtype == torch.float64


def test_of_sums_and_affine_maps() -> None:
    """Moments add up for uncorrelated terms. The terms here are exactly uncorrelated in each channel."""
    a = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).reshape(4, 1) * torch.tensor([2.0, 3.0]).double() + 1
    b = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(4, 1) * torch.tensor([5.0, 1.0]).double() - 4
    scale, shift = torch.tensor([-2.0, 0.5]).double(), torch.tensor([3.0, 1.0]).double()
    both = measured(a).add(measured(b))
    torch.testing.assert_close(both.mean, measured(a + b).mean)
    torch.testing.assert_close(both.variance, measured(a + b).variance)
    for offset in (None, shift):
        mapped, direct = both.affine(scale, offset), measured((a + b) * scale + (0 if offset is None else offset))
        torch.testing.assert_close(mapped.mean, direct.mean)
        torch.testing.assert_close(mapped.variance, direct.variance)
