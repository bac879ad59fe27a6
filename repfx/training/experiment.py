"""The main job in one call: expand, train, fuse, export, verify, measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from repfx.blocks.selection import Selection
from repfx.change.checkpoint import load
from repfx.change.schedule import SCHEDULES, Schedule
from repfx.data.class_names import require_same
from repfx.data.dataset import DataSet, DataSource, InputForm
from repfx.data.load import load_data
from repfx.data.predictions import Predictions, labels_of_logits, predict
from repfx.data.reading import told
from repfx.data.samples import evenly
from repfx.errors import Interrupted, InvalidInput, UnknownName
from repfx.measuring.cost import count_macs, count_parameters, measure_latency
from repfx.measuring.equivalence import check_equivalent
from repfx.onnx.export import export_onnx
from repfx.onnx.file import open_session
from repfx.onnx.quantize import quantize_onnx
from repfx.passes.expand import expand
from repfx.passes.fuse import fuse
from repfx.qat.file import export_int8
from repfx.qat.rounded import require_torchao, rounded
from repfx.records.journal import journal, to_json
from repfx.records.notes import copy_of
from repfx.records.number_text import plural
from repfx.records.plain_values import flat, from_plain, to_plain
from repfx.records.python_code import import_source
from repfx.tracing.sites import sites
from repfx.training.engine import accelerator_for
from repfx.training.evaluation import MANY_CLASSES, Evaluation
from repfx.training.loop import Trained, Watcher, train
from repfx.training.models import ModelReference, load_pretrained
from repfx.training.recipe import Recipe
from repfx.training.recipe_file import from_root, to_toml
from repfx.training.run_folder import (
    BEST,
    INT8,
    INT8_STATE,
    MODEL,
    STATE,
    STRUCTURE,
    RunFolder,
    Setup,
    begin_from,
    spec_of,
)
from repfx.training.runs.baseline import PLAIN, folder_of, require_comparable, require_plain_beginning, with_baseline
from repfx.training.runs.extension import LENGTH, as_begun, goes_on, recipe_going_on, require_no_fewer
from repfx.training.runs.history import History
from repfx.training.runs.metrics import Cost, Int8, Metrics
from repfx.training.stem import Stem
from repfx.training.trust import calls_in

OF_A_CALL = ("out", "overwrite", "resume")  # the fields that no recipe holds
_TEST_BATCH = 64
_CALIBRATION = 256  # images that ranges are measured on
_MOST_CLASSES = 2000  # of which each pair is counted
_FEW_STEPS = 3  # in an epoch
_SPEC = "dbb"
_MAY_DIFFER = {"data.root", "data.download", "data.strict", "training.device", "training.workers", "training.log_with"}
_MAY_DIFFER |= {"baseline", *(f"training.{name}" for name in LENGTH)}


@dataclass(frozen=True)
class Experiment:
    """A job for `repfx train`: what to train, how, and where the files go.

    Args:
        model: the model to train, in its plain form.
        data: the data set to train and test on.
        spec: branches that the model is expanded with; an empty list leaves the model plain. With a `schedule`, the branches that the
            schedule expands convs with. None takes dbb, or the schedule's own.
        schedule: `name` and options of a schedule. The model then begins plain, and the schedule changes it while it trains.
        training: the recipe of the training.
        weights: file of weights, checkpoint or folder of a run to begin from. Expanding then preserves the model's function; without it,
            the branches begin as in their papers. A run or a checkpoint gives its training form, which a schedule such as RepAn folds
            first.
        pretrained: whether to begin from the weights that torchvision or timm has for the model, which may be downloaded.
        image_size: height and width of an image; None takes the data's own.
        baseline: what the result is compared with: `plain` also trains the plain model by the same recipe, in a folder in `out`; else the
            folder of a finished run of the plain model. None compares with nothing.
        out: folder of the run.
        overwrite: whether an older run in `out` is replaced.
        resume: whether a run in `out` is continued. A finished one goes on if `training.epochs` is more than it was begun with.
    """

    model: ModelReference = field(default_factory=lambda: ModelReference("torchvision:resnet18"))
    data: DataSource = field(default_factory=DataSource)
    spec: Any = None
    schedule: Mapping[str, Any] | None = None
    training: Recipe = field(default_factory=Recipe)
    weights: Path | None = None
    pretrained: bool = False
    image_size: int | None = None
    baseline: str | None = None
    out: Path = Path("runs/first")
    overwrite: bool = False
    resume: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any], **call: Any) -> Experiment:
        """Return the job of a recipe's values, with `out`, `overwrite` and `resume` as `call` has them.

        Raises:
            InvalidInput: a key is unknown, a value can't be, or the recipe holds what belongs to a call.
        """
        misplaced = [key for key in OF_A_CALL if key in values]
        if misplaced:
            raise InvalidInput(f"{misplaced[0]} can't be set in a recipe: give the option --{misplaced[0]}.")
        return from_plain(cls, {**values, **call})

    @property
    def values(self) -> dict[str, Any]:
        """The values that a recipe's file holds: all but `out`, `overwrite` and `resume`. Files are named by absolute paths."""
        return from_root({key: value for key, value in to_plain(self).items() if key not in OF_A_CALL})


