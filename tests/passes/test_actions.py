"""Actions in place: each keeps the function, enters the journal, and can be replayed on a base model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import repfx
from repfx.blocks.spec import BranchSpec
from repfx.errors import InvalidInput, RepfxError, UnknownName
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.passes.freeze import Freeze
from repfx.passes.fuse import Fuse
from repfx.passes.restore import Restore
from repfx.passes.squeeze import Squeeze, Unsqueeze
from repfx.records.journal import ACTIONS, Action, apply, from_json, replay, to_json
from repfx.testing import assert_same_map, randomize_batch_norm
from tests.inline_net import same_state
from tests.small_net import SmallNet, batch, small_net

SITES = ("stem", "plain", "depthwise")
CYCLE: list[Action] = [
    *(Fuse(site) for site in SITES),
    *(Restore(site) for site in ("stem", "depthwise")),
    *(Expand(site, (BranchSpec("1x1"), BranchSpec("identity")), attach_rate=0.0) for site in SITES if site != "stem"),
    Expand("stem", (BranchSpec("1xk"),), gamma=0.01),
    Expand("depthwise.1x1.conv", (BranchSpec("identity"),)),
    Freeze("plain"),
    Drop("plain", "identity"),
    Squeeze("plain"),
    Unsqueeze("plain"),
    Squeeze("stem", frozen=False),
]
DATA = [batch(seed=seed) for seed in range(2)]


def trained() -> Any:
    """A model with blocks of every kind, and BatchNorms that have seen something."""
    model = repfx.expand(small_net(), {"stem": "dbb", "plain": "qarepvgg", "depthwise": "repvgg"})
    return randomize_batch_norm(model, seed=3)


def test_the_function_of_a_transposed_conv_stays_through_a_cycle() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), nn.ReLU()).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    model = randomize_batch_norm(repfx.expand(plain, ["kxk"]), seed=3).eval()
    reference = copy.deepcopy(model)
    kxk = (BranchSpec("kxk"),)
    for action in (Fuse("0"), Restore("0", measured=True), Expand("0", kxk, attach_rate=0.0), Drop("0", "kxk")):
        apply(model, [action], [x])
        assert_same_map(model, reference, x)
    assert str(model) == str(plain)
    assert_same_map(repfx.restore(repfx.fuse(model)), reference, x)


@pytest.mark.slow
def test_the_function_stays_through_each_of_them() -> None:
    model = trained()
    reference = copy.deepcopy(model).eval()
    for action in CYCLE:
        apply(model, [action], DATA)
        assert_same_map(copy.deepcopy(model).eval(), reference, batch(seed=9))
        held = isinstance(action, Squeeze) and action.frozen
        assert held != all(module.training for module in model.modules())


def test_together_they_are_the_same() -> None:
    model = trained()
    reference = copy.deepcopy(model).eval()
    apply(model, CYCLE, DATA)
    assert_same_map(model.eval(), reference, batch(seed=9))
    done = repfx.journal(model)[3:]
    assert len(done) == len(CYCLE)
    assert sorted(map(str, done)) == sorted(map(str, CYCLE))


def test_what_grew_is_recorded_with_the_names_that_branches_have() -> None:
    model: Any = repfx.expand(small_net(), {"plain": ["1x1"]})
    twice = Expand("stem", (BranchSpec("kxk"), BranchSpec("kxk"), BranchSpec("1x1", name="own")))
    apply(model, [twice], None)
    recorded: Any = repfx.journal(model)[-1]
    assert [branch.name for branch in recorded.branches] == list(model.stem.branches) == ["kxk", "kxk-2", "own"]


@pytest.mark.slow
def test_a_base_model_gets_the_same_structure_from_their_text() -> None:
    model = trained()
    apply(model, CYCLE, DATA)
    base: Any = SmallNet().double()
    replay(base, from_json(to_json(repfx.journal(model))))
    assert repfx.journal(base) == repfx.journal(model)
    assert str(base) == str(model)
    ours, theirs = dict(base.named_parameters()), dict(model.named_parameters())
    assert [(name, ours[name].requires_grad) for name in ours] == [(name, theirs[name].requires_grad) for name in ours]
    base.load_state_dict(model.state_dict(), strict=True)
    assert_same_map(base.eval(), model.eval(), batch(seed=9))


def test_actions_say_what_they_do() -> None:
    shown = [str(action) for action in (CYCLE[0], CYCLE[3], CYCLE[5], CYCLE[-5], Freeze("a", False), *CYCLE[-4:])]
    assert shown == [
        "fuse stem",
        "restore stem",
        "expand plain: 1x1, identity, attached by 0",
        "freeze plain",
        "thaw a",
        "drop plain.identity",
        "squeeze plain: its statistics stay",
        "unsqueeze plain",
        "squeeze stem",
    ]


def test_the_actions_are_known() -> None:
    assert ACTIONS.keys() == {
        "expand",
        "drop",
        "fuse",
        "restore",
        "freeze",
        "gate",
        "ungate",
        "calibrate",
        "squeeze",
        "squeeze_regions",
        "unsqueeze",
    }


def test_fused_is_a_plain_conv_and_restored_is_what_there_was() -> None:
    model: Any = trained()
    norm_keys = {name for name in model.state_dict() if name.startswith("norm")}
    apply(model, [Fuse(site) for site in SITES], None)
    assert [type(model.stem), type(model.norm)] == [nn.Conv2d, nn.Identity]
    assert model.stem.bias is not None
    apply(model, [Restore("stem"), Restore("depthwise")], None)
    assert (type(model.norm), model.norm.eps, model.norm.momentum) == (nn.BatchNorm2d, 1e-3, 0.2)
    assert norm_keys <= model.state_dict().keys()
    reference = copy.deepcopy(model).eval()
    plain = SmallNet().double()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert_same_map(plain.eval(), reference, batch(seed=9))


def test_measured_statistics_are_right_in_training_mode() -> None:
    model = trained()
    reference = copy.deepcopy(model).eval()
    apply(model, [*map(Fuse, SITES), Restore("stem", measured=True), Restore("depthwise", measured=True)], DATA)
    assert_same_map(copy.deepcopy(model).eval(), reference, batch(seed=9))
    assert_same_map(model.train(), reference, torch.cat(DATA), 1e-6)


def test_inherited_statistics_are_those_of_the_sum() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    randomize_batch_norm(model)
    weight, bias = model[1].weight.detach().clone(), model[1].bias.detach().clone()
    apply(model, [Fuse("0"), Restore("0")], None)
    assert torch.allclose(model[1].weight, weight.square().add(model[1].eps).sqrt())
    assert torch.allclose(model[1].bias, bias)


def test_a_batch_norm_that_also_activates_is_fused_and_restored() -> None:
    layers = pytest.importorskip("timm.layers")
    model: Any = nn.Sequential(nn.Conv2d(3, 6, 3), layers.BatchNormAct2d(6, act_layer=nn.SiLU)).double()
    reference = copy.deepcopy(randomize_batch_norm(model)).eval()
    for _ in range(2):
        apply(model, [Fuse("0")], None)
        assert_same_map(copy.deepcopy(model).eval(), reference, batch())
        apply(model, [Restore("0")], None)
        assert_same_map(copy.deepcopy(model).eval(), reference, batch())
        assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (Fuse("norm"), UnknownName, "site 'norm'"),
        (Restore("plain"), InvalidInput, "'plain' has absorbed no BatchNorm"),
        (Drop("plain", "1x1"), InvalidInput, "has no blocks"),
        (Freeze("plain"), InvalidInput, "has no blocks"),
        (Squeeze("plain"), InvalidInput, "has no blocks"),
        (Expand("plain", (BranchSpec("3x3x3"),)), UnknownName, "branch kind '3x3x3'"),
        (Expand("stem", (BranchSpec("identity"),)), RepfxError, "3 channels go in and 8 come out"),
        (Expand("plain", (BranchSpec("1x1"),), gamma=0.1), InvalidInput, "needs preserve and calibrate"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    action: Action, error: type[RepfxError], message: str
) -> None:
    model = small_net()
    before, text = copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(error, match=message):
        apply(model, [action], None)
    assert str(model) == text
    assert same_state(model.state_dict(), before)
    assert repfx.journal(model) == ()


@pytest.mark.parametrize(
    "actions",
    [
        [Drop("stem", "1x1-kxk"), Drop("stem.1x1-kxk.conv2", "1xk")],
        [Fuse("stem"), Fuse("stem.1x1-kxk.conv2")],
        [Fuse("stem"), Fuse("norm")],
    ],
    ids=str,
)
def test_what_can_t_be_done_together_is_refused_as_a_whole(actions: list[Action]) -> None:
    model: Any = repfx.expand(small_net(), {"stem": "dbb"})
    repfx.expand(model, {"stem.1x1-kxk.conv2": ["1xk"]}, inplace=True)
    text, done = str(model), repfx.journal(model)
    with pytest.raises(RepfxError, match=r"lies in|no site 'norm'"):
        apply(model, actions, None)
    assert str(model) == text
    assert repfx.journal(model) == done


def test_data_that_fail_leave_a_model_that_its_journal_describes() -> None:
    model = trained()
    reference = copy.deepcopy(model).eval()
    with pytest.raises(InvalidInput, match="calibrate gave no batch"):
        apply(model, [Fuse("stem")], iter(()))
    assert repfx.journal(model) == repfx.journal(trained())
    apply(model, [Fuse("stem")], None)
    with pytest.raises(InvalidInput, match="calibrate gave no batch"):
        apply(model, [Restore("stem", measured=True)], iter(()))
    base: Any = SmallNet().double()
    replay(base, repfx.journal(model))
    base.load_state_dict(model.state_dict(), strict=True)
    assert_same_map(base.eval(), reference, batch(seed=9))


def test_a_frozen_block_s_own_conv_is_not_trained() -> None:
    model = trained()
    model.train()(batch()).square().mean().backward()
    apply(model, [Freeze("stem")], None)
    assert all(parameter.grad is None for parameter in model.stem.origin.parameters())
    own = copy.deepcopy(model.stem.origin.state_dict())
    others = copy.deepcopy(model.stem.branches["1x1"].conv.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    model.train()(batch()).square().mean().backward()
    optimizer.step()
    now = model.stem.origin.state_dict()
    assert all(torch.equal(now[name], own[name]) for name in own if "running" not in name and "num" not in name)
    assert not torch.equal(now["norm.running_mean"], own["norm.running_mean"])
    assert not torch.equal(model.stem.branches["1x1"].conv.weight, others)
    apply(model, [Freeze("stem", frozen=False)], None)
    assert all(parameter.requires_grad for parameter in model.parameters())
