"""Schedules and linear layers: who expands them, and who refuses a spec for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import repfx
from repfx.errors import InvalidInput
from repfx.testing import assert_same_map
from tests.random_numbers import numbers_from

LINEAR = repfx.Spec(["kxk", "lora"], layers="linear")
DATA = [torch.randn(3, 6, 9, 9, generator=numbers_from(seed)) for seed in range(2)]


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 6),
        nn.GELU(),
        nn.Linear(6, 4),
    )


def train(model: nn.Module, driver: repfx.Driver, optimizer: torch.optim.Optimizer, epochs: int) -> list[str]:
    """Train a model and return its actions as text."""
    for _ in range(epochs):
        for x in DATA:
            optimizer.zero_grad()
            for share in driver.shares():
                (share * model.train()(x).square().mean()).backward()
            driver.after_backward()
            optimizer.step()
        driver.after_epoch()
    return [str(action) for _, action in driver.history]


@pytest.mark.parametrize(("spec", "sites"), [(LINEAR, ["4", "6"]), ("lora", ["0", "4", "6"]), ("acb", ["0"])])
def test_fixed_expands_the_layers_that_its_spec_is_for(spec: Any, sites: list[str]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    driver = repfx.Driver(model, optimizer, repfx.schedules.Fixed(spec, preserve=True))
    assert [action.site for _, action in driver.history] == sites
    train(model, driver, optimizer, 1)
    twin = copy.deepcopy(model).double().eval()
    fused = repfx.fuse(twin)
    assert_same_map(fused, twin, DATA[0].double())
    assert [type(fused.get_submodule(path)) for path in ("4", "6")] == [nn.Linear, nn.Linear]


def test_blocks_of_linear_layers_are_squeezed_for_the_last_epochs() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    driver = repfx.Driver(model, optimizer, repfx.schedules.Fixed(LINEAR, squeeze_from=1))
    actions = train(model, driver, optimizer, 2)
    assert actions[2:] == ["squeeze 4: its statistics stay", "squeeze 6: its statistics stay"]
    assert model[6].squeezed
    assert model[6].is_one_map


GROWING: dict[str, Callable[[Any], repfx.Schedule]] = {
    "dyrep": lambda spec: repfx.schedules.DyRep(interval=1, spec=spec),
    "repan": lambda spec: repfx.schedules.RepAn(cycles=1, epochs=2, warm_up=1, spec=spec),
    "repnas": lambda spec: repfx.schedules.RepNAS(budget=1, warm_up=0, epochs=1, spec=spec),
}


@pytest.mark.parametrize("name", GROWING)
def test_schedules_that_grow_branches_beside_convs_refuse_a_spec_for_linear_layers(name: str) -> None:
    with pytest.raises(InvalidInput, match="grows branches beside convs, and its spec is for linear layers"):
        GROWING[name](LINEAR)


@pytest.mark.parametrize("name", ["dyrep", "repan"])
def test_schedules_for_convs_leave_linear_layers_alone(name: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    schedule = GROWING[name](repfx.Spec(["kxk", "1x1"], layers="both"))
    driver = repfx.Driver(model, optimizer, schedule, calibrate=DATA)
    train(model, driver, optimizer, 1)
    assert {action.site for _, action in driver.history} == {"0"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repnas", "des"])
def test_blocks_of_linear_layers_can_be_searched(name: str) -> None:
    model = repfx.expand(net(), LINEAR, inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    kinds: dict[str, Any] = {"repnas": repfx.schedules.RepNAS, "des": repfx.schedules.DES}
    small = {"population": 3, "generation": 1, "nets": 1} if name == "des" else {}
    schedule = kinds[name](budget=3, warm_up=1, epochs=3, spec=None, **small)
    score: dict[str, Any] = {"score": lambda net: -float(net(DATA[0]).square().mean())} if name == "des" else {}
    driver = repfx.Driver(model, optimizer, schedule, calibrate=DATA, **score)
    train(model, driver, optimizer, 3)
    left = sum(len(site.branches) for site in repfx.sites(model))
    assert 0 < left <= 3
    twin = copy.deepcopy(model).double().eval()
    assert_same_map(repfx.fuse(twin), twin, DATA[0].double())
