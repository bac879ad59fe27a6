"""The main job on torchvision's models: expand with each preset that fits, train, fuse; the result is plain and equivalent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import densenet, regnet
from torchvision.models.video import resnet as video

import repfx
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.blocks.presets import PRESETS
from repfx.measuring.cost import count_macs
from repfx.testing import randomize_batch_norm, relative_error


def vgg() -> nn.Module:
    model: nn.Module = torchvision.models.vgg11_bn(num_classes=10)
    model.classifier = nn.Linear(512 * 7 * 7, 10)  # instead of 120 million weights that don't matter here
    return model


# Some are shorter than torchvision's named models, whose repeated layers would test nothing new.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "vgg": vgg,
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "regnet_y": lambda: regnet.RegNet(
        regnet.BlockParams.from_init_params(6, 48, 64.0, 2.5, group_width=8, se_ratio=0.25), num_classes=10
    ),
    "densenet": lambda: densenet.DenseNet(32, (3, 2, 3, 2), 64, num_classes=10),
    "googlenet": lambda: torchvision.models.googlenet(num_classes=10, init_weights=False),
    "r3d": lambda: video.VideoResNet(
        video.BasicBlock, [video.Conv3DSimple] * 4, [2, 1, 1, 1], video.BasicStem, num_classes=10
    ),
}
# UniRepLKNet's branches are for depthwise windows of 5 and more; none of these models has any
FITTING = sorted(set(PRESETS) - {"dilated"})
ALL = [(model, preset) for model in MODELS for preset in FITTING]


def build(name: str) -> nn.Module:
    model = MODELS[name]().double()
    randomize_batch_norm(model, seed=1)
    return model


def example(name: str) -> Tensor:
    size = (2, 3, 2, 16, 24) if name == "r3d" else (2, 3, 32, 40)
    return torch.randn(size, dtype=torch.float64)


def train_three_steps(model: nn.Module, x: Tensor) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(3):
        output = model(x)  # googlenet also returns its auxiliary heads
        loss = output.square().mean() if isinstance(output, Tensor) else sum(o.square().mean() for o in output)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(
            model.parameters(), 1.0
        )  # BatchNorm's gradients are huge for two samples at one position
        optimizer.step()


def convs(model: nn.Module) -> dict[str, ConvSpec]:
    """Convs by path, with their sizes."""
    return {path: ConvSpec.of(module) for path, module in model.named_modules() if is_conv(module)}


@pytest.mark.slow
@pytest.mark.slow_one_in(20)
@pytest.mark.parametrize(("name", "preset"), ALL)
def test_expand_train_fuse_is_exact_and_leaves_the_plain_model(name: str, preset: str) -> None:
    model, x = build(name), example(name)
    expanded = repfx.expand(model, preset)
    with torch.no_grad():
        assert relative_error(expanded.eval()(x), model.eval()(x)) < 1e-12
    assert len(repfx.report(expanded).applied) > 0

    train_three_steps(expanded, x)
    randomize_batch_norm(expanded, seed=2)
    fused = repfx.fuse(expanded)
    plain = repfx.fuse(model)
    with torch.no_grad():
        assert relative_error(fused.eval()(x), expanded.eval()(x)) < 1e-9
    assert convs(fused) == convs(plain) == convs(model)
    assert sum(map(is_batch_norm, fused.modules())) == sum(map(is_batch_norm, plain.modules()))
    assert count_macs(fused, x) == count_macs(plain, x) == count_macs(model, x)


@pytest.mark.slow_one_in(4)
@pytest.mark.slow  # for ResNet-18, the README's tests do it
@pytest.mark.parametrize("name", MODELS)
def test_fused_model_runs_in_onnxruntime(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = build(name).float()
    x = example(name).float()
    expanded = repfx.expand(model, "dbb")
    train_three_steps(expanded, x)
    target = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
    report = repfx.export_onnx(expanded, target, x, tolerance=1e-4)
    assert report.max_error < 1e-4
    assert target.is_file()


@pytest.mark.slow  # with the preset dbb, the README's tests do it
@pytest.mark.parametrize("preset", ["dbb", "mobileone"])
def test_restored_model_loads_strictly_into_the_original_class(preset: str) -> None:
    model, x = build("resnet18"), example("resnet18")
    expanded = repfx.expand(model, preset)
    train_three_steps(expanded, x)
    restored = repfx.restore(repfx.fuse(expanded))
    plain = MODELS["resnet18"]().double()
    plain.load_state_dict(restored.state_dict(), strict=True)
    with torch.no_grad():
        assert relative_error(plain.eval()(x), expanded.eval()(x)) < 1e-9
