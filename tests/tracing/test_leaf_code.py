"""Modules of anybody are read by their code if they hold only numbers per channel; others stay calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

import repfx
from repfx.tracing.leaf_code import code_of
from tests.inline_net import Net, convs, error_of, fused_exactly, image, ready, reasons


class LayerScale(nn.Module):
    """γ ⊙ x, with γ of some shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Any:
        return x * self.gamma


class Indexed(LayerScale):
    def forward(self, x: Tensor) -> Any:
        return self.gamma[:, None, None] * x


class Viewed(LayerScale):
    def forward(self, x: Tensor) -> Any:
        return x.mul(self.gamma.view(1, -1, 1, 1))


class InPlace(LayerScale):
    def forward(self, x: Tensor) -> Any:
        return x.mul_(self.gamma)


class Implicit(LayerScale):
    """YOLOv7's implicit knowledge: one number is added to each channel."""

    def forward(self, x: Tensor) -> Any:
        return self.gamma + x


class Affine(nn.Module):
    """ResMLP's affine map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Any:
        return torch.addcmul(self.beta.view(1, -1, 1, 1), self.alpha.view(1, -1, 1, 1), x)


class Frozen(nn.Module):
    """A frozen BatchNorm, written by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean", "variance"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Any:
        weight, bias, mean, variance = (
            getattr(self, name).reshape(1, -1, 1, 1) for name in ("weight", "bias", "mean", "variance")
        )
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Called(Frozen):
    def forward(self, x: Tensor) -> Any:
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, self.training, 0.1, 1e-4)  # type: ignore[arg-type]


class DropPath(nn.Module):
    """Stochastic depth, as everybody copies it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Any:
        if self.rate == 0.0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), dtype=x.dtype) >= self.rate
        return x * keep / (1 - self.rate)


class Dropped(DropPath):
    def forward(self, x: Tensor) -> Any:
        return F.dropout(x, self.rate, self.training)


class Deep(DropPath):
    def forward(self, x: Tensor) -> Any:
        return stochastic_depth(x, self.rate, "row", self.training)


class Slope(DropPath):
    """VanillaNet's activation, whose slope grows to 1."""

    def forward(self, x: Tensor) -> Any:
        return F.leaky_relu(x, 1 - self.rate)


def between_convs(module: nn.Module) -> Net:
    members = {"first": nn.Conv2d(4, 6, 3, stride=2), "module": module, "second": nn.Conv2d(6, 5, 1)}
    return Net(lambda m, x: m.second(m.module(m.first(x))), **members)


READ: dict[str, Callable[[], nn.Module]] = {
    "layer scale": lambda: LayerScale(6, 1, 1),
    "layer scale, one number": lambda: LayerScale(1),
    "layer scale, indexed": lambda: Indexed(6),
    "layer scale, viewed": lambda: Viewed(6),
    "layer scale in place": lambda: InPlace(1, 6, 1, 1),
    "implicit addition": lambda: Implicit(1, 6, 1, 1),
    "affine": lambda: Affine(6),
    "frozen BatchNorm": lambda: Frozen(6),
    "call of batch_norm": lambda: Called(6),
    "drop path": lambda: DropPath(0.0),
    "dropout in the mode": lambda: Dropped(0.0),
    "stochastic depth in the mode": lambda: Deep(0.0),
    "a slope of 1": lambda: Slope(0.0),
}


@pytest.mark.parametrize("name", READ)
def test_a_module_is_read_by_its_code(name: str) -> None:
    fused = fused_exactly(between_convs(READ[name]()), image())
    assert len(convs(fused)) == 1, reasons(fused)
    assert {path.rpartition(".")[0] for path, _ in fused.named_parameters()} == {*convs(fused)}


class Dead(LayerScale):
    """Code that writes into what it returns."""

    def forward(self, x: Tensor) -> Any:
        y = x * self.gamma
        y.add_(1)
        return y


class Counting(LayerScale):
    def forward(self, x: Tensor) -> Any:
        self.gamma.data.add_(0)
        return x * self.gamma


class Nonlinear(LayerScale):
    def forward(self, x: Tensor) -> Any:
        return x * self.gamma + x.relu()


class ByTheInput(LayerScale):
    def forward(self, x: Tensor) -> Any:
        return x * (self.gamma * x.mean())


class Sized(LayerScale):
    def forward(self, x: Tensor) -> Any:
        return x * 2 if x.shape[2] > 3 else x


