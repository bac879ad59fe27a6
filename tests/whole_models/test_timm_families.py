"""timm's families that fuse themselves: repfx leaves no more of the unprepared model than timm, and less if timm leaves BatchNorms."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

import repfx
from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.measuring.in_float64 import default_dtype
from repfx.testing import randomize_batch_norm

pytestmark = pytest.mark.slow

FAMILIES = {  # with whether timm leaves BatchNorms that could go
    "efficientvim_m1": False,
    "efficientvit_m0": False,
    "fastvit_t8": True,
    "ghostnetv3_050": True,
    "iformer_t": False,
    "lcnetv2_small": True,
    "levit_128s": False,
    "mobileone_s0": False,
    "nextvit_small": True,
    "repghostnet_050": True,
    "repvgg_a0": False,
    "repvit_m0_9": False,
    "shvit_s1": False,
    "tiny_vit_5m_224": False,
}


def counts(model: nn.Module) -> tuple[int, int]:
    return sum(map(is_conv, model.modules())), sum(map(is_batch_norm, model.modules()))


@pytest.mark.slow_one_in(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_more_is_left_than_timm_leaves(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with default_dtype(torch.float64 if dtype is torch.float64 else torch.float32):
        model = timm.create_model(family).eval().to(dtype)
    randomize_batch_norm(model)
    settings: Any = model.default_cfg
    size = settings["input_size"]
    fused = repfx.fuse(model)
    report = repfx.check_equivalent(model, fused, torch.randn(1, *size, dtype=dtype))
    if dtype is not torch.bfloat16:  # bfloat16 rounds weights to two digits
        assert report.max_error < (1e-9 if dtype is torch.float64 else 1e-4)
    timm_s = counts(reparameterize_model(timm.create_model(family).eval()))
    ours = counts(fused)
    assert ours[0] <= timm_s[0]
    assert ours[1] < timm_s[1] if FAMILIES[family] else ours[1] <= timm_s[1]
