"""The contract of branch kinds, over every registered kind and a broad list of sites; a new kind is tested the day it exists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.layers import Layer, is_batch_norm, is_conv, is_conv_or_linear
from repfx.algebra.meaning import kernel_of
from repfx.blocks.branch import KINDS, Branch, kind_of, refusal_of_branch
from repfx.blocks.spec import BranchSpec
from repfx.blocks.stages import Norm, Pad, Scale, Stages, conv_stages
from repfx.errors import InvalidInput, UnknownName
from repfx.testing import assert_same_map, randomize_batch_norm

SITES: dict[str, Callable[[], Layer]] = {
    "3x3": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "3x3 same channels": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "stride 2": lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1),
    "stride of columns": lambda: nn.Conv2d(4, 4, 3, stride=(1, 2), padding=1),
    "stride 3 by 2": lambda: nn.Conv2d(4, 6, 3, stride=(3, 2), padding=1),
    "groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "groups same channels": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=3),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "depthwise with multiplier": lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3),
    "one channel": lambda: nn.Conv2d(1, 1, 3, padding=1),
    "dilation": lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    "dilation of rows": lambda: nn.Conv2d(4, 4, 3, padding=(2, 1), dilation=(2, 1)),
    "dilation 3 by 1, stride 2": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(3, 1), dilation=(3, 1)),
    "rectangular": lambda: nn.Conv2d(4, 4, (3, 5), padding=(1, 2)),
    "row": lambda: nn.Conv2d(4, 4, (1, 7), padding=(0, 3)),
    "column": lambda: nn.Conv2d(4, 6, (7, 1), padding=(3, 0)),
    "even, same": lambda: nn.Conv2d(4, 4, 4, padding="same"),
    "even by odd, same, dilation": lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(3, 2)),
    "even, reflect, same": lambda: nn.Conv2d(4, 4, 4, padding="same", padding_mode="reflect"),
    "valid": lambda: nn.Conv2d(4, 4, 3, padding="valid"),
    "unpadded 5x5": lambda: nn.Conv2d(4, 6, 5),
    "over-padded": lambda: nn.Conv2d(4, 4, 3, padding=3),
    "reflect": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "replicate, over-padded": lambda: nn.Conv2d(4, 4, 3, padding=(2, 4), padding_mode="replicate"),
    "circular, dilation": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"),
    "reflect, unpadded": lambda: nn.Conv2d(4, 4, 3, padding_mode="reflect"),
    "1x1": lambda: nn.Conv2d(4, 4, 1),
    "1x1 stride 2": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "1x1 padded": lambda: nn.Conv2d(4, 4, 1, padding=1),
    "9x9 depthwise, stride 2": lambda: nn.Conv2d(2, 2, 9, stride=2, padding=4, groups=2),
    "17x17 depthwise": lambda: nn.Conv2d(2, 2, 17, padding=8, groups=2),
    "1d": lambda: nn.Conv1d(4, 4, 5, padding=2),
    "1d causal": lambda: nn.Conv1d(4, 4, 3, padding=2, dilation=2, stride=2),
    "1d 1": lambda: nn.Conv1d(4, 6, 1),
    "3d": lambda: nn.Conv3d(2, 2, 3, padding=1),
    "3d factored": lambda: nn.Conv3d(2, 4, (3, 1, 1), padding=(1, 0, 0)),
    "3d spatial, stride": lambda: nn.Conv3d(2, 4, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed, groups, dilation": lambda: nn.ConvTranspose2d(4, 6, (2, 3), dilation=(1, 2), groups=2),
    "1d transposed depthwise": lambda: nn.ConvTranspose1d(4, 4, 4, stride=2, padding=1, groups=4),
    "3d transposed": lambda: nn.ConvTranspose3d(2, 4, (1, 2, 2), stride=(1, 2, 2)),
    "linear": lambda: nn.Linear(4, 4),
    "linear to more": lambda: nn.Linear(4, 6, bias=False),
    "linear from one": lambda: nn.Linear(1, 3),
    "3d even, replicate": lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode="replicate"),
}
SIZES = {name: ConvSpec.of(make()) for name, make in SITES.items()}
VARIANTS = [
    *(BranchSpec(kind) for kind in KINDS),
    BranchSpec("dilated", {"kernel_size": 5, "dilation": 2}),
    BranchSpec("dilated", {"kernel_size": 3, "dilation": 7}),
    BranchSpec("dilated", {"kernel_size": 2, "dilation": 1}),
    BranchSpec("separable", {"expansion": 1}),
    BranchSpec("1x1-kxk", {"expansion": 3}),
    BranchSpec("1x1-kxk-1x1", {"expansion": 1, "bias": True}),
    BranchSpec("1x1-sobel-y", {"bias": True}),
    BranchSpec("1x1-laplacian", {"bias": True}),
    BranchSpec("lora", {"rank": 2, "alpha": 8}),
]
NORMS = ["batch_norm", "scale", "none"]
OF_LINEAR_LAYERS = ("1x1", "identity", "kxk", "1x1-kxk", "1x1-kxk-1x1", "lora")
EXPANDED = ("1x1-kxk-1x1", "lora", "1x1-sobel-x", "1x1-sobel-y", "1x1-sobel-z", "1x1-laplacian")


def label(value: object) -> str | None:
    return f"{value.kind}{list(value.options.values()) or ''}" if isinstance(value, BranchSpec) else None


PAIRS = [(branch, name) for branch in VARIANTS for name in SITES]
FITTING = [(branch, name) for branch, name in PAIRS if refusal_of_branch(branch, SIZES[name]) is None]
REFUSED = [pair for pair in PAIRS if pair not in FITTING]
on_fitting_sites = pytest.mark.parametrize(("branch", "name"), FITTING, ids=label)
with_each_norm = pytest.mark.parametrize("norm", NORMS)


@torch.no_grad()
def build(branch: BranchSpec, name: str, norm: str, dtype: torch.dtype = torch.float64) -> Branch:
    """A branch without values, such as zeros or ones, that could hide a mistake."""
    like = torch.empty((), dtype=dtype)
    built = kind_of(branch)(SIZES[name], Norm(norm, eps=1e-3), like, **branch.options)
    weights: list[Layer] = [
        module for module in built.modules() if is_conv_or_linear(module) or isinstance(module, Scale)
    ]
    for module in weights:
        if module.weight.requires_grad:
            module.weight.normal_(0.5, 0.5)
        if getattr(module, "bias", None) is not None:
            module.bias.normal_(0.5, 0.5)
    randomize_batch_norm(built)
    return built


def example(name: str) -> Tensor:
    """An input just large enough, with a different size on each axis so that swapped axes show."""
    site = SIZES[name]
    if site.is_linear:
        return torch.randn(2, 5, 3, site.in_channels, dtype=torch.float64)
    extents = [d * (k - 1) + 1 for d, k in zip(site.dilation, site.kernel_size)]
    sizes = [max(extent + 2, 5) + axis for axis, extent in enumerate(extents)]
    return torch.randn(2, site.in_channels, *sizes, dtype=torch.float64)


def norms_of(branch: Branch) -> list[Layer]:
    return [module for module in branch.modules() if is_batch_norm(module)]


@torch.no_grad()
def with_batch_statistics(branch: Branch, x: Tensor) -> Tensor:
    """Return the output in training mode; afterwards each BatchNorm's running statistics are those of this batch, unrounded."""
    seen: dict[Layer, Tensor] = {}
    hooks = [
        norm.register_forward_pre_hook(lambda norm, inputs: seen.update({norm: inputs[0]})) for norm in norms_of(branch)
    ]
    output: Tensor = branch.train()(x)
    for hook in hooks:
        hook.remove()
    for norm, entered in seen.items():
        channels = entered.transpose(0, 1).flatten(1)
        norm.running_mean.copy_(channels.mean(1))
        norm.running_var.copy_(channels.var(1, unbiased=False))
    return output


