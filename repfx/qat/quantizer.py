"""Where numbers are rounded to 8 bits: the same places as in the files of `quantize_onnx`. Imports torchao.

Activations are unsigned 8-bit integers with one scale for each tensor. Weights are signed 8-bit integers with one scale for each output
channel, and as many steps below zero as above. Both inputs of a sum are rounded, and so are all inputs of a concatenation, so that
kernels for integers can compute them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e import FusedMovingAvgObsFakeQuantize, MovingAveragePerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

_aten = torch.ops.aten
# operators with a weight, and the axis of the weight that holds the output channels
_WEIGHTED = {
    _aten.conv1d.default: 0,
    _aten.conv1d.padding: 0,
    _aten.conv2d.default: 0,
    _aten.conv2d.padding: 0,
    _aten.conv3d.default: 0,
    _aten.conv3d.padding: 0,
    _aten.conv_transpose1d.default: 1,
    _aten.conv_transpose2d.input: 1,
    _aten.conv_transpose3d.input: 1,
    _aten.linear.default: 0,
}
_COMBINING = {
    _aten.add.Tensor,
    _aten.add_.Tensor,
    _aten.mul.Tensor,
    _aten.mul_.Tensor,
    _aten.cat.default,
}
_AVERAGING = {
    _aten.mean.dim,
    _aten.avg_pool1d.default,
    _aten.avg_pool2d.default,
    _aten.adaptive_avg_pool1d.default,
    _aten.adaptive_avg_pool2d.default,
}
# operators that output numbers of their input, so that both have one scale
_MOVING = {
    _aten.max_pool1d.default,
    _aten.max_pool2d.default,
    _aten.flatten.using_ints,
    _aten.view.default,
    _aten.reshape.default,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
    _aten.slice.Tensor,
}
_NORM = {_aten.batch_norm.default}
_CLIPPING = {
    _aten.relu.default,
    _aten.relu_.default,
    _aten.relu6.default,
    _aten.hardtanh.default,
    _aten.hardtanh_.default,
}
_ACTIVATION = QuantizationSpec(
    dtype=torch.uint8,
    observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(),
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
)


class FileQuantizer(Quantizer):  # type: ignore[misc]  # torchao has no types
    """A quantizer for `prepare_qat_pt2e` that rounds where the files of `quantize_onnx` do."""

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Note at each node which of its inputs are rounded, and whether its output is."""
        for node in model.graph.nodes:
            if node.target in _WEIGHTED and node.args[1].op == "get_attr":
                _round(node, {node.args[0]: _ACTIVATION, node.args[1]: _weight(_WEIGHTED[node.target])})
                _round_output(_last_of(node, _NORM, _CLIPPING))
            elif node.target in _COMBINING and all(map(_is_float, node.all_input_nodes)) and _combines(node):
                _round(node, dict.fromkeys(node.all_input_nodes, _ACTIVATION))
                _round_output(_last_of(node, _CLIPPING))
            elif node.target in _AVERAGING:
                _round(node, {node.args[0]: _ACTIVATION})
                _round_output(node)
            elif node.target in _MOVING and _is_rounded(node.args[0]):
                _round(node, {node.args[0]: _ACTIVATION})
                _round_output(node, SharedQuantizationSpec((node.args[0], node)))
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Accept every graph: what isn't noted stays in float32."""


def _weight(axis: int) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0
        ),
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=axis,
    )


def _round(node: fx.Node, inputs: dict[Any, Any]) -> None:
    node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)


def _round_output(node: fx.Node, spec: Any = _ACTIVATION) -> None:
    node.meta.setdefault("quantization_annotation", QuantizationAnnotation(_annotated=True)).output_qspec = spec


def _is_rounded(node: fx.Node) -> bool:
    noted = node.meta.get("quantization_annotation")
    return noted is not None and noted.output_qspec is not None


def _last_of(node: fx.Node, *following: set[Any]) -> fx.Node:
    """Return the last node of those that follow in this order, each the only reader of the one before; a set may be skipped."""
    for targets in following:
        readers = list(node.users)
        if len(readers) == 1 and readers[0].target in targets:
            node = readers[0]
    return node


def _combines(node: fx.Node) -> bool:
    """Whether a node combines two activations or more."""
    return sum(each.op != "get_attr" for each in node.all_input_nodes) > 1


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
