"""The folder of a training run: its files, each of which appears whole or not at all, and how to build its model again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from repfx.blocks.architecture import Architecture
from repfx.blocks.branch import KINDS
from repfx.blocks.presets import SpecLike
from repfx.change.checkpoint import is_checkpoint, load, save
from repfx.errors import InvalidInput, first_line
from repfx.onnx.preprocessing import Preprocessing
from repfx.records.json_text import parse_json
from repfx.records.plain_values import from_plain
from repfx.records.target_file import is_locked, staged
from repfx.records.version import VERSION
from repfx.search.heat_map import draw
from repfx.training.models import ModelReference, load_weights
from repfx.training.recipe_file import parse_recipe
from repfx.training.runs.history import History
from repfx.training.trust import Trust, require_trusted

CHECKPOINT, STRUCTURE, MODEL, METRICS = "checkpoint.safetensors", "structure.json", "model.onnx", "metrics.json"
ARCHITECTURE, HEAT_MAP = "architecture.json", "architecture.png"
RECIPE, HISTORY, STATE, REPORT = "recipe.toml", "history.json", "state.safetensors", "report.html"
INT8, INT8_STATE = "model.int8.onnx", "state.int8.safetensors"
BASELINE = "baseline"  # the folder of the plain model's run, inside this one's
BEST, EVALUATION = "best.safetensors", "evaluation.json"
_FILES = (
    METRICS,
    EVALUATION,
    STATE,
    INT8_STATE,
    STRUCTURE,
    CHECKPOINT,
    BEST,
    MODEL,
    INT8,
    ARCHITECTURE,
    HEAT_MAP,
    RECIPE,
    HISTORY,
    REPORT,
)
_FORMAT = 3


@dataclass(frozen=True)
class Setup:
    """The model that a checkpoint's weights belong to. The checkpoint itself holds how the model's structure came about.

    Args:
        model: the plain model.
        spec: spec that the model was expanded with, as text or JSON gives it; None if there was a schedule.
        schedule: `name` and options of the schedule that changed the model in training; None without one.
        preprocessing: how the data's raw images were prepared; None if that isn't known.
        classes: names of the classes that the labels count; empty if the run recorded none.
    """

    model: ModelReference
    spec: Any
    schedule: Mapping[str, Any] | None
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the setup as JSON text, with the version of repfx that wrote it."""
        model = {"name": self.model.name, "num_classes": self.model.num_classes, "options": dict(self.model.options)}
        head = {"format": _FORMAT, "repfx": VERSION}
        preprocessing = None if self.preprocessing is None else self.preprocessing.as_dict()
        how = {"spec": self.spec, "schedule": self.schedule, "preprocessing": preprocessing, "classes": self.classes}
        return json.dumps({**head, "model": model, **how}, indent=2)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Setup:
        """Read what `to_json` wrote. Errors name `path`.

        Raises:
            InvalidInput: the text is something else.
        """
        try:
            found = parse_json(text)
            version = found["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{str(path)!r} is no structure that `repfx train` wrote.") from error
        if version != _FORMAT:
            raise InvalidInput(f"{str(path)!r} has format {version!r}; this version of repfx reads {_FORMAT}.")
        try:
            model = {name: found["model"][name] for name in ("name", "num_classes", "options")}
            how = {name: found[name] for name in ("spec", "schedule", "preprocessing", "classes")}
            setup = from_plain(cls, {"model": model, **how})
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{str(path)!r} is no structure that `repfx train` wrote.") from error
        except InvalidInput as error:
            raise InvalidInput(
                f"{str(path)!r} is no structure that `repfx train` wrote: {first_line(error)}."
            ) from error
        return setup