@on_fitting_sites
def test_equivalent_kernel_is_what_forward_computes(branch: BranchSpec, name: str) -> None:
    for norm in NORMS:
        built, x = build(branch, name, norm).eval(), example(name)
        assert_same_map(built.equivalent_kernel(x), built, x)


@on_fitting_sites
def test_added_to_the_sites_conv_it_keeps_that_convs_window(branch: BranchSpec, name: str) -> None:
    conv, x = SITES[name]().double(), example(name)
    own = kernel_of(conv, x, 0, 0)
    for norm in NORMS:
        built = build(branch, name, norm).eval()
        total = own.add(built.equivalent_kernel(x))
        # the padding mode of an unpadded kernel means nothing
        mode = own.padding_mode if own.padded else total.padding_mode
        assert ConvSpec.of_kernel(total) == replace(SIZES[name], padding_mode=mode)
        assert_same_map(total, lambda x, built=built: conv(x) + built(x), x)  # type: ignore[misc]


@on_fitting_sites
def test_in_training_mode_it_is_one_conv_too(branch: BranchSpec, name: str) -> None:
    """Padding comes first (strategy A), before anything adds a constant, so batch statistics change only numbers and not the form."""
    built, x = build(branch, name, "batch_norm"), example(name)
    output = with_batch_statistics(built, x)
    assert output.shape == SITES[name]().double()(x).shape
    assert_same_map(built.equivalent_kernel(x), lambda _: output, x)


