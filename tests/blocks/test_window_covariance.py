"""Covariances of windows: variances of outputs, exact and by autocorrelation, their gradients, and how they are tracked."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.layers import Layer
from repfx.algebra.meaning import kernel_of
from repfx.blocks.windows.autocorrelation import Autocorrelation, offsets_in, refusal_of_windows, windows_of
from repfx.blocks.windows.covariance import FullCovariance, WindowCovariance
from repfx.testing import relative_error
from tests.blocks.test_branches import SITES, example
from tests.random_numbers import numbers_from

TRACKED = [name for name in SITES if refusal_of_windows(ConvSpec.of(SITES[name]())) is None]
FORMS = [FullCovariance, Autocorrelation]


def windows(form: type[WindowCovariance], conv: Layer) -> WindowCovariance:
    """A covariance that is the last input's alone, measured at all positions."""
    found = form(ConvSpec.of(conv), torch.empty((), dtype=torch.float64))
    found.every, found.momentum, found.share, found.fewest = 1, 1.0, 1.0, 1 << 40
    return found


def kernel(conv: Layer) -> Kernel:
    return kernel_of(conv, conv.weight, conv.in_channels if hasattr(conv, "in_channels") else conv.in_features, 2)


def see(covariance: WindowCovariance, x: Tensor, conv: Layer) -> WindowCovariance:
    covariance.see(x, lambda: kernel(conv))
    return covariance


def of_batch(y: Tensor, *, linear: bool = False) -> Tensor:
    channels = y.flatten(0, -2).T if linear else y.transpose(0, 1).flatten(1)
    return channels.var(1, correction=0)


def smooth(*sizes: int, seed: int = 0) -> Tensor:
    """Images whose neighbouring pixels and channels are alike, with a mean far from zero."""
    noise = torch.randn(*sizes, dtype=torch.float64, generator=numbers_from(seed))
    return nn.functional.avg_pool2d(noise + noise.roll(1, 1), 3, 1, 1) * 3 + torch.arange(sizes[1]).view(1, -1, 1, 1)