def spec_of(text: Any) -> SpecLike:
    """Return a spec from text: a preset's name, branch kinds separated by commas, or a JSON object from site patterns to these.

    >>> spec_of("dbb"), spec_of("1x1,1xk"), spec_of('{"layer1.*": "acb"}')
    ('dbb', ['1x1', '1xk'], {'layer1.*': 'acb'})
    """
    if isinstance(text, dict):
        return {pattern: spec_of(part) for pattern, part in text.items()}
    if isinstance(text, list):
        return text
    if not isinstance(text, str):
        raise InvalidInput(f"spec {text!r} is neither text nor a list or a dict.")
    if text.lstrip().startswith(("{", "[")):
        try:
            return spec_of(parse_json(text))
        except ValueError as error:
            raise InvalidInput(f"spec {text!r} is no JSON: {error}.") from error
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return parts if len(parts) != 1 or parts[0] in KINDS else str(parts[0])


@dataclass(frozen=True)
class RunFolder:
    """A folder with the files of a run.

    Args:
        checkpoint: name of the file whose weights the run's model has.
    """

    path: Path
    checkpoint: str = CHECKPOINT

    @classmethod
    def at(cls, path: Path) -> RunFolder:
        """Return the folder at a path, or the folder of a checkpoint of a run, whose model then has the weights of this checkpoint."""
        return cls(path.parent, path.name) if path.name in (CHECKPOINT, BEST) and path.is_file() else cls(path)

    @contextmanager
    def new_run(self, *, overwrite: bool, resume: bool) -> Iterator[RunFolder]:
        """Make the folder for a run. If the run fails before it has saved anything, remove its files, and the folder if it is new.

        Raises:
            InvalidInput: a run is there already and neither `overwrite` nor `resume` is set.
            OSError: the folder can't be made or written.
        """
        there = [name for name in _FILES if (self.path / name).exists()]
        if there and not (overwrite or resume):
            advice = "--overwrite replaces it" + ("" if METRICS in there else ", --resume continues it")
            raise InvalidInput(f"{str(self.path)!r} holds a run already ({', '.join(there)}): {advice}.")
        new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with staged(self.path / METRICS):
                pass  # fail now, not after the training, if the folder can't be written
            self.remove_leftovers()
            yield self
        except BaseException:
            if (overwrite or not there) and not any(
                (self.path / name).exists() for name in (METRICS, STATE, CHECKPOINT)
            ):
                self.clear()
            raise
        finally:
            _remove_empty(new)

    @property
    def logs(self) -> Path:
        """The folder that a tracker writes into."""
        return self.path / "logs"

    def clear(self) -> None:
        """Remove an older run. Its metrics go first, because they mark a run as complete."""
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        self.remove_leftovers()
        shutil.rmtree(self.logs, ignore_errors=True)
        baseline = RunFolder(self.path / BASELINE)
        if baseline.path.is_dir():
            baseline.clear()
            _remove_empty([baseline.path])

    def remove_leftovers(self) -> None:
        """Remove what a run that was killed while it wrote a file has left of it."""
        for name in _FILES:
            for left in self.path.glob(f".{name}.*"):
                if not is_locked(left):
                    shutil.rmtree(left, ignore_errors=True)

    def write(self, name: str, fill: Callable[[Path], None]) -> None:
        """Let `fill` write a file, which appears under its name once it is whole."""
        with staged(self.path / name) as (_, staging):
            fill(staging)

    def begin(self, setup: Setup, recipe: str) -> None:
        """Remove an older run, and write the recipe and the setup of this one."""
        self.clear()
        self.write(RECIPE, lambda path: _write_text(path, recipe))
        self.write(STRUCTURE, lambda path: _write_text(path, setup.to_json() + "\n"))

    def go_on(self, recipe: str) -> None:
        """Let a run go on with another recipe. It is no longer finished, and epochs with rounding begin anew."""
        for name in (METRICS, INT8_STATE):
            (self.path / name).unlink(missing_ok=True)
        self.write(RECIPE, lambda path: _write_text(path, recipe))

    def write_history(self, history: History) -> None:
        """Write the epochs so far."""
        self.write(HISTORY, lambda path: _write_text(path, history.to_json()))

    def write_checkpoint(self, model: nn.Module) -> None:
        """Write the training form at the end of the run."""
        save(self.path / CHECKPOINT, model, random_state=False)

    def write_architecture(self, architecture: Architecture) -> None:
        """Write the architecture that a search found, as JSON and as a picture."""
        self.write(ARCHITECTURE, architecture.save)
        self.write(HEAT_MAP, lambda path: draw(architecture, path))

    @property
    def architecture(self) -> Architecture | None:
        """The architecture that a search found; None if the run was no search."""
        path = self.path / ARCHITECTURE
        return Architecture.load(path) if path.is_file() else None

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write all numbers of the run. This file is the last one."""
        self.write(METRICS, lambda path: _write_text(path, json.dumps(metrics, indent=2) + "\n"))

    def write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Write how the fused model does on the test images of each class."""
        self.write(EVALUATION, lambda path: _write_text(path, json.dumps(evaluation) + "\n"))

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """How the fused model does on the test images of each class; None if there is no such file.

        Raises:
            InvalidInput: `repfx train` didn't write the file.
        """
        return self._json(EVALUATION)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """All numbers of the run; None until it is finished.

        Raises:
            InvalidInput: `repfx train` didn't write the file.
        """
        return self._json(METRICS)

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.is_file():
            return None
        wrong = InvalidInput(f"{str(path)!r} holds no {Path(name).stem} that `repfx train` wrote.")
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise wrong from error
        if not isinstance(found, dict):
            raise wrong
        return found

    @property
    def history(self) -> History | None:
        """The history of the run so far, epoch by epoch; None if there is no such file."""
        path = self.path / HISTORY
        return History.from_json(path.read_text(encoding="utf-8", errors="replace"), path) if path.is_file() else None

    @property
    def recipe_text(self) -> str | None:
        """The recipe of the run, as text; None if there is no such file."""
        path = self.path / RECIPE
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The recipe of the run, as values, whatever code they name; None if there is no such file."""
        path = self.path / RECIPE
        return parse_recipe(path) if path.is_file() else None

    @property
    def setup(self) -> Setup:
        """The setup of the run, read from its file."""
        path = self.path / STRUCTURE
        return Setup.from_json(path.read_text(encoding="utf-8", errors="replace"), path)

    def unfinished(self) -> InvalidInput:
        """Return the error that says how a run that isn't finished goes on."""
        return InvalidInput(
            f"the run in {str(self.path)!r} isn't finished: `repfx train --resume --out {self.path}` continues it."
        )

    def load(self, *, trust: Trust = False) -> nn.Module:
        """Return the trained model in its training form, in eval mode.

        Args:
            trust: whether the model may be built that the folder names, whatever it is. Without it, the folder may name only models of
                torchvision, timm and `repfx.recipes.nets`, and classes of modules that are imported already.

        Raises:
            InvalidInput: the run isn't finished, its files don't belong together, or the model isn't trusted.
            OSError: a file is missing.
        """
        setup = self.setup
        if not (self.path / self.checkpoint).is_file():
            raise self.unfinished()
        require_trusted({"model": asdict(setup.model)}, repr(str(self.path / STRUCTURE)), trust)
        model = setup.model.build()
        return load(self.path / self.checkpoint, model, random_state=False).eval()


def begin_from(plain: nn.Module, weights: Path) -> nn.Module:
    """Give a plain model the weights of a file, in place, or the training form that a run or a checkpoint holds.

    Args:
        plain: the model of the run, as its class builds it.
        weights: file of weights, a checkpoint that `repfx.save` wrote, or the folder of a finished run. No code that they name is called.

    Returns:
        The model: `plain` itself.

    Raises:
        InvalidInput: there are no weights, or they don't fit the model; the model is then unchanged.
        OSError: a file can't be read.
    """
    if weights.is_dir():
        if not (weights / STRUCTURE).is_file():
            raise InvalidInput(f"folder {str(weights)!r} holds no training run: it has no {STRUCTURE}.")
        if not (weights / CHECKPOINT).is_file():
            raise RunFolder(weights).unfinished()
        weights = weights / CHECKPOINT
    if is_checkpoint(weights):
        return load(weights, plain, random_state=False)
    load_weights(plain, weights)
    return plain


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
