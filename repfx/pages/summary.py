"""Facts about a run for the top of its page, and the figures that sum up its sections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from repfx.pages.changes import Changes, count_of
from repfx.pages.forms import Form
from repfx.records.number_text import duration, engineering, grouped, percent, plural
from repfx.training.run_folder import Setup
from repfx.training.runs.baseline import points
from repfx.training.runs.history import Epoch
from repfx.training.runs.metrics import Metrics


@dataclass(frozen=True)
class Tile:
    """A figure that sums something up, with a label and a note below."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Fact:
    """A name and a text about the run, such as its model or its schedule."""

    name: str
    text: str


def facts_of(setup: Setup | None, epochs: Sequence[Epoch]) -> list[Fact]:
    """Return the model, its schedule or spec, the image size and the length of training, as far as the run has recorded them."""
    found = []
    if setup is not None:
        model = setup.model
        options = {"num_classes": model.num_classes, **model.options}
        found.append(Fact("Model", f"{model.name} {_options(options)}".strip()))
        if setup.schedule is not None:
            name, options = setup.schedule.get("name", "?"), {**setup.schedule}
            options.pop("name", None)
            found.append(Fact("Schedule", f"{name} {_options(options)}".strip()))
        elif setup.spec is not None:
            found.append(Fact("Expanded with", str(setup.spec)))
        if setup.preprocessing is not None:
            found.append(Fact("Image", "×".join(map(str, setup.preprocessing.shape))))
    trained = [epoch for epoch in epochs if epoch.epoch]
    if trained:
        seconds = [epoch.seconds for epoch in trained if epoch.seconds is not None]
        time = f", {duration(sum(seconds))}" if seconds else ""
        found.append(Fact("Trained", f"{plural(trained[-1].epoch, 'epoch')}{time}"))
    return found


def result_tiles(metrics: Mapping[str, Any], forms: Mapping[str, Form]) -> list[Tile]:
    """Sum up a finished run: the deployed model beside the training form."""
    trained, fused = forms.get("expanded"), forms.get("fused")
    if fused is None:
        return []
    found = []
    if fused.accuracy is not None:
        images = metrics.get("test_images")
        flips = f"{fused.flips} of {images} predictions flip by fusing" if fused.flips is not None and images else ""
        found.append(Tile("Accuracy, fused", percent(fused.accuracy), flips))
        plain = forms.get("plain", Form("")).accuracy
        if plain is not None:
            found.append(Tile("By the branches", points(fused.accuracy - plain), _compared(metrics, plain)))
    if fused.error is not None:
        found.append(Tile("Worst difference", f"{fused.error:.1e}", "fused against training form, relative"))
    for name, field, text in (
        ("MACs, fused", "macs", engineering),
        ("Parameters, fused", "parameters", engineering),
        ("Latency, fused", "latency", duration),
    ):
        own, before = getattr(fused, field), getattr(trained, field, None)
        if own is not None:
            note = f"{text(before)} in training form" if before is not None else ""
            found.append(Tile(name, text(own), note))
    return found


def notes_of(metrics: Mapping[str, Any]) -> list[str]:
    """Return sentences on what is special about the numbers of a run; none if the file is of another form."""
    try:
        return Metrics.from_dict(metrics).notes
    except (TypeError, KeyError, AttributeError):
        return []


def _compared(metrics: Mapping[str, Any], plain: float) -> str:
    baseline = metrics.get("baseline")
    differing = baseline.get("differing") if isinstance(baseline, Mapping) else None
    alike = f"trained otherwise: {', '.join(map(str, differing))}" if differing else "trained alike, one run of each"
    return f"the plain model has {percent(plain)}, {alike}"


def progress_tiles(epochs: Sequence[Epoch]) -> list[Tile]:
    """Sum up an unfinished run: how far it has come."""
    if not epochs:
        return []
    last = epochs[-1]
    found = [Tile("Epochs", str(last.epoch))]
    measured = [epoch for epoch in epochs if epoch.accuracy is not None]
    if last.loss is not None:
        found.append(Tile("Loss", f"{last.loss:.3g}", f"in epoch {last.epoch}"))
    if measured and measured[-1].accuracy is not None:
        found.append(Tile("Accuracy", percent(measured[-1].accuracy), f"after epoch {measured[-1].epoch}"))
    return found


def structure_tiles(changes: Iterable[Changes]) -> list[Tile]:
    """Sum up all changes of the structure: how many branches grew and how many were dropped."""
    changes = list(changes)
    if not changes:
        return []
    grown, dropped = (sum(count_of(getattr(each, name)) for each in changes) for name in ("grown", "dropped"))
    times = plural(len(changes), "adjustment")
    told = [("Branches grown", grown, f"in {times}"), ("Branches dropped", dropped, "")]
    return [Tile(name, grouped(number), note) for name, number, note in told if number]


def cost_tiles(epochs: Sequence[Epoch]) -> list[Tile]:
    """Sum up the cost of training, compared with training the plain model."""
    trained = [epoch for epoch in epochs if epoch.epoch and epoch.macs]
    if not trained:
        return []
    mean = fmean(epoch.macs for epoch in trained)
    found = []
    if epochs[0].epoch == 0 and epochs[0].macs:
        times = f"{mean / epochs[0].macs:.2f} ×"
        found.append(Tile("MACs of training", times, f"of the plain model's {engineering(epochs[0].macs)}, mean"))
    most = max(trained, key=lambda epoch: epoch.macs)
    found.append(Tile("Largest", engineering(most.macs), f"MACs, first in epoch {most.epoch}"))
    seconds = [epoch.seconds for epoch in trained if epoch.seconds is not None]
    if seconds:
        found.append(Tile("Time", duration(sum(seconds)), f"{duration(fmean(seconds))} an epoch, mean"))
    return found


def _options(options: Mapping[str, Any]) -> str:
    """Return options as text, leaving out those that are None."""
    told = [f"{name}={_value(value)}" for name, value in options.items() if value is not None]
    return f"({', '.join(told)})" if told else ""


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
