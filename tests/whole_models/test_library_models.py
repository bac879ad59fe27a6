"""Models that break tracing or folding in other tools: `fuse` gets them right and leaves the originals as they were.

The trouble: graphs with a mode fixed in them (swin, convnext, efficientnet_v2), a Proxy that is cached in a dict while it is traced (levit,
efficientformer, efficientvit_m0, tiny_vit), parents that read attributes of a child (RAFT), and BatchNorms that no conv feeds (repvit).
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn

import repfx
from repfx.algebra.layers import Layer
from repfx.testing import relative_error
from tests.inline_net import image, norms, ready, reasons, same_state

# the size of each model's input
MODELS = {
    "efficientformer_l1": 224,
    "repvgg_a0": 64,
    "tf_efficientnet_b0": 64,
    "levit_128s": 224,
    "efficientvit_m0": 224,
    "tiny_vit_5m_224": 224,
    "repvit_m0_9": 64,
    "torchvision.swin_t": 64,
    "torchvision.convnext_tiny": 64,
    "torchvision.efficientnet_v2_s": 64,
}
QUICK = ["repvgg_a0"]


def build(name: str) -> Layer:
    if name.startswith("torchvision."):
        return torchvision.models.get_model(name.removeprefix("torchvision."), num_classes=4)
    return timm.create_model(name, num_classes=4)


def proxies(model: nn.Module) -> Iterator[object]:
    for module in model.modules():
        for value in vars(module).values():
            inside = value.values() if isinstance(value, dict) else (value,)
            yield from (item for item in inside if isinstance(item, fx.Proxy))


@pytest.mark.slow_one_in(3)
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_fused_right_from_training_mode_and_untouched(name: str) -> None:
    model, x = ready(build(name)), image(1, 3, MODELS[name], MODELS[name])
    with torch.no_grad():
        expected = model(x)
    before = copy.deepcopy(model.train().state_dict())

    fused = repfx.fuse(model)
    assert norms(fused) == [], reasons(fused)
    assert same_state(before, model.state_dict())
    assert list(proxies(model)) == list(proxies(fused)) == []
    fused.eval()
    state = copy.deepcopy(fused.state_dict())
    with torch.no_grad():
        assert relative_error(fused(x), expected) < 1e-9
        assert relative_error(copy.deepcopy(fused)(x), expected) < 1e-9
    assert same_state(state, fused.state_dict())
    assert same_state(pickle.loads(pickle.dumps(model)).state_dict(), before)


@pytest.mark.slow
def test_a_flow_model_is_fused_in_islands_whose_attributes_are_read() -> None:
    model = ready(torchvision.models.optical_flow.raft_large())
    fused = repfx.fuse(model)
    assert norms(fused) == []
    images = tuple(torch.rand(1, 3, 128, 136, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for twin in (fused, copy.deepcopy(fused), repfx.fuse(fused)):
        report = repfx.check_equivalent(model, twin, images)
        assert report.equivalent


@pytest.mark.slow
def test_a_detector_is_fused_in_islands() -> None:
    """The heads' outputs are compared, because what follows, suppression of overlaps among nearly equal scores, is not continuous."""
    models: Any = torchvision.models.detection
    model = ready(models.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5))
    fused = repfx.fuse(model)
    assert type(fused) is type(model)
    assert norms(fused) == []
    x = image(1, 3, 96, 128)
    with torch.no_grad():
        features: list[dict[str, Tensor]] = [dict(twin.backbone(x)) for twin in (fused, model)]
        heads = [twin.head(list(output.values())) for twin, output in zip((fused, model), features)]
    for ours, theirs in (features, heads):
        assert ours.keys() == theirs.keys()
        assert max(relative_error(ours[key], theirs[key]) for key in theirs) < 1e-9