@pytest.mark.parametrize("name", TRACKED)
def test_the_full_covariance_gives_the_variance_of_the_batch(name: str) -> None:
    """It holds at borders, too, whatever is padded there."""
    conv, x = SITES[name]().double(), example(name) + 1
    found = see(windows(FullCovariance, conv), x, conv).variance(kernel(conv))
    torch.testing.assert_close(found, of_batch(conv(x), linear=isinstance(conv, nn.Linear)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding": 0}], ids=str)
def test_an_autocorrelation_is_near_where_an_input_is_alike_everywhere(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(6, 8, (3, 5), **{"padding": (1, 2), **options}).double()
    x = smooth(8, 6, 40, 56)
    found = see(windows(Autocorrelation, conv), x, conv).variance(kernel(conv))
    assert relative_error(found, of_batch(conv(x))) < 0.05


def test_zeros_beyond_the_border_count_in_an_autocorrelation() -> None:
    """On a map of few positions they are much of what the conv sees: without them the variance would be a third off."""
    conv = nn.Conv2d(6, 8, 5, padding=2).double()
    x = smooth(64, 6, 6, 5)
    covariance: Any = see(windows(Autocorrelation, conv), x, conv)
    found, expected = covariance.variance(kernel(conv)), of_batch(conv(x))
    assert relative_error(found, expected) < 0.15
    covariance.coverage.fill_(1.0)
    assert relative_error(covariance.variance(kernel(conv)), expected) > 0.3


def dense(covariance: Any) -> Tensor:
    """The covariance ``(groups, channels, taps, channels, taps)`` that an autocorrelation stands for, entry by entry."""
    site = covariance.site
    taps = list(product(*map(range, site.kernel_size)))
    found = torch.zeros(
        site.groups, covariance.channels, len(taps), covariance.channels, len(taps), dtype=torch.float64
    )
    offsets = offsets_in(site.kernel_size)
    for (i, here), (j, there) in product(enumerate(taps), repeat=2):
        apart = tuple(b - a for a, b in zip(here, there))
        if apart in offsets:
            both = covariance.covariance[offsets.index(apart)]
        else:
            both = covariance.covariance[offsets.index(tuple(-o for o in apart))].mT
        seen = covariance.coverage[i, j]
        rest = seen - covariance.coverage[i, i] * covariance.coverage[j, j]
        found[:, :, i, :, j] = seen * both + rest * covariance.mean[:, :, None] * covariance.mean[:, None, :]
    return found


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}, {"padding_mode": "reflect"}], ids=str)
def test_an_autocorrelation_stands_for_a_whole_covariance(options: dict[str, Any]) -> None:
    conv: Layer = nn.Conv2d(4, 6, (3, 2), padding=1, bias=False, **options).double()
    covariance = see(windows(Autocorrelation, conv), smooth(3, 4, 7, 9), conv)
    whole = dense(covariance)
    weight = conv.weight.reshape(whole.shape[0], -1, *whole.shape[1:3])
    expected = torch.einsum("goct,gctds,gods->go", weight, whole, weight).flatten()
    torch.testing.assert_close(covariance.variance(kernel(conv)), expected, rtol=1e-10, atol=1e-12)
    point: Layer = nn.Conv2d(4, 6, 1, groups=conv.groups, bias=False).double()
    mix = point.weight.reshape(whole.shape[0], -1, whole.shape[1])
    mean = torch.einsum("goc,gcd,god->go", mix, whole.mean((2, 4)), mix).flatten()
    torch.testing.assert_close(covariance.variance_of_mean(kernel(point)), mean, rtol=1e-10, atol=1e-12)
    centre = torch.einsum("goc,gcd,god->go", mix, whole[:, :, 2, :, 2], mix).flatten()  # tap (1, 0) of 3×2
    torch.testing.assert_close(covariance.variance(kernel(point)), centre, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_are_those_of_the_formula(form: type[WindowCovariance], groups: int) -> None:
    """The first and the second derivative, in a kernel with as many groups as the site or more."""
    conv = nn.Conv2d(4, 4, (3, 2), padding=1, groups=2 if groups > 1 else 1).double()
    covariance = see(windows(form, conv), smooth(3, 4, 7, 9), conv)
    own: Layer = nn.Conv2d(4, 4, (3, 2), padding=1, groups=groups, bias=False).double()

    def variance(weight: Tensor) -> Tensor:
        site = covariance.site
        return covariance.variance(Kernel(weight, None, site.stride, site.padding, site.dilation, groups))

    torch.autograd.gradcheck(variance, own.weight, fast_mode=True)
    torch.autograd.gradgradcheck(variance, own.weight, fast_mode=True)
    plain = torch.func.grad(lambda weight: variance(weight).square().sum())(own.weight)
    (found,) = torch.autograd.grad(variance(own.weight).square().sum(), own.weight)
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-12)


def test_a_second_derivative_needs_the_covariance_of_the_first() -> None:
    conv = nn.Conv2d(4, 4, 3).double()
    covariance = see(windows(FullCovariance, conv), smooth(3, 4, 7, 9), conv)
    found = covariance.variance(kernel(conv)).sum()
    see(covariance, smooth(3, 4, 7, 9, seed=1), conv)
    with pytest.raises(RuntimeError, match="measured anew"):
        torch.autograd.grad(found, conv.weight, create_graph=True)


def test_an_average_over_several_measurements_and_the_steps_between() -> None:
    conv, xs = nn.Conv2d(4, 4, 3).double(), [smooth(3, 4, 7, 9, seed=seed) for seed in range(4)]
    exact = [see(windows(FullCovariance, conv), x, conv).covariance for x in xs]
    covariance = windows(FullCovariance, conv)
    covariance.every, covariance.momentum = 3, 0.25
    for x in xs:
        see(covariance, x, conv)
    torch.testing.assert_close(covariance.covariance, 0.75 * exact[0] + 0.25 * exact[3], rtol=1e-12, atol=1e-12)
    assert covariance.steps == int(covariance.state_dict()["passes"]) == 4


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_is_near_the_whole_and_another_each_time(form: type[WindowCovariance]) -> None:
    conv, x = nn.Conv2d(4, 4, 3, padding=1).double(), smooth(32, 4, 24, 28)
    exact = see(windows(form, conv), x, conv).variance(kernel(conv))
    covariance = windows(form, conv)
    covariance.share, covariance.fewest, covariance.momentum = 0.04, 1, 0.0
    seen = []
    for _ in range(3):
        see(covariance, x, conv)
        measured: Any = covariance._measured(x)
        seen.append(measured["covariance"])
    assert not torch.equal(seen[0], seen[1])
    assert relative_error(covariance.variance(kernel(conv)), exact) < 0.2


