"""`Sweep`: one recipe, trained with several values of its options and several seeds, each run in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from repfx.errors import Interrupted, InvalidInput, first_line
from repfx.records.json_text import parse_json
from repfx.records.plain_values import from_plain, put
from repfx.records.target_file import staged
from repfx.training.experiment import Experiment, first_difference, run, schedule_of
from repfx.training.loop import Watcher
from repfx.training.recipe_file import from_root
from repfx.training.run_folder import METRICS, RunFolder
from repfx.training.runs.metrics import Metrics

SWEEP = "sweep.json"
_FORMAT = 1
_SEED = "training.seed"


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        folder: its folder, inside that of the sweep.
        values: its values of the options that the sweep is over, by key.
        seed: its seed.
        problem: why it failed the last time that it was tried; None if it didn't.
    """

    folder: str
    values: Mapping[str, Any]
    seed: int
    problem: str | None = None

    @property
    def choice(self) -> str:
        """Its values as text, which runs with other seeds share."""
        return text_of(dict(self.values))

    def __str__(self) -> str:
        names = short_keys(list(self.values))
        return ", ".join(
            [*(f"{names[key]} = {text_of(value)}" for key, value in self.values.items()), f"seed {self.seed}"]
        )


@dataclass(frozen=True)
class Sweep:
    """The contents of `sweep.json`.

    Args:
        recipe: the values that all runs share.
        keys: the options that the sweep is over, such as ``training.learning_rate``.
        points: its runs.
    """

    recipe: Mapping[str, Any]
    keys: tuple[str, ...]
    points: tuple[Point, ...]

    @classmethod
    def over(cls, recipe: Mapping[str, Any], options: Mapping[str, Sequence[Any]], seeds: int = 1) -> Sweep:
        """Return the sweep in which each combination of values is trained with several seeds.

        Args:
            recipe: values of a recipe.
            options: values by key.
            seeds: number of seeds, from the recipe's own on.

        Raises:
            InvalidInput: there is nothing to choose from, an option has no values or one of them twice, or a run can't be asked for so.

        >>> [point.folder for point in Sweep.over({}, {"training.learning_rate": [0.1, 0.2]}, seeds=2).points]
        ['learning_rate=0.1/seed=0', 'learning_rate=0.1/seed=1', 'learning_rate=0.2/seed=0', 'learning_rate=0.2/seed=1']
        """
        _require_choice(options, seeds)
        names = short_keys(list(options))
        first = Experiment.of(recipe).training.seed if _SEED not in options else 0
        points = []
        for values in product(*options.values()):
            chosen = dict(zip(options, values))
            parts = [f"{names[key]}={_file_name(value)}" for key, value in chosen.items()]
            for seed in range(first, first + seeds):
                own = chosen.get(_SEED, seed)
                point = Point("/".join([*parts, *([] if _SEED in options else [f"seed={own}"])]), chosen, own)
                points.append(point)
        found = cls(from_root(deepcopy(dict(recipe))), tuple(options), tuple(points))
        for point in points:
            schedule_of(found.experiment(point, Path()))
        return found

    def values(self, point: Point) -> dict[str, Any]:
        """Return the values of the recipe of one run."""
        found = deepcopy(dict(self.recipe))
        for key, value in {_SEED: point.seed, **point.values}.items():
            put(found, key, value)
        return found

    def experiment(self, point: Point, out: Path) -> Experiment:
        """Return the job of one run of the sweep in the folder `out`."""
        return Experiment.of(self.values(point), out=out / point.folder, resume=True)

    def after(self, older: Sweep, out: Path) -> Sweep:
        """Return this sweep with the runs that an older one has in the same folder.

        Raises:
            InvalidInput: the older one is of another recipe or over other options.
        """
        where = f"the sweep in {str(out)!r} was begun"
        if older.keys != self.keys:
            raise InvalidInput(
                f"{where} over {', '.join(older.keys) or 'seeds'}, and now it is over {', '.join(self.keys) or 'seeds'}: "
                "give another --out."
            )
        change = first_difference(self.recipe, older.recipe)
        if change is not None:
            raise InvalidInput(f"{where} with {change}: leave the change out, or give another --out.")
        new = {point.folder: point for point in self.points}
        kept = [point for point in older.points if point.folder not in new]
        return replace(self, points=(*kept, *self.points))

    def write(self, out: Path) -> None:
        """Write the sweep's file into its folder."""
        with staged(out / SWEEP) as (_, staging):
            staging.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, out: Path) -> Sweep:
        """Read the sweep of a folder.

        Raises:
            InvalidInput: `repfx sweep` didn't write the file.
            OSError: there is none.
        """
        path = out / SWEEP
        wrong = InvalidInput(f"{str(path)!r} holds no sweep that `repfx sweep` wrote.")
        try:
            found = parse_json(path.read_text(encoding="utf-8", errors="replace"))
            version = found.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise wrong from error
        if version != _FORMAT:
            raise InvalidInput(f"{str(path)!r} has format {version!r}; this version of repfx reads {_FORMAT}.")
        try:
            sweep = from_plain(cls, found)
        except InvalidInput as error:
            raise wrong from error
        if any(Path(point.folder).is_absolute() or ".." in Path(point.folder).parts for point in sweep.points):
            raise wrong
        return sweep


