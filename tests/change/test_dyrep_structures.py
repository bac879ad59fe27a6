"""DyRep in its authors' structure: BatchNorms stay behind the sum, and a block's own conv may grow again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import repfx
from repfx.algebra.conv_spec import ConvSpec
from repfx.change.schedule import Candidate, Observation
from repfx.passes.expand import Expand
from repfx.testing import assert_same_map, randomize_batch_norm
from tests.inline_net import same_state
from tests.random_numbers import numbers_from

DATA = [torch.randn(5, 3, 7, 9, dtype=torch.float64, generator=numbers_from(seed)) for seed in range(3)]
SPEC = ["1x1", "1xk"]
OPTIONS: dict[str, Any] = {"interval": 1, "until": 9, "metric": "snip", "deviation": 0.0, "spec": SPEC, "batches": 3}


def net() -> Any:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return randomize_batch_norm(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 7 * 9, 2))).double()


class Run:
    """A training with an average, whose steps depend on nothing but their number."""

    def __init__(self, **options: Any) -> None:
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        schedule = repfx.schedules.DyRep(**OPTIONS, **options)
        self.driver = repfx.Driver(self.model, self.optimizer, schedule, calibrate=DATA, ema=self.average)

    def epoch(self) -> list[str]:
        for x in DATA:
            self.optimizer.zero_grad()
            self.model.train()(x).square().mean().backward()
            self.driver.after_backward()
            self.optimizer.step()
            self.average.update_parameters(self.model)
        nets = (self.model, self.average)
        before = [copy.deepcopy(each).eval() for each in nets]
        actions = self.driver.after_epoch()
        for each, reference in zip(nets, before):
            assert_same_map(copy.deepcopy(each).eval(), reference, DATA[0])
        return [str(action) for action in actions]


@pytest.mark.slow
def test_it_grows_the_own_conv_again_keeps_the_function_and_resumes(tmp_path: Path) -> None:
    run = Run(norm_behind=True, own_again=True)
    done = run.epoch()
    assert done == ["expand 0: 1x1, 1xk"]
    assert run.model[0].norm_behind == "1"
    assert isinstance(run.model[1], nn.BatchNorm2d)
    done += run.epoch()
    assert "expand 0.origin.conv: 1x1, 1xk" in done
    repfx.save(tmp_path / "run.safetensors", run.model, run.optimizer, run.driver)
    torch.manual_seed(5)
    for _ in range(2):
        done += run.epoch()
    assert any(action.startswith("drop") for action in done)
    resumed = Run(norm_behind=True, own_again=True)
    repfx.load(tmp_path / "run.safetensors", resumed.model, resumed.optimizer, resumed.driver)
    torch.manual_seed(5)
    for _ in range(2):
        resumed.epoch()
    assert same_state(resumed.model.state_dict(), run.model.state_dict())
    assert repfx.journal(resumed.model) == repfx.journal(run.model)
    assert {each for group in run.optimizer.param_groups for each in group["params"]} == {*run.model.parameters()}
    assert_same_map(repfx.fuse(run.model.eval()), run.model, DATA[0])


def test_own_convs_are_no_candidates_unless_asked_for() -> None:
    for options in ({}, {"norm_behind": True}):
        run = Run(**options)
        run.epoch()
        run.epoch()
        assert [site for site in run.driver.observe().sites if "origin" in site] == []
    moved = Run(own_again=True)  # behind the own BatchNorm, which is in the block
    moved.epoch()
    assert moved.model[0].norm_path == "1"
    assert "expand 0.origin.conv: 1x1, 1xk" in moved.epoch()


def test_the_expansion_says_where_the_batch_norm_stays() -> None:
    conv = ConvSpec(8, 8, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    cases: list[tuple[Candidate, dict[str, Any], bool]] = [
        (Candidate("a", conv), {}, False),
        (Candidate("a", conv), {"norm_behind": True}, True),
        (Candidate("a", conv), {"spec": repfx.Spec(SPEC, norm_behind=True)}, True),
        (Candidate("a.origin.conv", conv, 1, own=True), {"own_again": True}, True),
    ]
    for candidate, options, behind in cases:
        (action,) = repfx.schedules.DyRep(**options).decide(Observation(15, [candidate]))
        assert isinstance(action, Expand)
        assert action.norm_behind == behind
