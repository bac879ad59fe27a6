"""`write_run_page`: one HTML page about a training run and its result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import repfx
from repfx.blocks.architecture import Architecture
from repfx.errors import InvalidInput, first_line
from repfx.onnx.preprocessing import Preprocessing
from repfx.pages.changes import changes_of, deeds
from repfx.pages.classes import classes_of
from repfx.pages.diagram import Part, parts_of
from repfx.pages.forms import forms_of_run, int8_forms
from repfx.pages.pictures.of_run import pictures_of
from repfx.pages.pictures.picture import write_pictures
from repfx.pages.rendering import write_page
from repfx.pages.run_charts import cost_chart, learning_chart
from repfx.pages.structure_map import LEVELS, structure_map
from repfx.pages.summary import cost_tiles, facts_of, notes_of, progress_tiles, result_tiles, structure_tiles
from repfx.search.heat_map import cells
from repfx.training.evaluation import Evaluation
from repfx.training.run_folder import CHECKPOINT, HISTORY, METRICS, REPORT, STRUCTURE, RunFolder, Setup
from repfx.training.runs.history import Epoch, History
from repfx.training.trust import Trust

_FEW_SITES = 6


def write_run_page(
    folder: RunFolder,
    out: str | os.PathLike[str] | None = None,
    *,
    trust: Trust = False,
    image: Path | None = None,
    pictures: Path | None = None,
) -> Path:
    """Write the page of a run. The page leaves out whatever the run hasn't written yet.

    Args:
        folder: the folder of the run.
        out: the HTML file to write, by default ``report.html`` in the run's folder.
        trust: as in `RunFolder.load`. A model that isn't trusted isn't built, and the page gives the reason.
        image: image file for which the page shows maps of features; None for no maps.
        pictures: folder that also gets the page's pictures, as SVG files; None for none.

    Returns:
        The path of the page.

    Raises:
        InvalidInput: the folder holds no run, one of its files is malformed, jinja2 is missing, a file can't be written, or there is an
            image and its maps can't be drawn.
        OSError: a file can't be read.
    """
    require_run(folder)
    target = folder.path / REPORT if out is None else Path(out)
    shown = _shown(folder, trust, image)
    if pictures is not None:
        write_pictures(shown["pictures"], pictures)
    write_page("run.html", target, **shown)
    return target


def is_run(folder: RunFolder) -> bool:
    """Tell whether a folder holds a training run, finished or not."""
    return any((folder.path / name).is_file() for name in (METRICS, STRUCTURE, HISTORY))


def require_run(folder: RunFolder) -> None:
    """Raise unless a folder holds a training run, finished or not.

    Raises:
        InvalidInput: the folder holds none.
    """
    if not is_run(folder):
        raise InvalidInput(
            f"{str(folder.path)!r} holds no training run: it has none of {METRICS}, {STRUCTURE}, {HISTORY}."
        )


def _shown(folder: RunFolder, trust: Trust, image: Path | None) -> dict[str, Any]:
    metrics = folder.metrics
    setup = folder.setup if (folder.path / STRUCTURE).is_file() else None
    epochs = epochs_of(folder.history, metrics)
    changes = [change for epoch in epochs if (change := changes_of(epoch))]
    graph = _graph(folder, trust)
    forms = {} if metrics is None else {**forms_of_run(metrics), **int8_forms(metrics)}
    has_blocks = any(epoch.blocks or epoch.actions for epoch in epochs)
    return {
        "name": folder.path.resolve().name,
        "finished": metrics is not None,
        "facts": facts_of(setup, epochs),
        "tiles": progress_tiles(epochs) if metrics is None else result_tiles(metrics, forms),
        "forms": forms,
        "notes": [] if metrics is None else notes_of(metrics),
        "test_images": None if metrics is None else metrics.get("test_images"),
        "learning": learning_chart(epochs) if epochs else [],
        "changes": [(change.epoch, deeds(change)) for change in changes],
        "structure_tiles": structure_tiles(changes),
        "map": structure_map(epochs, graph.order) if has_blocks else None,
        "levels": LEVELS,
        "few_sites": _FEW_SITES,
        "cost": cost_chart(epochs) if epochs else [],
        "cost_tiles": cost_tiles(epochs),
        "epochs": epochs,
        "graph": graph,
        "classes": None if folder.evaluation is None else classes_of(Evaluation.from_dict(folder.evaluation)),
        "architecture": _architecture(folder.architecture),
        "pictures": pictures_of(folder.architecture, epochs, graph.models, _prepared(image, setup, graph)),
        "recipe": folder.recipe_text,
    }


def epochs_of(history: History | None, metrics: Mapping[str, Any] | None) -> tuple[Epoch, ...]:
    """Return the epochs of the history; for a run without one, epochs that have only the losses from the metrics."""
    if history is not None:
        return history.epochs
    losses = (metrics or {}).get("losses")
    known = [loss for loss in losses if isinstance(loss, float)] if isinstance(losses, list) else []
    return tuple(Epoch(number, loss) for number, loss in enumerate(known, start=1))


@dataclass(frozen=True)
class Graph:
    """A model before and after fusing.

    Args:
        parts: the units of the model, part by part.
        order: the paths of its modules, in the model's order.
        problem: the reason why the model can't be shown; None if it can.
        models: the model itself, before and after fusing; None if it can't be shown.
    """

    parts: tuple[Part, ...] = ()
    order: tuple[str, ...] = ()
    problem: str | None = None
    models: tuple[nn.Module, nn.Module] | None = None


def _prepared(image: Path | None, setup: Setup | None, graph: Graph) -> tuple[Path, Preprocessing] | None:
    """Return an image file and how the run prepares images; None without one.

    Raises:
        InvalidInput: the run doesn't say how it prepares images, or its model can't be built.
    """
    if image is None:
        return None
    if graph.problem is not None:
        raise InvalidInput(f"there are no maps of {str(image)!r}: {graph.problem}.")
    if setup is None or setup.preprocessing is None:
        raise InvalidInput(f"there are no maps of {str(image)!r}: the run doesn't say how images are prepared.")
    return image, setup.preprocessing


def _graph(folder: RunFolder, trust: Trust) -> Graph:
    if not all((folder.path / name).is_file() for name in (STRUCTURE, CHECKPOINT)):
        return Graph(problem="the run has left no trained model yet")
    try:
        trained = folder.load(trust=trust)
        fused = repfx.fuse(trained)
    except Exception as error:  # building a model runs its author's code, which may be missing or raise anything
        return Graph(problem=f"its model can't be built again here: {first_line(error)}")
    return Graph(parts_of(trained, fused), tuple(path for path, _ in trained.named_modules()), models=(trained, fused))


@dataclass(frozen=True)
class Found:
    """The architecture that a search found.

    Args:
        kinds: the kinds of paths that occur at any site.
        sites: for each site and kind, whether the path is kept, and the importance that the search learned (None if it learned none).
    """

    kinds: tuple[str, ...]
    sites: Mapping[str, Mapping[str, tuple[bool, float | None]]]

    @property
    def kept(self) -> int:
        return sum(chosen for row in self.sites.values() for chosen, _ in row.values())

    @property
    def all(self) -> int:
        return sum(map(len, self.sites.values()))


def _architecture(found: Architecture | None) -> Found | None:
    if found is None:
        return None
    sites = {site: cells(code) for site, code in found.sites.items()}
    return Found(tuple(dict.fromkeys(kind for row in sites.values() for kind in row)), sites)
