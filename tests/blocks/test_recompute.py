"""Blocks that recompute keep only their input; outputs, gradients and statistics are those of ordinary blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

import repfx
from repfx.errors import InvalidInput
from repfx.passes.gate import gate
from repfx.passes.recompute import recompute
from repfx.testing import relative_error
from tests.passes.test_squeeze import X, assert_alike, expanded, outputs_and_gradients


def kept_bytes(model: nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass, without parameters and the input."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(X.clone().requires_grad_())
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("spec", ["dyrep", "orepa", "mobileone"])
def test_outputs_gradients_and_statistics_are_the_same(spec: str) -> None:
    model = expanded(spec).train()
    reference = copy.deepcopy(model)
    recompute(model)
    for _ in range(2):  # statistics of the first step show in the second
        assert_alike(model, reference)
    state = reference.state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, state[name], rtol=1e-12, atol=1e-12), name
    assert_alike(model.eval(), reference.eval())


def test_a_cumulative_average_counts_each_batch_once() -> None:
    model: Any = recompute(expanded("acb")).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    outputs_and_gradients(model)
    assert {int(count) for name, count in model.named_buffers() if name.endswith("num_batches_tracked")} == {1}


def test_it_keeps_about_what_the_plain_model_keeps() -> None:
    plain, model = expanded(["1x1"]), expanded("dyrep").train()
    plain = repfx.restore(repfx.fuse(plain)).train()
    before = kept_bytes(model)
    recompute(model)
    assert kept_bytes(model) < 1.1 * kept_bytes(plain) < 0.5 * before
    recompute(model, enabled=False)
    assert kept_bytes(model) == before


def test_gates_and_paths_that_are_closed() -> None:
    model = expanded(["1xk", "1x1"]).train()
    gate(model, "3", "sigmoid")
    model[3].gates.choose(["1x1"], modes=[True])
    assert_alike(recompute(copy.deepcopy(model), "3"), model)


def test_backward_twice_and_changes_in_between() -> None:
    """The recomputation uses the modes, rates and open gates of the forward pass."""
    gradients = []
    begun = repfx.expand(expanded("acb"), {"3.1xk.conv": ["1x1"]}).train()
    gate(begun, "3", "sigmoid")
    for again in (False, True):
        model: Any = recompute(copy.deepcopy(begun), enabled=again)
        loss = model(X).square().mean()
        loss.backward(retain_graph=True)
        model.eval()
        model[3].gates.choose(["1xk"], modes=[True])
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert relative_error(gradients[1], gradients[0]) < 1e-12


def test_what_changed_since_the_forward_pass_stays() -> None:
    model: Any = recompute(expanded("acb")).train()
    loss = model(X).square().mean()
    model.eval()
    buffers = dict(model.named_buffers())
    for buffer in buffers.values():
        buffer.fill_(3)
    loss.backward()
    assert not any(module.training for module in model.modules())
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert all(bool((buffer == 3).all()) for buffer in buffers.values())


def test_some_sites_and_squeezed_ones() -> None:
    model = recompute(expanded(), ["0", "6"])
    assert [model[site].recomputes for site in (0, 3, 6)] == [True, False, True]
    reference = copy.deepcopy(model)
    repfx.squeeze(model, statistics="frozen").train()
    assert_alike(model, reference.eval())


def test_recomputing_is_switched_off_again() -> None:
    model = recompute(recompute(expanded("acb")), ["0"], enabled=False)
    assert [model[site].recomputes for site in (0, 3, 6)] == [False, True, True]


def test_mixed_precision_recomputes_in_the_same() -> None:
    model = expanded("dbb").float().train()
    reference = copy.deepcopy(model)
    recompute(model)
    gradients = []
    for net in (model, reference):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = net(X.float())
        output.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


def test_what_computes_in_other_types_is_summed() -> None:
    """A conv outputs bfloat16 under autocast and an identity float32; the block sums both."""
    model: Any = repfx.expand(
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), repfx.Spec(["1x1", "identity"], norm="none")
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(X.float()).dtype == torch.float32


@pytest.mark.slow
def test_it_compiles_without_a_break() -> None:
    model = recompute(expanded("acb")).train()
    expected = outputs_and_gradients(copy.deepcopy(model))["output"]
    torch.compiler.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(X), expected)


def test_refusals() -> None:
    with pytest.raises(repfx.errors.InvalidInput, match="has no blocks"):
        recompute(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(repfx.errors.UnknownName, match="no block at 'head'"):
        recompute(expanded(), "head")


def test_it_runs_again_with_the_parameters_that_it_was_called_with() -> None:
    """MAML needs this: its inner steps call the model with other parameters."""
    model = expanded("dbb").train()
    own = {name: torch.randn_like(each).requires_grad_() for name, each in model.named_parameters()}

    def gradients(model: nn.Module) -> tuple[Tensor, ...]:
        y: Tensor = functional_call(model, own, (X,))
        return torch.autograd.grad(y.square().mean(), list(own.values()))

    expected = gradients(copy.deepcopy(model))
    for found, wanted in zip(gradients(recompute(model)), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_parameters_that_are_written_into_too_early() -> None:
    model = recompute(expanded("acb").train())
    loss = model(X).square().mean()
    with torch.no_grad():
        model[3].origin.conv.weight.mul_(2)
    with pytest.raises(InvalidInput, match=r"'origin\.conv\.weight' of a block that recomputes was written into"):
        loss.backward()


def test_what_is_random_inside_is_drawn_once() -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = recompute(expanded("acb"), enabled=enabled).train()
        model[3].origin.register_forward_hook(lambda module, args, output: F.dropout(output, 0.5))
        torch.manual_seed(1)
        results.append(outputs_and_gradients(model))
    for name, wanted in results[0].items():
        torch.testing.assert_close(results[1][name], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: torch.func.linearize(f, X)[1]])
def test_under_a_transform_of_functions_it_runs_once(transform: Any) -> None:
    model = expanded("orepa").train()

    def loss(x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y.square().sum()

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    expected = transform(loss)(X)
    recompute(model)
    torch.testing.assert_close(transform(loss)(X), expected, rtol=1e-9, atol=1e-9)
