"""The runs of `benchmarks/accuracy.py`: which are missing, how each is done or resumed, and the row that it leaves."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch

import repfx
from benchmarks._accuracy_methods import DEAREST, SCALES, TEACHER, Method, Scale
from benchmarks._accuracy_record import Record, Spent, claimed, locked
from benchmarks._record import machine
from repfx.blocks.architecture import Architecture
from repfx.change.schedule import SCHEDULES
from repfx.data.dataset import DataSource
from repfx.measuring.cost import count_macs
from repfx.records.plain_values import to_plain
from repfx.records.version import VERSION
from repfx.search.base import Search
from repfx.search.random_nets import random_nets
from repfx.training.experiment import Experiment, run
from repfx.training.loop import Watcher
from repfx.training.models import ModelReference
from repfx.training.recipe import Distillation, Recipe
from repfx.training.run_folder import ARCHITECTURE, CHECKPOINT, RunFolder
from repfx.training.runs.history import History
from repfx.training.runs.metrics import Metrics


@dataclass(frozen=True)
class Finished:
    """A training that is done.

    Args:
        experiment: the training, with the folder that it has left.
        metrics: its measurements.
        seconds: of the processor, and of the clock.
    """

    experiment: Experiment
    metrics: Metrics
    seconds: Sequence[float]

    @property
    def folder(self) -> RunFolder:
        """The files of the run."""
        return RunFolder(self.experiment.out)

    @cached_property
    def history(self) -> History:
        """The history of the run, epoch by epoch."""
        history = self.folder.history
        assert history is not None
        return history

    @property
    def macs(self) -> int:
        """Multiply-adds of a forward pass, summed over epochs."""
        return sum(epoch.macs for epoch in self.history.epochs[1:])

    @property
    def architecture(self) -> Architecture | None:
        """The architecture that the run has found or was given; None if it has none."""
        given = self.experiment.spec
        if isinstance(given, str) and given.endswith(".json"):
            return Architecture.load(given)
        return self.folder.architecture

    @property
    def values(self) -> dict[str, Any]:
        """All settings in effect and what was done to the structure, with files by their names alone."""
        setup, training = self.folder.setup, asdict(self.experiment.training)
        if training["distillation"] is not None:
            training["distillation"]["weights"] = Path(training["distillation"]["weights"]).name
        spec = Path(setup.spec).name if str(setup.spec).endswith(".json") else setup.spec
        data = {"name": Path(self.experiment.data.name).name, **to_plain(setup.preprocessing)}
        config = {"model": asdict(setup.model), "data": data, "spec": spec}
        config |= {"schedule": setup.schedule, "training": training}
        actions = [f"{epoch.epoch}: {action}" for epoch in self.history.epochs for action in epoch.actions]
        found = {} if self.architecture is None else {"architecture": _codes(self.architecture)}
        return {"config": config, "actions": actions, **found}


def _codes(architecture: Architecture) -> dict[str, Any]:
    """The code of each site, and the importance of each of its paths, beginning with the site's own conv."""
    return {
        site: {
            "branches": [branch.kind for branch in code.branches],
            "code": code.code,
            "importance": list(code.importance),
        }
        for site, code in architecture.sites.items()
    }