def run(experiment: Experiment, watcher: Watcher | None = None) -> Metrics | None:
    """Expand, train, fuse, export, verify and measure a model, and leave the files in `experiment.out`.

    Returns:
        The measurements in the first process; None in all others.

    Raises:
        RepfxError: something in the experiment can't be done. Whatever can be known before the training is raised before it.
        Interrupted: a signal ended the run; call with `resume` to continue it.
        OSError: a file can't be read or written.
    """
    if experiment.overwrite and experiment.resume:
        raise InvalidInput("a run can be replaced or continued, not both: give --overwrite or --resume.")
    if experiment.pretrained and experiment.weights is not None:
        raise InvalidInput(
            "a training begins with given weights or with pretrained ones: give --weights or --pretrained."
        )
    watcher, values, baseline = watcher or Watcher(), experiment.values, experiment.baseline
    if baseline is not None:
        require_comparable(values, baseline)
    try:
        metrics = _run(experiment, watcher)
        if metrics is None or baseline is None:
            return metrics
        beside = folder_of(baseline, experiment.out)
        if baseline == PLAIN:
            watcher.on_notice("now the plain model, trained alike, to compare with:")
            plain = replace(experiment, spec=[], schedule=None, baseline=None, out=beside.path)
            _run(replace(plain, overwrite=False, resume=True), watcher)
    except Interrupted as error:
        raise Interrupted(f"{error}; go on with: {_resuming(experiment)}") from error
    metrics = with_baseline(metrics, values, beside)
    RunFolder(experiment.out).write_metrics(metrics.as_dict())
    return metrics


def _run(experiment: Experiment, watcher: Watcher) -> Metrics | None:
    schedule, folder = schedule_of(experiment), RunFolder(experiment.out)
    if experiment.spec is not None:
        Selection.of(spec_of(experiment.spec))  # names that don't exist are told before the data is read
    if experiment.resume:
        _require_same(experiment, folder)
        require_no_fewer(experiment.training, folder)
    if schedule is not None and experiment.resume and (folder.path / STRUCTURE).is_file():
        schedule = as_begun(schedule, folder)
    with ExitStack() as stack:
        with accelerator_for(experiment.training, folder.logs) as accelerator:
            _require_rounding(experiment.training, accelerator.num_processes)
            is_first: bool = accelerator.is_main_process
            done = folder.metrics if experiment.resume else None
            if done is not None and not goes_on(experiment.training, folder):
                if is_first:
                    folder.remove_leftovers()
                return Metrics.from_dict(done) if is_first else None
            if is_first:
                stack.enter_context(folder.new_run(overwrite=experiment.overwrite, resume=experiment.resume))
            accelerator.wait_for_everyone()  # for the folder, which the first process makes
            results = _train(experiment, schedule, folder, watcher if is_first else Watcher(), accelerator)
        return _finish(experiment, folder, watcher, *results) if is_first else None


