"""`write_sweep_page`: one HTML page about a sweep, with accuracy over the options and over the cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from repfx.pages.chart import WIDTHS, style_of
from repfx.pages.compared_runs import ComparedRun, measures_of
from repfx.pages.comparison_chart import comparison_chart
from repfx.pages.comparison_page import MOST
from repfx.pages.rendering import svg, write_page
from repfx.pages.run_page import is_run
from repfx.pages.sweep_chart import Axis, Dot, Series, accuracy_chart, axis_of_counts, axis_of_option, places_of
from repfx.records.number_text import duration, engineering, percent
from repfx.training.recipe_file import to_toml
from repfx.training.run_folder import REPORT, RunFolder
from repfx.training.sweep import Row, Sweep, rows_of, short_keys, text_of


def write_sweep_page(folder: Path, out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a sweep, as far as it is. No model is built.

    Args:
        folder: the folder of the sweep.
        out: the HTML file to write, by default ``report.html`` in the folder.

    Returns:
        The path of the page.

    Raises:
        InvalidInput: the folder holds no sweep, one of its files is malformed, jinja2 is missing, or the page can't be written.
        OSError: a file can't be read.
    """
    sweep = Sweep.read(folder)
    rows, names = rows_of(sweep, folder), short_keys(sweep.keys)
    begun = [point for point in sweep.points if is_run(RunFolder(folder / point.folder))]
    runs = [ComparedRun.read(folder / point.folder, point.folder, place) for place, point in enumerate(begun)]
    measures = measures_of(runs)
    target = folder / REPORT if out is None else Path(out)
    write_page(
        "sweep.html",
        target,
        name=folder.resolve().name,
        keys=[names[key] for key in sweep.keys],
        rows=[_texts(row, sweep.keys) for row in rows],
        charts=charts_of(sweep.keys, rows),
        failed=[point for point in sweep.points if point.problem is not None],
        missing=len(sweep.points) - len(begun),
        runs=runs,
        measures=measures,
        groups=[(name, len(list(group))) for name, group in groupby(measures, lambda measure: measure.name)],
        learning=comparison_chart(runs) if 1 < len(runs) <= MOST else [],
        recipe=to_toml(sweep.recipe),
    )
    return target


def charts_of(keys: Sequence[str], rows: Sequence[Row]) -> list[tuple[str, list[Series], list[Any]]]:
    """Draw accuracy over each option that has several values, and over the multiply-adds of training.

    Returns:
        Title, series and pictures of each chart, one picture for each width in `WIDTHS`.
    """
    tested, names = [row for row in rows if row.results], short_keys(keys)
    found = []
    for key in keys:
        values = list({text_of(row.values[key]): row.values[key] for row in tested}.values())
        if len(values) > 1:
            places = dict(zip(map(text_of, values), places_of(values)))
            series = _series(tested, [other for other in keys if other != key], places, key)
            found.append(_chart(names[key], axis_of_option(names[key], values), series))
    costs = {row.mean("macs") for row in tested} - {None}
    if len(costs) > 1:
        title = "MACs of training, one image forward, mean over the epochs"
        axis = axis_of_counts(title, [cost for cost in costs if cost is not None])
        found.append(_chart("MACs of training", axis, _series_of_costs(tested, keys)))
    return found


def _series(rows: Sequence[Row], others: Sequence[str], places: dict[str, float], key: str) -> list[Series]:
    """Return a series for each choice of the other options' values."""
    names = short_keys([key, *others])
    groups: dict[str, list[Dot]] = {}
    for row in rows:
        name = ", ".join(f"{names[other]} = {text_of(row.values[other])}" for other in others)
        text = text_of(row.values[key])
        groups.setdefault(name, []).append(Dot(places[text], f"{names[key]} = {text}", tuple(row.accuracies)))
    return [Series(name, style_of(place), tuple(dots)) for place, (name, dots) in enumerate(groups.items())]


def _series_of_costs(rows: Sequence[Row], keys: Sequence[str]) -> list[Series]:
    """Return one series, whose dots are the rows that have a cost."""
    names = short_keys(keys)
    dots = []
    for row in rows:
        cost = row.mean("macs")
        if cost is not None:
            told = ", ".join(f"{names[key]} = {text_of(row.values[key])}" for key in keys)
            dots.append(Dot(cost, f"{told}: {engineering(cost)} MACs", tuple(row.accuracies)))
    return [Series("", style_of(0), tuple(dots), joined=False)]


def _chart(title: str, axis: Axis, series: list[Series]) -> tuple[str, list[Series], list[Any]]:
    label = f"Accuracy over {title}; the table above has all numbers."
    return title, series, [svg(accuracy_chart(axis, series, label, size)) for size in WIDTHS]


def _texts(row: Row, keys: Sequence[str]) -> dict[str, Any]:
    accuracy, macs, fused, seconds = map(row.mean, ("accuracy", "macs", "fused_macs", "seconds"))
    return {
        "chosen": [text_of(row.values[key]) for key in keys],
        "runs": str(row.runs) if row.runs == len(row.results) else f"{len(row.results)} of {row.runs}",
        "accuracy": "–" if accuracy is None else percent(accuracy),
        "deviation": "" if row.deviation is None else percent(row.deviation),
        "macs": "–" if macs is None else engineering(macs),
        "fused_macs": "–" if fused is None else engineering(fused),
        "seconds": "–" if seconds is None else duration(seconds),
    }
