"""Properties that hold for every verb."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import repfx
from repfx.testing import assert_same_map
from tests.small_net import batch, small_net

VERBS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "expand": lambda model: repfx.expand(model, "dbb"),
    "fuse": repfx.fuse,
    "restore": lambda model: repfx.restore(repfx.fuse(model)),
    "drop": lambda model: repfx.drop(repfx.expand(model, "dbb"), "stem", "1x1"),
}


@pytest.mark.parametrize("born_inside", [True, False])
@pytest.mark.parametrize("name", VERBS)
def test_in_inference_mode_results_can_be_trained_all_the_same(name: str, born_inside: bool) -> None:
    with torch.inference_mode(born_inside):
        model = small_net()
    with torch.inference_mode():
        result = VERBS[name](model)
        sites = list(repfx.sites(model))
    assert len(sites) == 3
    assert not any(tensor.is_inference() for tensor in (*result.parameters(), *result.buffers()))
    assert_same_map(result.eval(), model.eval(), batch())
    result.train()(batch()).sum().backward()
    assert all(parameter.grad is not None for parameter in result.parameters())


@pytest.mark.parametrize("grad", [True, False])
def test_the_caller_s_grad_mode_stays(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        repfx.fuse(repfx.expand(small_net(), "acb"))
        assert torch.is_grad_enabled() is grad
