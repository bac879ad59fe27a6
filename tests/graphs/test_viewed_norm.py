"""BatchNorms of sequences fold into linear layers where the number of axes is known, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_batch_norm
from repfx.rewriting.input_shapes import InputShapes
from repfx.testing import assert_equivalent, randomize_batch_norm


class Tokens(nn.Module):
    """A conv whose pixels are returned as ``(batch, pixels, channels)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x).flatten(2).transpose(1, 2)


FORMS: dict[str, Callable[[Tensor, nn.Module], Any]] = {
    "flatten": lambda y, norm: norm(y.flatten(0, 1)).reshape_as(y),
    "view": lambda y, norm: norm(y.view(-1, y.shape[-1])).view_as(y),
    "transpose": lambda y, norm: norm(y.transpose(1, 2)).transpose(-1, -2),
    "permute": lambda y, norm: norm(y.permute(0, 2, 1)).permute((0, 2, 1)),
    "turned otherwise": lambda y, norm: norm(y.transpose(1, 2)).transpose(0, 1),
    "turned and left so": lambda y, norm: norm(y.transpose(1, 2)),
}
OTHER_FORMS: dict[str, Callable[[Tensor, nn.Module], Any]] = {
    "plain": lambda y, norm: norm(y),
    "flattened and left so": lambda y, norm: norm(y.flatten(0, 1)),
    "all turned and brought back": lambda y, norm: norm(y.permute(2, 1, 0)).permute(2, 1, 0),
    "used before it is brought back": lambda y, norm: (z := norm(y.flatten(0, 1))).reshape_as(y) + z.mean(),
}


class Normed(nn.Module):
    """A linear layer with a BatchNorm behind it."""

    def __init__(self, form: str, features: int = 5) -> None:
        super().__init__()
        self.form = (FORMS | OTHER_FORMS)[form]
        self.linear = nn.Linear(6, features, bias=False)
        self.bn = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Any:
        return self.form(self.linear(x), self.bn)


X = torch.randn(2, 3, 5, 6, dtype=torch.float64)


def norms(model: nn.Module) -> int:
    return sum(map(is_batch_norm, model.modules()))


@pytest.mark.parametrize("form", FORMS)
def test_a_norm_seen_through_a_view_folds(form: str) -> None:
    model = randomize_batch_norm(nn.Sequential(Tokens(), Normed(form), nn.GELU()).double()).eval()
    fused = repfx.fuse(model)
    assert norms(fused) == 0, str(repfx.report(fused))
    assert_equivalent(fused, model, X)


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_views_stay_as_they_are(form: str) -> None:
    # there are 12 pixels; in some forms also 12 channels, and BatchNorm1d takes the pixels for channels
    features = 12 if form in ("plain", "all turned and brought back") else 5
    model = randomize_batch_norm(nn.Sequential(Tokens(), Normed(form, features)).double()).eval()
    fused = repfx.fuse(model)
    assert norms(fused) == 1
    assert repfx.report(fused).skipped
    assert_equivalent(fused, model, X)


def test_without_a_conv_nothing_is_known_of_the_input() -> None:
    fused = repfx.fuse(randomize_batch_norm(Normed("flatten").double()).eval())
    assert norms(fused) == 1


def test_a_head_of_batch_norm_and_linear_layer_is_one_linear_layer() -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    head = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.0), nn.Linear(6, 4))
    model = randomize_batch_norm(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), Pooled(), head).double()).eval()
    fused = repfx.fuse(model)
    assert norms(fused) == 0, str(repfx.report(fused))
    assert_equivalent(fused, model, X)


def test_dropout_that_drops_something_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout(0.0), nn.Dropout2d(0.5), nn.BatchNorm2d(6)).eval()
    fused = repfx.fuse(model)
    assert [type(module) for module in fused.modules() if isinstance(module, (nn.Dropout, nn.Dropout2d))] == [
        nn.Dropout2d
    ]
    assert norms(fused) == 1


class TestInputShapes:
    def test_a_layer_called_with_different_inputs_is_not_known(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 1)
                self.linear = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Any:
                pixels = self.conv(x).flatten(2).transpose(1, 2)
                return self.linear(pixels).mean(1) + self.linear(pixels.mean(1))

        assert InputShapes(Shared()).axes("linear") is None

    def test_what_is_seen_before_a_failure_holds(self) -> None:
        class Failing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.body(x)
                return y if y.sum().item() > 0 else -y  # there are no numbers on the meta device

        assert InputShapes(Failing()).axes("body.3") == 2

    def test_the_model_is_left_as_it_was(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert InputShapes(model).axes("1") == 4
        assert model.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert not model[1]._forward_pre_hooks
