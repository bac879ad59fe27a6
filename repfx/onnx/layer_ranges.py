"""Effects of quantization on a net, layer by layer: the ranges of weights and activations, and the noise that rounding adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repfx.errors import InvalidInput
from repfx.onnx.file import open_session, package

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SHARE = 0.999
_BINS = 4096


@dataclass(frozen=True)
class LayerRanges:
    """A conv or linear layer of a quantized file, compared with the same layer in float32 on the same inputs.

    SQNR is the ratio of signal to quantization noise, 10 log₁₀ Σ a² / Σ (a - b)², in decibels. The quantized file is computed as it
    says, not by the kernels of a particular machine.

    Args:
        name: the layer's path in the model, or the name of its node if the file has no such path.
        operator: ONNX's name for the operator.
        weight_range: the largest absolute value of a weight.
        channel_spread: `weight_range` divided by the weight range of the median output channel.
        low: the smallest number that the layer outputs, after a ReLU if one follows at once.
        high: the largest number that the layer outputs, at the same place.
        share: the part of the way from low to high that holds 99.9 % of these numbers; 0.05 % are left out at either end.
        weight_sqnr: SQNR of the weights alone.
        range_sqnr: SQNR of the range alone: exact outputs against the same outputs, rounded by the scale that the file has for them.
        output_sqnr: SQNR of the layer's outputs, with the noise of the layers before it.
        quantized: whether the file holds the weights as integers.
    """

    name: str
    operator: str
    weight_range: float
    channel_spread: float
    low: float
    high: float
    share: float
    weight_sqnr: float
    range_sqnr: float
    output_sqnr: float
    quantized: bool

    def __str__(self) -> str:
        return (
            f"{self.name}: outputs {self.output_sqnr:.1f} dB above the noise, weights {self.weight_sqnr:.1f} dB; "
            f"weights to {self.weight_range:.3g} ({self.channel_spread:.1f} times the median channel's), "
            f"outputs {self.low:.3g} to {self.high:.3g}, 99.9 % of them in {self.share:.0%} of that"
        )


@dataclass(frozen=True)
class WeightedLayer:
    """A node of an ONNX graph with constant weights; `axis` is the axis of `weight` that holds the output channels."""

    name: str
    node: str
    operator: str
    weight: Tensor
    axis: int
    output: str


def weighted_layers(model: Any) -> list[WeightedLayer]:
    """Return the convs and linear layers of an ONNX model that have constant weights, in order."""
    to_array = package("onnx").numpy_helper.to_array
    constants = {each.name: each for each in model.graph.initializer}
    return [
        WeightedLayer(
            name=node.input[1].removesuffix(".weight") if node.input[1].endswith(".weight") else node.name,
            node=node.name,
            operator=node.op_type,
            weight=torch.from_numpy(to_array(constants[node.input[1]]).copy()),
            axis=_channel_axis(node),
            output=node.output[0],
        )
        for node in model.graph.node
        if node.op_type in LAYERS and node.input[1] in constants
    ]


def measure_layers(path: Path, quantized: Path, inputs: Sequence[Tensor]) -> tuple[LayerRanges, ...]:
    """Run both files on the same inputs and compare them layer by layer.

    Raises:
        InvalidInput: a layer outputs numbers that are not finite.
    """
    onnx = package("onnx")
    exact, rounded = onnx.load(path), onnx.load(quantized)
    layers = weighted_layers(exact)
    twins = _Twins(rounded)
    pairs = [twins.outputs(layer, exact) for layer in layers]
    float_run, int8_run = (
        tapped(model, [pair[which] for pair in pairs]) for which, model in enumerate((exact, rounded))
    )
    outputs = [_Output(twins.steps(pair[1])) for pair in pairs]
    for batch in inputs:
        for layer, output, value in zip(layers, outputs, float_run(batch)):
            if not value.isfinite().all():
                raise InvalidInput(f"{layer.name!r} outputs numbers that are not finite for an input of calibrate.")
            output.widen(value)
    for batch in inputs:
        for output, value, other in zip(outputs, float_run(batch), int8_run(batch)):
            output.compare(value, other)
    return tuple(_ranges(layer, twins.weight(layer), output) for layer, output in zip(layers, outputs))


@dataclass(frozen=True)
class _Steps:
    """The numbers that a quantized tensor can hold: `scale` times an integer from `low` to `high` less `zero`."""

    scale: float
    zero: int
    low: int
    high: int

    def rounded(self, value: Tensor) -> Tensor:
        """Return values as the tensor can hold them."""
        return ((value / self.scale).round() + self.zero).clamp(self.low, self.high).sub(self.zero) * self.scale


class _Output:
    """Statistics of one layer's outputs, gathered batch by batch: first their range, then their distribution in it and their noise."""

    def __init__(self, steps: _Steps | None) -> None:
        self.low, self.high = math.inf, -math.inf
        self.signal, self.noise, self.noise_of_range = 0.0, 0.0, 0.0
        self._steps = steps
        self._counts = torch.zeros(_BINS, dtype=torch.float64, device="cpu")

    def widen(self, value: Tensor) -> None:
        self.low, self.high = min(self.low, float(value.min())), max(self.high, float(value.max()))

    def compare(self, value: Tensor, other: Tensor) -> None:
        value, other = value.double(), other.double()
        self.signal += float(value.square().sum())
        self.noise += float((value - other).square().sum())
        if self._steps is not None:
            self.noise_of_range += float((value - self._steps.rounded(value)).square().sum())
        if self.low < self.high:
            self._counts += torch.histc(value, _BINS, self.low, self.high)

    @property
    def share(self) -> float:
        """The part of the range that holds all but the outermost values."""
        if not self.low < self.high:
            return 1.0
        below = self._counts.cumsum(0) / self._counts.sum()
        edge = (1 - _SHARE) / 2
        first, last = (int((below < part).sum()) for part in (edge, 1 - edge))
        return (last - first + 1) / _BINS


