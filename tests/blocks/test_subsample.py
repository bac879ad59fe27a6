"""Strided 1×1 convs of few channels run as a view and an unstrided conv, because torch's own gradient may corrupt memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import repfx
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel, pad
from repfx.algebra.layers import Layer, is_conv
from repfx.algebra.meaning import kernel_of, meaning_of
from repfx.algebra.torch_faults import may_corrupt_memory
from repfx.blocks.branch import KINDS, refusal_of_branch
from repfx.blocks.spec import BranchSpec
from repfx.blocks.stages import Norm, Subsample
from repfx.testing import assert_same_map, randomize_batch_norm

ROOT = Path(__file__).parents[2]

SITES: dict[str, Layer] = {
    "stem": nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "stem 7x7": nn.Conv2d(3, 8, 7, stride=2, padding=3),
    "unpadded, cropped": nn.Conv2d(4, 6, 3, stride=2),
    "cropped on one side": nn.Conv2d(4, 6, 3, stride=(3, 2), padding=(2, 0)),
    "even": nn.Conv2d(3, 8, 4, stride=4),
    "one axis": nn.Conv2d(5, 8, 3, stride=(1, 2), padding=1),
    "dilated": nn.Conv2d(2, 8, 3, stride=2, padding=2, dilation=2),
    "groups": nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
    "reflect": nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect"),
    "1d": nn.Conv1d(3, 8, 5, stride=3, padding=2),
    "3d": nn.Conv3d(2, 8, 3, stride=(1, 2, 2), padding=1),
    "1x1": nn.Conv2d(3, 8, 1, stride=2),
}
SIZES = {name: ConvSpec.of(site) for name, site in SITES.items()}
FITTING = [(kind, name) for kind in KINDS for name in SITES if refusal_of_branch(BranchSpec(kind), SIZES[name]) is None]


def faulty(conv: Layer) -> bool:
    padding = [side for pair in ConvSpec.of(conv).padding for side in pair]
    return may_corrupt_memory(conv.in_channels, conv.kernel_size, conv.stride, padding)


@pytest.mark.parametrize(("kind", "name"), FITTING)
def test_no_branch_has_a_conv_for_which_torch_may_corrupt_memory(kind: str, name: str) -> None:
    spec = SIZES[name]
    branch = KINDS[kind](spec, Norm(), torch.empty((), dtype=torch.float64))
    assert not any(faulty(module) for module in branch.modules() if is_conv(module))


def test_other_branches_are_as_they_were() -> None:
    for conv in (nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.Conv2d(3, 8, 3, padding=1)):
        block: Layer = repfx.expand(nn.Sequential(conv), ["1x1"]).get_submodule("0")
        assert [*block.get_submodule("1x1")._modules] == ["conv", "norm"]
        assert block.get_submodule("1x1.conv").stride == conv.stride


def test_the_keys_of_a_branch_are_those_of_a_strided_conv() -> None:
    models = [repfx.expand(nn.Sequential(nn.Conv2d(c, 8, 3, stride=2, padding=1)), ["1x1"]) for c in (3, 16)]
    few, many = ([*model.state_dict()] for model in models)
    assert few == many
    assert "0.1x1.conv.weight" in few


@pytest.mark.parametrize("size", [(5,), (4, 7), (3, 6, 5)])
def test_it_is_a_map_that_keeps_every_position_at_the_stride(size: tuple[int, ...]) -> None:
    module = Subsample((2, 3, 1)[: len(size)])
    meaning = meaning_of(module)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    assert meaning is not None
    assert meaning.kind == "subsample"
    assert_same_map(kernel_of(module, x, 4, len(size)), module, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["stem", "unpadded, cropped", "one axis", "1d", "3d"])
def test_a_branch_computes_what_the_strided_conv_would(name: str, dtype: torch.dtype) -> None:
    spec = SIZES[name]
    branch: Layer = KINDS["1x1"](spec, Norm("none"), torch.empty((), dtype=dtype))
    x = torch.randint(-3, 4, (2, spec.in_channels, 9, 12, 7)[: spec.dimensions + 2]).to(dtype)
    nn.init.constant_(branch.conv.weight, 0.5)
    inner = spec.inner((1,) * spec.dimensions)
    middle = pad(x, inner.padding)
    conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[spec.dimensions - 1]
    torch.testing.assert_close(branch(x), conv(middle, branch.conv.weight, None, inner.stride), rtol=0, atol=0)


class Stem(nn.Module):
    """A stem whose strided 1×1 is written by hand, before a BatchNorm that reads nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.subsample = Subsample((2, 3))
        self.conv = nn.Conv2d(3, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(self.conv(self.subsample(x)))
        return output


def test_fuse_absorbs_it_into_the_conv_behind() -> None:
    model = randomize_batch_norm(Stem()).double().eval()
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    fused = repfx.fuse(model)
    assert [type(module) for module in fused.children()] == [nn.Conv2d]
    assert fused.get_submodule("conv").stride == (2, 3)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SITES)
