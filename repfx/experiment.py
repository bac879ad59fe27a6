"""The main job in one call: expand, train, fuse, export, verify, measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import repfx
from repfx.cost import count_macs, count_parameters, measure_latency
from repfx.data import load_data
from repfx.dataset import DataSet, DataSource, InputForm
from repfx.errors import InvalidInput, UnknownName, first_line
from repfx.journaling import Action
from repfx.models import ModelReference, load_weights
from repfx.notes import copy_of
from repfx.onnx import export_onnx
from repfx.run_folder import MODEL, RunFolder, Structure, spec_of
from repfx.schedule import SCHEDULES, Schedule
from repfx.training import Predictions, Recipe, Step, predict, train

_TEST_BATCH = 64
_SPEC = "dbb"


@dataclass(frozen=True)
class Experiment:
    """What `repfx train` is asked to do.

    Args:
        spec: what the model is expanded with; or what `schedule` expands convs with, None for its own.
        schedule: its name and options; the model then begins plain, and is changed while it trains.
        weights: a file to begin from; then expanding preserves the function instead of starting as the papers do.
    """

    model: ModelReference = field(default_factory=lambda: ModelReference("torchvision:resnet18"))
    data: DataSource = field(default_factory=DataSource)
    spec: str | None = None
    schedule: str | None = None
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    out: Path = Path("runs/first")
    overwrite: bool = False
    weights: Path | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class Cost:
    """Of one form of the model, for one image; latency in seconds."""

    parameters: int
    macs: int
    latency: float


@dataclass(frozen=True)
class Metrics:
    """What `metrics.json` holds. Flips are test images whose predicted class differs from the one before fusing."""

    losses: list[float]
    test_images: int
    accuracy: dict[str, float]
    flips: dict[str, int]
    max_error: dict[str, float]
    cost: dict[str, Cost]
    onnx_latency: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Watcher:
    """Hears what goes on: one `on_stage` for each part of the work, `on_step` and `on_actions` while training."""

    on_stage: Callable[[str], None] = lambda stage: None
    on_step: Callable[[Step], None] = lambda step: None
    on_actions: Callable[[int, Sequence[Action]], None] = lambda epoch, actions: None


def run(experiment: Experiment, watcher: Watcher | None = None) -> Metrics:
    """Do it all and leave the files in `experiment.out`; the checkpoint stays there even if a later step fails.

    Raises:
        RepfxError: something asked for can't be done; before the training wherever that can be known.
        OSError: a file can't be read or written.
    """
    watcher = watcher or Watcher()
    with RunFolder(experiment.out).new_run(overwrite=experiment.overwrite) as folder:
        return _run(experiment, folder, watcher)


def _run(experiment: Experiment, folder: RunFolder, watcher: Watcher) -> Metrics:
    recipe, schedule = experiment.recipe, _schedule(experiment)
    plain, data, reference = _prepare(experiment)
    watcher.on_stage("expand")
    spec = experiment.spec or _SPEC
    if schedule is None:
        expanded = repfx.expand(plain, spec_of(spec), preserve=experiment.weights is not None)
    else:
        expanded = copy_of(plain)
    expanded = to_device(expanded, recipe.device)
    watcher.on_stage("train")
    trained = train(expanded, data, recipe, watcher.on_step, schedule, watcher.on_actions)
    expanded = expanded.cpu().eval()
    folder.clear()
    if trained.architecture is not None:
        folder.write_architecture(trained.architecture)
    how = None if schedule is None else {"name": schedule.name, **asdict(schedule)}
    folder.write_checkpoint(expanded, Structure(reference, None if how else spec, how, data.preparation))
    watcher.on_stage("fuse")
    x = torch.stack([data.test[i][0] for i in range(min(2, len(data.test)))])  # type: ignore[arg-type]
    fused = repfx.fuse(expanded)
    equivalence = repfx.check_equivalent(expanded, fused, x)
    watcher.on_stage("export")
    exported = export_onnx(fused, folder.path / MODEL, x)
    watcher.on_stage("test")
    forms = {"plain": plain.eval(), "expanded": expanded, "fused": fused}
    session = onnx_session(folder.path / MODEL)
    tests = {
        name: predict(compute, data.test, _TEST_BATCH, recipe.workers)
        for name, compute in {"expanded": expanded, "fused": fused, "onnxruntime": session}.items()
    }
    watcher.on_stage("measure")
    errors = {"fused": equivalence.max_error, "onnxruntime": exported.max_error}
    metrics = _metrics(trained.losses, tests, errors, forms, session, x[:1])
    folder.write_metrics(metrics.as_dict())
    return metrics


def _schedule(experiment: Experiment) -> Schedule | None:
    if experiment.schedule is None:
        if experiment.schedule_options:
            raise InvalidInput("there are options for a schedule, and no schedule.")
        return None
    if experiment.schedule not in SCHEDULES:
        raise UnknownName("schedule", experiment.schedule, SCHEDULES)
    spec = {} if experiment.spec is None else {"spec": spec_of(experiment.spec)}
    return SCHEDULES[experiment.schedule].over(experiment.recipe.epochs, **spec, **experiment.schedule_options)


def _prepare(experiment: Experiment) -> tuple[nn.Module, DataSet, ModelReference]:
    """The plain model and its data; the model gets as many classes as the data has, unless told otherwise."""
    torch.manual_seed(experiment.recipe.seed)
    to_device(nn.Linear(1, 1), experiment.recipe.device)
    form = InputForm.of(experiment.model.build(), experiment.image_size)
    data = load_data(experiment.data, form)
    classes = experiment.model.num_classes or len(data.classes)
    reference = ModelReference(experiment.model.name, classes, experiment.model.options)
    torch.manual_seed(experiment.recipe.seed)
    plain = reference.build()
    if experiment.weights is not None:
        load_weights(plain, experiment.weights)
    return plain, data, reference


def to_device(model: nn.Module, device: str) -> nn.Module:
    """The model on a device.

    Raises:
        InvalidInput: there is no such device here.
    """
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"device {device!r} can't be used: {first_line(error)}.") from error


def onnx_session(path: Path) -> Callable[[Tensor], Tensor]:
    """A file's model in onnxruntime on the CPU, as a function of a batch.

    It runs on as many threads as torch does, so that their latencies can be compared.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _metrics(
    losses: list[float],
    tests: Mapping[str, Predictions],
    errors: dict[str, float],
    forms: Mapping[str, nn.Module],
    session: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Metrics:
    calls = {name: _call(form, x) for name, form in forms.items()} | {"onnxruntime": _call(session, x)}
    latency = measure_latency(calls)
    before = tests["expanded"]
    return Metrics(
        losses=losses,
        test_images=len(before.labels),
        accuracy={name: predictions.accuracy for name, predictions in tests.items()},
        flips={name: before.flips(tests[name]) for name in ("fused", "onnxruntime")},
        max_error=errors,
        cost={name: Cost(count_parameters(form), count_macs(form, x), latency[name]) for name, form in forms.items()},
        onnx_latency=latency["onnxruntime"],
    )


def _call(compute: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return compute(x)

    return call
