"""Kernels that are assembled in forward: every kind of derivative, one parameter at a time, and the order of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, vmap

import repfx
from repfx.algebra.assembly import assembled
from repfx.algebra.kernel import Kernel
from repfx.blocks.together import PLAN
from repfx.testing import randomize_batch_norm
from tests.random_numbers import numbers_from

X = torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=numbers_from(3))


def expanded(spec: str) -> Any:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).double()
    return randomize_batch_norm(repfx.expand(model, spec, preserve=False)).eval()


def sums(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Outputs summed per channel, ``(out,)``, with `parameter` in place of the model's own."""
    y: Tensor = functional_call(model, {name: parameter}, (X,))
    return y.sum((0, 2, 3))


def jacobian(model: nn.Module, name: str, parameter: Tensor) -> Any:
    return jacfwd(partial(sums, model, name))(parameter)


def of_several(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    return vmap(partial(sums, model, name))(torch.stack([parameter, 2 * parameter]))


@pytest.mark.parametrize("what", [jacobian, of_several])
@pytest.mark.parametrize("spec", ["acb", "dbb", "orepa"])
def test_one_parameter_can_be_varied_alone(spec: str, what: Callable[[nn.Module, str, Tensor], Tensor]) -> None:
    """Sums of kernels then mix tensors that have the axis of `vmap` with tensors that lack it."""
    model = expanded(spec)
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    expected = {name: what(model, name, each) for name, each in parameters.items()}
    repfx.squeeze(model)
    for name, each in parameters.items():
        torch.testing.assert_close(what(model, name, each), expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("squeezed", [True, False])
def test_a_recorded_function_gives_the_same_each_time(squeezed: bool, trained: bool) -> None:
    """A sum computed in place would write into the constants of the recorded function."""
    model = expanded("acb").requires_grad_(trained)
    if squeezed:
        repfx.squeeze(model)
    expected = torch.func.jvp(model, (X,), (X,))[1]
    recorded: Any = torch.func.linearize(model, X)[1]
    for _ in range(3):
        torch.testing.assert_close(recorded(X), expected, rtol=1e-10, atol=1e-10)


def depthwise_then_pointwise(a: Tensor, b: Tensor) -> Tensor:
    ones, none = (1, 1), ((0, 0), (0, 0))
    first = Kernel(a, None, ones, none, ones, groups=4)
    return assembled(lambda like: first.compose(Kernel(b, None, ones, none, ones)), a).weight


def test_an_assembled_kernel_can_be_differentiated_in_every_way() -> None:
    depthwise, pointwise = torch.randn(4, 1, 3, 2).double(), torch.randn(3, 4, 1, 1).double()
    inputs = (depthwise.requires_grad_(), pointwise.requires_grad_())
    assert torch.autograd.gradcheck(depthwise_then_pointwise, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(depthwise_then_pointwise, inputs)


def test_gradients_that_come_in_channels_last_are_put_in_order() -> None:
    kernel = torch.randn(3, 4, 3, 2).double().requires_grad_()
    found: list[Tensor] = []

    def listened_to(like: Tensor) -> Kernel:
        weight = kernel * 1
        weight.register_hook(found.append)
        return Kernel(weight, None, (1, 1), ((0, 0), (0, 0)), (1, 1))

    last = torch.randn(3, 4, 3, 2).double().contiguous(memory_format=torch.channels_last)
    assembled(listened_to, kernel).weight.backward(last)
    assert found[0].is_contiguous()
    assert torch.equal(found[0], last)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_cpu_never_holds_the_kernels_of_the_whole_model(device: str) -> None:
    """A model on another device keeps a plan, by which its kernels are assembled together. A model on a CPU keeps none."""
    layers = (layer for _ in range(2) for layer in (nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)))
    model = repfx.expand(nn.Sequential(*layers), "acb", preserve=False)
    model = repfx.squeeze(model, statistics="frozen").to(device)
    model(torch.randn(2, 4, 8, 9, device=device)).sum().backward()
    assert (PLAN in vars(model)) == (device == "meta")