def _finish(
    experiment: Experiment, folder: RunFolder, watcher: Watcher, trained: Trained, plain: nn.Module, data: DataSet
) -> Metrics:
    """Fuse, export, test and measure the trained model, in the first process alone."""
    expanded = trained.model.cpu().to(memory_format=torch.contiguous_format)
    plain = plain.cpu().to(memory_format=torch.contiguous_format)
    kept = {"epoch": trained.history.epochs[-1].epoch}
    if experiment.training.keep == "best":
        expanded = load(folder.path / BEST, copy_of(plain), random_state=False, progress=kept).eval()
    if trained.architecture is not None:
        folder.write_architecture(trained.architecture)
    folder.write_checkpoint(expanded)
    watcher.on_stage("fuse")
    x = torch.stack([data.test[i][0] for i in range(min(2, len(data.test)))])  # type: ignore[arg-type]
    fused = fuse(expanded)
    equivalence = check_equivalent(expanded, fused, x)
    watcher.on_stage("export")
    about = {"source": experiment.model.short_name, "journal": to_json(journal(expanded))}
    labels = labels_of_logits(fused, data.classes, x)
    how: dict[str, Any] = {"labels": labels, "preprocessing": data.preprocessing, "about": about}
    exported = export_onnx(fused, folder.path / MODEL, x, **how)
    watcher.on_stage("test")
    forms = {"plain": plain.eval(), "expanded": expanded, "fused": fused}
    session = onnx_session(folder.path / MODEL)
    tests = {
        name: predict(compute, data.test, _TEST_BATCH, experiment.training.workers)
        for name, compute in {"expanded": expanded, "fused": fused, "onnxruntime": session}.items()
    }
    watcher.on_stage("measure")
    errors = {"fused": equivalence.max_error, "onnxruntime": exported.max_error}
    losses = [epoch.loss for epoch in trained.history.epochs if epoch.loss is not None]
    metrics = replace(
        _metrics(losses, tests, errors, forms, session, x[:1]),
        epoch=kept["epoch"],
        unreadable={**data.unreadable, **trained.unreadable},
    )
    if len(labels) <= _MOST_CLASSES:
        folder.write_evaluation(Evaluation.of(labels, tests["fused"]).as_dict())
    if experiment.training.qat is not None:
        int8, unreadable = _in_8_bits(experiment, folder, watcher, fused, data, tests["fused"], how, metrics.unreadable)
        metrics = replace(metrics, int8=int8, unreadable={**metrics.unreadable, **unreadable})
    folder.write_metrics(metrics.as_dict())
    folder.remove_leftovers()
    return metrics


def _in_8_bits(
    experiment: Experiment,
    folder: RunFolder,
    watcher: Watcher,
    fused: nn.Module,
    data: DataSet,
    before: Predictions,
    how: Mapping[str, Any],
    unreadable: Mapping[str, str],
) -> tuple[Int8, Mapping[str, str]]:
    """Train the fused model on with rounding, write its file, and test it beside the model rounded without any training.

    Args:
        before: predictions of the fused model.
        how: what the file's metadata say.
        unreadable: reasons why image files are left out, as far as they were told before, by path.

    Returns:
        What was measured, and the reasons of all that this training left out.
    """
    watcher.on_stage("round")
    recipe, workers = experiment.training.with_rounding(), experiment.training.workers
    images = evenly(data.train, _CALIBRATION)
    calibrate = torch.stack([images[place][0] for place in range(len(images))])  # type: ignore[arg-type]
    with accelerator_for(recipe) as accelerator:
        model = rounded(fused.to(accelerator.device), calibrate.to(accelerator.device))
        watched = replace(watcher, on_epoch=lambda history: None)
        state = folder.path / INT8_STATE
        options: dict[str, Any] = {"checkpoint": state, "resume": True, "accelerator": accelerator}
        try:
            trained = train(model, data, recipe, watcher=watched, unreadable=unreadable, **options)
        except Interrupted as error:
            raise Interrupted(f"rounding {error}") from error
    file = export_int8(model.cpu().eval(), folder.path / INT8, calibrate[:_TEST_BATCH], **how)
    state.unlink(missing_ok=True)
    with TemporaryDirectory() as temporary:
        afterwards = Path(temporary) / INT8
        quantize_onnx(folder.path / MODEL, afterwards, [calibrate])
        tests = {
            name: predict(onnx_session(path, optimized=False), data.test, _TEST_BATCH, workers)
            for name, path in (("ptq", afterwards), ("qat", file.path))
        }
    measured = Int8(
        losses=[epoch.loss for epoch in trained.history.epochs if epoch.loss is not None],
        accuracy={name: predictions.accuracy for name, predictions in tests.items()},
        flips={name: before.flips(predictions) for name, predictions in tests.items()},
        file_error=file.error,
    )
    return measured, trained.unreadable


