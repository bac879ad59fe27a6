"""BatchNorms that also drop and activate: the norm folds, the rest stays, and what isn't folded stays whole."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn

import repfx
from repfx.algebra.activated_norm import norm_of, rest_of
from repfx.testing import assert_same_map, randomize_batch_norm
from tests.inline_net import Net, convs, error_of, fused_exactly, image, norms, ready, reasons, same_state


def sync_norm() -> nn.Module:
    whole = BatchNormAct2d(4, act_layer=nn.SiLU)
    synchronized = SyncBatchNormAct(4)
    synchronized.act, synchronized.drop = whole.act, whole.drop
    return synchronized


FORMS: dict[str, Callable[[], Any]] = {
    "ReLU in place": lambda: BatchNormAct2d(4),
    "SiLU": lambda: BatchNormAct2d(4, act_layer=nn.SiLU, inplace=False),
    "with parameters": lambda: BatchNormAct2d(4, act_layer=nn.PReLU, inplace=False),
    "no activation": lambda: BatchNormAct2d(4, apply_act=False),
    "with dropout": lambda: BatchNormAct2d(4, drop_layer=nn.Dropout),
    "no affine": lambda: BatchNormAct2d(4, affine=False, eps=1e-3),
    "frozen": lambda: FrozenBatchNormAct2d(4, act_layer=nn.SiLU),
    "synchronized": sync_norm,
}


class Block(nn.Module):
    """A block in timm's form: a conv, then one module for norm and activation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.bn1(self.conv(x))
        return output


def model_with(form: str) -> Any:
    return ready(Block(FORMS[form]()))


@pytest.mark.parametrize("form", FORMS)
def test_the_norm_is_folded_and_the_rest_stays_at_its_path(form: str) -> None:
    model = model_with(form)
    fused = fused_exactly(model, image())
    assert (convs(fused), norms(fused)) == (["conv"], [])
    kept = {path: type(module) for path, module in model.named_modules() if path.startswith("bn1.")}
    working = {path: kind for path, kind in kept.items() if kind is not nn.Identity}
    assert {path: type(module) for path, module in fused.named_modules() if path.startswith("bn1.")} == working
    assert_same_map(pickle.loads(pickle.dumps(fused)), model, image())


@pytest.mark.parametrize("form", FORMS)
def test_in_training_mode_the_rest_trains_as_before(form: str) -> None:
    model = model_with(form)
    fused = repfx.fuse(model.train())
    modes = {path: module.training for path, module in fused.named_modules() if path in ("bn1.drop", "bn1.act")}
    assert all(modes.values())
    assert_same_map(fused.eval(), model.eval(), image())


@pytest.mark.parametrize("spec", ["dbb", "qarepvgg"])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "synchronized"])
def test_expanding_keeps_both_modes_and_fusing_comes_back(form: str, spec: str) -> None:
    model = model_with(form)
    if form == "with dropout":
        model.bn1.drop.p = 0.0
    expanded, x = repfx.expand(model, spec), image()
    for mode in (True, False):
        assert_same_map(copy.deepcopy(expanded).train(mode), copy.deepcopy(model).train(mode), x)
    assert len(expanded.conv.branches) > 1
    randomize_batch_norm(expanded, seed=2)
    fused = repfx.fuse(expanded.eval())
    assert_same_map(fused, expanded, x)
    assert (convs(fused), norms(fused)) == (["conv"], [])


def test_expanding_in_place_keeps_the_parameters_and_a_failure_the_model() -> None:
    model = model_with("with parameters")
    before, parameters = copy.deepcopy(model.state_dict()), set(map(id, model.parameters()))
    whole = model.bn1
    with pytest.raises(repfx.errors.RepfxError):
        repfx.expand(model, "acb", inplace=True, calibrate=[torch.randn(2, 3, 5, 5, dtype=torch.float64)])
    assert model.bn1 is whole
    assert same_state(model.state_dict(), before)
    repfx.expand(model, "acb", inplace=True)
    assert parameters <= set(map(id, model.parameters()))
    assert list(dict(model.bn1.named_children())) == ["drop", "act"]


