"""Meanings of modules: the right kernel or a reason, by exact class, for the modules of torch, torchvision and timm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers.cond_conv2d import CondConv2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d, RmsNorm
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct
from timm.layers.pool2d_same import AvgPool2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

import repfx
from repfx.algebra.layers import Layer, has_hooks, is_batch_norm, is_conv
from repfx.algebra.meaning import affine_of, kernel_of, meaning_of, refusal_of, torch_class
from repfx.errors import InvalidInput
from repfx.testing import assert_same_map, randomize_batch_norm

Make = Callable[[], Layer]


def example(dimensions: int, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, *(8, 7, 9)[:dimensions], dtype=torch.float64)


def example_for(module: nn.Module, channels: int = 4) -> Tensor:
    meaning = meaning_of(module)
    assert meaning is not None
    return example(2 if meaning.dimensions is None else meaning.dimensions, channels)


def assert_read(module: nn.Module, kind: str, x: Tensor) -> None:
    """The kernel that is read computes what the module does."""
    module = randomize_batch_norm(module).double().eval()
    meaning = meaning_of(module)
    assert refusal_of(module) is None
    assert meaning is not None
    assert meaning.kind == kind
    assert_same_map(kernel_of(module, x, x.shape[1], x.ndim - 2), module, x)


CONVS: dict[str, Make] = {
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    "3d": lambda: nn.Conv3d(4, 2, (1, 3, 2), padding=(0, 1, 1), bias=False),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise with multiplier": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "even, same": lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"),
    "replicate, same": lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="replicate"),
    "circular": lambda: nn.Conv1d(4, 6, 3, padding=3, padding_mode="circular"),
    "transposed 1d": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 0)),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2),
    "transposed, depthwise": lambda: nn.ConvTranspose2d(4, 8, 2, stride=2, groups=4, bias=False),
    "transposed 3d": lambda: nn.ConvTranspose3d(4, 2, 2, stride=(1, 2, 2), padding=1),
    "torchvision's Conv3DSimple": lambda: Conv3DSimple(4, 2),
    "torchvision's Conv3DNoTemporal": lambda: Conv3DNoTemporal(4, 2),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
    "spectral norm, transposed": lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(4, 6, 3)),
}


@pytest.mark.parametrize("name", CONVS)
def test_convs(name: str) -> None:
    conv = CONVS[name]()
    assert is_conv(conv)
    assert not is_batch_norm(conv)
    assert_read(conv, "conv", example_for(conv))


def test_linear() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    for bias in (True, False):
        assert_read(nn.Linear(4, 6, bias), "conv", x)
    assert_read(parametrizations.weight_norm(nn.Linear(4, 6)), "conv", x)


def test_linear_on_the_last_axis_of_more() -> None:
    linear, x = nn.Linear(4, 6).double(), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert_same_map(kernel_of(linear, x, 4, 0), linear, x)


BATCH_NORMS: dict[str, Make] = {
    "1d on 3 axes": lambda: nn.BatchNorm1d(4),
    "2d": lambda: nn.BatchNorm2d(4),
    "3d": lambda: nn.BatchNorm3d(4),
    "synchronized": lambda: nn.SyncBatchNorm(4),
    "affine=False": lambda: nn.BatchNorm2d(4, affine=False),
    "large eps": lambda: nn.BatchNorm2d(4, eps=0.1),
    "tiny eps": lambda: nn.BatchNorm2d(4, eps=1e-12),
    "frozen": lambda: FrozenBatchNorm2d(4),
    "frozen, large eps": lambda: FrozenBatchNorm2d(4, eps=0.1),
    "no tracking since": lambda: _untracked_since(nn.BatchNorm2d(4)),
    "no beta": lambda: _without_beta(nn.BatchNorm2d(4)),
}


def _untracked_since(norm: Layer) -> Layer:
    norm.track_running_stats = False
    return norm


def _without_beta(norm: Layer) -> Layer:
    norm.bias = None
    return norm


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norms(name: str) -> None:
    norm = BATCH_NORMS[name]()
    assert is_batch_norm(norm)
    assert not is_conv(norm)
    dimensions = {"1d on 3 axes": 1, "3d": 3}.get(name, 2)
    assert_read(norm, "affine", example(dimensions))


def test_batch_norm_1d_on_two_axes() -> None:
    norm: Layer = randomize_batch_norm(nn.BatchNorm1d(4)).double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    scale, shift = affine_of(norm, x)
    assert_same_map(lambda x: x * scale + shift, norm, x)


def test_eps_is_the_modules_own() -> None:
    """A kernel that takes 1e-5 for every eps is 3e-5 off at 1e-3, which float32 would let through."""
    x = example(2)
    for eps in (1e-3, 1e-5, 0.0):
        norm = randomize_batch_norm(nn.BatchNorm2d(4, eps=eps)).double().eval()
        assert_same_map(kernel_of(norm, x, 4, 2), norm, x, 1e-12)


def _hooked(module: Layer) -> Layer:
    module.register_forward_hook(lambda *_: None)
    return module


def _pre_hooked(module: Layer) -> Layer:
    module.register_forward_pre_hook(lambda *_: None)
    return module


def _backward_hooked(module: Layer) -> Layer:
    module.register_full_backward_hook(lambda *_: None)
    return module


def _own_method(module: Layer, name: str) -> Layer:
    setattr(module, name, lambda x, *_: x)
    return module


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = super()._conv_forward(input, weight * 2, bias)
        return output


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.abs(super().forward(input))


class OwnCall(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(super().__call__(x))


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


REFUSED: dict[str, tuple[Make, str]] = {
    "timm's Conv2dSame": (lambda: Conv2dSame(4, 4, 3), "Conv2dSame runs code of its own, not Conv2d's"),
    "timm's StdConv2d": (lambda: StdConv2d(4, 4, 3), "StdConv2d runs code of its own"),
    "timm's StdConv2dSame": (lambda: StdConv2dSame(4, 4, 3), "runs code of its own"),
    "timm's ScaledStdConv2d": (lambda: ScaledStdConv2d(4, 4, 3), "runs code of its own"),
    "timm's ScaledStdConv2dSame": (lambda: ScaledStdConv2dSame(4, 4, 3), "runs code of its own"),
    "timm's FrozenBatchNormAct2d": (
        lambda: FrozenBatchNormAct2d(4),
        "FrozenBatchNormAct2d runs code of its own, not FrozenBatchNorm2d's",
    ),
    "timm's BatchNormAct2d": (
        lambda: BatchNormAct2d(4),
        "BatchNormAct2d runs code of its own, not BatchNorm2d's",
    ),
    "own forward": (lambda: OwnForward(4, 4, 3), "OwnForward runs code of its own"),
    "own _conv_forward": (lambda: OwnConvForward(4, 4, 3), "OwnConvForward runs code of its own"),
    "own call": (lambda: OwnCall(4, 4, 3), "OwnCall runs code of its own"),
    "own linear": (lambda: OwnLinear(4, 4), "OwnLinear runs code of its own, not Linear's"),
    "own norm": (lambda: OwnNorm(4), "OwnNorm runs code of its own"),
    "forward of one instance": (lambda: _own_method(nn.Conv2d(4, 4, 3), "forward"), "code of its own"),
    "forward of one frozen norm": (lambda: _own_method(FrozenBatchNorm2d(4), "forward"), "code of its own"),
    "_conv_forward of one instance": (lambda: _own_method(nn.Conv2d(4, 4, 3), "_conv_forward"), "code of its own"),
    "no running statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), "keeps no running statistics"),
    "lazy conv": (lambda: nn.LazyConv2d(4, 3), "LazyConv2d is lazy and not initialized yet"),
    "lazy transposed conv": (lambda: nn.LazyConvTranspose2d(4, 3), "is lazy and not initialized yet"),
    "lazy linear": (lambda: nn.LazyLinear(4), "is lazy and not initialized yet"),
    "lazy norm": (lambda: nn.LazyBatchNorm2d(), "is lazy and not initialized yet"),
    "lazy norm without parameters": (lambda: nn.LazyBatchNorm2d(affine=False), "is lazy and not initialized yet"),
    "hook": (lambda: _hooked(nn.Conv2d(4, 4, 3)), "Conv2d has hooks"),
    "pre-hook": (lambda: _pre_hooked(nn.Conv2d(4, 4, 3)), "Conv2d has hooks"),
    "backward hook": (lambda: _backward_hooked(nn.Conv2d(4, 4, 3)), "Conv2d has hooks"),
    "hook on a norm": (lambda: _hooked(nn.BatchNorm2d(4)), "BatchNorm2d has hooks"),
    "hook on a frozen norm": (lambda: _hooked(FrozenBatchNorm2d(4)), "FrozenBatchNorm2d has hooks"),
    "hook on a linear layer": (lambda: _hooked(nn.Linear(4, 4)), "Linear has hooks"),
    "complex": (lambda: nn.Conv2d(4, 4, 3, dtype=torch.complex64), "torch.complex64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_why(name: str) -> None:
    make, reason = REFUSED[name]
    module = make().eval()
    assert reason in str(refusal_of(module))
    assert meaning_of(module) is None
    with pytest.raises(InvalidInput, match=reason):
        kernel_of(module, example(2), 4, 2)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "normalise", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight norm", "spectral norm"]
)
def test_weights_computed_by_a_hook_are_not_read(normalise: Callable[[nn.Module], nn.Module]) -> None:
    conv = normalise(nn.Conv2d(4, 6, 3))
    assert has_hooks(conv)
    assert "has hooks" in str(refusal_of(conv))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_conv_is_read_again_once_its_hook_is_gone() -> None:
    conv = nn.utils.remove_weight_norm(nn.utils.weight_norm(nn.Conv2d(4, 6, 3)))
    assert_read(conv, "conv", example(2))


def test_a_lazy_conv_is_read_once_it_has_run() -> None:
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d()).double()
    x = example(2)
    model(x)
    assert_read(model[0], "conv", x)
    assert_read(model[1], "affine", example(2, 6))


def test_a_parametrization_of_ones_own_is_read() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    conv = nn.Conv2d(4, 6, 3)
    parametrize.register_parametrization(conv, "weight", Doubled())
    assert_read(conv, "conv", example(2))


NEITHER: dict[str, Make] = {
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4),
    "InstanceNorm2d that tracks no more": lambda: _untracked_since(nn.InstanceNorm2d(4, track_running_stats=True)),
    "lazy InstanceNorm2d": lambda: nn.LazyInstanceNorm2d(track_running_stats=True),
    "LeakyReLU": nn.LeakyReLU,
    "LeakyReLU of nearly 1": lambda: nn.LeakyReLU(1 + 1e-9),
    "PReLU": nn.PReLU,
    "PReLU of nearly 1": lambda: _slopes(1.0, 1.0, 1.0 + 1e-6, 1.0),
    "PReLU of one other slope": lambda: _slopes(1.0, 1.0, 0.5, 1.0),
    "PReLU without numbers": lambda: nn.PReLU(init=1.0, device="meta"),
    "timm's DropPath": lambda: DropPath(0.1),
    "torchvision's StochasticDepth": lambda: StochasticDepth(0.1, "row"),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    "timm's LayerNorm2d": lambda: LayerNorm2d(4),
    "timm's RmsNorm": lambda: RmsNorm(4),
    "timm's GroupNormAct": lambda: GroupNormAct(4, 2),
    "timm's CondConv2d": lambda: CondConv2d(4, 4, 3, num_experts=2),
    "timm's AvgPool2dSame": lambda: AvgPool2dSame(2),
    "ReLU": nn.ReLU,
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(1),
    "LPPool2d": lambda: nn.LPPool2d(1, 2),
    "Dropout": nn.Dropout,
    "ConstantPad2d of ones": lambda: nn.ConstantPad2d(1, 1.0),
    "Upsample": lambda: nn.Upsample(scale_factor=2),
    "Sequential": lambda: nn.Sequential(nn.Conv2d(4, 4, 3)),
}


@pytest.mark.parametrize("name", NEITHER)
def test_all_else_is_no_linear_map(name: str) -> None:
    module = NEITHER[name]()
    assert meaning_of(module) is None
    assert refusal_of(module) is None
    assert not is_batch_norm(module)
    with pytest.raises(InvalidInput, match="its class is not known"):
        kernel_of(module, example(2), 4, 2)


def test_a_renamed_class_is_read() -> None:
    renamed = type("Renamed", (nn.Conv2d,), {})
    conv = renamed(4, 6, 3)
    assert torch_class(conv) is nn.Conv2d
    assert_read(conv, "conv", example(2))


def _slopes(*slopes: float) -> nn.Module:
    activation = nn.PReLU(len(slopes))
    activation.weight.data = torch.tensor(slopes)
    return activation


INSTANCE_NORMS: dict[str, Make] = {
    "1d": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "2d": lambda: nn.InstanceNorm2d(4, track_running_stats=True, eps=0.1),
    "3d": lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("name", INSTANCE_NORMS)
def test_instance_norms_with_running_statistics(name: str) -> None:
    norm = INSTANCE_NORMS[name]()
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    assert not is_batch_norm(norm)
    assert_read(norm, "affine", example_for(norm))


POOLS: dict[str, Make] = {
    "1d": lambda: nn.AvgPool1d(3, 2, 1),
    "2d": lambda: nn.AvgPool2d((3, 2), padding=(1, 0)),
    "3d": lambda: nn.AvgPool3d(2, (1, 2, 1)),
    "unpadded, padding not counted": lambda: nn.AvgPool2d(3, 2, count_include_pad=False),
    "divisor": lambda: nn.AvgPool2d(3, 1, 1, divisor_override=5),
    "3d divisor": lambda: nn.AvgPool3d(2, divisor_override=3),
}


@pytest.mark.parametrize("name", POOLS)
def test_average_pools(name: str) -> None:
    pool = POOLS[name]()
    assert_read(pool, "pool", example_for(pool))


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool1d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(3, 1, (0, 1), count_include_pad=False),
        nn.AvgPool1d(3, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool3d(3, 2, ceil_mode=True),
    ],
    ids=str,
)
def test_pools_whose_window_shrinks_at_the_border_are_no_conv(pool: nn.Module) -> None:
    assert meaning_of(pool) is None


PADS: dict[str, Make] = {
    "zero 1d": lambda: nn.ZeroPad1d((1, 2)),
    "zero": lambda: nn.ZeroPad2d((1, 2, 0, 3)),
    "zero, crop": lambda: nn.ZeroPad2d((-1, 2, 1, -2)),
    "zero 3d": lambda: nn.ZeroPad3d((0, 1, 2, 3, 1, 0)),
    "reflect 1d": lambda: nn.ReflectionPad1d((2, 1)),
    "reflect": lambda: nn.ReflectionPad2d((1, 2, 0, 3)),
    "reflect, crop": lambda: nn.ReflectionPad2d((-1, 2, 2, -1)),
    "reflect 3d": lambda: nn.ReflectionPad3d((0, 1, 2, 1, 1, 0)),
    "replicate 1d": lambda: nn.ReplicationPad1d((1, 5)),
    "replicate": lambda: nn.ReplicationPad2d((1, 2, 0, 3)),
    "replicate, crop": lambda: nn.ReplicationPad2d((-1, 2, 2, -1)),
    "replicate 3d": lambda: nn.ReplicationPad3d((0, 1, 2, 3, 1, 0)),
    "circular 1d": lambda: nn.CircularPad1d((1, 3)),
    "circular": lambda: nn.CircularPad2d((1, 2, 0, 3)),
    "circular, crop": lambda: nn.CircularPad2d((-1, -2, -1, 0)),
    "circular 3d": lambda: nn.CircularPad3d((0, 1, 2, 3, 1, 0)),
}


@pytest.mark.parametrize("name", PADS)
def test_pads(name: str) -> None:
    module = PADS[name]()
    assert_read(module, "crop" if max(module.padding) <= 0 else "pad", example_for(module))


def test_a_zero_pad_whose_value_was_changed_is_no_kernel() -> None:
    pad: Layer = nn.ZeroPad2d(1)
    pad.value = 1.0
    assert meaning_of(pad) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "sides", [(-1, 2, 0, 0), (0, 1, 2, -1)], ids=["crops before, grows after", "grows before, crops after"]
)
def test_a_circular_pad_that_crops_and_grows_one_axis_is_no_kernel(sides: tuple[int, int, int, int]) -> None:
    """torch wraps what is left after cropping; a kernel pads first."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.pad(x, sides, mode="circular"))  # type: ignore[no-any-return]

    assert meaning_of(nn.CircularPad2d(sides)) is None
    model, x = Padded().double().eval(), example(2)
    assert_same_map(repfx.fuse(model), model, x)


