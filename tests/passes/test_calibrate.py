"""The verb `calibrate`: BatchNorm statistics measured anew, in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import repfx
from repfx.errors import InvalidInput
from repfx.passes.calibrate import calibrate
from repfx.records.journal import replay
from tests.inline_net import same_state
from tests.small_net import batch, small_net

DATA = [batch(4, seed=seed) for seed in range(3)]


def test_eval_mode_computes_what_training_mode_does() -> None:
    model = small_net()
    assert calibrate(model, [DATA[0]]) is model
    for norm in (model.norm, model.norm2):
        norm.running_var.mul_(1 - 1 / (DATA[0].numel() / 3))  # divided by n, not by n - 1
    torch.testing.assert_close(model.eval()(DATA[0]), model.train()(DATA[0]), rtol=1e-9, atol=1e-9)


def test_one_module_alone() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    calibrate(model, DATA, site="norm2")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"norm2.running_mean", "norm2.running_var", "norm2.num_batches_tracked"}


def test_it_is_in_the_journal_and_replayed_without_data() -> None:
    model = calibrate(small_net(), DATA)
    assert [str(action) for action in repfx.journal(model)] == ["calibrate all BatchNorms"]
    again = small_net()
    before = copy.deepcopy(again.state_dict())
    replay(again, repfx.journal(model))
    assert same_state(again.state_dict(), before)
    assert repfx.journal(again) == repfx.journal(model)


def test_what_fails_leaves_the_statistics() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    with pytest.raises(InvalidInput, match="batch 1 of calibrate doesn't fit SmallNet"):
        calibrate(model, [DATA[0], torch.zeros(2, 5)])
    assert same_state(model.state_dict(), before)
    assert [module.training for module in model.modules()] == modes
    assert model.norm.momentum == 0.2
    assert repfx.journal(model) == ()


def test_nothing_to_measure() -> None:
    with pytest.raises(InvalidInput, match="Sequential has no BatchNorm with running statistics"):
        calibrate(nn.Sequential(nn.Conv2d(3, 4, 3)), DATA)
    with pytest.raises(InvalidInput, match="plain has no BatchNorm"):
        calibrate(small_net(), DATA, site="plain")
