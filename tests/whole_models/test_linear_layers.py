"""Transformers and their kin with branches beside linear layers: whole models of timm, torchvision and torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.testing import assert_same_map, randomize_batch_norm
from tests.inline_net import reasons
from tests.random_numbers import numbers_from

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def timm_model(name: str, **options: Any) -> nn.Module:
    model: nn.Module = timm.create_model(name, num_classes=5, **options)
    return model


# each with the side of its images, and the number of its linear layers that stay as they are
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "vit_tiny": (lambda: timm_model("vit_tiny_patch16_224", img_size=48, depth=2), 48, 0),
    "convnext_atto": (lambda: timm_model("convnext_atto", conv_mlp=False, depths=(1, 1, 1, 1)), 64, 0),
    "vision transformer": (lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 40, num_classes=5), 32, 2),
}
SMALL = ("vit_tiny", "vision transformer")
SPECS = {"lora": "lora", "norms": repfx.Spec(["kxk", "1x1-kxk"], layers="linear")}
CASES = [
    pytest.param(name, spec, marks=() if name in SMALL and spec == "lora" else pytest.mark.slow)
    for name in MODELS
    for spec in SPECS
]


def images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=numbers_from(0))


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """Give the branches numbers of their own, in place, and put the model into eval mode."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=numbers_from(1)))
    return randomize_batch_norm(model).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spec"), CASES)
def test_linear_layers_of_whole_models(name: str, spec: str) -> None:
    make, side, staying = MODELS[name]
    model, x = make().double().eval(), images(side)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    expanded = repfx.expand(model, SPECS[spec])
    blocks = [site.path for site in repfx.sites(expanded) if site.linear and site.branches]
    assert len(linear) - len(blocks) == staying
    assert reasons(expanded).count("which isn't traced, reads its weights") == staying
    assert_same_map(expanded, model, x, 1e-12)
    fused = repfx.fuse(trained(expanded))
    assert_same_map(fused, expanded, x)
    assert [path for path, module in fused.named_modules() if isinstance(module, nn.Linear)] == linear
    assert all(type(fused.get_submodule(path)) is nn.Linear for path in blocks)


@pytest.mark.slow
def test_the_low_ranks_of_attention_are_all_that_is_trained() -> None:
    model, x = timm_model("vit_tiny_patch16_224", img_size=32, depth=2), images(32).float()
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranks = [repfx.BranchSpec("lora", {"rank": 2, "alpha": 4})]
    spec = repfx.Spec(ranks, norm="none", layers="linear")
    tuned = repfx.expand(model, {"*.attn.qkv": spec, "*.attn.proj": spec}, strict=True)
    weights = [name for name, weight in tuned.named_parameters() if weight.requires_grad]
    assert weights == [
        f"blocks.{block}.attn.{layer}.lora.{part}.weight"
        for block in range(2)
        for layer in ("qkv", "proj")
        for part in ("down", "up")
    ]
    optimizer = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(tuned.train()(x), torch.tensor([0, 1])).backward()
        optimizer.step()
    fused = repfx.fuse(tuned.eval())
    assert fused.state_dict().keys() == before.keys()
    changed = {name for name, tensor in fused.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"blocks.{block}.attn.{layer}.weight" for block in range(2) for layer in ("qkv", "proj")}
    assert_same_map(fused.double(), tuned.double(), x.double(), 1e-6)
    attention = fused.get_submodule("blocks.0.attn")
    assert type(attention) is type(model.get_submodule("blocks.0.attn"))


@pytest.mark.parametrize("fast", [False, True])
def test_torchs_own_transformer_keeps_the_layers_whose_weights_it_reads(fast: bool) -> None:
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 12), nn.TransformerEncoder(layer, 2), nn.Linear(12, 4)).double().eval()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    expanded = repfx.expand(model, "lora")
    assert [site.path for site in repfx.sites(expanded) if site.branches] == ["0", "2"]
    assert "Skip '1.layers.0.linear1': code around it, which isn't traced, reads its weights" in reasons(expanded)
    with torch.inference_mode(fast):
        assert_same_map(expanded, model, x, 1e-12)
        assert_same_map(repfx.fuse(trained(expanded)), expanded, x)
