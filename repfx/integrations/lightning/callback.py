"""repfx inside Lightning 2: a callback that lets a schedule change a LightningModule while a Trainer trains it.

A checkpoint of the Trainer holds for it, under ``checkpoint["repfx"]``, plain values and tensors: the structure of the LightningModule, of
the same moment as its weights; where the driver and the random numbers stood; which parameters each group of the optimizers had.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from repfx.change.carry import copy_in
from repfx.change.companion import Score
from repfx.change.driver import Driver
from repfx.change.optimizer_groups import fill_groups, names_by_group
from repfx.change.schedule import Schedule
from repfx.change.structure import Skeleton
from repfx.errors import InvalidInput
from repfx.integrations.lightning.checkpoint import (
    KEY,
    entry_in,
    entry_of,
    load_weights,
    rebuild,
    take_to,
    write_structure,
)
from repfx.integrations.lightning.data import TrainingData
from repfx.integrations.lightning.hooks import Before
from repfx.integrations.lightning.limits import (
    model_path,
    require_one_trainer,
    require_open_sites,
    require_served,
    trains,
)
from repfx.records.journal import Action, from_json
from repfx.records.notes import copy_without_numbers
from repfx.records.random_state import read_random_state, set_random_state

__all__ = ["RepFXCallback", "load_weights", "rebuild"]


def _callback_class() -> Any:
    """Lightning's `Callback`: of the package that is in use already, if there are both."""
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    raise InvalidInput("this needs Lightning, which is missing: pip install 'repfx[lightning]'.")


