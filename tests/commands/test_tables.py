"""Tables of commands in narrow terminals: each name and each number is there."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from repfx.commands.tables import quantization_table
from repfx.onnx.layer_ranges import LayerRanges
from repfx.onnx.quantization_report import QuantizationReport

RANGES = {"0": (0.0, 6.68), "8": (-9.29, 7.94), "layer1.0.downsample.0": (-0.00123, 0.00456), "qkv": (-1.23e3, 9.99e4)}


@pytest.mark.parametrize("width", [80, 120])
def test_layers_of_8_bits_have_their_names_and_ranges(width: int) -> None:
    layers = tuple(
        LayerRanges(
            name=name,
            operator="Conv",
            quantized=True,
            weight_range=1.9,
            channel_spread=12.4,
            low=low,
            high=high,
            share=0.999,
            weight_sqnr=47.3,
            range_sqnr=45.2,
            output_sqnr=41.7,
        )
        for name, (low, high) in RANGES.items()
    )
    report = QuantizationReport(Path("m.onnx"), "minmax", True, False, 4, 1, 1, layers, 10, 0, None)
    out = StringIO()
    Console(file=out, width=width).print(quantization_table(report))
    text = out.getvalue()
    assert "…" not in text
    assert all(f"{number:.3g}" in text for pair in RANGES.values() for number in pair)
    names = "".join(line[: line.find("  ", 1)].strip() for line in text.splitlines()[4:])
    assert all(name in names for name in RANGES)