def run_sweep(
    sweep: Sweep, out: Path, watched: Callable[[], AbstractContextManager[Watcher]] = lambda: nullcontext(Watcher())
) -> Sweep:
    """Train what a sweep asks for and its folder lacks, one run after the other. A run that fails is named, and the others go on.

    Args:
        out: the sweep's folder. Runs that are finished stay as they are, and interrupted ones are continued.
        watched: what is called for each run, for a watcher of it.

    Returns:
        The sweep with all runs that the folder has, and the problems of those that failed.

    Raises:
        InvalidInput: the folder has a sweep of another recipe or over other options, or several processes were started.
        Interrupted: a signal ended a run; the same call continues it.
        OSError: the sweep's file can't be read or written.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InvalidInput("a sweep runs in one process: start each of its runs by `repfx train` in several.")
    asked = {point.folder for point in sweep.points}
    if (out / SWEEP).is_file():
        sweep = sweep.after(Sweep.read(out), out)
    out.mkdir(parents=True, exist_ok=True)
    sweep.write(out)
    todo = [place for place, point in enumerate(sweep.points) if point.folder in asked]
    for number, place in enumerate(todo, start=1):
        point = sweep.points[place]
        about = f"run {number} of {len(todo)}: {point}"
        with watched() as watcher:
            watcher.on_notice(about)
            problem = _tried(sweep.experiment(point, out), about, watcher)
        if problem is not None:
            watcher.on_notice(f"failed: {problem}")
        points = list(sweep.points)
        points[place] = replace(point, problem=problem)
        sweep = replace(sweep, points=tuple(points))
        sweep.write(out)
    return sweep


def _tried(experiment: Experiment, about: str, watcher: Watcher) -> str | None:
    """Train one run; return why it failed, or None."""
    try:
        run(experiment, watcher)
    except Interrupted as error:
        raise Interrupted(f"the sweep was interrupted in {about}. The same command continues it") from error
    except Exception as error:
        # such as a model that can't be built with this value, or memory that is too small for it
        return f"{first_line(error)}."
    return None


@dataclass(frozen=True)
class Result:
    """A finished run of a sweep.

    Args:
        accuracy: that of the fused model.
        macs: multiply-adds of one image forward in training, as a mean over the epochs; None if the run has kept no history.
        fused_macs: those of the fused model.
        seconds: how long the epochs took; None if the run has kept no history.
    """

    accuracy: float
    macs: float | None
    fused_macs: int
    seconds: float | None

    @classmethod
    def of(cls, folder: RunFolder) -> Result | None:
        """Read the result of a run; None until it is finished."""
        found = folder.metrics
        if found is None:
            return None
        try:
            metrics = Metrics.from_dict(found)
            accuracy, fused_macs = metrics.accuracy["fused"], metrics.cost["fused"].macs
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"{str(folder.path / METRICS)!r} holds no metrics that `repfx train` wrote.") from error
        epochs = [] if folder.history is None else [epoch for epoch in folder.history.epochs if epoch.epoch]
        seconds = [epoch.seconds for epoch in epochs if epoch.seconds is not None]
        macs = [epoch.macs for epoch in epochs if epoch.macs]
        return cls(accuracy, fmean(macs) if macs else None, fused_macs, sum(seconds) if seconds else None)


@dataclass(frozen=True)
class Row:
    """All runs with the same values, whatever their seeds.

    Args:
        values: the values of the options that the sweep is over, by key.
        runs: number of its runs.
        results: the results of those that are finished.
    """

    values: Mapping[str, Any]
    runs: int
    results: tuple[Result, ...]

    @property
    def accuracies(self) -> list[float]:
        return [result.accuracy for result in self.results]

    @property
    def deviation(self) -> float | None:
        """The sample deviation of the accuracies; None of fewer than two."""
        return stdev(self.accuracies) if len(self.results) > 1 else None

    def mean(self, field: str) -> float | None:
        """Return the mean of a number over the finished runs; None if none has it."""
        known = [value for result in self.results if (value := getattr(result, field)) is not None]
        return fmean(known) if known else None

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain values, for JSON."""
        means = {field: self.mean(field) for field in ("accuracy", "macs", "fused_macs", "seconds")}
        finished = {"runs": self.runs, "finished": len(self.results), "accuracies": self.accuracies}
        return {"values": dict(self.values), **finished, **means, "deviation": self.deviation}