@dataclass(frozen=True)
class Work:
    """The runs of one scale on one data set.

    Args:
        scale: name of the scale.
        data: file of the data.
        record: rows of the runs that are done.
        folder: where runs keep their files. A run that is killed resumes from these.
    """

    scale: str
    data: Path
    record: Record
    folder: Path

    @property
    def setting(self) -> Scale:
        """The net, its training and the methods."""
        return SCALES[self.scale]

    def path(self, name: str, seed: int, suffix: str = "") -> Path:
        """The place of a run's folder, or of a file beside it."""
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}{suffix}"

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """Do what is left of a run: train, fuse, export and test. Return the row for the file."""
        method, own = self.setting.methods[name], self.finish(name, seed)
        search = None if method.found_by is None else self.finish(method.found_by, seed)
        stages, images, metrics = [*([search] if search else []), own], _count(own.experiment.data), own.metrics
        taught = _macs(self.setting.teacher) * own.experiment.training.epochs if method.distilled else 0
        return {
            "scale": self.scale,
            "method": name,
            "seed": seed,
            "data": self.data.stem,
            "images": images,
            "accuracy": metrics.accuracy,
            "flips": metrics.flips,
            "test_images": metrics.test_images,
            # a step costs three forward passes, and one of the teacher
            "training_macs": images * (3 * sum(stage.macs for stage in stages) + taught),
            "seconds": sum(stage.seconds[1] for stage in stages),
            "cpu_seconds": sum(stage.seconds[0] for stage in stages),
            "epochs": [epoch.accuracy for stage in stages for epoch in stage.history.epochs],
            **own.values,
            **({"search": search.values} if search else {}),
            "repfx": VERSION,
            **machine("cuda" if torch.cuda.is_available() else "cpu"),  # the device of a recipe that names none
        }

    def finish(self, name: str, seed: int) -> Finished:
        """Return a training that is done. If it isn't, do what is left of it, or wait for the process that is at it."""
        experiment = self.experiment(name, seed)
        with locked(self.path(name, seed, ".lock")):
            spent = Spent(self.path(name, seed, ".seconds"))
            try:
                metrics = run(experiment, Watcher(on_epoch=lambda history: spent.write()))
            finally:
                spent.write()
        assert metrics is not None
        return Finished(experiment, metrics, spent.seconds)

    def experiment(self, name: str, seed: int) -> Experiment:
        """Return the training of a run. What it needs of other runs is finished first."""
        setting, method = self.setting, self.setting.methods[name]
        net = setting.teacher if name == TEACHER else setting.net
        data = DataSource(str(_part(self.data, setting.images, self.folder)))
        spec, training = self._spec(method, name, seed), self._training(method, seed)
        out = self.path(name, seed)
        return Experiment(net, data, spec, self._schedule(method), training, out=out, resume=True)

    def _spec(self, method: Method, name: str, seed: int) -> Any:
        if method.found_by is not None:
            return str(self.finish(method.found_by, seed).folder.path / ARCHITECTURE)
        if method.drawn is not None:
            file = self.path(name, seed, ".json")
            draw(self.setting.net, method.drawn, seed).save(file)
            return str(file)
        return method.spec

    def _schedule(self, method: Method) -> Mapping[str, Any] | None:
        schedule = method.schedule
        if schedule is not None and issubclass(SCHEDULES[schedule["name"]], Search):
            return {"learning_rate": self.setting.gate_rate, **schedule}
        return schedule

    def _training(self, method: Method, seed: int) -> Recipe:
        recipe, distillation = self.setting.training, None
        if method.distilled:
            weights = self.finish(TEACHER, 0).folder.path / CHECKPOINT
            distillation = Distillation(self.setting.teacher, str(weights), 0.9, 10.0)
        epochs = max(1, round(self._length(method, seed) * recipe.epochs))
        return replace(recipe, seed=seed, epochs=epochs, clip=method.clip, distillation=distillation)

    def _length(self, method: Method, seed: int) -> float:
        if isinstance(method.length, float):
            return method.length
        if method.length == DEAREST:
            return self.record.dearest(self.scale, seed)
        own = _macs(self.setting.net, method.spec) * self.setting.training.epochs
        return self.finish(method.length, seed).macs / own


def measure(work: Work, names: Sequence[str], seeds: Sequence[int] | None) -> None:
    """Do all runs that the record lacks, except those that another process is at."""
    for seed, name in runs_of(work.setting, names, seeds):
        with claimed(work.path(name, seed, ".claim")) as ours:
            record = Record.at(work.record.file)
            if ours and not record.has(work.scale, name, seed) and not _too_early(work, record, name, seed, names):
                row = replace(work, record=record).row(name, seed)
                record.add(row)
                print(f"{name}, seed {seed}: {row['accuracy']['fused']:.2%} in {row['seconds']:.0f} s", flush=True)


def runs_of(setting: Scale, names: Sequence[str], seeds: Sequence[int] | None) -> list[tuple[int, str]]:
    """Return the runs in their order: all methods with the first seed, then all with the next. None takes each method's own seeds."""
    methods = {name: method for name, method in setting.methods.items() if name in names and method.listed}
    every = range(max((method.seeds for method in methods.values()), default=0)) if seeds is None else seeds
    return [
        (seed, name) for seed in every for name, method in methods.items() if seeds is not None or seed < method.seeds
    ]


def _too_early(work: Work, record: Record, name: str, seed: int, names: Sequence[str]) -> bool:
    """Whether the most expensive method isn't known yet, because others of this seed aren't done, and this run needs it."""
    others = [other for other in work.setting.listed if other in names and other != name]
    needs = work.setting.methods[name].length == DEAREST
    return needs and not all(record.has(work.scale, other, seed) for other in others)


def draw(net: ModelReference, share: float, seed: int) -> Architecture:
    """Draw an architecture of RepNAS's space at random: that share of all paths, and at least one at each site."""
    return random_nets(net.build(), share, 1, seed=seed)[0]


def _macs(net: ModelReference, spec: Any = ()) -> int:
    """Multiply-adds for an image of 32 × 32, with the branches of a spec."""
    plain = net.build()
    return count_macs(repfx.expand(plain, spec, preserve=False) if spec else plain, torch.zeros(1, 3, 32, 32))


def _count(data: DataSource) -> int:
    with numpy.load(data.name) as arrays:
        return len(arrays["y_train"])


def _part(data: Path, images: int | None, folder: Path) -> Path:
    """The data with `images` training images, in which each class keeps its share."""
    if images is None:
        return data
    part = folder / "data" / data.name
    if part.is_file():
        return part
    part.parent.mkdir(exist_ok=True)
    with numpy.load(data) as arrays:
        found = dict(arrays)
    chosen = numpy.random.default_rng(0).permutation(len(found["y_train"]))[:images]
    found |= {name: found[name][chosen] for name in ("x_train", "y_train")}
    staged = part.with_name(f"{os.getpid()}-{data.name}")
    numpy.savez(staged, **found)
    staged.replace(part)
    return part