def _require_rounding(recipe: Recipe, processes: int) -> None:
    """Raise if a recipe has epochs with rounding that can't be done here."""
    if recipe.qat is None:
        return
    require_torchao()
    if processes > 1:
        raise InvalidInput(
            f"{processes} processes were started, and epochs with rounding run in one: leave qat out, or start one process."
        )


def _train(
    experiment: Experiment, schedule: Schedule | None, folder: RunFolder, watcher: Watcher, accelerator: Any
) -> tuple[Trained, nn.Module, DataSet]:
    """Train in every process; return the result, the plain model and the data."""
    with accelerator.main_process_first():  # it may download the data
        plain, first, data, reference = _prepare(experiment)
    if data.unreadable:
        watcher.on_notice(told(data.unreadable, "test image"))
    steps = math.ceil(len(data.train) / experiment.training.batch_size)  # type: ignore[arg-type]
    if steps < _FEW_STEPS:
        watcher.on_notice(f"an epoch is {plural(steps, 'step')} alone: a smaller --batch-size gives more")
    watcher.on_stage("expand")
    spec = _SPEC if experiment.spec is None else experiment.spec
    if schedule is None:
        stem = Stem.up_to(plain, experiment.training.freeze)
        model = expand(
            first, stem.left_out(first, spec_of(spec)), preserve=experiment.weights is not None or experiment.pretrained
        )
    else:
        _require_sites(schedule, plain)
        model = copy_of(first)
    how = None if schedule is None else {"name": schedule.name, **asdict(schedule)}
    setup = Setup(reference, None if how else spec, how, data.preprocessing, data.classes)
    continued = experiment.resume and (folder.path / STATE).is_file()
    longer = recipe_going_on(experiment.training, folder) if continued else None
    if continued and (begun := folder.setup.classes):
        require_same(data, begun, experiment.data.name, str(folder.path))

    def on_epoch(history: History) -> None:
        if not continued and len(history.epochs) == 1:
            folder.begin(setup, to_toml(experiment.values))
        elif longer is not None:
            folder.go_on(longer)
        folder.write_history(history)
        watcher.on_epoch(history)

    watcher.on_stage("train")
    trained = train(
        model,
        data,
        experiment.training,
        schedule,
        watcher=replace(watcher, on_epoch=on_epoch),
        plain=plain,
        checkpoint=folder.path / STATE,
        best=folder.path / BEST,
        resume=experiment.resume,
        accelerator=accelerator,
    )
    return trained, plain, data


def _resuming(experiment: Experiment) -> str:
    """Return the command that resumes a run."""
    known = all(call.is_of_a_library for call in calls_in(experiment.values))
    return f"repfx train --resume --out {experiment.out}" + ("" if known else " --trust")


def _require_same(experiment: Experiment, folder: RunFolder) -> None:
    """Raise if the run in the folder was begun with other values, except for those that may differ."""
    begun = folder.recipe
    change = None if begun is None else first_difference(experiment.values, Experiment.of(begun).values)
    if change is not None:
        raise InvalidInput(
            f"the run in {str(folder.path)!r} was begun with {change}: leave the change out, or replace the run with --overwrite."
        )


