"""Bugs of other tools that users reported in public, one test each, named by its thread or its tool.

If the mistake is still in an installed package, or is a formula of a few lines, the test also shows the wrong result, as proof that the
care is needed.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models import byobnet, levit
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.nn.utils.fusion import fuse_conv_bn_weights

import repfx
from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.testing import randomize_batch_norm, relative_error
from tests.inline_net import Net

X = torch.randn(2, 4, 7, 9, dtype=torch.float64)


def ready(model: nn.Module) -> Any:
    return randomize_batch_norm(model.double(), seed=3).eval()


def counts(model: nn.Module) -> tuple[int, int]:
    return sum(map(is_conv, model.modules())), sum(map(is_batch_norm, model.modules()))


@torch.no_grad()
def off(found: Any, expected: Any, x: Tensor = X) -> float:
    return relative_error(found(x), expected(x))


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


# ---- folding BatchNorm


def test_pytorch_104593_and_197539_a_conv_that_is_called_twice() -> None:
    model = ready(Net(lambda m, x: m.b(m.c(m.c(x))), c=nn.Conv2d(4, 4, 3, padding=1), b=nn.BatchNorm2d(4)))
    assert off(optimization.fuse(copy.deepcopy(model)), model) > 0.01
    fused = repfx.fuse(model)
    assert off(fused, model) < 1e-12
    assert "called 2 times" in str(repfx.report(fused))


def test_pytorch_197539_a_batch_norm_behind_a_linear_layer_on_a_sequence_counts_the_second_axis() -> None:
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    assert off(optimization.fuse(copy.deepcopy(model)), model, x) > 0.01
    assert off(repfx.fuse(model), model, x) < 1e-12


def test_pytorch_108863_weights_that_were_folded_once_and_trained_since() -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    first = repfx.fuse(model)
    before = first(X)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    model(X).square().sum().backward()
    optimizer.step()
    model.eval()
    assert off(repfx.fuse(model), model) < 1e-12
    assert torch.equal(first(X), before)
    assert off(first, model) > 1e-3


def test_pytorch_180995_grouped_transposed_convs() -> None:
    model = ready(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)))
    conv, norm = model
    with pytest.raises(RuntimeError):
        fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias, True
        )
    fused = repfx.fuse(model)
    assert counts(fused) == (1, 0)
    assert off(fused, model) < 1e-12


def test_ultralytics_25364_the_weight_of_a_transposed_conv_has_its_outputs_on_the_second_axis() -> None:
    conv, norm = nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False), nn.BatchNorm2d(4)
    model = ready(nn.Sequential(conv, norm))
    scale, shift = scale_and_shift(norm)

    def on_the_first_axis(x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, conv.weight * scale.view(-1, 1, 1, 1), shift, stride=2)

    assert off(on_the_first_axis, model) > 0.1
    assert off(repfx.fuse(model), model) < 1e-12


def test_optimum_s_folder_left_the_bias_of_the_conv_unscaled() -> None:
    conv, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    model = ready(nn.Sequential(conv, norm))
    scale, shift = scale_and_shift(norm)

    def unscaled(x: Tensor) -> Tensor:
        bias: Any = conv.bias
        return F.conv2d(x, conv.weight * scale.view(-1, 1, 1, 1), bias + shift)

    assert off(unscaled, model) > 0.01
    assert off(repfx.fuse(model), model) < 1e-12


def test_optimum_s_folder_took_a_beta_that_is_missing_for_one() -> None:
    norm = nn.BatchNorm2d(4)
    norm.register_parameter("bias", None)
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), norm))
    fused = repfx.fuse(model)
    assert counts(fused) == (1, 0)
    assert off(fused, model) < 1e-12


def test_timm_s_repvit_fused_the_norms_of_others_away() -> None:
    """timm's helper replaced every BatchNorm by the identity, whether a conv had absorbed it or not."""
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()))
    fused = repfx.fuse(model)
    assert counts(fused) == (1, 1)
    assert off(fused, model) < 1e-12


# ---- dtype and mode


def test_timm_s_fuse_builds_float32_layers_in_training_mode_whatever_the_model_is() -> None:
    model = ready(levit.ConvNorm(4, 6, 3))
    theirs = model.fuse()
    assert theirs.weight.dtype is torch.float32
    assert theirs.training
    fused = repfx.fuse(model)
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.float64}
    assert not any(module.training for module in fused.modules())
    assert off(fused, model) < 1e-12


def test_timm_s_inference_mode_builds_a_conv_without_padding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained, deployed = (ready(byobnet.RepVggBlock(4, 4, 3, inference_mode=mode)) for mode in (False, True))
    assert deployed(X).shape != trained(X).shape
    fused = repfx.fuse(trained)
    assert counts(fused) == (1, 0)
    assert off(fused, trained) < 1e-12


# ---- branches


def test_yolov7_the_identity_of_a_grouped_block() -> None:
    """The kernel is the identity within each group. A kernel that ignores the groups has an error larger than the output."""
    conv, norm = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
    model = ready(Net(lambda m, x: m.c(x) + m.b(x), c=conv, b=norm))
    fused = repfx.fuse(model)
    assert counts(fused) == (1, 0)
    assert off(fused, model) < 1e-12


@pytest.mark.parametrize(
    "settings", [{"dilation": 2, "padding": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
def test_dyrep_lost_dilation_and_padding_mode(settings: dict[str, Any]) -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3, **settings), nn.BatchNorm2d(4)))
    expanded = repfx.expand(model, "dyrep")
    assert repfx.report(expanded).applied
    assert off(expanded, model) < 1e-12
    randomize_batch_norm(expanded, seed=1)
    assert off(repfx.fuse(expanded), expanded) < 1e-12


def test_dyrep_dropped_the_bias_of_a_block_that_had_become_a_conv_again(tmp_path: Path) -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)))
    fused = repfx.fuse(repfx.expand(model, "dyrep"))
    torch.save(fused.state_dict(), tmp_path / "fused.pt")
    other = repfx.fuse(repfx.expand(ready(copy.deepcopy(model)), "dyrep"))
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(torch.load(tmp_path / "fused.pt"), strict=True)
    assert off(other, model) < 1e-12


def test_repan_divided_by_a_gamma_of_zero() -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight[2] = 0
    restored = repfx.restore(repfx.fuse(model))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in restored.state_dict().values())
    assert off(restored, model) < 1e-12


@pytest.mark.parametrize("preset", ["repvgg", "mobileone", "dbb"])
def test_repvgg_and_yolov7_accuracy_collapses_after_re_parameterization(preset: str) -> None:
    """A dozen threads report this. `check_equivalent` passes for the right model and raises for one that isn't equivalent."""
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
    expanded = randomize_batch_norm(repfx.expand(model, preset), seed=1)
    assert repfx.check_equivalent(expanded, repfx.fuse(expanded), X).max_error < 1e-12
    with pytest.raises(repfx.errors.RepfxError):
        repfx.check_equivalent(expanded, repfx.fuse(model), X)


# ---- export


@pytest.mark.slow
def test_onnx_optimizer_made_an_invalid_graph_of_a_repvgg_block(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = ready(repfx.expand(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()), "repvgg"))
    repfx.export_onnx(model.float(), tmp_path / "block.onnx", X.float())
    graph = onnx.load(tmp_path / "block.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [node.op_type for node in graph.graph.node] == ["Conv", "Relu"]
