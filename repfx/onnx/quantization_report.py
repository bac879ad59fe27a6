"""What quantizing a file to 8 bits has given, as values."""

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
    """Of a classifier on labelled images, before and after quantization.

    Args:
        images: how many there were.
        float32: of the file before.
        int8: of the quantized file, computed as it says.
        flips: images whose predicted class that changes.
        int8_here: of the quantized file by the kernels that onnxruntime has for this machine.
        flips_here: images whose predicted class differs from the one in float32 then.
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
    """What `quantize_onnx` wrote.

    Args:
        path: the file.
        method: how the ranges of activations were chosen.
        per_channel: whether each output channel of a weight has its own scale.
        reduce_range: whether weights have 7 bits.
        images: how many inputs the ranges were measured on.
        size_before: bytes of the file in float32.
        size: bytes of the file.
        layers: the convs and linear layers in order.
        bound: decibels that `weak` is about.
        kernel_error: how far the outputs by onnxruntime's kernels for this machine are from what the file says, on the inputs of calibrate:
            the root of Σ (a - b)² / Σ a².
        accuracy: on labelled data, where there was some.
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

    @property
    def weak(self) -> LayerRanges | None:
        """The first layer whose outputs stand less than `bound` above the noise that rounding has put in up to there."""
        return next((layer for layer in self.layers if layer.output_sqnr < self.bound), None)

    @property
    def overflows(self) -> bool:
        """Whether the kernels of this machine give something else than the file says; rounding alone stays below 2 %."""
        return self.kernel_error > _OVERFLOW

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; None for a ratio without noise."""
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
        if self.accuracy:
            lines.append(f"  gives   {self.accuracy}")
        if self.weak:
            lines.append(f"  first layer below {self.bound:g} dB: {self.weak.name}")
        if self.overflows:
            lines.append(f"  {OVERFLOW.format(self.kernel_error)}")
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