def rows_of(sweep: Sweep, out: Path) -> list[Row]:
    """Return the results of a sweep, one row for each choice of values.

    Raises:
        InvalidInput: the files of a run are malformed; OSError: they can't be read.
    """
    found: dict[str, list[Point]] = {}
    for point in sweep.points:
        found.setdefault(point.choice, []).append(point)
    return [
        Row(
            points[0].values,
            len(points),
            tuple(result for point in points if (result := Result.of(RunFolder(out / point.folder))) is not None),
        )
        for points in found.values()
    ]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each key, or the whole key where two would have the same name.

    >>> short_keys(["training.epochs", "schedule.budget"]), short_keys(["training.epochs", "schedule.epochs"])["schedule.epochs"]
    ({'training.epochs': 'epochs', 'schedule.budget': 'budget'}, 'schedule.epochs')
    """
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 and name != "seed" else key for key, name in zip(keys, last)}


def text_of(value: Any) -> str:
    """Return a value of an option as text."""
    return value if isinstance(value, str) else json.dumps(value)


def _require_choice(options: Mapping[str, Sequence[Any]], seeds: int) -> None:
    if not options and seeds < 2:
        raise InvalidInput("there is nothing to choose from: give --over KEY=VALUE,VALUE or more --seeds.")
    if _SEED in options and seeds > 1:
        raise InvalidInput(f"{_SEED} is an option of the sweep: leave --seeds out.")
    for key, values in options.items():
        texts = [text_of(value) for value in values]
        twice = next((text for text in texts if texts.count(text) > 1), None)
        if twice is not None:
            raise InvalidInput(f"{key} has the value {twice} twice: give each value once.")
        if not texts:
            raise InvalidInput(f"{key} has no values: give --over {key}=VALUE,VALUE.")


def _file_name(value: Any) -> str:
    """Return the name of a value in a folder's name. What files can't be called after gets a name of its own by a checksum.

    >>> _file_name(0.1), _file_name("dbb"), _file_name(["1x1", "1xk"])
    ('0.1', 'dbb', '1x1-1xk-14cbc4')
    """
    text = text_of(value)
    name = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-.")[:40]
    if name == text:
        return name
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")
