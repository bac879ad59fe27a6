"""timm's own parts of a training loop follow a model whose structure changes; docs/how-to/timm.md runs the loop itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import repfx
from repfx.testing import assert_same_map, randomize_batch_norm
from tests.inline_net import same_state
from tests.small_net import SmallNet, batch, small_net

timm: Any = pytest.importorskip("timm")
optim: Any = pytest.importorskip("timm.optim")
DYREP = repfx.schedules.DyRep(interval=1, until=9, deviation=0.0)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, driver: repfx.Driver) -> None:
    optimizer.zero_grad()
    model.train()(batch()).square().mean().backward()
    driver.after_backward()
    optimizer.step()


@pytest.mark.slow
def test_a_model_ema_follows_and_is_saved(tmp_path: Any) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    ema: Any = timm.utils.ModelEmaV3(model, decay=0.8)
    driver = repfx.Driver(model, optimizer, DYREP, calibrate=[batch()], ema=ema)
    for _ in range(2):
        step(model, optimizer, driver)
        ema.update(model)
        before = copy.deepcopy(ema.module)
        assert driver.after_epoch()
        assert_same_map(copy.deepcopy(ema.module), before, batch(seed=50))
        assert not any(module.training for module in ema.modules() if module is not ema)
    values = copy.deepcopy(ema.module.state_dict())
    ema.update(model)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(ema.module.state_dict()[name], 0.8 * values[name] + 0.2 * value)
    repfx.save(tmp_path / "run.ckpt", model, optimizer, driver)
    fresh: Any = SmallNet().double()
    again = timm.utils.ModelEmaV3(fresh, decay=0.8)
    optimizer = torch.optim.SGD(fresh.parameters(), 0.05, momentum=0.9)
    repfx.load(
        tmp_path / "run.ckpt", fresh, optimizer, repfx.Driver(fresh, optimizer, DYREP, calibrate=[batch()], ema=again)
    )
    assert same_state(again.module.state_dict(), ema.module.state_dict())


def test_new_branches_have_the_rate_of_their_layer_and_its_weight_decay() -> None:
    model: Any = randomize_batch_norm(timm.create_model("test_resnet", num_classes=4))
    optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.05, layer_decay=0.7)
    sites = ["conv1.0", "layer2.0.conv2", "layer4.0.conv2"]
    scales = {name: _group_of(optimizer, model.get_submodule(name).weight)["lr_scale"] for name in sites}
    assert len(set(scales.values())) == 3
    with repfx.carry(model, optimizer):
        repfx.expand(model, dict.fromkeys(sites, "dbb"), inplace=True)
    for site, scale in scales.items():
        parameters = list(model.get_submodule(site).parameters())
        groups = [_group_of(optimizer, parameter) for parameter in parameters]
        assert {group["lr_scale"] for group in groups} == {scale}
        assert [group["weight_decay"] for group in groups] == [0.05 * (each.ndim > 1) for each in parameters]


def _group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    (group,) = (group for group in optimizer.param_groups if any(each is parameter for each in group["params"]))
    return group