def first_difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str | None:
    """Say in which key values of a recipe differ from those of a run or a sweep that is continued; None if all that counts is equal."""
    now, then = flat(now), flat(then)
    differing = [key for key in sorted({*now, *then}) if now.get(key) != then.get(key) and key not in _MAY_DIFFER]
    key = next(iter(differing), None)
    return None if key is None else f"{key} = {then.get(key)!r}, and now it is {now.get(key)!r}"


def schedule_of(experiment: Experiment) -> Schedule | None:
    """Return the schedule that a job asks for; None without one.

    Raises:
        InvalidInput: no schedule has this name, or it lacks an option, or a value can't be.
    """
    if experiment.schedule is None:
        return None
    options = dict(experiment.schedule)
    name = options.pop("name", None)
    if name is None:
        raise InvalidInput("there are options for a schedule, and no schedule: give its name, too.")
    name = _registered(str(name))
    spec = {} if experiment.spec is None else {"spec": spec_of(experiment.spec)}
    if spec.get("spec") == []:
        raise InvalidInput(
            f"the spec is empty, so that {name} has no branches to work with: name some, or leave the spec out."
        )
    return SCHEDULES[name].over(experiment.training.epochs, **{**spec, **options})


def _registered(name: str) -> str:
    """Return the name under which a schedule is registered; ``file.py:Class`` and ``package.module:Class`` are imported first.

    Raises:
        InvalidInput: what is imported is no schedule with a name; UnknownName: no schedule has this name.
    """
    source, _, class_name = name.rpartition(":")
    if source:
        found = getattr(import_source(source), class_name, None)
        if not (isinstance(found, type) and issubclass(found, Schedule) and "name" in vars(found)):
            raise InvalidInput(f"{name!r} is no schedule: it must be a subclass of repfx.Schedule that sets `name`.")
        name = found.name
    if name not in SCHEDULES:
        raise UnknownName("schedule", name, SCHEDULES)
    return name


def _require_sites(schedule: Schedule, plain: nn.Module) -> None:
    """Raise if the schedule's spec has a pattern that fits no conv of the model."""
    spec = getattr(schedule, "spec", None)
    if isinstance(spec, Mapping):
        Selection.of(spec).require_used({site.path: str(site.conv or "?") for site in sites(plain, spec)})


def _prepare(experiment: Experiment) -> tuple[nn.Module, nn.Module, DataSet, ModelReference]:
    """Return the plain model, the model to begin from, the data, and the model's reference.

    The model gets as many classes as the data has, unless it names a number.
    """
    torch.manual_seed(experiment.training.seed)
    form = InputForm.of(experiment.model.build(), experiment.image_size)
    data = load_data(experiment.data, form)
    classes = experiment.model.num_classes or len(data.classes)
    reference = ModelReference(experiment.model.name, classes, experiment.model.options)
    torch.manual_seed(experiment.training.seed)
    plain = reference.build()
    if experiment.pretrained and not (experiment.resume and (experiment.out / STATE).is_file()):
        load_pretrained(plain, reference)
    first = plain
    if experiment.weights is not None:
        first = begin_from(copy_of(plain), experiment.weights)
        if experiment.baseline == PLAIN:
            require_plain_beginning(first, experiment.weights)
    return plain, first, data, reference


def onnx_session(path: Path, *, optimized: bool = True) -> Callable[[Tensor], Tensor]:
    """Return a function that runs the model of an ONNX file on a batch, in onnxruntime on the CPU.

    It uses as many threads as torch does, so that their latencies can be compared.
    """
    session = open_session(path, optimized=optimized, threads=torch.get_num_threads())
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
        top5={
            name: predictions.top5 or 0.0 for name, predictions in tests.items() if predictions.classes >= MANY_CLASSES
        },
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
