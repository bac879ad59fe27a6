"""Kernels that were assembled together: gradients that go back one by one or not at all, and what may change unseen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.algebra.kernel import Kernel
from repfx.blocks.branch import KINDS, Branch
from repfx.blocks.together import PLAN
from tests.blocks.test_together import X, alone, assert_close, forward_counts, gradients, squares, squeezed

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


class NoGradient(torch.autograd.Function):
    """The identity, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None


def test_kernels_without_a_gradient() -> None:
    model = squeezed()

    def run(model: nn.Module) -> list[Tensor]:
        first, second = model(X)
        return [NoGradient.apply(first), NoGradient.apply(second)]

    assert all(each is None or not each.any() for each in gradients(model, run).values())


def test_a_step_of_one_head_between_the_backward_passes_of_two() -> None:
    """What the second head's kernel is made from stays as it is."""
    model = squeezed()
    model.stem.requires_grad_(False)
    twin = copy.deepcopy(model)
    runs: list[tuple[Any, Callable[[], list[Tensor]]]] = [(model, lambda: model(X)), (twin, lambda: alone(twin))]
    for one, run in runs:
        first, second = run()
        first.square().sum().backward()
        with torch.no_grad():
            one.first[0].conv.weight.sub_(one.first[0].conv.weight.grad, alpha=1e-3)
        second.square().sum().backward()
    found, expected = ({name: each.grad for name, each in one.named_parameters()} for one in (model, twin))
    assert_close(found, expected)


@pytest.mark.parametrize("again", [False, True])
def test_parts_that_are_frozen_after_the_forward_pass(again: bool) -> None:
    """The backward pass goes where the forward pass came from: once with second derivatives, or twice."""
    found = []
    model = squeezed()
    weights = [each for each in model.parameters() if each.requires_grad]
    runs: list[Callable[[], list[Tensor]]] = [lambda: model(X), lambda: alone(model)]
    for run in runs:
        loss = squares(run())
        model.first.requires_grad_(False)
        if again:
            torch.autograd.grad(loss, weights[:1], retain_graph=True)
        found.append(torch.autograd.grad(loss, model.stem[0].conv.weight, create_graph=not again)[0])
        model.first.requires_grad_(True)
    assert torch.allclose(found[0], found[1], rtol=1e-10)


def test_statistics_that_were_made_in_inference_mode() -> None:
    model = squeezed()
    expected = gradients(model, lambda model: model(X))
    with torch.inference_mode():
        for norm in (each for each in model.modules() if isinstance(each, nn.BatchNorm2d)):
            assert norm.running_mean is not None
            norm.running_mean = norm.running_mean.clone()
    assert_close(gradients(model, lambda model: model(X)), expected)


def test_a_block_that_is_the_model_keeps_its_plan() -> None:
    block = repfx.squeeze(copy.deepcopy(squeezed().second[0]), statistics="frozen")
    x = torch.ones(2, 4, 5, 6, dtype=torch.float64)
    block(x)
    plan = vars(block)[PLAN]
    block(x)
    assert plan is not None
    assert vars(block)[PLAN] is plan


def test_an_object_that_changes_unseen() -> None:
    class Scaled(Branch):
        kind = "scaled"
        plan = SimpleNamespace(factor=2.0)

        @classmethod
        def stages(cls, site: Any, norm: Any, like: Tensor) -> Any:
            yield "conv", nn.Conv2d(site.in_channels, site.out_channels, 3, padding=1, bias=False, dtype=like.dtype)

        def forward(self, x: Tensor) -> Any:
            conv: Any = self[0]
            return conv(x) * self.plan.factor

        def equivalent_kernel(self, like: Tensor) -> Kernel:
            kernel = super().equivalent_kernel(like)
            return kernel.fold_affine(like.new_ones(kernel.out_channels) * self.plan.factor)

    try:
        model = squeezed(["scaled"])
        plan = SimpleNamespace(factor=2.0)
        for each in (each for each in model.modules() if isinstance(each, Scaled)):
            each.plan = plan
        model(X)
        plan.factor = 3.0
        for one, other in zip(model(X), alone(model)):
            assert torch.allclose(one, other, rtol=1e-11)
    finally:
        KINDS.known.pop("scaled", None)


def test_a_part_on_another_stream() -> None:
    model = squeezed()
    expected = forward_counts(model)["rsqrt"]
    own: Callable[..., Any] = model.second.forward

    def elsewhere(x: Tensor) -> Any:
        with torch.cpu.stream(torch.cpu.Stream()):
            return own(x)

    model.second.forward = elsewhere
    assert forward_counts(model)["rsqrt"] > expected


def test_a_part_in_a_captured_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = squeezed()
    expected = forward_counts(model)["rsqrt"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert forward_counts(model)["rsqrt"] > expected