@pytest.mark.parametrize("branch", VARIANTS, ids=label)
@with_each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_that_of_the_site(branch: BranchSpec, norm: str, dtype: torch.dtype) -> None:
    name = fitting_site(branch)
    built, x = build(branch, name, norm, dtype), example(name).to(dtype)
    tensors = [tensor for tensor in (*built.parameters(), *built.buffers()) if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} <= {dtype}
    assert built.eval()(x).dtype == built.train()(x).dtype == dtype
    assert built.equivalent_kernel(x).weight.dtype == dtype
    assert built.equivalent_kernel(x.double()).weight.dtype == torch.float64


@pytest.mark.parametrize("branch", VARIANTS, ids=label)
@with_each_norm
def test_equivalent_kernel_is_differentiable(branch: BranchSpec, norm: str) -> None:
    name = fitting_site(branch)
    built, x = build(branch, name, norm).eval(), example(name)
    learned = [parameter for parameter in built.parameters() if parameter.requires_grad]
    kernel = built.equivalent_kernel(x)(x).square().sum()
    direct = built(x).square().sum()
    if not learned:
        assert not kernel.requires_grad
        return
    for by_kernel, expected in zip(torch.autograd.grad(kernel, learned), torch.autograd.grad(direct, learned)):
        torch.testing.assert_close(by_kernel, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("branch", VARIANTS, ids=label)
def test_every_kind_serves_a_site(branch: BranchSpec) -> None:
    assert fitting_site(branch) in SITES


@pytest.mark.parametrize(("branch", "name"), REFUSED, ids=label)
def test_a_refusal_says_why(branch: BranchSpec, name: str) -> None:
    reason = refusal_of_branch(branch, SIZES[name])
    assert isinstance(reason, str)
    assert len(reason.split()) > 1
    assert not reason.endswith(".")


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("identity", "3x3", "4 channels go in and 6 come out"),
        ("identity", "stride 2", "stride 2×2"),
        ("identity", "stride of columns", "stride 1×2"),
        ("1x1", "1x1", "1×1 already"),
        ("1xk", "row", "a single row"),
        ("1xk", "column", "1×1"),
        ("kx1", "column", "a single column"),
        ("kx1", "row", "1×1"),
        ("1xk", "1d", "no rows"),
        ("kx1", "1d", "no columns"),
        ("1x1-kxk", "1x1", "1×1"),
        ("1x1-avg", "1x1", "1×1 already"),
        ("1x1-avg", "dilation", "dilation 2×2"),
        ("1x1-avg", "dilation of rows", "dilation 2×1"),
        ("1x1-avg", "depthwise with multiplier", "6 channels from 3"),
        ("dilated-2x2", "rectangular", "3×3"),
        ("dilated", "3x3", "cover 5"),
        ("frequency-prior", "3d", "3"),
        ("frequency-prior", "1x1", "1×1"),
        ("separable", "depthwise", "depthwise already"),
        ("separable", "1d 1", "1×1"),
        ("1x1-kxk-1x1", "1x1", "1×1 already"),
        ("1x1-sobel-x", "row", "1×7 has no 3 taps"),
        ("1x1-sobel-y", "1d", "needs 2 axes, the window has 1"),
        ("1x1-sobel-z", "3x3", "needs 3 axes, the window has 2"),
        ("1x1-laplacian", "even by odd, same, dilation", "2×3 has no 3 taps"),
        ("1x1-laplacian", "1x1", "1×1 has no 3 taps"),
        ("lora", "depthwise", "rank 1 already"),
        ("lora", "transposed", "equal sizes"),
        ("1x1", "1d transposed depthwise", "equal sizes"),
        ("identity", "3d transposed", "equal sizes"),
        ("identity", "linear to more", "4 channels go in and 6 come out"),
        *((kind, "linear", "a linear layer has no window") for kind in KINDS if kind not in OF_LINEAR_LAYERS),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, name: str, reason: str) -> None:
    assert reason in str(refusal_of_branch(BranchSpec(kind), SIZES[name]))


