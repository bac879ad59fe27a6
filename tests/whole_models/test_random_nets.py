"""Random nets through every verb."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import repfx
from repfx.blocks.branch import KINDS
from repfx.blocks.folded_norm import folded_norm
from repfx.blocks.presets import PRESETS
from repfx.testing import TOLERANCE, randomize_batch_norm, relative_error
from tests.inline_net import convs, norms, same_state
from tests.random_net import RandomNet, nets_of_sites, random_nets

NETS = random_nets()
HALF = settings(max_examples=settings().max_examples // 2)  # for tests that trace each net several times
SPECS = st.one_of(st.sampled_from(sorted(PRESETS)), st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3))


@torch.no_grad()
def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    output = model(x)
    return list(output) if isinstance(output, tuple) else [output]


def assert_same(model: nn.Module, reference: nn.Module, x: Tensor, tolerance: float = TOLERANCE) -> None:
    pairs = zip(outputs_of(model, x.clone()), outputs_of(reference, x.clone()), strict=True)
    errors = [relative_error(output, expected) for output, expected in pairs]
    assert max(errors) <= tolerance, errors


@torch.no_grad()
def perturbed(model: nn.Module, seed: int) -> nn.Module:
    """Move every parameter and randomize BatchNorms, in place."""
    randomize_batch_norm(model, seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def writes(model: RandomNet) -> bool:
    """Whether the net changes any value in place."""
    in_place = any(getattr(module, "inplace", False) for module in model.modules())
    return in_place or any(call.name in ("iadd", "isub", "relu_") for call in model.program)


@given(NETS)
def test_fused_nets_compute_the_same_say_what_stays_and_can_be_copied(model: RandomNet) -> None:
    before, text = copy.deepcopy(model.state_dict()), str(model)
    fused: Any = repfx.fuse(model)
    assert same_state(before, model.state_dict())
    assert str(model) == text
    assert_same(fused, model, model.input())
    called = {str(node.target) for node in fused.graph.nodes}
    assert called & {*norms(fused)} <= {skip.path for skip in repfx.report(fused).skipped}, "one stays without a reason"
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same(twin, fused, model.input(), 0)
        assert repfx.report(twin) == repfx.report(fused)


@pytest.mark.slow
@given(NETS)
def test_a_fused_net_has_nothing_left_to_fuse(model: RandomNet) -> None:
    """A second `fuse` changes nothing, except in nets that write in place: there, with other names, tracing the result may show more."""
    fused = repfx.fuse(model)
    assume(convs(fused))
    again = repfx.fuse(fused)
    assert_same(again, fused, model.input())
    if not writes(model):
        assert repfx.report(again).applied == ()
        assert same_state(again.state_dict(), fused.state_dict())


@pytest.mark.slow
@given(NETS, st.booleans())
def test_modes_are_kept_and_dropouts_drop_as_before(model: RandomNet, training: bool) -> None:
    for module in model.modules():
        module.training = isinstance(module, nn.Dropout) or training
    fused = repfx.fuse(model)
    assert fused.training == training
    assert all(module.training for module in fused.modules() if training or isinstance(module, nn.Dropout))
    for net in (fused, model):
        net.eval()
        for module in net.modules():
            module.training = isinstance(module, nn.Dropout)
    results = []
    for net in (fused, model):
        torch.manual_seed(1)
        results.append(outputs_of(net, model.input()))
    assert max(relative_error(ours, theirs) for ours, theirs in zip(*results)) < TOLERANCE


@HALF
@given(NETS, SPECS, st.integers(0, 99))
def test_expanding_keeps_the_function_and_trained_blocks_fuse_right(model: RandomNet, spec: Any, seed: int) -> None:
    before = copy.deepcopy(model.state_dict())
    expanded = repfx.expand(model, spec)
    assert same_state(before, model.state_dict())
    assert_same(expanded, model, model.input())
    perturbed(expanded, seed)
    assert_same(repfx.fuse(expanded), expanded, model.input())


@pytest.mark.slow
@HALF
@given(random_nets(biases=True, shared=False), SPECS)
def test_blocks_cost_nothing_in_the_end(model: RandomNet, spec: Any) -> None:
    """Each conv has a bias here, because the branches' BatchNorms add one anyway, which may prevent a merge."""
    expanded = perturbed(repfx.expand(model, spec), seed=3)
    assert len(convs(repfx.fuse(expanded))) <= len(convs(repfx.fuse(model)))


@pytest.mark.slow
@HALF
@given(NETS)
def test_restored_nets_compute_the_same(model: RandomNet) -> None:
    fused = repfx.fuse(model)
    if any(folded_norm(module) for module in fused.modules()):
        assert_same(repfx.restore(fused), model, model.input())


@pytest.mark.slow
@HALF
@given(st.one_of(nets_of_sites(), NETS), st.one_of(st.none(), SPECS))
def test_what_loads_strictly_into_the_plain_class_computes_the_same(model: RandomNet, spec: Any) -> None:
    """The law of `restore`: its state dict either raises in the class that the model came from, or is all that the class needs."""
    trained = model if spec is None else perturbed(repfx.expand(model, spec), seed=5)
    fused = repfx.fuse(trained)
    if not any(folded_norm(module) for module in fused.modules()):
        return
    restored = repfx.restore(fused)
    assert_same(restored, trained, model.input())
    plain = perturbed(copy.deepcopy(model), seed=9)
    try:
        plain.load_state_dict(restored.state_dict(), strict=True)
    except RuntimeError:
        return
    assert_same(
        plain, trained, model.input(), 10 * TOLERANCE
    )  # a small factor behind a conv makes its weight less exact


@pytest.mark.slow
@HALF
@given(NETS, SPECS)
def test_a_state_dict_carries_over_to_another_expansion(model: RandomNet, spec: Any) -> None:
    trained = perturbed(repfx.expand(model, spec), seed=5)
    other = repfx.expand(model, spec)
    other.load_state_dict(trained.state_dict(), strict=True)
    assert all(torch.equal(*pair) for pair in zip(outputs_of(other, model.input()), outputs_of(trained, model.input())))
