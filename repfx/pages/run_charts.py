"""The charts of a run's page: accuracy and loss, and the cost of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from repfx.pages.chart import WIDTHS, Line, Panel, chart
from repfx.pages.rendering import svg
from repfx.records.number_text import duration, engineering
from repfx.training.history import Epoch


def learning_chart(epochs: Sequence[Epoch]) -> list[Any]:
    """Draw accuracy and loss, once for each width in `WIDTHS`. The list is empty if neither is known."""
    accuracy = [_line("accuracy", epochs, "accuracy")]
    averaged = _line("averaged model", epochs, "ema_accuracy", "second")
    if any(value is not None for value in averaged.values):
        accuracy = [_line("model", epochs, "accuracy"), averaged]
    panels = [
        Panel("Accuracy on the test images", tuple(accuracy), _percent, from_zero=False),
        Panel("Training loss", (_line("loss", epochs, "loss"),), _number),
    ]
    return _all_widths(panels, epochs, "Accuracy and loss over the epochs; the table below has all numbers.")


def cost_chart(epochs: Sequence[Epoch]) -> list[Any]:
    """Draw multiply-adds, parameters and seconds, once for each width in `WIDTHS`. The list is empty if none is known."""
    plain = epochs[0] if epochs[0].epoch == 0 and epochs[0].macs else None
    panels = [
        Panel("MACs, one image forward", (_line("MACs", epochs, "macs", stepped=True),), engineering),
        Panel("Parameters", (_line("parameters", epochs, "parameters", stepped=True),), engineering),
        Panel("Time of an epoch", (_line("time", epochs, "seconds", stepped=True),), duration),
    ]
    if plain is not None:
        references = (("plain", float(plain.macs)), ("plain", float(plain.parameters)), None)
        panels = [
            Panel(panel.title, panel.lines, panel.text, reference=reference)
            for panel, reference in zip(panels, references)
        ]
    label = "Multiply-adds, parameters and time over the epochs; the table below has all numbers."
    return _all_widths(panels, epochs, label)


def _all_widths(panels: Sequence[Panel], epochs: Sequence[Epoch], label: str) -> list[Any]:
    if not any(panel.values for panel in panels):
        return []
    return [svg(chart(panels, epochs, label, size)) for size in WIDTHS]


def _line(name: str, epochs: Sequence[Epoch], field: str, style: str = "first", *, stepped: bool = False) -> Line:
    values = [getattr(epoch, field) for epoch in epochs]
    return Line(name, tuple(value if _is_known(value, stepped) else None for value in values), style, stepped)


def _is_known(value: float | None, stepped: bool) -> bool:
    """Tell whether a value was measured. Stepped lines are costs, and a cost of 0 means that it wasn't measured."""
    return value is not None and math.isfinite(value) and not (stepped and value == 0)


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _number(value: float) -> str:
    return f"{value:.3g}"
