"""The callback for Lightning: it trains like a loop written by hand, and all parts of a checkpoint are of one moment."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import repfx
from repfx.change.schedule import Schedule
from repfx.errors import InvalidInput
from repfx.testing import assert_same_map
from tests.inline_net import same_state

pl: Any = pytest.importorskip("lightning.pytorch")
lightning: Any = pytest.importorskip("repfx.integrations.lightning")

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = torch.Generator().manual_seed(3)
IMAGES = torch.randn(20, 3, 9, 7, generator=NUMBERS, dtype=torch.float64)
LABELS = torch.randint(4, (20,), generator=NUMBERS)
SHORT: dict[str, Schedule] = {
    "dyrep": repfx.schedules.DyRep(interval=1, until=9, deviation=0.0),
    "repan": repfx.schedules.RepAn(cycles=3, epochs=1, warm_up=0.5, freeze=True),
    "repnas": repfx.schedules.RepNAS(warm_up=1, epochs=2, learning_rate=0.1),
}
DES = repfx.schedules.DES(population=4, warm_up=1, epochs=3, generation=1, nets=2, learning_rate=0.1)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def net(dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, 4)]
    return nn.Sequential(*layers, *head).double()


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    """An optimizer with two groups by kind, as users make them. A new optimizer's order differs from that of a model that grew."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 1e-3}, {"params": others, "lr": 0.02}]
    return torch.optim.SGD(groups, 0.05, momentum=0.9)


class Classifier(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.net = net(dropout)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


def loader(shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, LABELS), 4, shuffle=shuffle)


def trainer_of(epochs: int, *callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = any(isinstance(each, pl.callbacks.ModelCheckpoint) for each in callbacks)
    options = {"accelerator": "cpu", "enable_checkpointing": checkpoints, **quiet, **options}
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **options)


def averaging() -> Any:
    return pl.callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.8))


class Run:
    """Four epochs with a checkpoint of each."""

    def __init__(self, schedule: Schedule, folder: Path, resume: Path | None = None, **when: Any) -> None:
        self.module = Classifier()
        self.callback = lightning.RepFXCallback(schedule)
        self.averaging = averaging()
        checkpoints = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, **when)
        self.trainer = trainer_of(4, self.callback, self.averaging, checkpoints)
        torch.manual_seed(5)
        self.trainer.fit(self.module, loader(), loader(), ckpt_path=resume, weights_only=True)


