"""Blocks whose site's BatchNorm stays behind the sum, and blocks whose own conv has become a block again, as in DyRep's own code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.errors import InvalidInput, Refused
from repfx.passes.drop import Drop
from repfx.passes.freeze import freeze
from repfx.passes.fuse import Fuse
from repfx.passes.restore import Restore
from repfx.records.journal import apply
from repfx.testing import assert_same_map, randomize_batch_norm, relative_error
from tests.random_numbers import numbers_from

BEHIND = repfx.Spec(["1x1", "kxk"], norm_behind=True)
AGAIN = {"0.origin.conv": BEHIND}
AXES: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Callable[..., nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def plain(*, bias: bool = False, dimensions: int = 2, **options: Any) -> Any:
    """A conv, its BatchNorm, and another conv behind them."""
    torch.manual_seed(dimensions)
    conv = AXES[dimensions](4, 6, 3, padding=1, bias=bias, **options)
    norm = NORMS[dimensions](6, eps=1e-3, momentum=0.2)
    last = AXES[dimensions](6, 3, 1)
    return randomize_batch_norm(nn.Sequential(conv, norm, nn.ReLU(), last)).double()


def images(seed: int = 0, dimensions: int = 2) -> Tensor:
    sizes = (7, 9, 5)[:dimensions]
    return torch.randn(5, 4, *sizes, dtype=torch.float64, generator=numbers_from(seed))


@torch.no_grad()
def settled(model: Any, x: Tensor) -> Any:
    """Give BatchNorms the statistics of a batch, with the variance by which it is normalised in training mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    count = x[:, 0].numel()
    for norm in norms:
        norm.momentum = 0.2
        norm.running_var.mul_((count - 1) / count)  # type: ignore[union-attr]
    return model.eval()


def trained(model: Any, seed: int = 7) -> Any:
    """Give everything in the blocks random numbers, γ of both signs."""
    randomize_batch_norm(model, seed)
    return model.eval()


def again(model: Any, **options: Any) -> Any:
    """Expand the first conv, and then its own conv once more."""
    return repfx.expand(repfx.expand(model, {"0": BEHIND}, **options), AGAIN, strict=True, **options)


def sum_behind(model: Any, x: Tensor, *, training: bool) -> Tensor:
    """The output of the own BatchNorm, computed from the tensors alone: BN(BN(conv) + BN(1×1) + BN(k×k))."""

    def normed(y: Tensor, norm: Any) -> Any:
        mean, variance = norm.running_mean, norm.running_var
        if training:
            mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
        shape = (1, -1, 1, 1)
        y = (y - mean.reshape(shape)) / (variance.reshape(shape) + norm.eps).sqrt()
        return y * norm.weight.reshape(shape) + norm.bias.reshape(shape)

    block = model[0]
    own = normed(F.conv2d(x, block.conv.weight, block.conv.bias, padding=1), block.origin.norm)
    pointwise = normed(F.conv2d(x, block.branches["1x1"].conv.weight), block.branches["1x1"].norm)
    full = normed(F.conv2d(x, block.branches["kxk"].conv.weight, padding=1), block.branches["kxk"].norm)
    output: Tensor = normed(own + pointwise + full, model[1])
    return output


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_own_batch_norm_stays_behind_the_sum(bias: bool, training: bool) -> None:
    model = trained(repfx.expand(plain(bias=bias), {"0": BEHIND}))
    assert (model[0].norm_path, model[0].norm_behind) == (None, "1")
    expected = model[3](sum_behind(model, images(), training=training).relu())
    assert relative_error(copy.deepcopy(model).train(training)(images()), expected) < 1e-12


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dimensions", [2, *(pytest.param(axes, marks=pytest.mark.slow) for axes in (1, 3))])
def test_expanding_keeps_eval_mode_and_training_mode_where_statistics_have_settled(
    dimensions: int, bias: bool, nested: bool
) -> None:
    x = images(dimensions=dimensions)
    model = settled(plain(bias=bias, dimensions=dimensions), x)
    grown = again(model) if nested else repfx.expand(model, {"0": BEHIND})
    assert (grown[0].inner is not None) == nested
    for training in (False, True):
        assert_same_map(copy.deepcopy(grown).train(training), copy.deepcopy(model).train(training), x, 1e-12)
    passes = [copy.deepcopy(grown).train(), copy.deepcopy(model).train()]
    for each in passes:  # eval mode doesn't drift away, either
        for seed in range(3):
            each(images(seed, dimensions))
    assert_same_map(passes[0].eval(), passes[1].eval(), x, 0.02)


def test_statistics_that_lag_behind_move_training_mode_by_epsilon_alone() -> None:
    model = plain()
    grown = repfx.expand(model, {"0": BEHIND})
    assert_same_map(copy.deepcopy(grown).train(), copy.deepcopy(model).train(), images(), 1e-2)


