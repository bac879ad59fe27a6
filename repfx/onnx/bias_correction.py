"""Correct the biases of a quantized file, so that rounding moves no channel's mean.

Rounded weights give outputs whose mean over real inputs differs from that of the exact ones, channel by channel. The difference is
constant, so the bias takes it back (Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, 2019,
section 4.2). It is measured on the calibration inputs, from the first layer to the last, each with the layers before it corrected already.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repfx.onnx.file import package
from repfx.onnx.layer_ranges import WeightedLayer, tapped, weighted_layers


def correct_biases(path: Path, quantized: Path, inputs: Sequence[Tensor]) -> tuple[str, ...]:
    """Change the biases in a quantized file, in place.

    Args:
        path: the file in float32 that it was made from.
        inputs: calibration inputs.

    Returns:
        The names of the layers whose biases were changed. A layer without a bias stays as it is.
    """
    onnx = package("onnx")
    exact, rounded = onnx.load(path), onnx.load(quantized)
    biases = _Biases(rounded)
    layers = [layer for layer in weighted_layers(exact) if biases.has(layer)]
    if not layers:
        return ()
    means = _means(exact, [layer.output for layer in layers], inputs)
    for layer, mean in zip(layers, means):
        (given,) = _means(rounded, [biases.output(layer)], inputs)
        biases.add(layer, mean - given)
    onnx.save(rounded, quantized)
    return tuple(layer.name for layer in layers)


def _means(model: Any, names: Sequence[str], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean of each channel of values inside a graph, over all inputs."""
    run = tapped(model, names, whole=False)
    sums = [torch.zeros(()).double()] * len(names)
    counts = [0] * len(names)
    for batch in inputs:
        for place, value in enumerate(run(batch)):
            channels = value.double().movedim(1, 0).flatten(1)
            sums[place] = sums[place] + channels.sum(1)
            counts[place] += channels.shape[1]
    return [each / count for each, count in zip(sums, counts)]


class _Biases:
    """The biases of a quantized model, by the nodes that add them."""

    def __init__(self, model: Any) -> None:
        self._nodes = {node.name: node for node in model.graph.node}
        self._made_by = {output: node for node in model.graph.node for output in node.output}
        self._constants = {each.name: each for each in model.graph.initializer}

    def has(self, layer: WeightedLayer) -> bool:
        """Whether a layer has a bias that is a constant, in integers or floats."""
        node = self._nodes[layer.node]
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.input) < 3 or not node.input[2]:
            return False
        return all(name in self._constants for name in self._tensors(layer))

    def output(self, layer: WeightedLayer) -> str:
        """Name the layer's own output, before any rounding."""
        return str(self._nodes[layer.node].output[0])

    def add(self, layer: WeightedLayer, change: Tensor) -> None:
        """Add a number to each channel of a bias, rounded to its scale."""
        to_array, from_array = package("onnx").numpy_helper.to_array, package("onnx").numpy_helper.from_array
        name, *others = self._tensors(layer)
        held = self._constants[name]
        values = torch.from_numpy(to_array(held).copy())
        if others:
            change = change / torch.from_numpy(to_array(self._constants[others[0]]).copy()).double()
            limits = torch.iinfo(values.dtype)
            changed = (values.double() + change.round()).clamp(limits.min, limits.max)
        else:
            changed = values.double() + change
        held.CopyFrom(from_array(changed.to(values.dtype).numpy(), name))

    def _tensors(self, layer: WeightedLayer) -> list[str]:
        """Name the bias and, if it is in integers, its scale."""
        name = self._nodes[layer.node].input[2]
        node = self._made_by.get(name)
        return [name] if node is None else list(node.input[:2])
