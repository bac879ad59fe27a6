"""Fused programs of torch.export in the tools that take such programs: ExecuTorch and the quantization of torchao."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import repfx
from repfx.exported.operators import conv_call, norm_call
from tests.exported.nets import made
from tests.exported.test_fusing import convs_of, exported

pytestmark = pytest.mark.tools

NAMES = ["branches", "linear", "transposed"]


@pytest.mark.parametrize("name", NAMES)
def test_executorch_lowers_a_fused_program(name: str) -> None:
    exir = pytest.importorskip("executorch.exir")
    model, inputs = made(name, torch.float32)
    fused = repfx.fuse(exported(model, inputs))
    edge = exir.to_edge(fused)
    targets = [str(node.target) for node in edge.exported_program().graph.nodes]
    assert not any("batch_norm" in target for target in targets)
    assert sum("convolution" in target for target in targets) == len(convs_of(fused))
    result: Any = edge.exported_program().module()(*inputs)
    for a, b in zip(torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(model(*inputs))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert edge.to_executorch().buffer


@pytest.mark.parametrize("name", ["branches", "linear"])
def test_a_fused_program_is_quantized(name: str) -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizers = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model, inputs = made(name, torch.float32)
    fused = repfx.fuse(exported(model, inputs))
    quantizer = quantizers.X86InductorQuantizer().set_global(quantizers.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(fused.module(), quantizer)
    prepared(*inputs)
    converted: nn.Module = pt2e.convert_pt2e(prepared)
    assert any("dequantize" in str(node.target) for node in converted.graph.nodes)  # type: ignore[union-attr]
    assert not any(norm_call(node) for node in converted.graph.nodes)  # type: ignore[union-attr]
    assert any(conv_call(node) for node in converted.graph.nodes)  # type: ignore[union-attr]
    converted(*inputs)


def test_a_quantized_program_is_left_as_it_is() -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizers = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model, inputs = made("branches", torch.float32)
    quantizer = quantizers.X86InductorQuantizer().set_global(quantizers.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(exported(model, inputs, "module"), quantizer)
    prepared(*inputs)
    converted = pt2e.convert_pt2e(prepared)
    expected = converted(*inputs)
    again = repfx.fuse(converted)
    assert torch.equal(again(*inputs), expected)
