"""Tools that let each module fuse itself: timm's `reparameterize_model`, and scripts that call `switch_to_deploy` on every module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import repfx
from repfx.algebra.layers import is_conv
from repfx.testing import randomize_batch_norm

timm = pytest.importorskip("timm")
from timm.utils import reparameterize_model  # noqa: E402

PRESETS = ["repvgg", "dbb", "orepa", "acb"]


def expanded(name: str, preset: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).double()
    model = randomize_batch_norm(repfx.expand(randomize_batch_norm(model), preset))
    return model.eval()


def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, dtype=torch.float64)


@torch.no_grad()
def assert_same(a: nn.Module, b: nn.Module, x: torch.Tensor) -> None:
    expected, found = a(x), b(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def has_blocks(model: nn.Module) -> bool:
    return any(type(module).__module__.startswith("repfx.blocks") for module in model.modules())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "name", ["repvgg_a0", "mobileone_s0", "ghostnetv3_050", "repvit_m0_9", "levit_128s", "resnet10t"]
)
@pytest.mark.slow
def test_timm_fuses_an_expanded_model_as_repfx_does(name: str, preset: str) -> None:
    model = expanded(name, preset)
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64) if "levit" in name else image()
    fused, expected = repfx.fuse(model), model(x).detach()
    found = reparameterize_model(model)
    assert not has_blocks(found)
    assert_same(fused, found, x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert sum(map(is_conv, found.modules())) <= 2 * sum(map(is_conv, fused.modules()))