@pytest.mark.parametrize("nested", [False, True])
def test_branches_can_begin_with_a_small_gamma(nested: bool) -> None:
    data = [images(seed) for seed in range(4)]
    model = settled(plain(), torch.cat(data))
    options: dict[str, Any] = {"gamma": 0.1, "calibrate": [torch.cat(data)]}
    grown = again(model, **options) if nested else repfx.expand(model, {"0": BEHIND}, **options)
    inner = grown[0].inner if nested else grown[0]
    ratio = inner.branches["kxk"].norm.weight.detach().abs().mean() / inner.norm.weight.detach().abs().mean()
    assert float(ratio) == pytest.approx(0.1, rel=0.05)
    assert_same_map(copy.deepcopy(grown).eval(), copy.deepcopy(model).eval(), images(), 1e-12)
    assert_same_map(copy.deepcopy(grown).train(), copy.deepcopy(model).train(), torch.cat(data), 1e-3)


@pytest.mark.parametrize("nested", [False, True])
def test_fused_restored_and_squeezed(nested: bool) -> None:
    first = again(plain()) if nested else repfx.expand(plain(), {"0": BEHIND})
    model = trained(first)
    fused: Any = repfx.fuse(model)
    assert_same_map(fused, model, images())
    assert [type(module) for module in fused.children()] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    restored = repfx.restore(fused)
    assert_same_map(restored.eval(), model, images())
    plain().load_state_dict(restored.state_dict(), strict=True)
    frozen = repfx.squeeze(copy.deepcopy(model), statistics="frozen")
    assert frozen.get_submodule("0").squeezed
    assert_same_map(frozen.train(), model, images())
    for parameter in frozen.parameters():
        parameter.grad = None
    frozen(images()).square().sum().backward()
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(frozen.get_parameter(name).grad, parameter.grad) < 1e-9, name


@pytest.mark.parametrize("bias", [False, True])
def test_dropping_all_branches_gives_the_plain_net_back(bias: bool) -> None:
    model = trained(repfx.expand(plain(bias=bias), {"0": BEHIND}))
    before = copy.deepcopy(model)
    repfx.drop(model, "0", "kxk", example=images())
    assert_same_map(model, before, images())
    repfx.drop(model, "0", "1x1")
    assert_same_map(model, before, images())
    plain(bias=bias).load_state_dict(model.state_dict(), strict=True)
    assert isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    "order", ["0 0 i i", *(pytest.param(order, marks=pytest.mark.slow) for order in ("i i 0 0", "0 i 0 i"))]
)
def test_branches_leave_a_block_whose_own_conv_is_a_block(order: str, calibrated: bool) -> None:
    x = torch.cat([images(seed) for seed in range(4)])
    model = settled(trained(again(plain())), x)
    model[0].norm.weight.data[2] = 0.0  # nothing may be divided by γ
    before = copy.deepcopy(model)
    names = {"0": ["1x1", "kxk"], "i": ["1x1", "kxk"]}
    for which in order.split():
        site = "0" if which == "0" else "0.origin.conv"
        inner = model[0].inner
        learned = inner.branches["kxk"].conv.weight.clone() if inner is not None and inner.branches.get("kxk") else None
        repfx.drop(model, site, names[which].pop(0), calibrate=[x] if calibrated else None)
        assert_same_map(model.eval(), before.eval(), images())
        if calibrated:
            assert_same_map(copy.deepcopy(model).train(), copy.deepcopy(before).train(), x)
        if which == "0" and learned is not None:
            assert torch.equal(model[0].inner.branches["kxk"].conv.weight, learned), "an inner block begins anew"
    plain().load_state_dict(model.state_dict(), strict=True)


def test_all_leave_in_one_step_and_so_they_do_in_a_replay(tmp_path: Path) -> None:
    model = trained(again(plain()))
    before = copy.deepcopy(model)
    drops = [Drop(site, name) for site in ("0", "0.origin.conv") for name in ("1x1", "kxk")]
    apply(model, drops, [images()])
    assert_same_map(model, before, images())
    plain().load_state_dict(model.state_dict(), strict=True)
    repfx.save(tmp_path / "model.safetensors", model)
    assert_same_map(repfx.load(tmp_path / "model.safetensors", plain()).eval(), model, images())


def test_fusing_and_restoring_in_place() -> None:
    model = trained(again(plain()))
    before = copy.deepcopy(model)
    apply(model, [Fuse("0"), Restore("0")], None)
    assert_same_map(model, before, images())
    plain().load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_rebuilds_it(nested: bool, tmp_path: Path) -> None:
    model = trained(again(plain()) if nested else repfx.expand(plain(), {"0": BEHIND}))
    if nested:
        repfx.drop(model, "0", "1x1")
    repfx.save(tmp_path / "model.safetensors", model)
    loaded: Any = repfx.load(tmp_path / "model.safetensors", plain())
    assert_same_map(loaded.eval(), model, images())
    assert repfx.journal(loaded) == repfx.journal(model)
    assert loaded[0].norm_behind == "1"
    assert not nested or loaded[0].inner.norm_behind == "0.origin.norm"