IDENTITIES: dict[str, Make] = {
    "LeakyReLU": lambda: nn.LeakyReLU(1.0),
    "LeakyReLU, a whole number": lambda: nn.LeakyReLU(1),
    "LeakyReLU in place": lambda: nn.LeakyReLU(1.0, inplace=True),
    "PReLU": lambda: nn.PReLU(init=1.0),
    "PReLU per channel": lambda: _slopes(1.0, 1.0, 1.0, 1.0),
    "Dropout": lambda: nn.Dropout(0.0),
    "Dropout2d": lambda: nn.Dropout2d(0),
    "AlphaDropout": lambda: nn.AlphaDropout(0.0),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.0),
    "timm's DropPath": lambda: DropPath(0.0),
    "torchvision's StochasticDepth": lambda: StochasticDepth(0.0, "batch"),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_layers_that_are_the_identity_at_one_setting(name: str) -> None:
    for dimensions in (1, 2, 3):
        module = IDENTITIES[name]()
        meaning = meaning_of(module)
        assert meaning is not None
        assert not meaning.lasts
        x = example(dimensions)
        assert_same_map(kernel_of(module, x, 4, dimensions), module.double(), x.clone())


def test_identity() -> None:
    for channels, dimensions in ((3, 1), (4, 2), (2, 3)):
        assert_read(nn.Identity(), "identity", example(dimensions, channels))
    assert meaning_of(nn.Identity("any", arguments=True)) is not None


