"""The plain model's run, with which a run is compared: whether branches helped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from repfx.blocks.paths import outermost_blocks
from repfx.errors import InvalidInput
from repfx.records.number_text import percent, plural
from repfx.records.plain_values import flat
from repfx.training.recipe import with_defaults
from repfx.training.run_folder import BASELINE, RunFolder
from repfx.training.runs.metrics import Baseline, Metrics

PLAIN = "plain"  # for a plain model that is trained beside the other one
_SAME = ("model", "data.name", "data.options", "data.crop", "image_size")


def folder_of(baseline: str, out: Path) -> RunFolder:
    """Return the folder of the plain model's run: the one that is named, or a folder in `out`."""
    return RunFolder(out / BASELINE if baseline == PLAIN else Path(baseline))


def require_comparable(values: Mapping[str, Any], baseline: str) -> None:
    """Raise unless a run can be compared with a baseline.

    Args:
        values: values of the run's recipe.
        baseline: `plain`, or the folder of a finished run.

    Raises:
        InvalidInput: the run is of the plain model itself, the folder holds no finished run of the same plain model on the same data, or
            several processes would have to train two models.
    """
    if values.get("spec") == [] and "schedule" not in values:
        raise InvalidInput(
            "the model is trained plain, so there is nothing to compare it with: leave the baseline out."
        )
    if baseline == PLAIN:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InvalidInput(
                "several processes train one model: train the plain one in a run of its own, and give its folder as the baseline."
            )
        return
    folder = RunFolder(Path(baseline))
    if folder.recipe is None:
        raise InvalidInput(f"the baseline must be {PLAIN!r} or the folder of a run, and {baseline!r} holds none.")
    found = with_defaults(folder.recipe)
    metrics = folder.metrics
    if metrics is None:
        raise folder.unfinished()
    if found.get("spec") != [] or "schedule" in found:
        raise InvalidInput(f"the run in {baseline!r} isn't of a plain model: train one with --spec '[]'.")
    _require_plain(Metrics.from_dict(metrics), folder)
    differing = [key for key in _differing(values, found) if key.startswith(_SAME)]
    if differing:
        theirs, ours = (flat(each).get(differing[0]) for each in (found, values))
        raise InvalidInput(
            f"the run in {baseline!r} can't be compared: its {differing[0]} is {theirs!r}, and here it is {ours!r}."
        )


def with_baseline(metrics: Metrics, values: Mapping[str, Any], folder: RunFolder) -> Metrics:
    """Return the metrics of a run beside those of the plain model's run in a folder.

    Raises:
        InvalidInput: the two were tested on different numbers of images, or the other run's model had branches.
    """
    plain = Metrics.from_dict(folder.metrics or {})
    _require_plain(plain, folder)
    if plain.test_images != metrics.test_images:
        counts = f"{plain.test_images} images, and this one on {metrics.test_images}"
        raise InvalidInput(f"the run in {str(folder.path)!r} can't be compared: it was tested on {counts}.")
    differing = [
        key for key in _differing(values, with_defaults(folder.recipe or {})) if key.startswith(("training", "weights"))
    ]
    known = {PLAIN: plain.top5["fused"]} if "fused" in plain.top5 else {}
    return replace(
        metrics,
        accuracy={**metrics.accuracy, PLAIN: plain.accuracy["fused"]},
        top5={**metrics.top5, **known},
        baseline=Baseline(str(folder.path), tuple(differing)),
    )


def require_plain_beginning(first: nn.Module, weights: Path) -> None:
    """Raise if the model that a run and its plain model begin from has branches, which the plain one would be trained with, too."""
    if next(outermost_blocks(first), None) is not None:
        raise InvalidInput(
            f"the weights in {str(weights)!r} have branches, and a plain model can't begin from them: give weights of a plain model, "
            "or the folder of a plain model's run as the baseline."
        )


def _require_plain(metrics: Metrics, folder: RunFolder) -> None:
    """Raise if the model of a run had more parameters in training than the plain one, because its weights brought branches."""
    if metrics.cost["expanded"].parameters > metrics.cost["plain"].parameters:
        raise InvalidInput(
            f"the run in {str(folder.path)!r} isn't of a plain model: the weights that it began from have branches."
        )


def verdict(metrics: Metrics) -> str | None:
    """Return a sentence on what the branches have brought; None without a baseline."""
    if metrics.baseline is None:
        return None
    ours, plain = metrics.accuracy["fused"], metrics.accuracy[PLAIN]
    images = round((ours - plain) * metrics.test_images)
    alike = (
        f"trained otherwise ({', '.join(metrics.baseline.differing)})"
        if metrics.baseline.differing
        else "trained alike"
    )
    many = plural(abs(images), f"{'more' if images > 0 else 'fewer'} test image")
    right = f"gets {many} right than" if images else "gets as many test images right as"
    return (
        f"With branches, the fused model {right} the plain model, {alike}: {points(ours - plain)} on {percent(plain)}. "
        "This is one run of each."
    )


def points(difference: float) -> str:
    """Return a difference of two shares in percentage points.

    >>> points(0.0113), points(-0.5), points(0)
    ('+1.13 points', '-50.00 points', '+0.00 points')
    """
    return f"{100 * difference:+.2f} points"


def _differing(values: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    ours, theirs = flat(values), flat(found)
    unimportant = ("training.device", "training.workers", "training.log_with")
    return [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key) and key not in unimportant]
