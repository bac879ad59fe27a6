"""Results of quantizing a file to 8 bits, as values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repfx.onnx.layer_ranges import LayerRanges

_OVERFLOW = 0.05
OVERFLOW = (
    "onnxruntime's kernels for this machine are {:.0%} off what the file says: without VNNI\n"
    "  products are added in 16 bits, which overflow; with 7 bits for weights they don't"
)


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a classifier on labelled images, before and after quantization.

    Args:
        images: number of images.
        float32: accuracy of the file in float32.
        int8: accuracy of the quantized file, computed as it says.
        flips: number of images whose predicted class then differs from the one in float32.
        int8_here: accuracy of the quantized file by the kernels that onnxruntime has for this machine.
        flips_here: number of images whose predicted class by these kernels differs from the one in float32.
    """

    images: int
    float32: float
    int8: float
    flips: int
    int8_here: float
    flips_here: int

    def __str__(self) -> str:
        return (
            f"accuracy {self.int8:.2%}, {self.float32:.2%} in float32; {self.flips} of {self.images} predictions differ "
            f"(on this machine {self.int8_here:.2%} and {self.flips_here})"
        )


@dataclass(frozen=True)
class QuantizationReport:
    """The report of `quantize_onnx` on the file that it wrote.

    Args:
        path: the file.
        method: name of the method that chose the ranges of activations.
        per_channel: whether each output channel of a weight has its own scale.
        reduce_range: whether weights have 7 bits.
        images: number of inputs that the ranges were measured on.
        size_before: bytes of the file in float32.
        size: bytes of the file.
        layers: the convs and linear layers in order.
        bound: decibels above the noise below which `weak` names a layer.
        kernel_error: relative distance of outputs b, by onnxruntime's kernels for this machine, from outputs a of the file computed as it
            says, on the inputs of calibrate: the root of Σ (a - b)² / Σ a².
        accuracy: accuracy on labelled data; None if none was given.
        corrected: names of the layers whose biases were corrected.
    """

    path: Path
    method: str
    per_channel: bool
    reduce_range: bool
    images: int
    size_before: int
    size: int
    layers: tuple[LayerRanges, ...]
    bound: float
    kernel_error: float
    accuracy: Accuracy | None
    corrected: tuple[str, ...] = ()

    @property
    def weak(self) -> LayerRanges | None:
        """The first layer whose outputs are less than `bound` decibels above the noise that rounding has added up to there, or None."""
        return next((layer for layer in self.layers if layer.output_sqnr < self.bound), None)

    @property
    def overflows(self) -> bool:
        """Whether the kernels of this machine compute something else than the file says. Rounding alone stays below 2 %."""
        return self.kernel_error > _OVERFLOW

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. A number that is not finite, such as a ratio without noise, becomes None."""
        layers = [{key: _plain(value) for key, value in vars(layer).items()} for layer in self.layers]
        weak = None if self.weak is None else self.weak.name
        return asdict(self) | {"path": str(self.path), "layers": layers, "weak": weak, "overflows": self.overflows}

    def __str__(self) -> str:
        bits = f"{7 if self.reduce_range else 8} bits and one scale a {'channel' if self.per_channel else 'tensor'}"
        weakest = min(self.layers, key=lambda layer: layer.output_sqnr)
        lines = [
            f"{self.path} ({self.size / 1e6:.2f} MB; {self.size_before / 1e6:.2f} MB in float32)",
            f"  ranges  {self.method} over {self.images} inputs; weights with {bits}",
            f"  weakest {weakest.name}: outputs {weakest.output_sqnr:.1f} dB above the noise, weights {weakest.weight_sqnr:.1f} dB",
        ]
        if self.corrected:
            lines.append(f"  biases  of {len(self.corrected)} layers corrected")
        if self.accuracy:
            lines.append(f"  gives   {self.accuracy}")
        if self.weak:
            lines.append(f"  first layer below {self.bound:g} dB: {self.weak.name}")
        if self.overflows:
            lines.append(f"  {OVERFLOW.format(self.kernel_error)}")
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