@pytest.mark.parametrize("name", [*CONVS, *BATCH_NORMS])
def test_arithmetic_is_in_the_dtype_asked_for(name: str) -> None:
    module = (CONVS | BATCH_NORMS)[name]().eval()
    dimensions = meaning_of(module)
    assert dimensions is not None
    for dtype in (torch.float64, torch.float32):
        like = torch.ones((), dtype=dtype)
        kernel = kernel_of(module, like, 4, dimensions.dimensions or 2)
        assert kernel.weight.dtype == dtype
        assert kernel.bias is None or kernel.bias.dtype == dtype


def test_reading_changes_nothing() -> None:
    for make in [*CONVS.values(), *BATCH_NORMS.values()]:
        module = make().eval()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        meaning = meaning_of(module)
        assert meaning is not None
        kernel_of(module, torch.ones((), dtype=torch.float64), 4, meaning.dimensions or 2)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_conv_then_batch_norm_is_what_torch_computes() -> None:
    conv, x = nn.Conv2d(4, 6, 3, padding=1).double(), example(2)
    norm: Layer = randomize_batch_norm(nn.BatchNorm2d(6, eps=1e-3)).double().eval()
    both = kernel_of(conv, x, 4, 2).compose(kernel_of(norm, x, 6, 2))
    direct = F.batch_norm(conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)
    assert_same_map(both, lambda _: direct, x)
