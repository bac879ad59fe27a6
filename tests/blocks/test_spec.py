"""Specs and presets: windows inside a site's window line up with it, presets and specs resolve, malformed ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer
from repfx.algebra.meaning import kernel_of
from repfx.blocks.branch import KINDS
from repfx.blocks.presets import PRESETS, resolve_spec
from repfx.blocks.spec import BranchSpec, Spec
from repfx.errors import InvalidInput, UnknownName
from repfx.testing import assert_same_map
from repfx.testing.strategies import conv_modules, conv_specs, inputs_for

# --- A window inside a site's window --------------------------------------------------------------------------------


@st.composite
def windows(draw: st.DrawFn) -> tuple[ConvSpec, tuple[int, ...], tuple[int, ...]]:
    """A site, and a window and a dilation, counted in the site's taps, that fit into the site's window."""
    site = draw(conv_specs())
    window = tuple(draw(st.integers(1, k)) for k in site.kernel_size)
    dilation = tuple(
        draw(st.integers(1, (k - 1) // (inner - 1) if inner > 1 else 3)) for k, inner in zip(site.kernel_size, window)
    )
    return site, window, dilation


def offsets(site: ConvSpec, axis: int) -> list[int]:
    """Positions of the taps, relative to the position of the output."""
    before, _ = site.padding[axis]
    return [tap * site.dilation[axis] - before for tap in range(site.kernel_size[axis])]


def ones_of(site: ConvSpec) -> Kernel:
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel_size)
    sizes = (site.stride, site.padding, site.dilation, site.groups, site.padding_mode)
    return Kernel(torch.ones(shape, dtype=torch.float64), None, *sizes)


def check_alignment(case: tuple[ConvSpec, tuple[int, ...], tuple[int, ...]]) -> None:
    """Check that the taps are among the site's own and centred on them, so that the two outputs have one size and can be summed."""
    site, window, dilation = case
    inner = site.inner(window, dilation)
    assert inner.kernel_size == window
    for axis in range(site.dimensions):
        own, taps = offsets(site, axis), offsets(inner, axis)
        assert set(taps) <= set(own)
        spare_before, spare_after = taps[0] - own[0], own[-1] - taps[-1]
        assert 0 <= spare_after - spare_before <= site.dilation[axis]
    whole = ones_of(site).add(ones_of(inner))
    assert whole.kernel_size == site.kernel_size
    assert whole.padding == site.padding


@pytest.mark.slow
@given(windows())
def test_a_window_inside_lies_on_the_sites_taps(case: tuple[ConvSpec, tuple[int, ...], tuple[int, ...]]) -> None:
    check_alignment(case)


