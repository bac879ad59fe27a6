"""`comparison_chart`: accuracy and loss of several runs, each in one panel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from repfx.pages.chart import Line, Panel
from repfx.pages.compared_runs import ComparedRun
from repfx.pages.run_charts import all_widths, finite
from repfx.pages.scale import NUMBERS, SHARES
from repfx.training.runs.history import Epoch

_MOST_POINTS = 150  # of a curve; more would make a page of many long runs large, and no screen shows them


def comparison_chart(runs: Sequence[ComparedRun]) -> list[Any]:
    """Draw accuracy and loss of all runs, once for each width. The list is empty if neither is known of any run."""
    numbers = sorted({epoch.epoch for run in runs for epoch in run.epochs})
    accuracy, loss = (
        tuple(Line(run.name, _values(run, field, numbers), run.style) for run in runs) for field in ("accuracy", "loss")
    )
    panels = [
        Panel("Accuracy on the test images", accuracy, SHARES, from_zero=False, named=False),
        Panel("Training loss", loss, NUMBERS, named=False),
    ]
    label = "Accuracy and loss of all runs over the epochs; the table above has the results."
    return all_widths(panels, [Epoch(number) for number in numbers], label)


def _values(run: ComparedRun, field: str, numbers: Sequence[int]) -> tuple[float | None, ...]:
    """Return a value for each epoch. Of a long run, evenly chosen ones are kept, and the last one always."""
    known = {epoch.epoch: value for epoch in run.epochs if (value := finite(getattr(epoch, field))) is not None}
    kept = set(list(known)[:: -max(1, math.ceil(len(known) / _MOST_POINTS))])
    return tuple(known[number] if number in kept else None for number in numbers)
