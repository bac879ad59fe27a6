"""`gradient_chart`: mean |gradient| of the sites' own convs and of their branches over the epochs (RepAn, figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from repfx.blocks.block import ORIGIN
from repfx.pages.chart import WIDTHS, Line, Panel, chart, style_of
from repfx.pages.pictures.picture import Key, Picture
from repfx.pages.run_charts import finite
from repfx.pages.scale import NUMBERS
from repfx.training.runs.history import Epoch


def gradient_lines(epochs: Sequence[Epoch]) -> dict[str, tuple[float | None, ...]]:
    """Return the mean over all sites for each path, epoch by epoch: the sites' own convs first, then each branch by name."""
    names = dict.fromkeys((ORIGIN, *(name for epoch in epochs for own in epoch.gradients.values() for name in own)))
    found = {}
    for name in names:
        values = [[own[name] for own in epoch.gradients.values() if name in own] for epoch in epochs]
        found["own convs" if name == ORIGIN else name] = tuple(finite(fmean(each)) if each else None for each in values)
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def gradient_chart(epochs: Sequence[Epoch]) -> Picture | None:
    """Draw the gradients; None if the run recorded none."""
    lines = [Line(name, values, style_of(place)) for place, (name, values) in enumerate(gradient_lines(epochs).items())]
    if not lines:
        return None
    panel = Panel("Mean |gradient| of a weight", tuple(lines), NUMBERS, named=False)
    drawings = tuple(chart([panel], epochs, "Mean gradients of the paths over the epochs.", size) for size in WIDTHS)
    note = "Each line is the mean over all sites that have the path, of the mean over its weights and over the epoch's steps."
    keys = tuple(Key(line.name, line.style) for line in lines)
    return Picture("gradients", "Gradients of own convs and branches", note, drawings, keys)