@given(windows().flatmap(lambda case: st.tuples(st.just(case), inputs_for(case[0], channels=case[0].in_channels))))
def test_a_window_inside_sees_what_the_sites_taps_see(case: tuple[Any, Tensor]) -> None:
    (site, window, dilation), x = case
    inner = ones_of(site.inner(window, dilation))
    laid = ones_of(site)
    weight = torch.zeros_like(laid.weight)
    spare = [k - 1 - d * (w - 1) for k, w, d in zip(site.kernel_size, window, dilation)]
    taps = [torch.arange(w) * d + left // 2 for w, d, left in zip(window, dilation, spare)]
    where: Any = (slice(None), *torch.meshgrid(*taps, indexing="ij"))
    weight.flatten(0, 1)[where] = 1
    assert_same_map(inner, replace(laid, weight=weight), x)


@given(conv_specs(), st.integers(0, 2))
def test_a_window_that_does_not_fit_is_refused(site: ConvSpec, axis: int) -> None:
    axis %= site.dimensions
    window = tuple(k + (at == axis) for at, k in enumerate(site.kernel_size))
    with pytest.raises(InvalidInput, match=f"a window of {window[axis]} taps .* doesn't fit into"):
        site.inner(window)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(conv_modules(), st.integers(12, 14))
def test_the_sizes_of_a_module_are_those_of_its_kernel(conv: Layer, size: int) -> None:
    kernel = kernel_of(conv, torch.ones(1), conv.in_channels, len(conv.kernel_size))
    site = ConvSpec.of(conv)
    assert site == ConvSpec.of_kernel(kernel)
    x = torch.zeros(1, conv.in_channels, *[size] * site.dimensions, dtype=torch.float64)
    assert conv(x).shape == ones_of(site)(x).shape
    assert site.is_pointwise == (set(conv.kernel_size) == {1})
    assert site.is_depthwise == (conv.groups == conv.in_channels > 1)


@pytest.mark.parametrize(
    ("conv", "text"),
    [
        (nn.Conv1d(2, 4, 3), "3 2→4"),
        (nn.Conv2d(4, 4, (3, 5), stride=(2, 1), groups=4), "3×5 4→4 stride 2×1 depthwise"),
        (nn.Conv2d(4, 6, 2, dilation=2, groups=2), "2×2 4→6 dilation 2×2 groups 2"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "3×3 1→1 reflect"),
        (nn.Conv2d(1, 1, 3, padding_mode="reflect"), "3×3 1→1"),
    ],
)
def test_sizes_read_as_one_line(conv: nn.Module, text: str) -> None:
    assert str(ConvSpec.of(conv)) == text


# --- Presets and specs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves_to_known_branch_kinds(name: str) -> None:
    spec = resolve_spec(name)
    assert spec is PRESETS[name].spec
    assert PRESETS[name].name == name
    assert PRESETS[name].description
    assert "\n" not in PRESETS[name].description
    for window in (3, 5, 7, 9, 11, 13, 17):
        site = ConvSpec.of(nn.Conv2d(4, 4, window, padding=window // 2, groups=4))
        branches = spec.branches_for(site)
        assert {branch.kind for branch in branches} <= set(KINDS)
        assert branches or (name, window) == ("dilated", 3)


@pytest.mark.parametrize("window", [5, 7, 9, 11, 13, 17])
def test_the_dilated_preset_fits_into_the_windows_it_is_for(window: int) -> None:
    site = ConvSpec.of(nn.Conv2d(4, 4, window, padding=window // 2, groups=4))
    for branch in PRESETS["dilated"].spec.branches_for(site):
        window, dilation = branch.options["kernel_size"], branch.options["dilation"]
        check_alignment((site, (window, window), (dilation, dilation)))


def test_the_dilated_preset_leaves_out_dense_and_rectangular_windows() -> None:
    for conv in (nn.Conv2d(4, 4, 5), nn.Conv2d(4, 4, (5, 7), groups=4)):
        assert PRESETS["dilated"].spec.branches_for(ConvSpec.of(conv)) == ()


def test_specs_of_every_form_resolve() -> None:
    site = ConvSpec.of(nn.Conv2d(1, 1, 3))
    wanted = (BranchSpec("1x1"), BranchSpec("identity"))
    assert resolve_spec(["1x1", "identity"]).branches_for(site) == wanted
    assert resolve_spec(("1x1", BranchSpec("identity"))).branches_for(site) == wanted
    spec = Spec(lambda site: ("1x1", "identity"))
    assert resolve_spec(spec) is spec
    assert spec.branches_for(site) == wanted


MALFORMED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "unknown preset": (lambda: resolve_spec("repvg"), UnknownName, "no preset 'repvg'; did you mean 'repvgg'"),
    "unlike any preset": (lambda: resolve_spec("zzz"), UnknownName, "no preset 'zzz'. Known: acb, "),
    "unknown norm": (
        lambda: Spec(["1x1"], norm="batchnorm"),  # type: ignore[arg-type]
        UnknownName,
        "no norm 'batchnorm'; did you mean 'batch_norm'",
    ),
    "unknown weights": (
        lambda: Spec(["1x1"], weights="fanout"),  # type: ignore[arg-type]
        UnknownName,
        "no first value of weights 'fanout'; did you mean 'fan_out'",
    ),
    "branches in a string": (
        lambda: Spec("1x1"),
        InvalidInput,
        "branches is the str '1x1'; it takes a list",
    ),
    "branches of no list": (
        lambda: Spec(3),  # type: ignore[arg-type]
        InvalidInput,
        "branches is the int 3; it takes a list",
    ),
    "a string of a function": (
        lambda: Spec(lambda site: "1x1").branches_for(ConvSpec.of(nn.Conv2d(1, 1, 3))),
        InvalidInput,
        "branches is the str '1x1'; it takes a list",
    ),
    "a branch of no name": (lambda: resolve_spec(["1x1", 3]), InvalidInput, "not by 3"),  # type: ignore[list-item]
    "a spec of nothing": (lambda: resolve_spec(None), InvalidInput, "not NoneType"),  # type: ignore[arg-type]
    "a spec of a number": (lambda: resolve_spec(3), InvalidInput, "not int"),  # type: ignore[arg-type]
    "a branch of a function": (
        lambda: Spec(lambda site: (3,)).branches_for(  # type: ignore[arg-type,return-value]
            ConvSpec.of(nn.Conv2d(1, 1, 3))
        ),
        InvalidInput,
        "not by 3",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_says_so(name: str) -> None:
    ask, error, message = MALFORMED[name]
    with pytest.raises(error, match=message):
        ask()