def _ranges(layer: WeightedLayer, rounded: Tensor | None, output: _Output) -> LayerRanges:
    channels = layer.weight.abs().movedim(layer.axis, 0).flatten(1).amax(1)
    largest, median = float(channels.max()), float(channels.median())
    weight = layer.weight.double()
    noise = 0.0 if rounded is None else float((weight - rounded).square().sum())
    return LayerRanges(
        name=layer.name,
        operator=layer.operator,
        weight_range=largest,
        channel_spread=largest / median if median else math.inf,
        low=output.low,
        high=output.high,
        share=output.share,
        weight_sqnr=_decibels(float(weight.square().sum()), noise),
        range_sqnr=_decibels(output.signal, output.noise_of_range),
        output_sqnr=_decibels(output.signal, output.noise),
        quantized=rounded is not None,
    )


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


class _Twins:
    """Layers of a quantized model, found by the names of their nodes, which quantization keeps."""

    def __init__(self, model: Any) -> None:
        self._nodes = {node.name: node for node in model.graph.node}
        self._made_by = {output: node for node in model.graph.node for output in node.output}
        self._constants = {each.name: each for each in model.graph.initializer}
        back = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        self._rounded = {
            node.input[0]: back[node.output[0]]
            for node in model.graph.node
            if node.op_type == "QuantizeLinear" and node.output[0] in back
        }

    def outputs(self, layer: WeightedLayer, exact: Any) -> tuple[str, str]:
        """Name the layer's output in both models: after a ReLU if quantization has merged that ReLU into the layer's range."""
        output = self._nodes[layer.node].output[0]
        known = {name for node in exact.graph.node for name in node.output}
        return (output if output in known else layer.output), self._rounded.get(output, output)

    def steps(self, output: str) -> _Steps | None:
        """Return the steps by which a value is rounded; None if it isn't, or has several scales."""
        node = self._made_by[output]
        if node.op_type != "DequantizeLinear":
            return None
        scale, zero = (package("onnx").numpy_helper.to_array(self._constants[name]) for name in node.input[1:3])
        if scale.size != 1:
            return None
        limits = torch.iinfo(torch.from_numpy(zero.copy()).dtype)
        return _Steps(float(scale), int(zero), limits.min, limits.max)

    def weight(self, layer: WeightedLayer) -> Tensor | None:
        """Return a layer's weight as the file rounds it; None if the file doesn't hold it as integers."""
        node = self._made_by.get(self._nodes[layer.node].input[1])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        integers, scale, zero = (self._constant(name) for name in node.input)
        axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
        shape = [-1 if place == axis and scale.numel() > 1 else 1 for place in range(integers.dim())]
        return (integers - zero.reshape(shape)) * scale.reshape(shape)

    def _constant(self, name: str) -> Tensor:
        return torch.from_numpy(package("onnx").numpy_helper.to_array(self._constants[name]).copy()).double()


def _channel_axis(node: Any) -> int:
    if node.op_type == "Conv":
        return 0
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return 0 if transposed else 1


def tapped(model: Any, names: Sequence[str], *, whole: bool = True) -> Any:
    """Return a function that runs a model on a batch and returns its values at `names`, which may lie inside the graph.

    Args:
        whole: whether the nodes run, too, that these values don't depend on.
    """
    onnx = package("onnx")
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    there = {value.name for value in tapped.graph.output}
    tapped.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in dict.fromkeys(names)
        if name not in there
    )
    session = open_session(tapped.SerializeToString(), optimized=False)  # as the file says, on every machine
    taken = session.get_inputs()[0].name
    options = package("onnxruntime").RunOptions()
    options.only_execute_path_to_fetches = not whole
    return lambda x: [torch.from_numpy(each) for each in session.run(list(names), {taken: x.numpy()}, options)]
