"""repfx inside Lightning 2: a callback that lets a schedule change a LightningModule while a Trainer trains it.

The callback adds plain values and tensors to each checkpoint of the Trainer, under ``checkpoint["repfx"]``: the structure of the
LightningModule at the moment of its weights; the states of the driver and of the random numbers; and the names of the parameters in each
group of the optimizers.
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
from repfx.records.generators import read_random_state, set_random_state
from repfx.records.journal import Action, from_json
from repfx.records.notes import copy_without_numbers

__all__ = ["RepFXCallback", "load_weights", "rebuild"]


def _callback_class() -> Any:
    """Return Lightning's `Callback`. If both packages are installed, it is from the one that is imported already."""
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    raise InvalidInput("this needs Lightning, which is missing: pip install 'repfx[lightning]'.")


class RepFXCallback(_callback_class()):  # type: ignore[misc]
    """Change a LightningModule while a Trainer trains it, as a schedule decides; `driver` exists once training begins.

    The optimizers, Lightning's `WeightAveraging` and `DistributedDataParallel` follow each change. A checkpoint holds the structure beside
    the weights, so that ``trainer.fit(…, ckpt_path=…)`` resumes a run as if nothing had happened, and ``trainer.test(ckpt_path="best")``
    tests the model that was saved. With manual optimization, the callback observes the gradients when the optimizer that trains the model
    makes its step.

    Args:
        schedule: schedule that decides when and how the structure changes.
        model: path of the module to change, such as ``"net"``. By default it is the one child of the LightningModule that holds its convs;
            if there is no such child, it is the LightningModule itself.
        calibrate: inputs of the changed module, or a data loader, for the statistics of new BatchNorms. By default these are the Trainer's
            own training data, where the first entry of each batch is the input.
        score: function that rates a candidate of a search, given as the plain net that it is when fused; the higher the better.
        ema: path of a module of the LightningModule that holds an averaged copy of the changed module, such as an `AveragedModel`. The
            callback finds the copy of Lightning's `WeightAveraging` by itself.
        random_state: whether a run that is resumed in one process takes over the random numbers of the checkpoint.
        verbose: whether each change is printed.

    Raises:
        InvalidInput: the callback can't serve the Trainer or the LightningModule; raised when fit begins, with the reason.
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
        """Check that the Trainer can be served, and let the LightningModule's own hooks write and rebuild the structure."""
        if stage == "fit":
            require_served(trainer, pl_module, self.schedule, self._ema)
        if self._module is not pl_module:
            self._module, self._skeleton, self._state, self.driver = pl_module, None, None, None
        self._resumed = None
        # stays after training: weights without structure fit no module
        Before.hang(pl_module, "on_save_checkpoint", write_structure)
        Before.hang(pl_module, "on_load_checkpoint", partial(self._load, trainer))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the parameters of the new optimizers in their old order, before Lightning loads their states by number."""
        groups = [names_by_group(optimizer, pl_module) for optimizer in trainer.optimizers]
        require_one_trainer(pl_module, self._model_in(pl_module), trainer.optimizers)
        if self._resumed is None:
            return
        known = self._resumed["optimizers"]
        if known is None or len(known) != len(groups):
            raise InvalidInput(
                f"the checkpoint doesn't hold the groups of {len(groups)} optimizers: load its weights alone, with load_weights."
            )
        for optimizer, names in zip(trainer.optimizers, known):
            fill_groups(optimizer, pl_module, names)
        self._take_over_random_state(trainer)  # before the data of the next epoch are shuffled

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the driver, now that the data, the optimizers and the contents of a checkpoint are there."""
        model = self._model_in(pl_module)
        require_open_sites(model, self.schedule)
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
        """Make up for the end of an epoch that was cut off after another callback's checkpoint and before this one's turn."""
        while self._is_behind(trainer.current_epoch):
            self._end_epoch(trainer, pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Observe the last gradients before a step. If there is a scaler, they are still scaled."""
        if self.driver is not None and pl_module.automatic_optimization and not trainer.fit_loop._should_accumulate():
            self.driver.after_backward()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Observe the gradients of the optimizer that trains the model, if optimization is manual."""
        automatic = pl_module.automatic_optimization
        if self.driver is not None and not automatic and trains(optimizer, self.driver.model):
            self.driver.after_backward()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Let the schedule change the model. Lightning writes its own checkpoints of this epoch afterwards."""
        if self._is_behind(trainer.current_epoch + 1):  # otherwise it was done before the loaded checkpoint was written
            self._end_epoch(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the structure, the driver, the optimizers' groups and the random numbers into a checkpoint."""
        state = self._state if self.driver is None else self.driver.state_dict()
        checkpoint[KEY] = entry_of(pl_module) | {
            "driver": state,
            "first_epoch": self._first_epoch,
            "optimizers": _groups(trainer, pl_module),
            "random_state": read_random_state(),
        }

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the LightningModule back its own hook for loading."""
        Before.take_down(pl_module, "on_load_checkpoint")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the LightningModule back its own hook for loading, because no `teardown` follows an exception."""
        Before.take_down(pl_module, "on_load_checkpoint")

    # ---- what they do

    def _model_in(self, module: Any) -> nn.Module:
        path = model_path(module, self._ema, self.schedule) if self._path is None else self._path
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
        """Print the changes if `verbose`, and let `DistributedDataParallel` read the parameters again after a change."""
        actions = tuple(actions)
        for action in actions if self._verbose else ():
            module.print(f"repfx, epoch {trainer.current_epoch}: {action}")
        strategy = trainer.strategy
        if actions and isinstance(strategy.model, nn.parallel.DistributedDataParallel):
            strategy.model = module
            strategy.configure_ddp()

    def _load(self, trainer: Any, module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Give the LightningModule, and averages of it, the structure that a checkpoint's weights have."""
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
    """Tell whether a resumed run shuffles its data only after `on_train_start`.

    It does so if an epoch must be ended first, or if Lightning is an older version.
    """
    return bool(loop.restarting or not getattr(loop, "is_resuming", False))


def _groups(trainer: Any, module: Any) -> list[list[list[str]]] | None:
    """Return the parameter names of each group of each optimizer.

    Return None if the optimizers are of an earlier structure, such as after ``trainer.test(ckpt_path=…)``.
    """
    try:
        return [names_by_group(optimizer, module) for optimizer in trainer.optimizers]
    except InvalidInput:
        return None


def _averages(trainer: Any) -> list[Any]:
    """Return the copies of the LightningModule that callbacks such as `WeightAveraging` hold."""
    held = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [each.module for each in held if isinstance(each, torch.optim.swa_utils.AveragedModel)]