class Seeded(pl.Callback):  # type: ignore[misc]
    """A callback that seeds torch, so that new branches begin alike whatever else has drawn random numbers."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        torch.manual_seed(50)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        torch.manual_seed(trainer.current_epoch)


# ---- training


def by_hand(schedule: Schedule, accumulate: int = 1, score: Any = None, clip: float = 0.5) -> repfx.Driver:
    """Train by hand for three epochs of five batches. With two batches a step, the last step of an epoch has one."""
    model = net(0.0)
    optimizer = optimizer_of(model)
    rates = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    batches = list(loader(shuffle=False))
    steps = math.ceil(len(batches) / accumulate)
    data = loader(shuffle=False)
    torch.manual_seed(50)
    driver = repfx.Driver(model, optimizer, schedule, calibrate=data, steps_per_epoch=steps, score=score)
    for epoch in range(3):
        for start in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            for share in driver.shares():
                for x, y in batches[start : start + accumulate]:
                    (share * F.cross_entropy(model(x), y) / accumulate).backward()
            driver.after_backward()
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
        rates.step()
        torch.manual_seed(epoch)
        driver.after_epoch()
    return driver


@pytest.mark.slow
@pytest.mark.parametrize(("name", "accumulate"), [("dyrep", 1), ("repan", 2), ("repnas", 1)])
def test_it_trains_as_a_loop_by_hand(name: str, accumulate: int) -> None:
    module, callback = Classifier(0.0), lightning.RepFXCallback(SHORT[name])
    trainer = trainer_of(3, Seeded(), callback, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    trainer.fit(module, loader(shuffle=False), loader(shuffle=False))
    driver = by_hand(SHORT[name], accumulate)
    assert callback.driver.history == driver.history
    assert len(driver.history) > 3
    assert same_state(module.net.state_dict(), driver.model.state_dict())


def score(candidate: nn.Module) -> float:
    with torch.no_grad():
        return -float(candidate(IMAGES).square().mean())


class ByHand(Classifier):
    """A module with manual optimization, in which a step can go through several nets."""

    def __init__(self, callback: Any) -> None:
        super().__init__(0.0)
        self.automatic_optimization = False
        self.callback = [callback]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for share in self.callback[0].driver.shares():
            self.manual_backward(share * super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, 1e9)
        optimizer.step()

    def on_train_epoch_end(self) -> None:
        schedulers: Any = self.lr_schedulers()
        schedulers.step()


@pytest.mark.slow
def test_optimization_by_hand_averages_a_step_over_several_nets() -> None:
    callback = lightning.RepFXCallback(DES, score=score)
    module = ByHand(callback)
    trainer_of(3, Seeded(), callback).fit(module, loader(shuffle=False))
    driver = by_hand(DES, score=score, clip=1e9)
    assert callback.driver.history == driver.history
    assert callback.driver.search.history == driver.search.history
    assert same_state(module.net.state_dict(), driver.model.state_dict())


# ---- checkpoints


@pytest.mark.parametrize(
    ("name", "at_validation"),
    [("dyrep", False), *(pytest.param(name, True, marks=pytest.mark.slow) for name in SHORT)],
)
def test_a_run_goes_on_to_the_same_bits(name: str, at_validation: bool, tmp_path: Path) -> None:
    """A run resumes bit for bit from the end of an epoch, after the structure changed, and from the validation before that."""
    when: dict[str, Any] = {"save_on_train_epoch_end": False} if at_validation else {}
    whole = Run(SHORT[name], tmp_path, **when)
    resumed = Run(SHORT[name], tmp_path / "again", tmp_path / "epoch=1.ckpt", **when)
    pairs = [(each.module.state_dict(), each.averaging._average_model.state_dict()) for each in (whole, resumed)]
    assert same_state(pairs[0][0], pairs[1][0])
    assert same_state(pairs[0][1], pairs[1][1])
    assert resumed.callback.driver.history == whole.callback.driver.history
    assert len(whole.callback.driver.history) > 3
    states = [str(each.trainer.optimizers[0].state_dict()) for each in (whole, resumed)]
    assert states[0] == states[1]


@pytest.mark.slow
def test_what_was_saved_earlier_is_tested_deployed_and_trained_on(tmp_path: Path) -> None:
    """An earlier checkpoint is loaded in the same process, where the model has grown since, and without a Trainer into a plain model."""
    module, callback = Classifier(), lightning.RepFXCallback(SHORT["dyrep"])
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_weights_only=True)
    trainer = trainer_of(3, callback, checkpoints)
    trainer.fit(module, loader())
    grown = repfx.journal(module.net)
    saved = lightning.load_weights(tmp_path / "epoch=0.ckpt", Classifier())
    assert 0 < len(repfx.journal(saved.net)) < len(grown)
    assert_same_map(repfx.fuse(saved.net).eval(), saved.net.eval(), IMAGES)
    trainer.test(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert same_state(module.state_dict(), saved.state_dict())
    assert repfx.journal(module.net) == repfx.journal(saved.net)
    trainer.test(module, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert repfx.journal(module.net) == grown
    again = Classifier()
    trainer_of(1, lightning.RepFXCallback(SHORT["dyrep"])).validate(again, loader(), tmp_path / "epoch=2.ckpt", False)
    assert same_state(again.state_dict(), module.state_dict())


class SavesTooEarly(pl.Callback):  # type: ignore[misc]
    """A callback that saves at the end of an epoch before the structure changes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.slow
def test_an_end_of_an_epoch_that_was_cut_off_is_made_up_for(tmp_path: Path) -> None:
    histories = []
    for resume in (None, tmp_path / "early.ckpt"):
        early = [SavesTooEarly(tmp_path / "early.ckpt")] if resume is None else []
        callback = lightning.RepFXCallback(SHORT["dyrep"])
        trainer_of(2, *early, callback).fit(Classifier(0.0), loader(shuffle=False), ckpt_path=resume)
        histories.append(callback.driver.history)
    assert histories[0][0] == histories[1][0]
    assert [{epoch for epoch, _ in history} for history in histories] == [{1, 2}] * 2