@pytest.mark.parametrize(
    "form", ["ReLU in place", "SiLU", "with parameters", "with dropout", "no activation", "frozen"]
)
@pytest.mark.parametrize("spec", [None, "acb"])
def test_restored_it_loads_strictly_into_the_original(form: str, spec: str | None) -> None:
    model, x = model_with(form), image()
    trained = model if spec is None else randomize_batch_norm(repfx.expand(model, spec)).eval()
    restored = repfx.restore(repfx.fuse(trained))
    assert norms(restored) == ["bn1"]
    original = model_with(form)
    original.load_state_dict(restored.state_dict(), strict=True)
    assert_same_map(restored.eval(), trained, x)
    assert_same_map(original.eval(), trained, x)
    refused = repfx.fuse(restored)
    assert norms(refused) == []
    assert_same_map(refused.eval(), trained, x)


def test_what_is_not_folded_stays_whole() -> None:
    model = ready(
        Net(
            lambda m, x: m.twice(m.conv(m.twice(m.first(x)))) + m.hooked(m.other(x)),
            first=BatchNormAct2d(4),
            conv=nn.Conv2d(4, 4, 3, padding=1),
            twice=BatchNormAct2d(4, act_layer=nn.SiLU),
            other=nn.Conv2d(4, 4, 1),
            hooked=BatchNormAct2d(4),
        )
    )
    model.hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    fused = fused_exactly(model, image())
    assert norms(fused) == ["first", "twice", "hooked"]
    assert {type(fused.get_submodule(path)) for path in norms(fused)} == {BatchNormAct2d}
    assert all(word in reasons(fused) for word in ("called 2 times", "hooks", "the input comes before it"))
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert repfx.report(fused).applied == ()
    fused.train()(image())  # and normalises by the batch again
    assert not torch.equal(fused.twice.running_mean, model.twice.running_mean)


def test_an_activation_between_norm_and_conv_is_never_jumped_over() -> None:
    """Folded forward, the affine part would pass through the ReLU."""
    model = Net(lambda m, x: m.conv(m.norm(x)), norm=BatchNormAct2d(4), conv=nn.Conv2d(4, 4, 1))
    assert norms(fused_exactly(model, image())) == ["norm"]
    linear = Net(lambda m, x: m.conv(m.norm(x)), norm=BatchNormAct2d(4, apply_act=False), conv=nn.Conv2d(4, 4, 1))
    assert norms(fused_exactly(linear, image())) == []


def test_inside_what_can_t_be_traced() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = m.block(x)
        return y if y.sum() > 0 else -y

    model = Net(forward, block=Block(BatchNormAct2d(4)))
    fused = fused_exactly(model, image())
    assert type(fused) is Net
    assert norms(fused) == []
    restored = repfx.restore(fused)
    assert error_of(restored.eval(), model, image()) < 1e-9
    assert norms(restored) == ["block.bn1"]


def test_the_norm_alone_shares_its_tensors_and_leaves_the_whole_as_it_was() -> None:
    whole = ready(BatchNormAct2d(4))
    norm, rest = norm_of(whole), rest_of(whole)
    assert type(norm) is nn.BatchNorm2d
    assert all(a is b for a, b in zip(norm.parameters(), whole.parameters(), strict=True))
    assert list(dict(whole.named_children())) == ["drop", "act"]
    assert_same_map(lambda x: rest(norm(x)), whole, image())
    plain = nn.BatchNorm2d(4)
    assert norm_of(plain) is plain
    assert type(rest_of(plain)) is nn.Identity


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", pytest.param("repvgg_a0", marks=pytest.mark.slow)])
def test_timm_s_models(name: str) -> None:
    model: Any = timm.create_model(name, num_classes=4)
    x = image(1, 3, 64, 72)
    fused = fused_exactly(model, x)
    assert norms(fused) == []
    restored = repfx.restore(fused)
    assert error_of(restored, model, x) < 1e-9
    expanded = repfx.expand(model, "dbb")
    assert error_of(expanded, model, x) < 1e-12
    randomize_batch_norm(expanded, seed=3)
    assert error_of(repfx.fuse(expanded), expanded, x) < 1e-9
