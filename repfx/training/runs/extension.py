"""More epochs for a run than it was begun with."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from repfx.change.schedule import SCHEDULES, Schedule
from repfx.errors import InvalidInput
from repfx.training.recipe import Recipe, with_defaults
from repfx.training.recipe_file import to_toml
from repfx.training.run_folder import HISTORY, STATE, RunFolder
from repfx.training.runs.best import is_over

LENGTH = ("epochs", "patience")  # the keys of a training that a run may change when it goes on


def goes_on(recipe: Recipe, folder: RunFolder) -> bool:
    """Tell whether a finished run is asked for more epochs than it has.

    Raises:
        InvalidInput: it is, and can't be continued.
    """
    begun = _training(folder)
    if all(begun[name] == getattr(recipe, name) for name in LENGTH):
        return False
    where, history = f"the run in {str(folder.path)!r} is finished", folder.history
    if history is None or not (folder.path / STATE).is_file():
        raise InvalidInput(f"{where} and has no {STATE} or {HISTORY} to go on from: replace it with --overwrite.")
    name = (folder.setup.schedule or {}).get("name", "")
    if name in SCHEDULES and SCHEDULES[name].closes_paths:
        raise InvalidInput(f"{where}, and the search {name} has closed with it: replace it with --overwrite.")
    over = is_over(history, recipe.patience)
    if over and recipe.epochs > begun["epochs"]:
        raise InvalidInput(
            f"{where}, because its patience of {recipe.patience} epochs ran out: give more --patience, or 0."
        )
    return history.epochs[-1].epoch < recipe.epochs and not over


def require_no_fewer(recipe: Recipe, folder: RunFolder) -> None:
    """Raise if a run is to have fewer epochs than it was begun with."""
    begun = recipe.epochs if folder.recipe is None else _training(folder)["epochs"]
    if recipe.epochs < begun:
        raise InvalidInput(
            f"the run in {str(folder.path)!r} was begun with {begun} epochs, and now there are {recipe.epochs}: "
            "a run that goes on may have more epochs, not fewer."
        )


def recipe_going_on(recipe: Recipe, folder: RunFolder) -> str | None:
    """Return the text of the run's recipe with the new number of epochs and the new patience; None if neither changes."""
    values = folder.recipe
    lengths = {name: getattr(recipe, name) for name in LENGTH}
    if values is None or all(_training(folder)[name] == value for name, value in lengths.items()):
        return None
    return to_toml({**values, "training": {**values.get("training", {}), **lengths}})


def as_begun(schedule: Schedule, folder: RunFolder) -> Schedule:
    """Return the schedule that a run was begun with, which holds for more epochs, too.

    Args:
        schedule: the schedule that a new run of as many epochs would have.
    """
    begun = dict(folder.setup.schedule or {})
    if begun.pop("name", None) != schedule.name:
        return schedule
    now = json.loads(json.dumps(asdict(schedule)))
    changed = {name: value for name, value in begun.items() if now.get(name) != value}
    return replace(schedule, **changed)


def _training(folder: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = with_defaults(folder.recipe or {})["training"]
    return found