@pytest.mark.slow
def test_an_epoch_that_lightning_ends_once_more_is_ended_once(tmp_path: Path) -> None:
    """Lightning ends an epoch again after it loads a checkpoint into a run that counts steps."""
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, "run")
    trainer_of(1, lightning.RepFXCallback(SHORT["dyrep"]), checkpoints).fit(Classifier(), loader())
    callback = lightning.RepFXCallback(SHORT["dyrep"])
    trainer = trainer_of(-1, callback, max_steps=10)
    trainer.fit(Classifier(), loader(), ckpt_path=tmp_path / "run.ckpt")
    assert (trainer.global_step, callback.driver.epoch) == (10, 2)


@pytest.mark.slow
def test_a_second_fit_goes_on_where_the_first_one_ended() -> None:
    module, callback = Classifier(), lightning.RepFXCallback(SHORT["repan"], verbose=True)
    trainer = trainer_of(1, callback)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    trainer_of(1, callback).fit(module, loader())
    assert callback.driver.epoch == 3
    assert {epoch for epoch, _ in callback.driver.history} == {0, 1, 2}
    other = Classifier()
    trainer_of(1, callback).fit(other, loader())
    assert callback.driver.epoch == 1
    assert len(repfx.journal(other.net)) == len(callback.driver.history)


class Loadable(Classifier):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        lightning.rebuild(self, checkpoint)


@pytest.mark.slow
def test_a_module_that_rebuilds_itself_is_loaded_from_a_checkpoint(tmp_path: Path) -> None:
    """A module that rebuilds itself loads checkpoints, also after training, and can still be copied and pickled."""
    module = Loadable()
    trainer = trainer_of(1, lightning.RepFXCallback(SHORT["dyrep"]))
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    for name in ("weights.ckpt", "whole.ckpt"):
        loaded = Loadable.load_from_checkpoint(tmp_path / name, map_location="cpu")
        assert same_state(loaded.state_dict(), module.state_dict())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same_state(copied.state_dict(), module.state_dict())
        copied.on_save_checkpoint({})
        copied.on_load_checkpoint(torch.load(tmp_path / "whole.ckpt", weights_only=True))
    assert "on_load_checkpoint" not in vars(module)


# ---- what else a run holds