class RepFXCallback(_callback_class()):  # type: ignore[misc]
    """Changes a LightningModule while a Trainer trains it, as a schedule decides; `driver` is there once training begins.

    The optimizers, Lightning's `WeightAveraging` and `DistributedDataParallel` follow. A checkpoint holds the structure beside the
    weights, so that ``trainer.fit(…, ckpt_path=…)`` goes on as if nothing had happened, and ``trainer.test(ckpt_path="best")`` tests that
    model. With manual optimization, the gradients are observed where the optimizer that trains the model makes its step.

    Args:
        schedule: when and how the structure changes.
        model: path of the module to be changed, such as ``"net"``; by default the one child of the LightningModule that holds its convs,
            and if there are several, the LightningModule itself.
        calibrate: inputs of that module, or a data loader, for the statistics of new BatchNorms; by default the Trainer's own
            training data, of whose batches the first entry is the input.
        score: what a candidate of a search is worth, from the plain net that it is when fused; the higher the better.
        ema: path of a module of the LightningModule that holds an averaged copy of that module, as an `AveragedModel` does. The copy of
            Lightning's `WeightAveraging` is found by itself.
        random_state: whether a run that goes on in one process takes over the random numbers of the checkpoint.
        verbose: whether each change is printed.

    Raises:
        InvalidInput: when fit begins, for what can't be served, with the reason.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        model: str | None = None,
        calibrate: Iterable[Any] | None = None,
        score: Score | None = None,
        ema: str | None = None,
        random_state: bool = True,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.driver: Driver | None = None
        self._path = model
        self._calibrate = calibrate
        self._score = score
        self._ema = ema
        self._takes_random_state = random_state
        self._verbose = verbose
        self._module: Any = None
        self._skeleton: Skeleton | None = None
        self._state: Mapping[str, Any] | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._first_epoch = 0

    # ---- Lightning's hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check what is asked for; let the structure be written and rebuilt in the LightningModule's own hooks."""
        if stage == "fit":
            require_served(trainer, pl_module, self.schedule, self._ema)
        if self._module is not pl_module:
            self._module, self._skeleton, self._state, self.driver = pl_module, None, None, None
        self._resumed = None
        Before.hang(pl_module, "on_save_checkpoint", write_structure)  # and stays: weights alone would fit nothing
        Before.hang(pl_module, "on_load_checkpoint", partial(self._load, trainer))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Arrange the new optimizers as they were, before Lightning loads their states by number."""
        groups = [names_by_group(optimizer, pl_module) for optimizer in trainer.optimizers]
        require_one_trainer(pl_module, self._model_in(pl_module), trainer.optimizers)
        if self._resumed is None:
            return
        known = self._resumed["optimizers"]
        if known is None or len(known) != len(groups):
            raise InvalidInput(
                f"the checkpoint doesn't tell the groups of {len(groups)} optimizers: load its weights alone, by load_weights."
            )
        for optimizer, names in zip(trainer.optimizers, known):
            fill_groups(optimizer, pl_module, names)
        self._take_over_random_state(trainer)  # before the data of the next epoch are shuffled

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the driver, now that data, optimizers and whatever a checkpoint held are there."""
        model = self._model_in(pl_module)
        require_open_sites(model)
        self._keep_skeleton(model)
        batches = trainer.num_training_batches
        counted = pl_module.automatic_optimization and math.isfinite(batches)
        state = self._state if self.driver is None else self.driver.state_dict()
        self.driver = Driver(
            model,
            trainer.optimizers,
            self.schedule,
            calibrate=TrainingData(trainer) if self._calibrate is None else self._calibrate,
            ema=self._average_of(trainer, pl_module),
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            steps_per_epoch=math.ceil(batches / trainer.accumulate_grad_batches) if counted else None,
            score=self._score,
            state=state,
        )
        if self._resumed is None or state is None:
            self._first_epoch = trainer.current_epoch - self.driver.epoch
        else:
            self._first_epoch = self._resumed["first_epoch"]
            if _shuffles_anew(trainer.fit_loop):
                self._take_over_random_state(trainer)
        if state is None:
            self._follow(trainer, pl_module, [action for _, action in self.driver.history])

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Make up for an epoch whose end was cut off, between another callback's checkpoint and this one's turn."""
        while self._is_behind(trainer.current_epoch):
            self._end_epoch(trainer, pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Observe the last gradients before a step, which are still scaled if there is a scaler."""
        if self.driver is not None and pl_module.automatic_optimization and not trainer.fit_loop._should_accumulate():
            self.driver.after_backward()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """With manual optimization, observe the gradients of the optimizer that trains the model."""
        automatic = pl_module.automatic_optimization
        if self.driver is not None and not automatic and trains(optimizer, self.driver.model):
            self.driver.after_backward()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Let the schedule change the model; Lightning's own checkpoints of this time are written afterwards."""
        if self._is_behind(trainer.current_epoch + 1):  # else it was done before the checkpoint that was loaded
            self._end_epoch(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write down all that belongs to this moment."""
        state = self._state if self.driver is None else self.driver.state_dict()
        checkpoint[KEY] = entry_of(pl_module) | {
            "driver": state,
            "first_epoch": self._first_epoch,
            "optimizers": _groups(trainer, pl_module),
            "random_state": read_random_state(),
        }

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the hook of loading as it was."""
        Before.take_down(pl_module, "on_load_checkpoint")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same, where there will be no `teardown`."""
        Before.take_down(pl_module, "on_load_checkpoint")

    # ---- what they do

    def _model_in(self, module: Any) -> nn.Module:
        path = model_path(module, self._ema) if self._path is None else self._path
        model: nn.Module = module.get_submodule(path)
        return model.get_submodule("_orig_mod") if hasattr(model, "_orig_mod") else model

    def _keep_skeleton(self, model: nn.Module) -> None:
        if self._skeleton is None:
            self._skeleton = Skeleton(model)

    def _average_of(self, trainer: Any, module: Any) -> nn.Module | None:
        if self._ema is not None:
            return copy_in(module.get_submodule(self._ema), self._model_in(module))
        averages = _averages(trainer)
        return self._model_in(averages[0]) if averages else None

    def _take_over_random_state(self, trainer: Any) -> None:
        assert self._resumed is not None
        if self._takes_random_state and trainer.world_size == 1:
            set_random_state(self._resumed["random_state"])

    def _is_behind(self, epoch: int) -> bool:
        return self.driver is not None and self.driver.epoch < epoch - self._first_epoch

    def _end_epoch(self, trainer: Any, module: Any) -> None:
        assert self.driver is not None
        self._follow(trainer, module, self.driver.after_epoch())

    def _follow(self, trainer: Any, module: Any, actions: Iterable[Action]) -> None:
        """What looked at the parameters once looks again."""
        actions = tuple(actions)
        for action in actions if self._verbose else ():
            module.print(f"repfx, epoch {trainer.current_epoch}: {action}")
        strategy = trainer.strategy
        if actions and isinstance(strategy.model, nn.parallel.DistributedDataParallel):
            strategy.model = module
            strategy.configure_ddp()

    def _load(self, trainer: Any, module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Take the LightningModule, and averages of it, to the structure that a checkpoint's weights have."""
        model = self._model_in(module)
        self._keep_skeleton(model)
        entry = entry_in(checkpoint)
        for each in (module, *_averages(trainer)):
            self._rebuild(each, entry)
        self._state = entry.get("driver")
        if self._state is not None:
            self._resumed = entry
        if self.driver is not None:
            if self._state is None:
                self.driver = None
            else:
                self.driver.load_state_dict(self._state)

    def _rebuild(self, module: Any, entry: Mapping[str, Any]) -> None:
        assert self._skeleton is not None
        model = self._model_in(module)
        models = [model] if self._ema is None else [model, copy_in(module.get_submodule(self._ema), model)]
        paths = {inner: path for path, inner in module.named_modules()}
        journals = entry.get("journals")
        for each in models:
            wanted = self._skeleton.journal if journals is None else from_json(journals.get(paths[each], "[]"))
            take_to(copy_without_numbers(each), wanted, self._skeleton)  # raises before anything is changed
            take_to(each, wanted, self._skeleton)
        rebuild(module, {KEY: entry})


def _shuffles_anew(loop: Any) -> bool:
    """Whether the data that a run goes on with are shuffled later than now: where an epoch has to be ended first, or Lightning is older."""
    return bool(loop.restarting or not getattr(loop, "is_resuming", False))


def _groups(trainer: Any, module: Any) -> list[list[list[str]]] | None:
    """None if the Trainer's optimizers are of an earlier structure, as after ``trainer.test(ckpt_path=…)``."""
    try:
        return [names_by_group(optimizer, module) for optimizer in trainer.optimizers]
    except InvalidInput:
        return None


def _averages(trainer: Any) -> list[Any]:
    """The copies of the LightningModule that callbacks such as `WeightAveraging` hold."""
    held = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [each.module for each in held if isinstance(each, torch.optim.swa_utils.AveragedModel)]
