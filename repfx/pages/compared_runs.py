"""`ComparedRun`: a run as far as it is, beside others; and what the runs' tables show side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repfx.pages.changes import Names, structure_after
from repfx.pages.chart import style_of
from repfx.pages.forms import INT8_TITLES, TITLES, Form, forms_of_run, int8_forms
from repfx.pages.run_page import epochs_of, require_run
from repfx.pages.structure_map import sorted_sites
from repfx.records.number_text import duration, engineering, percent
from repfx.records.plain_values import flat
from repfx.training.run_folder import RunFolder
from repfx.training.runs.history import Epoch

_EXPANDED, _FUSED = {"expanded": TITLES["expanded"]}, {"fused": TITLES["fused"]}
_ALL = {"plain": TITLES["plain"], **_EXPANDED, **_FUSED, **INT8_TITLES}
_COLUMNS: tuple[tuple[str, str, Callable[[float], str], Mapping[str, str]], ...] = (
    ("accuracy", "accuracy", percent, _ALL),
    ("MACs", "macs", engineering, {**_EXPANDED, **_FUSED}),
    ("parameters", "parameters", engineering, {**_EXPANDED, **_FUSED}),
    ("latency", "latency", duration, {**_EXPANDED, **_FUSED}),
)


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs that a page compares.

    Args:
        name: what differs in its path from the others'.
        style: the CSS classes by which the page draws its curves.
        finished: whether it has written its metrics.
        epochs: its epochs so far.
        forms: the forms of its model, by name. An unfinished run has its training form, with the last numbers of its history.
        recipe: keys and values of its recipe; None if it has left none.
        structure: branches by site after its last epoch; None if it has kept no history.
    """

    name: str
    style: str
    finished: bool
    epochs: tuple[Epoch, ...]
    forms: Mapping[str, Form]
    recipe: Mapping[str, Any] | None
    structure: Mapping[str, Names] | None

    @property
    def trained(self) -> int:
        """The number of epochs that it has trained."""
        return self.epochs[-1].epoch if self.epochs else 0

    @property
    def seconds(self) -> float | None:
        """How long its epochs took; None if that isn't known."""
        known = [epoch.seconds for epoch in self.epochs if epoch.seconds is not None]
        return sum(known) if known else None

    @classmethod
    def read(cls, path: Path, name: str, place: int) -> ComparedRun:
        """Read the run in a folder.

        Args:
            place: its place among the runs, from 0, which gives it its colour.

        Raises:
            InvalidInput: the folder holds no run, or one of its files is malformed.
        """
        folder = RunFolder(path)
        require_run(folder)
        metrics, history, recipe = folder.metrics, folder.history, folder.recipe
        epochs = epochs_of(history, metrics)
        forms = _forms_so_far(epochs) if metrics is None else {**forms_of_run(metrics), **int8_forms(metrics)}
        structure = None if history is None or not epochs else structure_after(epochs[-1])
        known = None if recipe is None else flat(recipe)
        return cls(name, style_of(place), metrics is not None, epochs, forms, known, structure)


@dataclass(frozen=True)
class Row:
    """One row of a table whose columns are the runs: what it is about, and a text for each run."""

    about: Names
    texts: Names


@dataclass(frozen=True)
class Measure:
    """One column of the table of results: a number of one form, as text for each run, None where it isn't known."""

    name: str
    form: str
    texts: tuple[str | None, ...]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Shorten paths to the parts in which they differ. Each keeps one part at least.

    >>> short_names([Path("runs/a/seed0"), Path("runs/b/seed0")]), short_names([Path("runs/a"), Path("runs/a/baseline")])
    (['a', 'b'], ['a', 'a/baseline'])
    """
    parts = [path.parts for path in paths]
    while min(map(len, parts)) > 1 and len({each[0] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    while min(map(len, parts)) > 1 and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    return ["/".join(each) for each in parts]


def measures_of(runs: Sequence[ComparedRun]) -> list[Measure]:
    """Return the columns of the table of results. Columns in which no run has a number are left out."""
    found = [
        Measure(name, title, tuple(_text(run.forms.get(form), field, write) for run in runs))
        for name, field, write, forms in _COLUMNS
        for form, title in forms.items()
    ]
    times = tuple(None if run.seconds is None else duration(run.seconds) for run in runs)
    return [measure for measure in (*found, Measure("training", "time", times)) if any(measure.texts)]


def recipe_rows(runs: Sequence[ComparedRun]) -> list[Row]:
    """Return the keys in which recipes differ, with their values. Runs that have left no recipe count as equal to all others."""
    known = [run.recipe for run in runs if run.recipe is not None]
    keys = dict.fromkeys(key for recipe in known for key in recipe)
    differing = [key for key in keys if len({_value(recipe, key) for recipe in known}) > 1]
    return [Row((key,), tuple(_value(run.recipe, key) for run in runs)) for key in differing]


def structure_rows(runs: Sequence[ComparedRun]) -> list[Row]:
    """Return the sites with their branches in each run. Sites with the same branches in all runs share a row."""
    found: dict[Names, list[str]] = {}
    for site in sorted_sites(dict.fromkeys(site for run in runs for site in run.structure or ())):
        texts = tuple("?" if run.structure is None else ", ".join(run.structure.get(site, "–")) for run in runs)
        found.setdefault(texts, []).append(site)
    return [Row(tuple(sites), texts) for texts, sites in found.items()]


def _forms_so_far(epochs: Sequence[Epoch]) -> dict[str, Form]:
    trained = [epoch for epoch in epochs if epoch.epoch]
    if not trained:
        return {}
    accuracy = next((epoch.accuracy for epoch in reversed(trained) if epoch.accuracy is not None), None)
    last = trained[-1]
    return {"expanded": Form(TITLES["expanded"], accuracy, parameters=last.parameters or None, macs=last.macs or None)}


def _text(form: Form | None, field: str, write: Callable[[float], str]) -> str | None:
    value = getattr(form, field, None)
    return None if value is None else write(value)


def _value(recipe: Mapping[str, Any] | None, key: str) -> str:
    if recipe is None:
        return "?"
    if key not in recipe:
        return "–"
    value = recipe[key]
    return value if isinstance(value, str) and value else json.dumps(value, default=str, ensure_ascii=False)
