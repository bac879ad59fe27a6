"""The training loop: what it learns, repeats and refuses."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import repfx
from repfx.change.schedule import SCHEDULES
from repfx.data.augmentation import Augmentation, AugmentedImages
from repfx.data.batches import Batches
from repfx.data.dataset import DataSet, PreparedImages, Stages, as_it_is
from repfx.data.predictions import Predictions, predict
from repfx.errors import Interrupted, InvalidInput, RepfxError, UnknownName
from repfx.training.engine import accelerator_for
from repfx.training.loop import Step, Watcher, train
from repfx.training.models import ModelReference
from repfx.training.recipe import Distillation, Recipe
from repfx.training.runs.history import History
from tests.tiny import net

LOOKS_AT_ALL = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU not every step is looked at")


def bright_or_dark(count: int = 33) -> DataSet:
    labels = torch.arange(count) % 2
    images = (2.0 * labels - 1)[:, None, None, None] + 0.1 * torch.randn(count, 1, 8, 8)
    return DataSet(TensorDataset(images, labels), TensorDataset(images, labels), ("dark", "bright"))


def first_weight(model: Any) -> Tensor:
    weight: Tensor = model[0].weight.detach().clone()
    return weight


def weights_after(seed: int, data: DataSet) -> Tensor:
    torch.manual_seed(seed)
    model = net(2)
    train(model, data, Recipe(epochs=1, batch_size=8, seed=seed))
    return first_weight(model)


@LOOKS_AT_ALL
def test_it_learns_and_tells_each_step() -> None:
    data, model = bright_or_dark(), net(2)
    steps: list[Step] = []
    history = train(
        model, data, Recipe(epochs=3, batch_size=8, learning_rate=0.01), watcher=Watcher(on_step=steps.append)
    ).history
    assert sorted({step.number for step in steps}) == list(range(1, 13))  # the 33rd image alone would be no batch
    assert (steps[-1].total, steps[-1].epoch) == (12, 3)
    first, *losses = [epoch.loss for epoch in history.epochs]
    assert first is None
    assert losses[2] < losses[0]  # type: ignore[operator]
    assert history.epochs[-1].accuracy == 1
    assert predict(model, data.test, 7).accuracy == 1
    assert not model.training


@pytest.mark.slow
def test_equal_seeds_give_equal_weights() -> None:
    data = bright_or_dark()
    assert torch.equal(weights_after(1, data), weights_after(1, data))
    assert not torch.equal(weights_after(1, data), weights_after(2, data))


class Auxiliary(nn.Module):
    """A model that returns its logits in a tuple or a dict, as googlenet or a segmentation model would."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner: nn.Sequential = net(2)
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        logits = self.inner(x)
        return {"tuple": (logits, None), "dict": {"aux": 0, "out": logits}, "map": x}[self.kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_the_main_output_is_trained(kind: str) -> None:
    data, model = bright_or_dark(), Auxiliary(kind)
    before = first_weight(model.inner)
    train(model, data, Recipe(epochs=1, batch_size=16))
    assert not torch.equal(first_weight(model.inner), before)


def test_what_is_no_classifier_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"no classifier: its output is \(1, 1, 8, 8\)"):
        train(Auxiliary("map"), bright_or_dark(), Recipe())


def test_an_image_that_does_not_fit_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 9), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="--image-size"):
        train(model, bright_or_dark(), Recipe())


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="gives 1 classes, the data has 2"):
        train(net(1), bright_or_dark(), Recipe())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    model = net(2)
    model.get_parameter("0.weight").data.fill_(float("nan"))
    with pytest.raises(RepfxError, match="the loss is nan in epoch 1"):
        train(model, bright_or_dark(), Recipe())


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"workers": -1}])
def test_a_recipe_that_can_not_be_used_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(change))):
        Recipe(**change)  # type: ignore[arg-type]


# --- interrupted and resumed --------------------------------------------------------------------------------------------


PICTURES = Augmentation(crop_padding=1, flip=0.5, cutout=2, mixup=0.2, cutmix=1.0)


def pictures(count: int = 40) -> DataSet:
    labels = torch.arange(count) % 2
    images = (labels[:, None, None, None] * 100 + torch.randint(0, 100, (count, 1, 8, 6))).byte()
    stages = Stages((8, 6), lambda image: image, lambda image: image.float() / 200)
    part = PreparedImages(TensorDataset(images, labels), stages)
    return DataSet(part, part, ("dark", "bright"))


