"""timm's `reparameterize_model` fuses expanded models, by the code of timm's own classes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import repfx
from repfx.algebra.layers import is_conv
from repfx.blocks.block import RepBlock
from repfx.testing import assert_same_map, randomize_batch_norm

timm = pytest.importorskip("timm")
from timm.utils.model import reparameterize_model  # noqa: E402

MODELS = ["repvgg_a0", "mobileone_s0", "ghostnetv3_050", "repvit_m0_9", "levit_128s", "resnet10t"]


@pytest.fixture
def in_float64() -> Iterator[None]:
    """timm's code makes convs in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def expanded(name: str, preset: str) -> nn.Module:
    model = randomize_batch_norm(timm.create_model(name, num_classes=7))
    return randomize_batch_norm(repfx.expand(model, preset), seed=1).eval()


def image(name: str) -> torch.Tensor:
    return torch.randn(2, 3, *((224, 224) if "levit" in name else (64, 96)))


def convs(model: nn.Module) -> int:
    return sum(map(is_conv, model.modules()))


@pytest.mark.slow
@pytest.mark.slow_one_in(10)
@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("preset", ["repvgg", "dbb", "orepa"])
@pytest.mark.parametrize("name", MODELS)
def test_it_keeps_the_function(name: str, preset: str) -> None:
    model, x = expanded(name, preset), image(name)
    before = model(x)
    found = reparameterize_model(model)
    assert not any(isinstance(module, RepBlock) for module in found.modules())
    assert convs(found) <= convs(reparameterize_model(timm.create_model(name)))
    assert_same_map(found, lambda _: before, x)
    assert torch.equal(model(x), before)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_it_gives_what_fuse_gives() -> None:
    model, x = expanded("test_byobnet", "repvgg"), torch.randn(2, 3, 32, 48)
    assert_same_map(reparameterize_model(model), repfx.fuse(model), x)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ["repvgg_a0", "resnet10t"])
def test_it_gives_what_fuse_gives_for_whole_models(name: str) -> None:
    model, x = expanded(name, "repvgg"), image(name)
    assert_same_map(reparameterize_model(model, inplace=True), repfx.fuse(model), x)
