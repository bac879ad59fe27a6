"""Optimizers follow a model's structure: state stays with its parameter, groups keep their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import repfx
from repfx.change.carry import carry
from repfx.errors import InvalidInput
from repfx.passes.fuse import Fuse
from repfx.passes.gate import gate
from repfx.passes.restore import Restore
from repfx.records.journal import apply
from repfx.testing import randomize_batch_norm, relative_error
from tests.small_net import batch, small_net

X = torch.randn(2, 4, 6, 7)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9),
    "Adam": lambda groups: torch.optim.Adam(groups, 0.01, amsgrad=True),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, 0.01, fused=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, 0.01, momentum=0.9),
    "NAdam": lambda groups: torch.optim.NAdam(groups, 0.01),
}


def net() -> Any:
    first = [nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)]
    return nn.Sequential(*first, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(X).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_an_average_of_scaled_branches_stays_what_it_was() -> None:
    model = net().double()
    average = averaged(model)
    expected = model.eval()(X.double())
    with carry(model, average):
        repfx.expand(model, "orepa", inplace=True)
    for _ in range(3):
        average.update_parameters(model)
        assert relative_error(average.eval()(X.double()), expected) < 1e-12


def test_an_optimizer_that_can_not_take_up_new_parameters_is_refused_before_anything_changes() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    step(model, optimizer)
    with pytest.raises(InvalidInput, match="leave out fused=True"), carry(model, optimizer):
        repfx.expand(model, "acb", inplace=True)
    assert not repfx.journal(model)
    with pytest.raises(InvalidInput, match="leave out fused=True"):
        repfx.Driver(model, optimizer, repfx.schedules.DyRep(), calibrate=[X])


def names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[set[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [{names[parameter] for parameter in group["params"]} for group in optimizer.param_groups]


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    return {
        key: torch.as_tensor(value).clone() for key, value in optimizer.state[parameter].items() if value is not None
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_stays_keeps_its_state_and_what_is_new_is_trained(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    conv = model[3]
    before = state_of(optimizer, conv.weight)
    with repfx.carry(model, optimizer):
        repfx.expand(model, {"3": ["1x1", "1xk"]}, inplace=True)
    assert names_of(model, optimizer) == [{name for name, _ in model.named_parameters()}]
    assert model[3].conv is conv
    after = state_of(optimizer, conv.weight)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    gammas = [branch.last_norm.weight for branch in model[3].branches.values()]
    step(model, optimizer)
    assert all(bool(gamma.any()) for gamma in gammas), "γ began with 0 and was not trained"

    leaving = set(model[3].branches["1xk"].parameters())
    states = {name: state_of(optimizer, each) for name, each in model.named_parameters() if each not in leaving}
    with repfx.carry(model, optimizer):
        repfx.drop(model, "3", "1xk")
    for key, each in model.named_parameters():
        assert all(torch.equal(value, states[key][what]) for what, value in state_of(optimizer, each).items())
        assert state_of(optimizer, each).keys() == states[key].keys()
    assert names_of(model, optimizer) == [{name for name, _ in model.named_parameters()}]
    assert not leaving & optimizer.state.keys()
    step(model, optimizer)


def test_new_parameters_join_the_groups_of_their_own_site() -> None:
    model = net()
    slow: dict[str, Any] = {"params": [model[0].weight], "lr": 0.01}
    vectors: dict[str, Any] = {"params": [*model[1].parameters(), model[3].bias], "weight_decay": 0.0}
    rest = {"params": [model[3].weight, *model[5].parameters()]}
    optimizer = torch.optim.SGD([slow, vectors, rest], 0.1, weight_decay=0.5)
    with repfx.carry(model, optimizer):
        repfx.expand(model, {"0": ["1x1"], "3": ["1xk"]}, inplace=True)
    vectors_of = ["0.origin.norm", "0.1x1.norm", "3.1xk.norm"]
    assert names_of(model, optimizer) == [
        {"0.origin.conv.weight", "0.1x1.conv.weight"},
        {"3.origin.conv.bias", *(f"{path}.{name}" for path in vectors_of for name in ("weight", "bias"))},
        {"3.origin.conv.weight", "3.1xk.conv.weight", "5.weight", "5.bias"},
    ]


def test_blocks_inside_blocks_belong_to_the_branch_they_are_in() -> None:
    model = net()
    optimizer = torch.optim.SGD([{"params": model[:3].parameters()}, {"params": model[3:].parameters()}], 0.1)
    with repfx.carry(model, optimizer):
        repfx.expand(model, {"3": ["1x1-kxk"]}, inplace=True)
        repfx.expand(model, {"3.1x1-kxk.conv2": ["1xk"]}, inplace=True)
    first, second = names_of(model, optimizer)
    assert first == {"0.weight", "1.weight", "1.bias"}
    assert second == {name for name, _ in model.named_parameters()} - first


def test_each_of_two_optimizers_gets_its_own_and_strangers_stay() -> None:
    model, stranger = net(), nn.Parameter(torch.ones(2))
    one = torch.optim.SGD([*model[:3].parameters(), stranger], 0.1)
    other = torch.optim.SGD(model[5].parameters(), 0.1)
    with repfx.carry(model, one, other):
        repfx.expand(model, {"0": ["1x1"], "3": ["1x1"]}, inplace=True)
    assert len(one.param_groups[0]["params"]) == 7  # conv, γ, β of both paths, and the parameter from elsewhere
    assert any(parameter is stranger for parameter in one.param_groups[0]["params"])
    assert names_of(model, other) == [{"5.weight", "5.bias"}]  # nobody trains 3, so nobody trains its branches


def test_a_failure_inside_leaves_model_and_optimizer_together() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def grow_and_fail() -> None:
        with repfx.carry(model, optimizer):
            repfx.expand(model, {"3": ["1x1"]}, inplace=True)
            repfx.drop(model, "3", "1xk")

    with pytest.raises(repfx.errors.UnknownName):
        grow_and_fail()
    assert names_of(model, optimizer) == [{name for name, _ in model.named_parameters()}]


def test_a_scheduler_goes_on_over_the_groups() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step(model, optimizer)
    scheduler.step()
    with repfx.carry(model, optimizer):
        repfx.expand(model, "dbb", inplace=True)
    step(model, optimizer)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025]


# ---- averages


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


@pytest.mark.parametrize("spec", ["acb", "qarepvgg", "dbb"])
def test_an_average_computes_the_same_and_goes_on_averaging(spec: str) -> None:
    model: Any = randomize_batch_norm(net().double())
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    average = averaged(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        model.train()(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    before = average.eval()(x)
    with repfx.carry(model, optimizer, average):
        repfx.expand(model, {"0": "repvgg", "3": spec}, inplace=True)
        repfx.drop(model, "3", next(iter(model[3].branches)))
    assert relative_error(average(x), before) < 1e-9
    assert average.state_dict().keys() == {"n_averaged", *(f"module.{name}" for name in model.state_dict())}
    model.train()(x).square().mean().backward()
    optimizer.step()
    average.update_parameters(model)
    pairs = zip(average.module.parameters(), model.parameters(), strict=True)
    assert all(mean.shape == parameter.shape for mean, parameter in pairs)
    assert relative_error(average.eval()(x), before) < 0.5


BEGINNINGS: dict[str, dict[str, Any]] = {
    "gamma": {"gamma": 0.01, "calibrate": [X.double()]},
    "attached": {"attach_rate": 0.0, "calibrate": [X.double()]},
}


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_an_average_begins_with_the_branches_of_the_model(beginning: str) -> None:
    model: Any = randomize_batch_norm(net().double())
    average: Any = averaged(model)
    with torch.no_grad():
        for parameter in average.parameters():  # so that the two differ
            parameter.mul_(1.1)
    before = average.eval()(X.double())
    with repfx.carry(model, average):
        repfx.expand(model, ["1x1", "1xk"], inplace=True, **BEGINNINGS[beginning])
    assert relative_error(average(X.double()), before) < 1e-9
    for branch in ("1x1", "1xk"):
        ours, theirs = (net[0].branches[branch].state_dict() for net in (average.module, model))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert average.module[3].norm is None if beginning == "attached" else average.module[3].norm is not None


def test_what_is_put_back_is_trained_where_it_was() -> None:
    model: nn.Module = net()
    matrices: dict[str, Any] = {"params": [parameter for parameter in model.parameters() if parameter.ndim > 1]}
    vectors: dict[str, Any] = {"params": [parameter for parameter in model.parameters() if parameter.ndim == 1]}
    optimizer = torch.optim.SGD([matrices, {**vectors, "weight_decay": 0.1}], 0.1, momentum=0.9)
    step(model, optimizer)
    conv: Any = model.get_submodule("0")
    kept = state_of(optimizer, conv.weight)
    before = names_of(model, optimizer)
    average: Any = averaged(model)
    with repfx.carry(model, optimizer, average):
        apply(model, [Fuse("0"), Restore("0")], None)
    assert names_of(model, optimizer) == before
    assert torch.equal(state_of(optimizer, conv.weight)["momentum_buffer"], kept["momentum_buffer"])
    with repfx.carry(model, optimizer, average):
        apply(model, [Fuse("0")], None)
    with repfx.carry(model, optimizer, average):
        apply(model, [Restore("0")], None)
    trained = set().union(*names_of(model, optimizer))
    assert trained == {name for name, _ in model.named_parameters()}, "put back later, γ and β join their conv's group"
    assert average.module.state_dict().keys() == model.state_dict().keys()


def test_a_module_without_a_copy_is_refused() -> None:
    model = net()
    average = averaged(model)
    repfx.expand(model, {"3": ["1x1"]}, inplace=True)
    with pytest.raises(InvalidInput, match="AveragedModel holds no copy of the Sequential in the structure"):
        with repfx.carry(model, average):
            pass


def test_a_new_parameter_joins_one_optimizer_of_several() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    matrices = torch.optim.SGD([model[0].weight], 0.1)
    vectors = torch.optim.SGD(model[1].parameters(), 0.1)
    with carry(model, matrices, vectors):
        repfx.expand(model, "acb", inplace=True)
    groups = [list(each.param_groups[0]["params"]) for each in (matrices, vectors)]
    assert all(parameter.ndim > 1 for parameter in groups[0])
    assert all(parameter.ndim == 1 for parameter in groups[1])
    assert {id(parameter) for group in groups for parameter in group} == {id(p) for p in model.parameters()}
    assert sum(map(len, groups)) == len(list(model.parameters()))


@pytest.mark.parametrize("weights", ["default", "shared"])
def test_an_average_of_branches_that_share_weights_keeps_its_function(weights: Any) -> None:
    spec = repfx.Spec(["1x1", "1xk", "kx1"], weights=weights)
    model = repfx.expand(small_net(), {"stem": spec}, preserve=False)
    average = AveragedModel(model)
    average.update_parameters(model)
    randomize_batch_norm(average.module, 5)
    x = batch(3, seed=9)
    before = average.eval()(x)
    with carry(model, average):
        gate(model, "stem")
    torch.testing.assert_close(average.eval()(x), before, rtol=1e-9, atol=1e-9)
    with carry(model, average):
        repfx.drop(model, "stem", "1xk")
    torch.testing.assert_close(average.eval()(x), before, rtol=1e-9, atol=1e-9)
