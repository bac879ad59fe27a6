"""Weights that hooks compute before each forward: older weight norm and spectral norm, and pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import repfx
from tests.inline_net import convs, error_of, fused_exactly, image, norms, ready

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def channels_and_bias(m: Any) -> None:
    prune.ln_structured(m[0], "weight", 0.5, 2, 0)
    prune.l1_unstructured(m[0], "bias", 0.5)


def twice(m: Any) -> None:
    prune.l1_unstructured(m[3], "weight", 0.3)
    prune.random_unstructured(m[3], "weight", 0.4)


def everywhere(m: Any) -> None:
    prune.global_unstructured(
        [(m[0], "weight"), (m[3], "weight"), (m[1], "bias")], pruning_method=prune.L1Unstructured, amount=0.5
    )


WAYS: dict[str, Callable[[Any], Any]] = {
    "weight norm": lambda m: weight_norm(m[0]),
    "weight norm along another axis": lambda m: weight_norm(m[3], dim=1),
    "weight norm of the bias": lambda m: weight_norm(m[0], "bias"),
    "spectral norm": lambda m: spectral_norm(m[0]),
    "channels and bias": channels_and_bias,
    "a BatchNorm": lambda m: prune.l1_unstructured(m[1], "weight", 0.5),
    "twice": twice,
    "everywhere": everywhere,
    "nothing pruned": lambda m: prune.identity(m[0], "weight"),
    "a linear layer": lambda m: weight_norm(m[7]),
}


def net(way: str, dimensions: int = 2) -> Any:
    conv, norm = (getattr(nn, f"{kind}{dimensions}d") for kind in ("Conv", "BatchNorm"))
    pool = getattr(nn, f"AdaptiveAvgPool{dimensions}d")(1)
    torch.manual_seed(3)
    layers = [conv(4, 6, 3, padding=1), norm(6), nn.ReLU(), conv(6, 4, 3, groups=2, bias=False), norm(4)]
    model = ready(nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)))
    WAYS[way](model)
    return model


STATES: dict[str, Callable[[Any], Any]] = {
    "fresh": lambda m: None,
    "after a forward": lambda m: m(image()),
    "after a backward": lambda m: m(image()).sum().backward(),
    "after a step": lambda m: (m(image()).sum().backward(), torch.optim.SGD(m.parameters(), 0.1).step()),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("way", WAYS)
def test_they_are_folded(way: str, state: str) -> None:
    model, x = net(way), image()
    STATES[state](model)
    with torch.no_grad():
        expected = copy.deepcopy(model.state_dict())
        fused = repfx.fuse(model)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.items())
    assert error_of(fused, model, x) < 1e-9
    assert norms(fused) == []
    assert len(convs(fused)) == 3
    assert not any(module._forward_pre_hooks for module in fused.modules())
    assert error_of(repfx.restore(fused), model, x) < 1e-9
    assert repfx.check_equivalent(model, fused, x).equivalent


@pytest.mark.parametrize("dimensions", [1, 3])
def test_in_other_dimensions(dimensions: int) -> None:
    model = net("everywhere", dimensions)
    assert norms(fused_exactly(copy.copy(model), image(2, 4, *(9, 10, 7)[:dimensions]))) == []


@pytest.mark.slow_one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_other_verbs_serve_the_rest_of_the_model(way: str, tmp_path: Path) -> None:
    model, x = net(way), image()
    refusals = {site.path: str(site.refusal) for site in repfx.sites(model)}
    assert {path for path, reason in refusals.items() if "has hooks" in reason} == {
        path for path in refusals if model.get_submodule(path)._forward_pre_hooks
    }
    expanded = repfx.expand(model, "acb")
    assert error_of(expanded, model, x) < 1e-9
    assert error_of(repfx.squeeze(repfx.expand(model, "repvgg")), model, x) < 1e-9
    assert repfx.export_onnx(net(way).float(), tmp_path / "net.onnx", x.float()).max_error < 1e-4
    repfx.save(tmp_path / "run.ckpt", expanded)
    again = repfx.load(tmp_path / "run.ckpt", net(way))
    assert error_of(again, model, x) < 1e-9


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_frozen_stays_frozen(way: str, trains: bool) -> None:
    model = net(way).requires_grad_(trains)
    assert {parameter.requires_grad for parameter in repfx.fuse(model).parameters()} == {trains}


def test_the_model_goes_on_as_before() -> None:
    model = net("everywhere").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(image()).sum().backward()
    for verb in (repfx.fuse, repfx.sites, lambda m: repfx.expand(m, "acb")):
        verb(model)
    optimizer.step()
    assert prune.is_pruned(model)
    assert not bool(model[0].weight_mask.all())
    model(image()).sum().backward()