def in_memory(data: DataSet) -> DataSet:
    """Return the same data with images that need no fitting."""
    train: Any = data.train
    part = PreparedImages(train.raw, Stages(train.stages.size, as_it_is, train.stages.normalize))
    return DataSet(part, part, data.classes)


def trained(
    recipe: Recipe,
    schedule: str | None,
    checkpoint: Path | None = None,
    *,
    stop_at: int | None = None,
    resume: bool = False,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Train, and return the final weights and the history without times. The run is interrupted after step `stop_at`."""
    torch.manual_seed(0)
    data, model = pictures(), net(2)
    changes = None if schedule is None else SCHEDULES[schedule].over(recipe.epochs, spec="acb")
    watcher = Watcher(on_step=lambda step: signal.raise_signal(signal.SIGINT) if step.number == stop_at else None)
    torch.manual_seed(1 if resume else 2)  # earlier draws must not matter
    done = train(model, data, recipe, changes, watcher=watcher, checkpoint=checkpoint, resume=resume)
    entries = [{**entry.to_dict(), "seconds": None} for entry in done.history.epochs]
    return done.model.state_dict(), entries


@pytest.mark.slow_one_in(3)
@pytest.mark.one_in(2)
@LOOKS_AT_ALL
@pytest.mark.parametrize(
    ("schedule", "stop_at", "changes"),
    [
        (None, 7, {"augmentation": PICTURES, "average": 0.9, "clip": 1.0}),
        (
            "dyrep",
            12,
            {
                "augmentation": PICTURES,
                "average": 0.9,
                "gradients": True,
                "optimizer": "SGD",
                "optimizer_options": {"momentum": 0.9},
            },
        ),
        pytest.param("dyrep", 10, {"channels_last": True}, marks=pytest.mark.slow),
        pytest.param("repnas", 8, {"decay_vectors": False, "gradients": True}, marks=pytest.mark.slow),
        pytest.param("des", 12, {}, marks=pytest.mark.slow),
        pytest.param("repan", 8, {"optimizer": "RMSprop", "mixed_precision": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_training_goes_on_to_the_same_bits(
    schedule: str | None, stop_at: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    recipe = Recipe(epochs=4, batch_size=8, learning_rate=0.01, **changes)
    state = tmp_path / "state.safetensors"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        Interrupted, match=f"stopped in epoch {(stop_at - 1) // 5 + 1} after step {(stop_at - 1) % 5 + 1}$"
    ):
        trained(recipe, schedule, state, stop_at=stop_at)
    assert signal.getsignal(signal.SIGINT) is before
    weights, history = trained(recipe, schedule, state, resume=True)
    whole, whole_history = trained(recipe, schedule)
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    assert history == whole_history


@pytest.mark.slow
def test_a_run_that_ended_between_epochs_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, batch_size=16, augmentation=PICTURES)
    state = tmp_path / "state.safetensors"

    def fail(history: History) -> None:
        if len(history.epochs) == 3:  # after the second epoch, before its state is written
            raise OSError("disk full")

    torch.manual_seed(0)
    data, model = pictures(), net(2)
    with pytest.raises(OSError, match="disk full"):
        train(model, data, recipe, watcher=Watcher(on_epoch=fail), checkpoint=state)
    weights, history = trained(recipe, None, state, resume=True)
    whole, whole_history = trained(recipe, None)
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    assert history == whole_history


# --- options of a recipe -----------------------------------------------------------------------------------------------


def test_what_is_drawn_for_an_image_depends_on_seed_epoch_and_image_alone() -> None:
    images = PICTURES.of_images(pictures().train, seed=3)
    assert isinstance(images, AugmentedImages)
    first = images[5][0]
    assert torch.equal(images[5][0], first)
    with torch.device("meta"):  # the default device of new tensors must not matter
        assert torch.equal(images[5][0], first)
    assert torch.equal(next(iter(DataLoader(images, 8, num_workers=2)))[0][5], first)
    images.epoch = 1
    assert not torch.equal(images[5][0], first)


def test_an_augmented_image_is_made_of_the_image() -> None:
    data = pictures()
    flipped = Augmentation(flip=1.0).of_images(data.train, 0)
    assert torch.equal(flipped[3][0], data.train[3][0].flip(-1))
    cropped = Augmentation(crop_padding=2).of_images(data.train, 0)
    raw, crops = ([images[index][0] for index in range(40)] for images in (data.train, cropped))
    padded = [torch.nn.functional.pad(image, (2, 2, 2, 2)) for image in raw]
    places = [(top, left) for top in range(5) for left in range(5)]
    found = [
        [(top, left) for top, left in places if torch.equal(whole[:, top : top + 8, left : left + 6], crop)]
        for whole, crop in zip(padded, crops)
    ]
    assert all(found)
    assert len({each[0] for each in found}) > 10
    holes = Augmentation(cutout=4).of_images(data.train, 0)
    assert all(
        4 <= int((holes[index][0] == 0).sum()) <= 16 + int((data.train[index][0] == 0).sum()) for index in range(40)
    )


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(crop_padding=2, flip=0.5),
        Augmentation(crop_padding=3),
        Augmentation(flip=0.3),
        Augmentation(crop_padding=1, flip=1.0, cutout=2),
        Augmentation(crop_padding=1, random_erasing=0.5),
    ],
)
def test_a_batch_is_varied_as_its_images_are(augmentation: Augmentation) -> None:
    images: Any = augmentation.of_images(in_memory(pictures()).train, seed=3)
    images.epoch = 2
    chosen = [7, 0, 31, 12, 12]
    with torch.device("meta"):
        many = images.__getitems__(chosen)
    assert (images.at_once is None) == bool(augmentation.cutout or augmentation.random_erasing)
    for (image, label), index in zip(many, chosen):
        assert torch.equal(image, images[index][0])
        assert label == images[index][1]


def test_mixed_labels_are_probabilities() -> None:
    x, y = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    mixed, labels = Augmentation(mixup=1.0).of_batch(2)(x, y)
    assert labels.shape == (6, 2)
    assert torch.allclose(labels.sum(1), torch.ones(6))
    assert not torch.equal(mixed, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher.pt", "checkpoint.safetensors"])
def test_a_teacher_is_learnt_from(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    teacher = net(2)
    if name == "teacher.pt":
        torch.save(teacher.state_dict(), tmp_path / name)
    else:
        repfx.save(tmp_path / name, repfx.expand(teacher, "acb"), random_state=False)
    torch.manual_seed(6)
    reference = ModelReference(f"{Path(__file__).parents[1] / 'tiny.py'}:net")
    told = Distillation(reference, str(tmp_path / name), alpha=1.0, temperature=1.0)
    data, student = pictures(), net(2)
    x = torch.stack([data.test[index][0] for index in range(40)])

    def distance() -> float:
        with torch.no_grad():
            return float((student.eval()(x).softmax(1) - teacher.eval()(x).softmax(1)).abs().mean())

    far = distance()
    train(student, data, Recipe(epochs=8, batch_size=8, learning_rate=0.02, distillation=told))
    assert distance() < 0.5 * far


@pytest.mark.slow
def test_the_average_is_what_training_ends_with() -> None:
    torch.manual_seed(0)
    model = net(2)
    done = train(model, pictures(), Recipe(epochs=2, batch_size=8, average=0.99, learning_rate=0.05))
    assert done.model is not model
    assert not torch.equal(first_weight(done.model), first_weight(model))
    torch.manual_seed(0)
    assert not torch.equal(first_weight(done.model), first_weight(net(2)))
    assert all(entry.ema_accuracy is not None for entry in done.history.epochs[1:])


@pytest.mark.slow
def test_channels_last_changes_only_the_order_of_sums() -> None:
    weights = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        data, model = pictures(), net(2).double()
        stages = Stages((8, 6), lambda image: image, lambda image: image.double() / 200)
        double = PreparedImages(data.train.raw, stages)  # type: ignore[attr-defined]
        optimizer = {"optimizer": "SGD", "learning_rate": 0.1}
        recipe = Recipe(epochs=1, batch_size=8, channels_last=channels_last, **optimizer)  # type: ignore[arg-type]
        train(model, DataSet(double, double, data.classes), recipe, SCHEDULES["dyrep"].over(1))
        weights.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-5  # the loss takes logits as float32


@pytest.mark.slow
def test_a_tracker_gets_each_epoch(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = Recipe(epochs=3, batch_size=8, log_with="tensorboard")
    with accelerator_for(recipe, tmp_path) as accelerator:
        history = train(net(2), pictures(), recipe, accelerator=accelerator).history
    (events,) = (tmp_path / "repfx").glob("events*")
    written = EventAccumulator(str(events)).Reload()
    losses = [(event.step, event.value) for event in written.Scalars("loss")]
    assert losses == [(entry.epoch, pytest.approx(entry.loss)) for entry in history.epochs[1:]]


@pytest.mark.slow
def test_a_compiled_training_follows_the_structure() -> None:
    results = []
    for compiled in (False, True):
        recipe = Recipe(epochs=2, batch_size=8, compile=compiled, optimizer="SGD", learning_rate=0.05)
        results.append(trained(recipe, "dyrep"))
    assert results[0][0].keys() == results[1][0].keys()
    worst = max(float((results[0][0][name] - results[1][0][name]).abs().max()) for name in results[0][0])
    assert worst < 1e-4


@pytest.mark.slow
def test_compiling_has_the_mode_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def compiled(net: nn.Module, *, mode: str) -> nn.Module:
        asked.append(mode)
        return net

    monkeypatch.setattr(torch, "compile", compiled)
    for mode in ("default", "reduce-overhead"):
        trained(Recipe(epochs=1, batch_size=8, compile=True, compile_mode=mode), None)
    assert asked == ["default", "reduce-overhead"]


@pytest.mark.parametrize(
    ("compile", "mode", "error", "message"),
    [
        (True, "reduced-overhead", UnknownName, "reduce-overhead"),
        (False, "reduce-overhead", InvalidInput, "but compile is false"),
    ],
)
def test_modes_of_compiling_that_can_t_be(compile: bool, mode: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe(compile=compile, compile_mode=mode)


def test_a_search_is_not_compiled() -> None:
    with pytest.raises(InvalidInput, match=r"RepNAS opens other gates at every step.*set compile = false"):
        trained(Recipe(epochs=4, batch_size=8, compile=True), "repnas")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "Adamm"}, "no optimizer 'Adamm'; did you mean 'Adam'"),
        ({"optimizer_options": {"momentum": 0.9}}, "AdamW has no option momentum"),
        ({"optimizer_options": {"betas": 3}}, "AdamW can't be made"),
        ({"optimizer": "SparseAdam"}, "SparseAdam fails in a trial step: SparseAdam does not support dense gradients"),
        ({"optimizer": "LBFGS", "weight_decay": 0.0}, "LBFGS fails in a trial step"),
        ({"warm_up": 9.0}, "warm_up is 9.0; it must be from 0 to the 5 epochs"),
        ({"average": 1.0}, "average is 1.0"),
        ({"rates": "up"}, "no shape of rates 'up'"),
        ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16', which needs an accelerator"),
        ({"device": "cuda:7"}, "device 'cuda:7' can't be used"),
        ({"log_with": "chalk"}, "no tracker 'chalk'"),
    ],
)
def test_what_a_recipe_can_not_ask_for_is_refused(options: dict[str, Any], message: str) -> None:
    if torch.accelerator.is_available() and ("fp16" in message or "cuda" in message):
        pytest.skip("this machine can")
    with pytest.raises(InvalidInput, match=re.escape(message)):
        train(net(2), pictures(), Recipe(**options))


@pytest.mark.parametrize(
    "options", [{"crop_padding": -1}, {"flip": 2.0}, {"crop_padding": 1, "resized_crop": 0.5}, {"auto_augment": "x"}]
)
def test_an_augmentation_that_can_not_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(options))):
        Augmentation(**options)


def test_a_batch_that_can_not_be_shared_out_is_refused() -> None:
    with pytest.raises(InvalidInput, match="batch_size is 9; it must be a multiple of the 2 processes"):
        Batches(images=100, size=9, processes=2)


def test_the_processes_share_each_image_of_an_epoch_out() -> None:
    parts = [list(Batches(images=43, size=8, seed=1, process=process, processes=4)) for process in range(4)]
    assert [len(batch) for batch in parts[0]] == [2] * 5
    drawn = [index for part in parts for batch in part for index in batch]
    assert len(set(drawn)) == len(drawn) == 40
    alone = list(Batches(images=43, size=8, seed=1))
    together = [sorted(index for part in parts for index in part[step]) for step in range(5)]
    assert together == [sorted(batch) for batch in alone[:5]]
    assert list(Batches(images=43, size=8, seed=1, begin=3)) == alone[3:]
    assert list(Batches(images=43, size=8, seed=1, epoch=1)) != alone


def test_flips_are_counted_whether_right_or_wrong() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    first = Predictions(torch.tensor([0, 1, 1, 1]), labels)
    second = Predictions(torch.tensor([0, 2, 2, 2]), labels)
    assert (first.accuracy, first.flips(second), first.flips(first)) == (0.5, 3, 0)
