"""`restore` puts BatchNorms back behind fused convs and keeps the function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import repfx
from repfx.errors import InvalidInput, Refused
from repfx.passes.fuse import Fuse
from repfx.passes.restore import Restore
from repfx.records.journal import apply
from repfx.testing import assert_same_map, randomize_batch_norm
from tests.small_net import SmallNet, batch, small_net


def trained(preset: str = "dbb") -> nn.Module:
    return randomize_batch_norm(repfx.expand(small_net(), preset), seed=7).eval()


@pytest.mark.parametrize("preset", ["repvgg", "dbb", "odbb", "qarepvgg"])
def test_restored_loads_strictly_into_the_original_class(preset: str) -> None:
    model = trained(preset)
    restored = repfx.restore(repfx.fuse(model))
    assert_same_map(restored, model, batch())
    plain = SmallNet().double().eval()
    plain.load_state_dict(restored.state_dict(), strict=True)
    assert_same_map(plain, model, batch())


def test_eps_and_momentum_return() -> None:
    restored: Any = repfx.restore(repfx.fuse(trained()))
    assert (restored.norm.eps, restored.norm.momentum) == (1e-3, 0.2)


@pytest.mark.parametrize("trains", [True, False])
def test_a_batch_norm_returns_trained_where_its_conv_is(trains: bool) -> None:
    """A frozen stem stays frozen; what stands behind it goes on to learn."""
    model: Any = small_net().eval()
    model.stem.requires_grad_(trains)
    model.norm.requires_grad_(trains)
    restored: Any = repfx.restore(repfx.fuse(model))
    assert {each.requires_grad for each in restored.norm.parameters()} == {trains}
    assert {each.requires_grad for each in restored.norm2.parameters()} == {True}
    assert_same_map(restored, model, batch())


def test_a_synchronized_batch_norm_returns_as_one() -> None:
    model: Any = nn.SyncBatchNorm.convert_sync_batchnorm(trained())
    restored: Any = repfx.restore(repfx.fuse(model))
    assert isinstance(restored.norm, nn.SyncBatchNorm)
    assert isinstance(restored.norm2, nn.SyncBatchNorm)
    assert_same_map(restored.eval(), model, batch())


@pytest.mark.parametrize("preset", [None, "dbb"])
def test_a_frozen_batch_norm_returns_as_one(preset: str | None) -> None:
    """Backbones of detectors have frozen BatchNorms. The restored model is the same function in training mode, too."""
    model: Any = small_net().eval()
    model.norm = FrozenBatchNorm2d(8, eps=1e-3).double()
    model.norm2 = FrozenBatchNorm2d(8).double()
    plain = copy.deepcopy(randomize_batch_norm(model, seed=3))
    if preset is not None:
        model = randomize_batch_norm(repfx.expand(model, preset), seed=7)
    restored: Any = repfx.restore(repfx.fuse(model.train()))
    assert type(restored.norm) is type(restored.norm2) is FrozenBatchNorm2d
    assert (restored.norm.eps, restored.norm.running_var.dtype) == (1e-3, torch.float64)
    assert_same_map(restored, model.eval(), batch())
    plain.load_state_dict(restored.state_dict(), strict=True)
    assert_same_map(plain.train(), model, batch())


def test_the_restored_model_trains_and_fuses_again() -> None:
    restored: Any = repfx.restore(repfx.fuse(trained())).train()
    before = restored.norm.running_mean.clone()
    restored(batch()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in restored.parameters())
    assert not torch.equal(before, restored.norm.running_mean)
    restored.eval()
    assert_same_map(repfx.fuse(restored), restored, batch())


@pytest.mark.slow
def test_a_single_batch_norm_keeps_the_training_mode_too() -> None:
    """Conv + BatchNorm is the same function again in both modes if the running statistics are those of the data."""
    model = small_net().train()
    data = batch(64)
    for _ in range(400):
        model(data)  # the running statistics become those of the data
    restored = repfx.restore(repfx.fuse(model))
    assert_same_map(restored.eval(), copy.deepcopy(model).eval(), data)
    # running variance is unbiased, batch variance biased: they differ by 1 in 64·99 positions
    assert_same_map(restored.train(), model.train(), data, 1e-3)


def test_calibrated_statistics_keep_the_output_in_training_mode() -> None:
    fused = repfx.fuse(trained())
    data = [batch(seed=seed) for seed in range(3)]
    restored = repfx.restore(fused, calibrate=data)
    assert_same_map(restored.eval(), fused, torch.cat(data))
    assert_same_map(restored.train(), fused, torch.cat(data), 1e-9)


def test_gamma_zero_is_no_obstacle() -> None:
    model = small_net().eval()
    with torch.no_grad():
        model.norm.weight[::2] = 0
        model.norm2.weight.zero_()
    fused = repfx.fuse(model)
    restored = repfx.restore(fused)
    assert_same_map(restored, model, batch())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in restored.state_dict().values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    fused: Any = repfx.fuse(small_net())
    with torch.no_grad():
        fused.stem.weight[0, 0, 0, 0] = value
    with pytest.raises(InvalidInput, match="weight of 'stem' is not finite"):
        repfx.restore(fused)
    broken = small_net()
    with torch.no_grad():
        broken.stem.weight[0, 0, 0, 0] = value
    with pytest.raises(InvalidInput, match="merged weight of 'stem' is not finite"):
        repfx.fuse(broken)


def test_the_fused_model_is_untouched() -> None:
    fused = repfx.fuse(trained())
    before = copy.deepcopy(fused.state_dict())
    repfx.restore(fused, "*", calibrate=[batch()])
    assert before.keys() == fused.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in fused.state_dict().items())


def test_named_convs_get_one_even_if_they_never_had_one() -> None:
    fused = repfx.fuse(small_net())
    restored: Any = repfx.restore(fused, "plain")
    assert isinstance(restored.plain_norm, nn.BatchNorm2d)
    assert restored.stem.bias is not None
    assert_same_map(restored.eval(), fused.eval(), batch())


def test_a_model_that_absorbed_nothing() -> None:
    with pytest.raises(InvalidInput, match="has absorbed a BatchNorm"):
        repfx.restore(small_net())
    with pytest.raises(InvalidInput, match="no conv of SmallNet fits 'zz'"):
        repfx.restore(small_net(), "zz")


def test_inside_another_model_the_batch_norm_returns_beside_its_conv() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.backbone = inner

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.backbone(x) * 2
            return output

    outer = Outer(repfx.fuse(trained()))
    restored: Any = repfx.restore(outer)
    assert isinstance(restored.backbone.norm, nn.BatchNorm2d)
    assert_same_map(restored.eval(), outer.eval(), batch())


def test_a_conv_called_twice_is_left_alone_with_the_reason() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert "called 2 times" in str(repfx.report(repfx.restore(model, "0")))
    with pytest.raises(Refused, match="called 2 times"):
        repfx.restore(model, "0", strict=True)


def test_what_was_folded_survives_copying_and_saving(tmp_path: Any) -> None:
    fused = repfx.fuse(trained())
    torch.save(fused, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for twin in (copy.deepcopy(fused), loaded):
        assert set(repfx.restore(twin).state_dict()) == set(SmallNet().state_dict())


# --- BatchNorms without a scale or a shift ---------------------------------------------------------------------------

LAYERS: dict[str, Any] = {
    "1d": (lambda: nn.Conv1d(3, 6, 3, bias=False), nn.BatchNorm1d, (4, 3, 11)),
    "2d": (lambda: nn.Conv2d(3, 6, 3, bias=True), nn.BatchNorm2d, (4, 3, 9, 10)),
    "3d": (lambda: nn.Conv3d(3, 6, 3, bias=False), nn.BatchNorm3d, (4, 3, 5, 6, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 3, bias=False), nn.BatchNorm2d, (4, 3, 9, 10)),
    "linear": (lambda: nn.Linear(3, 6), nn.BatchNorm1d, (7, 3)),
}


def normed(kind: str, missing: tuple[str, ...]) -> nn.Sequential:
    """A layer and a BatchNorm without some of its parameters, in float64."""
    layer, norm, _ = LAYERS[kind]
    model = nn.Sequential(*([nn.Flatten()] if kind == "linear" else []), layer(), norm(6), nn.ReLU()).double()
    for name in missing:
        model[-2].register_parameter(name, None)
    return model


@pytest.mark.parametrize("missing", [("weight", "bias"), ("weight",), ("bias",)])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_batch_norm_returns_with_the_parameters_that_it_had(kind: str, missing: tuple[str, ...]) -> None:
    model = randomize_batch_norm(normed(kind, missing)).eval()
    x = torch.randn(LAYERS[kind][2], dtype=torch.float64)
    restored = repfx.restore(repfx.fuse(model), calibrate=[x])
    assert repfx.report(restored).skipped == ()
    assert_same_map(restored, model, x)
    again = normed(kind, missing).eval()
    again.load_state_dict(restored.state_dict(), strict=True)
    assert_same_map(again, model, x)


@pytest.mark.parametrize("missing", [("weight", "bias"), ("bias",)])
def test_without_a_shift_it_trains_as_it_did(missing: tuple[str, ...]) -> None:
    model = normed("2d", missing)
    x = torch.randn(64, 3, 9, 10, dtype=torch.float64)
    norm: Any = model[1]
    norm.momentum = None  # the statistics of all that it has seen
    model.train()(x)
    restored = repfx.restore(repfx.fuse(model))
    assert restored.training
    assert_same_map(restored.train(), model.train(), x, tolerance=1e-4)


def test_in_place_it_returns_without_them_too() -> None:
    model = randomize_batch_norm(normed("2d", ("weight", "bias"))).eval()
    x = torch.randn(LAYERS["2d"][2], dtype=torch.float64)
    before, keys = model(x).detach(), list(model.state_dict())
    apply(model, [Fuse("0"), Restore("0")], None)
    assert_same_map(model, lambda _: before, x)
    assert list(model.state_dict()) == keys