UNREAD: dict[str, Callable[[], nn.Module]] = {
    "writes into what it returns": lambda: Dead(6, 1, 1),
    "writes into its parameter": lambda: Counting(6, 1, 1),
    "adds an activation": lambda: Nonlinear(6, 1, 1),
    "scales by the input": lambda: ByTheInput(6, 1, 1),
    "asks for sizes": lambda: Sized(6, 1, 1),
    "scales positions": lambda: LayerScale(1, 1, 3, 4),
    "scales a row": lambda: LayerScale(4),
    "drops": lambda: DropPath(0.1),
    "drops, by a function": lambda: Dropped(0.1),
    "drops, by torchvision's function": lambda: Deep(0.1),
    "a slope of nearly 1": lambda: Slope(1e-9),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_module_whose_code_does_anything_else_stays(name: str) -> None:
    fused = fused_exactly(between_convs(UNREAD[name]()), image(2, 4, 7, 9))
    assert len(convs(fused)) == 2


def test_a_module_that_is_called_twice_stays() -> None:
    model = Net(lambda m, x: m.b(m.scale(m.a(x))) + m.scale(x), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))
    model.scale = LayerScale(4, 1, 1)
    fused = fused_exactly(model, image())
    assert len(convs(fused)) == 2
    assert "scale" in dict(fused.named_children())


def test_a_module_with_a_hook_stays() -> None:
    scale = LayerScale(6, 1, 1)
    scale.register_forward_hook(lambda *_: None)
    assert code_of(scale, {}) is None
    fused = fused_exactly(between_convs(scale), image())
    assert len(convs(fused)) == 2


def test_a_grey_image_that_a_scale_spreads_over_channels_is_not_read() -> None:
    model = Net(lambda m, x: m.conv(m.scale(x)), scale=LayerScale(1, 4, 1, 1), conv=nn.Conv2d(4, 5, 3))
    fused = fused_exactly(model, image(2, 1, 9, 10))
    assert error_of(fused, model, image(2, 4, 9, 10)) < 1e-9


def test_a_scale_with_the_axis_of_a_batch_gives_it_to_the_output() -> None:
    model = ready(Net(lambda m, x: m.scale(m.conv(x)), conv=nn.Conv2d(4, 6, 3), scale=Viewed(6)))
    fused = repfx.fuse(model)
    assert "scale" not in dict(fused.named_children())
    assert error_of(fused, model, image(4, 9, 10)) < 1e-9


def test_what_a_scale_has_absorbed_is_restored() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.scale = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), LayerScale(6, 1, 1)

        def forward(self, x: Tensor) -> Any:
            return self.scale(self.norm(self.conv(x)))

    model = ready(Scaled())
    restored = repfx.restore(repfx.fuse(model)).double().eval()
    assert error_of(restored, model, image()) < 1e-9
    again = ready(Scaled(), seed=1)
    again.load_state_dict(restored.state_dict())
    assert error_of(again, model, image()) < 1e-9


def test_a_scale_on_the_last_axis_folds_into_a_linear_layer() -> None:
    model = Net(lambda m, x: m.scale(m.linear(x)), linear=nn.Linear(4, 6), scale=LayerScale(6))
    fused = fused_exactly(model, image(2, 3, 5, 4))
    assert [name for name, _ in fused.named_children()] == ["linear"]


class Powered(LayerScale):
    def __init__(self, *shape: int, power: int) -> None:
        super().__init__(*shape)
        self.power = power

    def forward(self, x: Tensor) -> Any:
        return x * self.gamma**self.power


def test_leaves_that_are_alike_keep_their_own_numbers() -> None:
    parts = [Powered(4, 1, 1, power=power) for power in (1, 1, 2)]
    convs_between = [nn.Conv2d(4, 4, 3) for _ in range(4)]
    layers = [convs_between[0], parts[0], nn.ReLU(), convs_between[1], parts[1], nn.ReLU(), convs_between[2], parts[2]]
    fused = fused_exactly(nn.Sequential(*layers, nn.ReLU(), convs_between[3]), image(2, 4, 12, 13))
    assert not [module for module in fused.modules() if isinstance(module, Powered)]


def test_leaves_that_are_alike_are_traced_once() -> None:
    known: dict[Any, Any] = {}
    for gamma in (Powered(4, 1, 1, power=2) for _ in range(3)):
        code = code_of(gamma, known)
        assert code is not None
        assert code.module.gamma is gamma.gamma
    assert len(known) == 1
    code_of(Powered(4, 1, 1, power=3), known)
    assert len(known) == 2
    odd: Any = Powered(4, 1, 1, power=3)
    odd.table = {"power": 3}
    code_of(odd, known)
    assert len(known) == 2