@pytest.mark.parametrize("form", FORMS)
def test_the_first_measurement_keeps_the_part_of_the_conv(form: type[WindowCovariance]) -> None:
    conv: Layer = nn.Conv2d(4, 6, 3, padding=1).double()
    covariance = windows(form, conv)
    covariance.begin(kernel(conv))
    torch.testing.assert_close(covariance.unit, (conv.weight.square().sum((1, 2, 3)) + 1e-5).sqrt())
    see(covariance, smooth(3, 4, 7, 9), conv)
    torch.testing.assert_close(covariance.unit, covariance.deviation(kernel(conv)), rtol=1e-12, atol=0)
    unit = covariance.unit.clone()
    see(covariance, smooth(3, 4, 7, 9, seed=1), conv)
    assert torch.equal(covariance.unit, unit)


def test_a_kernel_of_zeros_has_the_unit_one() -> None:
    conv: Layer = nn.Conv2d(4, 6, 3).double()
    nn.init.zeros_(conv.weight)
    covariance = windows(FullCovariance, conv)
    covariance.begin(kernel(conv))
    assert torch.equal(covariance.unit, torch.ones_like(covariance.unit))


@pytest.mark.parametrize("x", [torch.zeros(0, 4, 7, 9), torch.zeros(2, 4, 2, 2)], ids=["no image", "no window"])
@pytest.mark.parametrize("form", FORMS)
def test_an_input_without_windows_changes_nothing(form: type[WindowCovariance], x: Tensor) -> None:
    conv = nn.Conv2d(4, 4, 3).double()
    covariance = windows(form, conv)
    before = copy.deepcopy(covariance.state_dict())
    see(covariance, x.double(), conv)
    assert all(torch.equal(now, before[name]) for name, now in covariance.state_dict().items())
    covariance.momentum = 0.1
    see(covariance, smooth(3, 4, 7, 9), conv)  # is the first measurement
    expected = see(windows(form, conv), smooth(3, 4, 7, 9), conv)
    assert torch.equal(covariance.covariance, expected.covariance)


def test_half_precision_is_tracked_in_float32() -> None:
    conv = nn.Conv2d(4, 4, 3)
    covariance = windows_of(ConvSpec.of(conv), conv.weight).half()
    assert {each.dtype for each in covariance.buffers()} == {torch.float32, torch.int64}
    assert covariance.double().covariance.dtype == torch.float64
    assert windows_of(ConvSpec.of(conv), conv.weight.bfloat16()).covariance.dtype == torch.float32


def test_few_numbers_are_kept_whole() -> None:
    forms = {
        nn.Conv2d(64, 8, 3): FullCovariance,
        nn.Conv2d(128, 8, 3): Autocorrelation,
        nn.Conv2d(1024, 8, 1): FullCovariance,
        nn.Conv2d(256, 256, 7, groups=256): FullCovariance,
        nn.Conv2d(1024, 1024, 3, groups=8): Autocorrelation,
        nn.Linear(512, 8): FullCovariance,
    }
    assert {conv: type(windows_of(ConvSpec.of(conv), torch.empty(0))) for conv in forms} == forms


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.ConvTranspose2d(4, 4, 3), "transposed"),
        (nn.Conv2d(512, 512, 13, groups=512), "13×13 is too large"),
        (nn.Conv3d(64, 64, 5), "5×5×5 is too large"),
        (nn.Conv3d(64, 64, 3), None),
    ],
    ids=str,
)
def test_some_windows_are_refused(conv: Layer, reason: str | None) -> None:
    found = refusal_of_windows(ConvSpec.of(conv))
    assert found is None if reason is None else reason in str(found)


def test_a_kernel_outside_the_window_is_refused() -> None:
    conv = nn.Conv2d(4, 4, 3).double()
    covariance = windows(FullCovariance, conv)
    with pytest.raises(NoKernel, match=r"taps isn't in the window of 3×3 4→4"):
        covariance.variance(kernel(nn.Conv2d(4, 4, 5).double()))
    with pytest.raises(NoKernel, match="1 groups can't be normalised"):
        windows(FullCovariance, nn.Conv2d(4, 4, 3, groups=2)).variance(kernel(conv))
