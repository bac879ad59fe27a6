"""The charts of a run's page: accuracy and loss, and the cost of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from repfx.pages.chart import WIDTHS, Line, Panel, chart
from repfx.pages.rendering import svg
from repfx.pages.scale import COUNTS, NUMBERS, SHARES, TIMES
from repfx.training.runs.history import Epoch


def learning_chart(epochs: Sequence[Epoch]) -> list[Any]:
    """Draw accuracy and loss, once for each width in `WIDTHS`. The list is empty if neither is known."""
    accuracy = [_line("accuracy", epochs, "accuracy")]
    averaged = _line("averaged model", epochs, "ema_accuracy", "second")
    if any(value is not None for value in averaged.values):
        accuracy = [_line("model", epochs, "accuracy"), averaged]
    panels = [
        Panel("Accuracy on the test images", tuple(accuracy), SHARES, from_zero=False),
        Panel("Training loss", (_line("loss", epochs, "loss"),), NUMBERS),
    ]
    return all_widths(panels, epochs, "Accuracy and loss over the epochs; the table below has all numbers.")


def cost_chart(epochs: Sequence[Epoch]) -> list[Any]:
    """Draw multiply-adds, parameters and seconds, once for each width in `WIDTHS`. The list is empty if none is known.

    The numbers of epoch 0 are those of the plain model, which isn't trained: they are references, and the curves begin at epoch 1.
    """
    plain = epochs[0] if epochs[0].epoch == 0 and epochs[0].macs else None
    panels = [
        Panel("MACs, one image forward", (_line("MACs", epochs, "macs", stepped=True),), COUNTS),
        Panel("Parameters", (_line("parameters", epochs, "parameters", stepped=True),), COUNTS),
        Panel("Time of an epoch", (_line("time", epochs, "seconds", stepped=True),), TIMES),
    ]
    if plain is not None:
        references = (("plain", float(plain.macs)), ("plain", float(plain.parameters)), None)
        panels = [replace(panel, reference=reference) for panel, reference in zip(panels, references)]
    label = "Multiply-adds, parameters and time over the epochs; the table below has all numbers."
    return all_widths(panels, epochs, label)


def all_widths(panels: Sequence[Panel], epochs: Sequence[Epoch], label: str) -> list[Any]:
    """Draw panels once for each width in `WIDTHS`. The list is empty if no panel has values."""
    if not any(panel.values for panel in panels):
        return []
    return [svg(chart(panels, epochs, label, size)) for size in WIDTHS]


def _line(name: str, epochs: Sequence[Epoch], field: str, style: str = "first", *, stepped: bool = False) -> Line:
    """Return a curve. Stepped ones are costs: epoch 0 has none of its own, and a cost of 0 means that it wasn't measured."""
    values = [
        None if stepped and not (epoch.epoch and getattr(epoch, field)) else getattr(epoch, field) for epoch in epochs
    ]
    return Line(name, tuple(map(finite, values)), style, stepped)


def finite(value: float | None) -> float | None:
    """Return a value that can be drawn; None if there is none."""
    return value if value is not None and math.isfinite(value) else None