class Averaged(Classifier):
    """A module with convs, an average and a scaler of its own."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.net.float()
        self.average = AveragedModel(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0].float()), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        self.average.update_parameters(self.net)


@pytest.mark.slow
def test_an_average_inside_the_module_and_a_scaler_go_along(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    module = Averaged()
    callback = lightning.RepFXCallback(
        repfx.schedules.DyRep(interval=1, until=9, metric="snip"),
        model="net",
        ema="average",
        calibrate=[IMAGES.float()],
    )
    trainer = trainer_of(1, callback, plugins=[precision])
    trainer.fit(module, loader())
    (expanded,) = callback.driver.history
    assert repfx.journal(module.average.module) == repfx.journal(module.net) == (expanded[1],)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert len(callback.driver.history) > 1
    trainer.validate(module, [], tmp_path / "run.ckpt", False)
    assert repfx.journal(module.average.module) == repfx.journal(module.net) == (expanded[1],)
    assert same_state(lightning.load_weights(tmp_path / "run.ckpt", Averaged()).state_dict(), module.state_dict())


def test_a_module_with_convs_of_its_own_is_changed_itself() -> None:
    class Flat(Classifier):
        def __init__(self) -> None:
            super().__init__(0.0)
            layers: nn.Sequential = self.net
            self.net: Any = nn.Identity()
            for number, layer in enumerate(layers):
                self.add_module(f"layer{number}", layer)

        def forward(self, x: Tensor) -> Tensor:
            for layer in list(self.children())[1:]:
                x = layer(x)
            return x

    module, callback = Flat(), lightning.RepFXCallback(SHORT["dyrep"])
    trainer_of(1, callback, averaging()).fit(module, loader())
    assert callback.driver.model is module
    assert len(callback.driver.history) == 1


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["module", "net"])
def test_a_compiled_module_follows(compiled: str) -> None:
    module, callback = Classifier(0.0), lightning.RepFXCallback(SHORT["dyrep"])
    plain, other = Classifier(0.0), lightning.RepFXCallback(SHORT["dyrep"])
    trainer_of(3, Seeded(), other).fit(plain, loader(shuffle=False))
    if compiled == "net":
        module.net.compile(backend="eager")
    whole = torch.compile(module, backend="eager") if compiled == "module" else module
    trainer_of(3, Seeded(), callback).fit(whole, loader(shuffle=False))
    assert callback.driver.history == other.driver.history
    assert_same_map(module.net.eval(), plain.net.eval(), IMAGES)


@pytest.mark.slow
def test_the_older_package_serves_as_well() -> None:
    older = pytest.importorskip("pytorch_lightning")

    class Older(older.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        forward = Classifier.forward
        training_step = Classifier.training_step
        configure_optimizers = Classifier.configure_optimizers

    callback = lightning.RepFXCallback(SHORT["dyrep"])
    older.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, callbacks=[callback], logger=False).fit(
        Older(), loader()
    )
    assert len(callback.driver.history) == 1


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", ["dyrep", "repnas"])
def test_two_processes_end_with_the_same_model(name: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "tests.programs.lightning_on_two_ranks", name, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "expand" in done.stdout


# ---- what isn't served


def with_manual_optimization() -> Classifier:
    module = Classifier()
    module.automatic_optimization = False
    return module


def without_forward() -> Any:
    class Bare(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = net(), net()
            self.loss_of = self.second
            self.training_step = lambda batch: self.first(batch[0]).mean()

        configure_optimizers = Classifier.configure_optimizers

    return Bare()


def with_a_stranger() -> Classifier:
    module, stranger = Classifier(), nn.Linear(2, 3)
    module.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        [*module.parameters(), *stranger.parameters()], 0.1
    )
    return module


def frozen_into_one_function() -> Classifier:
    module = Classifier()
    module.net = torch.jit.trace(module.net.float().eval(), IMAGES.float())
    return module


DYREP, REPNAS = SHORT["dyrep"], SHORT["repnas"]


@pytest.mark.parametrize(
    ("make", "schedule", "options", "message"),
    [
        (Classifier, DES, {}, "give it nets=1, or optimize by hand"),
        (with_a_stranger, DYREP, {}, "group 0 of the optimizer has 2 parameters that aren't the model's"),
        (without_forward, DYREP, {}, "has no forward of its own, and its convs lie in first, second: name the module"),
        (frozen_into_one_function, DYREP, {}, "no conv of .* can be expanded"),
        (with_manual_optimization, DYREP, {"scaler": True}, "gradients are unscaled before the callback sees them"),
        (Classifier, DYREP, {"callbacks": ["StochasticWeightAveraging"]}, "keeps a copy that can't follow"),
    ],
)
def test_what_can_t_be_served_is_refused_before_training(
    make: Any, schedule: Schedule, options: dict[str, Any], message: str
) -> None:
    module = make()
    before, text = copy.deepcopy(module.state_dict()), str(module)
    options = dict(options)
    others = [getattr(pl.callbacks, name)(swa_lrs=0.1) for name in options.pop("callbacks", [])]
    if options.pop("scaler", False):
        options["plugins"] = [pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    callback = lightning.RepFXCallback(schedule, score=score)
    trainer = trainer_of(1, callback, *others, **options)
    with pytest.raises(InvalidInput, match=message):
        trainer.fit(module, loader())
    assert same_state(module.state_dict(), before)
    assert str(module) == text


def synchronized() -> Any:
    strategy = pl.strategies.DDPStrategy()
    strategy._layer_sync = object()  # as Trainer(sync_batchnorm=True) does
    return strategy


@pytest.mark.parametrize(
    ("strategy", "schedule", "message"),
    [
        (lambda: pl.strategies.FSDPStrategy(), DYREP, "FSDPStrategy keeps parameters in pieces"),
        (lambda: pl.strategies.DDPStrategy(start_method="spawn"), DYREP, "'spawn' hands back weights alone"),
        (synchronized, DYREP, "call torch.nn.SyncBatchNorm"),
        (lambda: pl.strategies.DDPStrategy(), REPNAS, "train with strategy='ddp_find_unused_parameters_true'"),
    ],
)
def test_ways_to_train_that_can_t_be_served(strategy: Any, schedule: Schedule, message: str) -> None:
    trainer = SimpleNamespace(strategy=strategy(), precision_plugin=None, callbacks=[])
    module = Classifier()
    with pytest.raises(InvalidInput, match=message):
        lightning.RepFXCallback(schedule).setup(trainer, module, "fit")
    assert not vars(module).keys() & {"on_save_checkpoint", "on_load_checkpoint"}