def test_blocks_fuse_squeeze_and_drop_as_ever(name: str) -> None:
    site = SITES[name]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(site.kernel_size) - 1]
    model = nn.Sequential(site, norm(site.out_channels))
    block = repfx.expand(model, ["1x1", "kxk"])
    block = randomize_batch_norm(block).double().eval()
    x = torch.randn((2, site.in_channels, 9, 12, 7)[: len(site.kernel_size) + 2], dtype=torch.float64)
    expected = block(x)
    fused = repfx.fuse(block)
    assert sum(map(is_conv, fused.modules())) == 1
    torch.testing.assert_close(fused(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(repfx.squeeze(block)(x), expected, rtol=1e-9, atol=1e-9)
    repfx.unsqueeze(block)
    inner: Layer = block.get_submodule("0")
    for branch in inner.branches:
        repfx.drop(block, "0", branch)
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_it_is_compiled_and_exported() -> None:
    block = (
        randomize_batch_norm(repfx.expand(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1)), "dbb"))
        .double()
        .eval()
    )
    x = torch.randn(2, 3, 8, 11, dtype=torch.float64)
    exported = torch.export.export(block, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), block(x), rtol=1e-9, atol=1e-9)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", [(2, 2), (1, 3)])
def test_a_kernel_runs_so_too(stride: tuple[int, int]) -> None:
    """A squeezed block with one open path, and a conv that shares weights, are kernels when they run."""
    weight = torch.randn(6, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    kernel = Kernel(weight, None, stride, ((0, -1), (-1, 0)), (1, 1))
    x = torch.randn(2, 3, 8, 10, dtype=torch.float64)
    expected = nn.functional.conv2d(x[:, :, :-1, 1:], weight, None, stride)
    torch.testing.assert_close(kernel(x), expected, rtol=1e-12, atol=1e-12)


PROGRAM = """
import torch, repfx
from torch import nn

x = torch.randn(4, 5, 32, 16, dtype=torch.float64)
model = repfx.expand(nn.Sequential(nn.Conv2d(5, 8, 3, stride=2, padding=1)), "dbb")
exact = repfx.expand(nn.Sequential(nn.Conv2d(5, 8, 3, stride=2, padding=1)), "dbb").double()
exact.load_state_dict(model.state_dict())
model.to(memory_format=torch.channels_last)
for _ in range(10):
    for each in (model, exact):
        each.zero_grad()
    exact(x).square().mean().backward()
    model(x.float().contiguous(memory_format=torch.channels_last)).square().mean().backward()
    for (name, own), other in zip(model.named_parameters(), exact.parameters()):
        scale = max(1, float(other.grad.abs().max()))
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)
print("as exact")
"""


@pytest.mark.slow
@pytest.mark.one_in(2)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's kernels for x86")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_stem_trains_in_channels_last_in_a_process_of_its_own(threads: int) -> None:
    """A strided 1×1 conv of 5 channels aborts or hangs here on older CPUs. The variable makes newer CPUs run their kernels."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "as exact\n"), done.stderr


def test_squeezed_with_one_open_path_no_conv_is_faulty() -> None:
    """The kernel is then a strided 1×1 of few channels itself."""
    model = repfx.expand(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1)), ["1x1"])
    block: Layer = model.get_submodule("0")
    block.rest()
    repfx.squeeze(model.eval())
    x = torch.randn(2, 3, 8, 10)
    with Convs() as convs:
        model(x)
    assert convs.sizes[-1] == ((8, 3, 1, 1), (1, 1))
    assert {stride for _, stride in convs.sizes} == {(1, 1)}


class Convs(TorchDispatchMode):
    """A record of the weight's shape and the stride of each conv that runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution.default:
            self.sizes.append((tuple(args[1].shape), tuple(args[3])))
        return function(*args, **(kwargs or {}))
