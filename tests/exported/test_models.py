"""Known models as programs: as few convs as from the module, and the same outputs, for free sizes too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.export import Dim

import repfx
from repfx.algebra.layers import is_conv
from repfx.testing import randomize_batch_norm
from tests.exported.test_fusing import assert_same, convs_of, norms_of

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    **{name: partial(timm.create_model, name) for name in ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9")},
}


@pytest.mark.slow
@pytest.mark.slow_one_in(3)
@pytest.mark.parametrize("name", MODELS)
def test_as_few_convs_as_from_the_module(name: str) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(MODELS[name]()).double().eval()
    x = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},))
    fused = repfx.fuse(program)
    assert len(convs_of(fused)) == sum(map(is_conv, repfx.fuse(model).modules()))
    assert not norms_of(fused)
    assert_same(program, fused, (torch.randn(3, 3, 128, 96, dtype=torch.float64),))
