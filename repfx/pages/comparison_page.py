"""`write_comparison_page`: one HTML page that compares several training runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from repfx.errors import InvalidInput
from repfx.pages.compared_runs import ComparedRun, measures_of, recipe_rows, short_names, structure_rows
from repfx.pages.comparison_chart import comparison_chart
from repfx.pages.rendering import write_page

COMPARISON = "comparison.html"
MOST, _FEW_NAMES = 12, 4


def write_comparison_page(paths: Sequence[Path], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page that compares runs, each as far as it is. No model is built.

    Args:
        paths: the folders of two to twelve runs.
        out: the HTML file to write, by default ``comparison.html`` in the current folder.

    Returns:
        The path of the page.

    Raises:
        InvalidInput: there are too few or too many runs, a run is given twice, a folder holds no run, one of its files is malformed,
            jinja2 is missing, or the page can't be written.
        OSError: a file can't be read.
    """
    whole = [path.resolve() for path in paths]
    twice = next((path for place, path in enumerate(paths) if whole[place] in whole[:place]), None)
    if twice is not None:
        raise InvalidInput(f"{str(twice)!r} is given twice: give each run once.")
    if not 2 <= len(paths) <= MOST:
        raise InvalidInput(f"a page compares 2 to {MOST} runs, and {len(paths)} are given.")
    runs = [ComparedRun.read(path, name, place) for place, (path, name) in enumerate(zip(paths, short_names(whole)))]
    measures = measures_of(runs)
    target = Path(COMPARISON if out is None else out)
    write_page(
        "comparison.html",
        target,
        name=", ".join(run.name for run in runs) if len(runs) <= _FEW_NAMES else f"{len(runs)} runs",
        runs=runs,
        measures=measures,
        groups=[(name, len(list(group))) for name, group in groupby(measures, lambda measure: measure.name)],
        learning=comparison_chart(runs),
        recipe_rows=recipe_rows(runs),
        recipes=sum(run.recipe is not None for run in runs),
        structure_rows=structure_rows(runs),
        structures=sum(run.structure is not None for run in runs),
    )
    return target