# The taps of a window of 3×5 at which each kind has weights; those of the dilated pairs are of 3×3.
EVERYWHERE = ["#####", "#####", "#####"]
CENTRE = [".....", "..#..", "....."]
TAPS = {
    "1x1": CENTRE,
    "identity": CENTRE,
    "1xk": [".....", "#####", "....."],
    "kx1": ["..#..", "..#..", "..#.."],
    "kxk": EVERYWHERE,
    "1x1-kxk": EVERYWHERE,
    "1x1-avg": EVERYWHERE,
    "separable": EVERYWHERE,
    "frequency-prior": EVERYWHERE,
    "1x1-kxk-1x1": EVERYWHERE,
    "lora": EVERYWHERE,
    "1x1-sobel-x": [".#.#.", ".#.#.", ".#.#."],
    "1x1-sobel-y": [".###.", ".....", ".###."],
    "1x1-laplacian": ["..#..", ".###.", "..#.."],
    "dilated": [".#.#.", ".....", ".#.#."],
    "dilated-2x2": ["#.#", "...", "#.#"],
    "dilated-1x2": ["...", "#.#", "..."],
    "dilated-2x1": [".#.", "...", ".#."],
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "1x1-sobel-z"])  # it needs a third axis
def test_a_branch_has_weights_at_the_taps_that_its_kind_names(kind: str) -> None:
    """Origin and branch add to a kernel of the site's window, which is zero where the origin and the branch have no tap."""
    rows = TAPS[kind]
    sizes = len(rows), len(rows[0])
    site = ConvSpec.of(nn.Conv2d(4, 4, sizes, padding=(1, sizes[1] // 2)))
    options = {"kernel_size": 2, "dilation": 2} if kind == "dilated" else {}
    like = torch.empty((), dtype=torch.float64)
    branch = kind_of(BranchSpec(kind))(site, Norm("none"), like, **options)
    for module in branch.modules():
        if is_conv(module) and module.weight.requires_grad:
            nn.init.uniform_(module.weight, 0.5, 1.0)  # type: ignore[arg-type]
    nothing = kernel_of(nn.Conv2d(4, 4, sizes, padding=(1, sizes[1] // 2)).double(), like, 4, 2)
    whole = replace(nothing, weight=torch.zeros_like(nothing.weight), bias=None).add(branch.equivalent_kernel(like))
    found = whole.weight.abs().sum((0, 1)) > 1e-12
    if kind == "frequency-prior":  # some of its cosines are zero
        assert found.any(0).all()
        return
    assert found.tolist() == [[tap == "#" for tap in row] for row in rows]


@pytest.mark.parametrize("sizes", [(3, 5), (4, 2)])
def test_the_prior_of_frequencies_is_a_row_of_cosines(sizes: tuple[int, int]) -> None:
    """Half of the channels hold cosines down the window and half across, each of one frequency more (OREPA, equation 3)."""
    height, width = sizes
    site = ConvSpec.of(nn.Conv2d(3, 7, sizes))
    branch: Any = kind_of(BranchSpec("frequency-prior"))(site, Norm("none"), torch.empty((), dtype=torch.float64))
    assert branch.prior.weight.shape == (7, 1, height, width)
    assert not branch.prior.weight.requires_grad
    for channel in range(7):
        for row in range(height):
            for column in range(width):
                down = math.cos(math.pi * (row + 0.5) * (channel + 1) / height)
                across = math.cos(math.pi * (column + 0.5) * (channel + 1 - 3) / width)
                expected = down if channel < 3 else across
                assert float(branch.prior.weight[channel, 0, row, column]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "dimensions", "taps"),
    [
        ("1x1-sobel-x", 1, [1, 0, -1]),
        ("1x1-sobel-x", 2, [[1, 0, -1], [2, 0, -2], [1, 0, -1]]),
        ("1x1-sobel-y", 2, [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]),
        ("1x1-laplacian", 1, [1, -2, 1]),
        ("1x1-laplacian", 2, [[0, 1, 0], [1, -4, 1], [0, 1, 0]]),
    ],
)
def test_the_filters_of_edges_are_those_of_the_books(kind: str, dimensions: int, taps: list[Any]) -> None:
    site = ConvSpec.of([nn.Conv1d, nn.Conv2d][dimensions - 1](2, 4, 3, padding=1))
    fixed: Layer = KINDS[kind](site, Norm("none"), torch.empty(())).get_submodule("filter")
    assert not fixed.weight.requires_grad
    assert fixed.weight[:, 0].tolist() == [taps] * 4


@pytest.mark.parametrize(("kind", "axis"), [("1x1-sobel-x", 2), ("1x1-sobel-y", 1), ("1x1-sobel-z", 0)])
def test_a_slope_in_space_is_smoothed_along_the_two_other_axes(kind: str, axis: int) -> None:
    site = ConvSpec.of(nn.Conv3d(1, 1, 3))
    fixed: Layer = KINDS[kind](site, Norm("none"), torch.empty(())).get_submodule("filter")
    taps = fixed.weight[0, 0].movedim(axis, 0)
    smooth = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert torch.equal(taps, torch.stack([smooth, torch.zeros(3, 3), -smooth]))


def test_the_laplacian_of_space_weighs_six_neighbours() -> None:
    fixed: Layer = KINDS["1x1-laplacian"](ConvSpec.of(nn.Conv3d(1, 1, 3)), Norm("none"), torch.empty(())).filter
    assert float(fixed.weight[0, 0, 1, 1, 1]) == -6
    assert float(fixed.weight.clamp(min=0).sum()) == 6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("branch", [each for each in VARIANTS if each.kind in EXPANDED], ids=label)
def test_every_trained_number_gets_a_gradient(branch: BranchSpec, norm: str) -> None:
    name = fitting_site(branch)
    built, x = build(branch, name, norm).train(), example(name)
    weights = torch.randn_like(built(x))
    (built(x) * weights).sum().backward()
    # a BatchNorm takes away what the one before it added
    trained = {path: each for path, each in built.named_parameters() if each.requires_grad and "norm1" not in path}
    for path, parameter in trained.items():
        assert parameter.grad is not None, path
        assert "norm2" in path or float(parameter.grad.abs().max()) > 1e-6, path


def test_the_filters_of_edges_have_a_scale_where_no_batch_norm_is_one() -> None:
    kind = KINDS["1x1-laplacian"]
    for norm in ("none", "scale"):
        scale: Layer = kind(SIZES["3x3"], Norm(norm), torch.empty(()), bias=True).scale
        assert (scale.weight.shape, scale.bias.shape) == ((6,), (6,))
        assert kind(SIZES["3x3"], Norm(norm), torch.empty(())).get_submodule("scale").bias is None
    assert "scale" not in dict(kind(SIZES["3x3"], Norm(), torch.empty(())).named_children())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("weights", ["default", "fan_out", "small", "shared"])
@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.Conv1d(4, 4, 5), nn.Conv3d(4, 6, 1, groups=2), nn.Conv2d(4, 4, 1)],
    ids=str,
)
def test_a_low_rank_begins_at_zero_whatever_the_spec_says_of_weights(conv: Layer, weights: Any, norm: Any) -> None:
    """Nothing subtracts it from a site with a BatchNorm, so the function would change."""
    if weights == "shared" and norm != "batch_norm":
        return
    rank = BranchSpec("lora", {"rank": 4, "alpha": 2})
    block: Any = repfx.expand(nn.Sequential(conv), repfx.Spec([rank], norm=norm, weights=weights))[0]
    branch = block.branches["lora"]
    assert not branch.up.weight.any()
    assert branch.up.weight.requires_grad
    assert branch.factor.value == 0.5
    assert branch.last_norm is None


def test_fixed_filters_are_never_shared_with_the_site() -> None:
    """They have the shape of a depthwise site's own weights."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4))
    kinds = ["frequency-prior", "1x1-sobel-x"]
    block: Any = repfx.expand(model, repfx.Spec(kinds, weights="shared"))[0]
    site = ConvSpec.of(model[0])
    for kind, name in zip(kinds, ("prior", "filter")):
        fixed: Layer = KINDS[kind](site, Norm(), torch.empty(())).get_submodule(name)
        assert torch.equal(block.branches[kind].get_submodule(name).weight, fixed.weight)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_pointwise_conv_before_a_window_begins_as_an_identity(groups: int) -> None:
    site = ConvSpec.of(nn.Conv2d(6, 6, (3, 2), groups=groups))
    branch: Any = kind_of(BranchSpec("1x1-kxk"))(site, Norm("none"), torch.empty((), dtype=torch.float64))
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    assert torch.equal(branch.conv1(x), x)


@pytest.mark.parametrize("residual", [False, True])
def test_the_first_of_two_linear_layers_begins_as_an_identity(residual: bool) -> None:
    site, options = ConvSpec.of(nn.Linear(6, 3)), {"residual": residual}
    branch: Any = kind_of(BranchSpec("1x1-kxk"))(site, Norm("none"), torch.empty((), dtype=torch.float64), **options)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.equal(branch.conv1(x), x)
    assert_same_map(branch.equivalent_kernel(x), branch, x)


def test_depthwise_sites_keep_their_groups() -> None:
    """A branch that mixed the channels of a depthwise site would make its conv a dense one."""
    site = "depthwise"
    kernels = [build(branch, name, "none").equivalent_kernel(torch.ones(1)) for branch, name in FITTING if name == site]
    assert {kernel.groups for kernel in kernels} == {SIZES[site].groups}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("1x1", {"dilation": 2}),
        ("identity", {"kernel_size": 3}),
        ("dilated", {"size": 5}),
        ("dilated", {"kernel_size": "3"}),
        ("dilated", {"kernel_size": 0}),
        ("dilated", {"dilation": 0}),
        ("dilated", {"kernel_size": 2.5}),
        ("separable", {"expansion": 0}),
        ("1x1-kxk", {"expansion": 0}),
        ("1x1-kxk-1x1", {"expansion": 1.5}),
        ("lora", {"rank": 0}),
        ("lora", {"alpha": 0}),
        ("lora", {"alpha": math.nan}),
        ("lora", {"alpha": "8"}),
        ("1x1-sobel-x", {"axis": 1}),
    ],
)
def test_wrong_options_are_invalid(kind: str, options: dict[str, object]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 9, padding=4), nn.BatchNorm2d(4))
    with pytest.raises(InvalidInput, match=kind):
        repfx.expand(model, repfx.Spec((BranchSpec(kind, options),)))


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'identity'"):
        kind_of(BranchSpec("identiti"))


def test_norms_take_over_the_settings_of_the_sites_own() -> None:
    own = nn.SyncBatchNorm(4, eps=1e-2, momentum=0.3)
    built = KINDS["1x1-kxk"](SIZES["3x3"], Norm.like("batch_norm", own), torch.empty(()))
    assert [type(norm) for norm in norms_of(built)] == [nn.SyncBatchNorm] * 2
    assert {(norm.eps, norm.momentum) for norm in norms_of(built)} == {(1e-2, 0.3)}
    assert built.last_norm is norms_of(built)[-1]


@pytest.mark.parametrize("norm", ["scale", "none"])
def test_without_batch_norm_there_is_none(norm: str) -> None:
    assert not any(norms_of(build(branch, name, norm)) for branch, name in FITTING)


def fitting_site(branch: BranchSpec) -> str:
    return next(name for other, name in FITTING if other is branch)


# ---- the registry


@pytest.fixture
def kinds_as_before() -> Iterator[None]:
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)


def new_kind(name: str) -> type[Branch]:
    """A new branch kind, with all that it takes to add one."""

    class Crossing(Branch):
        """1×k, then k×1; x is padded first."""

        kind = name

        @classmethod
        def refusal(cls, site: ConvSpec) -> str | None:
            return "the window is 1×1 already" if site.is_pointwise else None

        @classmethod
        def stages(cls, site: ConvSpec, norm: Norm, like: Tensor) -> Stages:
            rows, columns = site.kernel_size
            unpadded = ((0, 0), (0, 0))
            channels, ones = site.in_channels, (1, 1)
            across = ConvSpec(channels, channels, (1, columns), ones, unpadded, ones)
            down = ConvSpec(channels, site.out_channels, (rows, 1), site.stride, unpadded, ones)
            yield "pad", Pad(site.padding, site.padding_mode)
            yield from conv_stages("conv1", across, like)
            yield from norm.inside("norm1", channels, site.dimensions, like)
            yield from conv_stages("conv2", down, like)
            yield from norm.last(site.out_channels, site.dimensions, like)

    return Crossing


@pytest.mark.usefixtures("kinds_as_before")
class TestRegistration:
    @pytest.mark.parametrize("kind", ["", "a.b", 3, None], ids=repr)
    def test_a_malformed_kind_is_rejected(self, kind: object) -> None:
        before = dict(KINDS)
        with pytest.raises(InvalidInput, match="Nameless"):
            type("Nameless", (Branch,), {"kind": kind})
        assert before == KINDS

    def test_a_missing_kind_is_rejected(self) -> None:
        with pytest.raises(InvalidInput, match="Nameless"):
            type("Nameless", (Branch,), {})

    def test_a_taken_kind_is_rejected(self) -> None:
        before = dict(KINDS)
        with pytest.raises(InvalidInput, match=r"Other.*Pointwise"):
            type("Other", (Branch,), {"kind": "1x1"})
        assert before == KINDS

    def test_a_taken_kind_is_rejected_from_a_class_of_the_same_name(self) -> None:
        before = dict(KINDS)
        with pytest.raises(InvalidInput, match="Pointwise"):
            type("Pointwise", (Branch,), {"kind": "1x1", "__module__": "elsewhere"})
        assert before == KINDS

    def test_a_subclass_needs_a_kind_of_its_own(self) -> None:
        with pytest.raises(InvalidInput, match="Child"):
            type("Child", (KINDS["1x1"],), {})

    def test_a_class_that_is_loaded_again_takes_its_own_place(self) -> None:
        again = type("Pointwise", (Branch,), {"kind": "1x1", "__module__": KINDS["1x1"].__module__})
        assert KINDS["1x1"] is again

    @pytest.mark.parametrize("kind", ["origin", "forward", "kernel_size", "training"])
    def test_a_kind_that_a_block_needs_for_itself_leaves_the_model_alone(self, kind: str) -> None:
        new_kind(kind)
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        with pytest.raises(InvalidInput, match=kind):
            repfx.expand(model, [kind], inplace=True)
        assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d]

    @pytest.mark.parametrize("preset_norm", NORMS)
    def test_a_new_kind_is_one_class(self, preset_norm: str) -> None:
        crossing = new_kind("1xk-kx1")
        model = randomize_batch_norm(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1))
        ).double()
        spec = repfx.Spec(("1xk-kx1",), norm=preset_norm)  # type: ignore[arg-type]
        table = repfx.sites(model, spec)
        assert table["0"].note == "would get 1xk-kx1"
        assert "1×1" in table["3"].note

        expanded = repfx.expand(model, spec).eval()
        block = expanded.get_submodule("0")
        assert isinstance(block, repfx.RepBlock)
        assert isinstance(block.branches["1xk-kx1"], crossing)
        x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
        assert_same_map(expanded, model.eval(), x)
        randomize_batch_norm(expanded, seed=3)
        fused = repfx.fuse(expanded)
        assert_same_map(fused, expanded, x)
        assert [type(module) for module in fused.children()] == [nn.Conv2d, nn.ReLU, nn.Conv2d]

    def test_the_fixture_takes_new_kinds_back(self) -> None:
        assert "1xk-kx1" not in KINDS
