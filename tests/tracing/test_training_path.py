"""Modules whose eval path writes into their own tensors: `fuse` takes the training path for both modes if both compute the same."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from tests.foreign_blocks.span import SPAN, Conv3XCInItsOwnWords
from tests.inline_net import convs, error_of, image, norms, ready, reasons, same_state


class Copying(Conv3XCInItsOwnWords):
    """Copies the composed weight into the conv, with gradients off."""

    @torch.no_grad()
    def update_params(self) -> None:
        weight, bias = self.composed()
        self.eval_conv.weight.copy_(weight)
        self.eval_conv.bias.copy_(bias)


class Normed(Conv3XCInItsOwnWords):
    """Has a BatchNorm in training mode, which the composed weight holds, and an activation that drops behind both paths."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.norm = getattr(nn, f"BatchNorm{self.sk.weight.ndim - 2}d")(self.sk.out_channels)
        self.drop = nn.Dropout(0.5)

    def composed(self) -> tuple[Tensor, Tensor]:
        weight, bias = super().composed()
        scale = self.norm.weight.data / torch.sqrt(self.norm.running_var + self.norm.eps)
        shift = self.norm.bias.data + (bias - self.norm.running_mean) * scale
        return weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift

    def branches(self, x: Tensor) -> Any:
        return self.norm(super().branches(x))

    def forward(self, x: Tensor) -> Any:
        return self.drop(super().forward(x))


@pytest.mark.parametrize("kind", [Conv3XCInItsOwnWords, Copying, Normed])
@pytest.mark.parametrize(("dimensions", "stride"), [(1, 2), (2, 1), (3, 1)])
def test_the_training_path_is_the_one_conv(kind: Any, dimensions: int, stride: int) -> None:
    model = ready(nn.Sequential(kind(dimensions, 4, 6, stride), nn.SiLU()))
    x, before = image(2, 4, *(9, 10, 7)[:dimensions]), copy.deepcopy(model.state_dict())
    fused = repfx.fuse(model)
    assert same_state(before, model.state_dict())
    assert error_of(fused, model, x) < 1e-9  # this writes into the model
    assert (convs(fused), norms(fused)) == (["0.conv.1"], [])
    report = repfx.report(fused)
    assert [note.path for note in report.notes] == ["0"]
    assert "it runs its training path in eval mode, too" in str(report)
    assert bool((fused.train()(x) == 0).any()) == (kind is Normed)


@pytest.mark.slow
def test_a_net_of_such_blocks() -> None:
    model = ready(SPAN())
    x = image(2, 3, 10, 13)
    fused = repfx.fuse(model, example=x)
    assert error_of(fused, model, x) < 1e-9
    assert (len(convs(fused)), norms(fused)) == (10, [])
    assert len(repfx.report(fused).notes) == 8
    trained = copy.deepcopy(model).train()
    assert error_of(fused.train(), trained, x) < 1e-9


def test_the_fused_form_is_trained_further() -> None:
    fused: Any = repfx.fuse(nn.Sequential(Conv3XCInItsOwnWords(), nn.ReLU()).train())
    assert fused.training
    fused(torch.randn(1, 8, 7, 5)).sum().backward()
    assert [tuple(weight.shape) for weight in fused.parameters()] == [(8, 8, 3, 3), (8,)]
    assert all(weight.grad is not None for weight in fused.parameters())


# ---- blocks whose two paths aren't the same


class OtherBorder(Conv3XCInItsOwnWords):
    """Pads behind the first 1×1 in training mode: its bias doesn't reach the border."""

    def branches(self, x: Tensor) -> Any:
        wide = F.pad(self.conv[0](x), self.around)
        return self.conv[2](self.conv[1](wide)) + self.sk(x)


class Clamped(Conv3XCInItsOwnWords):
    def branches(self, x: Tensor) -> Any:
        return super().branches(x).clamp(-1e3, 1e3)


class Stale(Conv3XCInItsOwnWords):
    """Composes its weight once, so that the weight doesn't follow later changes."""

    def update_params(self) -> None:
        if self.weight_concat is None:
            super().update_params()


class Twofold(Conv3XCInItsOwnWords):
    def branches(self, x: Tensor) -> Any:
        y = super().branches(x)
        return y, y.mean()

    def forward(self, x: Tensor) -> Any:
        if self.training:
            return self.branches(x)
        self.update_params()
        return self.eval_conv(x)


class Drawing(Conv3XCInItsOwnWords):
    def branches(self, x: Tensor) -> Any:
        return F.dropout(super().branches(x), 0.5)


class Counting(Conv3XCInItsOwnWords):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def branches(self, x: Tensor) -> Any:
        self.count.add_(1)  # type: ignore[operator]
        return super().branches(x)


class BatchStatistics(Conv3XCInItsOwnWords):
    def branches(self, x: Tensor) -> Any:
        y = super().branches(x)
        return F.batch_norm(y, None, None, training=True)


class Watched(Conv3XCInItsOwnWords):
    def __init__(self) -> None:
        super().__init__()
        self.conv[0].register_forward_hook(do_nothing)


def do_nothing(*arguments: Any) -> None: ...


class SizesOfItsOwn(Conv3XCInItsOwnWords):
    """Takes only one size."""

    def branches(self, x: Tensor) -> Any:
        return super().branches(x) * torch.ones(9, 10)


def stale() -> nn.Module:
    block = Stale()
    block.double().eval()(image(1, 8, 5, 5))
    nn.init.normal_(block.sk.weight)
    return block


DIFFERENT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "at the border": (OtherBorder, r"its two paths differ on an input of \(1, 8, 5, 8\): by "),
    "for large numbers": (Clamped, r"its two paths differ on an input of \(2, 8, 10, 5\): by "),
    "an old weight": (stale, "it computes different things in training and in eval mode"),
    "another output": (Twofold, "their outputs are no single tensors"),
    "dropout in code": (Drawing, "its training path draws random numbers: dropout"),
    "a count": (Counting, "its training path writes into its own tensors"),
    "statistics of the batch": (BatchStatistics, "its two paths differ on an input of"),
    "a hook": (Watched, "a layer in it has hooks, which would run in eval mode, too"),
    "one size": (SizesOfItsOwn, "its two paths can't be compared: The size of tensor"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_block_with_two_paths_stays(case: str) -> None:
    build, reason = DIFFERENT[case]
    model = ready(nn.Sequential(build(), nn.ReLU()))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    fused = repfx.fuse(model)
    assert torch.equal(state, torch.get_rng_state())
    assert same_state(before, model.state_dict())
    x = image(2, 8, 9, 10)
    assert error_of(fused, model, x) == 0
    assert type(fused.get_submodule("0")) is type(model.get_submodule("0"))
    assert repfx.report(fused).notes == ()
    assert re.search(reason, reasons(fused)), reasons(fused)


def test_other_verbs_leave_it_alone() -> None:
    model = ready(nn.Sequential(Conv3XCInItsOwnWords(), nn.SiLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)))
    expanded = repfx.expand(model, "repvgg")
    assert [path for path, module in expanded.named_modules() if type(module).__name__ == "RepBlock"] == ["2"]
    fused = repfx.fuse(expanded)
    assert error_of(fused, model, image(2, 8, 9, 10)) < 1e-9
    assert convs(fused) == ["0.conv.1", "2"]
    restored = repfx.restore(repfx.fuse(model)).eval()
    assert error_of(restored, model, image(2, 8, 9, 10)) < 1e-9
    assert norms(restored) == ["3"]