def test_own_conv_may_grow_behind_the_own_batch_norm_in_the_block_too() -> None:
    model: Any = repfx.expand(repfx.expand(plain(), {"0": ["1x1"]}), AGAIN, strict=True)
    trained(model)
    before = copy.deepcopy(model)
    assert_same_map(repfx.fuse(model), before, images())
    repfx.drop(model, "0", "1x1")
    assert type(model[1]) is nn.Identity
    assert not model[0].branches
    assert repfx.sites(model)["0"].refusal == "its own conv has become a block"
    for name in ("1x1", "kxk"):
        repfx.drop(model, "0.origin.conv", name)
    assert_same_map(model, before, images())
    plain().load_state_dict(model.state_dict(), strict=True)


def test_own_convs_grow_only_where_a_batch_norm_follows_and_the_spec_says_so() -> None:
    behind: Any = repfx.expand(plain(), {"0": BEHIND})
    with pytest.raises(Refused, match="norm_behind=True"):
        repfx.expand(behind, {"0.origin.conv": ["1x1"]}, strict=True)
    bare: Any = repfx.expand(plain(), {"0": repfx.Spec(["1x1"], norm="none")})
    with pytest.raises(Refused, match="no BatchNorm follows it there"):
        repfx.expand(bare, AGAIN, strict=True)
    assert [site.path for site in repfx.sites(behind)] == ["0", "3"]
    with pytest.raises(InvalidInput, match="behind the sum already"):
        repfx.Spec(["1x1"], norm="scale", norm_behind=True)


def test_a_conv_without_a_batch_norm_gets_none() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).double()
    grown: Any = repfx.expand(model, BEHIND)
    assert grown[0].norm is None
    assert grown[0].norm_behind is None
    for training in (True, False):
        assert_same_map(grown.train(training), model, images(), 1e-12)


def test_without_preserving_the_new_batch_norm_begins_as_torch_s_do() -> None:
    grown: Any = repfx.expand(plain(), {"0": BEHIND}, preserve=False)
    assert grown[0].norm.weight.eq(1).all()
    assert grown[0].norm.running_mean.eq(0).all()
    data = [images(seed) for seed in range(3)]
    calibrated: Any = repfx.expand(plain(), {"0": BEHIND}, preserve=False, calibrate=data)
    assert not calibrated[0].norm.running_mean.eq(0).any()


def test_an_expansion_that_fails_leaves_the_model_as_it_was() -> None:
    model = plain(bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InvalidInput, match="doesn't fit"):
        repfx.expand(model, {"0": BEHIND}, calibrate=[torch.ones(2, 9, 4, 4).double()], inplace=True)
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_averages_and_groups_follow() -> None:
    model = plain()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    randomize_batch_norm(average, 3)
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
    before = copy.deepcopy(average)
    with repfx.carry(model, optimizer, average):
        repfx.expand(model, {"0": BEHIND}, inplace=True)
        repfx.expand(model, AGAIN, inplace=True)
    assert_same_map(average.eval(), before.eval(), images())
    grown = {name for name, _ in model.named_parameters() if "origin" in name and ".norm." in name}
    decayed = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert grown
    assert not any(id(model.get_parameter(name)) in decayed for name in grown)
    trained(model)
    trained(average, 4)
    before = copy.deepcopy(average)
    with repfx.carry(model, optimizer, average):
        repfx.drop(model, "0", "1x1", calibrate=[images()])
    assert_same_map(average.eval(), before.eval(), images())
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert known == {id(parameter) for parameter in model.parameters()}


def test_frozen_and_by_its_own_method() -> None:
    model = trained(again(plain()))
    freeze(model, "0")
    assert not model[0].conv.weight.requires_grad
    before = copy.deepcopy(model)
    model[0].switch_to_deploy()
    assert_same_map(model, before, images())


class Deploying(nn.Module):
    """A module that fuses its conv and BatchNorm itself, as timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = plain()[:2]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y

    @torch.no_grad()
    def fuse(self) -> None:
        factor = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        bias = self.norm.bias - self.norm.running_mean * factor
        fused = nn.Conv2d(4, 6, 3, padding=1).to(factor)
        fused.weight.copy_(self.conv.weight * factor.reshape(-1, 1, 1, 1))
        fused.bias.copy_(bias)  # type: ignore[union-attr]
        self.conv, self.norm = fused, nn.Identity()


def test_a_class_that_fuses_itself_finds_a_conv_and_the_batch_norm() -> None:
    model: Any = repfx.expand(nn.Sequential(Deploying()), {"0.conv": BEHIND})
    model = trained(repfx.expand(model, {"0.conv.origin.conv": BEHIND}))
    before = copy.deepcopy(model)
    model[0].fuse()
    assert type(model[0].conv) is nn.Conv2d
    assert_same_map(model, before, images())


def test_an_example_proves_eval_mode_where_statistics_have_not_settled() -> None:
    model = plain()
    expanded = repfx.expand(model, BEHIND, example=images())
    assert_same_map(expanded.eval(), model.eval(), images())
