"""`train`: trains a model on a data set as a recipe says, in one process or many, and resumes where it was interrupted."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

from repfx.blocks.architecture import Architecture
from repfx.blocks.drop_path import set_drop_path
from repfx.blocks.scales import gammas_in
from repfx.change.checkpoint import load, save
from repfx.change.driver import Driver
from repfx.change.optimizer_groups import lay_out_state
from repfx.change.schedule import Schedule, Unchanged
from repfx.data.dataset import DataSet, Images, every, labels_of, part_of
from repfx.data.predictions import check_fit, logits_of, mean_log_likelihood
from repfx.data.reading import told
from repfx.data.seeds import seed_of
from repfx.errors import Interrupted, InvalidInput, RepfxError, first_line
from repfx.measuring.cost import count_macs_in_batch, count_parameters
from repfx.records.journal import Action
from repfx.records.notes import copy_of
from repfx.records.plain_values import flat, to_plain
from repfx.training.engine import accelerator_for
from repfx.training.interruption import noticed_signals
from repfx.training.learning_rate import curve_of
from repfx.training.objective.auxiliary import Auxiliary
from repfx.training.objective.loss import loss_of, teacher_of
from repfx.training.optimizers import RATE_SCALE, make_optimizer
from repfx.training.process import Place
from repfx.training.recipe import Recipe
from repfx.training.runs.best import accuracy_of, best_of, is_over, story_of_end
from repfx.training.runs.gradients import Gradients
from repfx.training.runs.history import Epoch, History
from repfx.training.stem import Stem
from repfx.training.supply import Supply

_STEPS_BETWEEN_LOOKS = 10  # on devices other than the CPU, where a look makes the host wait


@dataclass(frozen=True)
class Step:
    """Progress of a training after a step: `number` of `total` steps, and the epoch, both counted from 1."""

    number: int
    total: int
    epoch: int
    loss: float


@dataclass(frozen=True)
class Watcher:
    """Functions to call as the work goes on: `on_stage` before each part of it, `on_notice` with a sentence, the others in training."""

    on_stage: Callable[[str], None] = lambda stage: None
    on_step: Callable[[Step], None] = lambda step: None
    on_epoch: Callable[[History], None] = lambda history: None
    on_notice: Callable[[str], None] = lambda sentence: None


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Args:
        model: the trained model in eval mode; the averaged one, if there is an average.
        history: the history of the run, epoch by epoch.
        architecture: the architecture that a search found; None if the schedule is no search.
        unreadable: reasons why image files were left out of the training, by path.
    """

    model: nn.Module
    history: History
    architecture: Architecture | None
    unreadable: Mapping[str, str] = field(default_factory=dict)


def train(
    model: nn.Module,
    data: DataSet,
    recipe: Recipe,
    schedule: Schedule | None = None,
    *,
    watcher: Watcher | None = None,
    plain: nn.Module | None = None,
    checkpoint: Path | None = None,
    best: Path | None = None,
    resume: bool = False,
    accelerator: Any = None,
    unreadable: Mapping[str, str] | None = None,
) -> Trained:
    """Train a model in place on a data set. Equal seeds give equal weights, also after an interruption.

    Args:
        schedule: schedule that changes the model's structure during training. The learning rate begins anew with each of its cycles. If it
            scores candidates, it scores them on every tenth training image of each class, or on `recipe.scored_images`, and the model
            isn't trained on these images.
        watcher: functions that are called after each step and epoch, in the first process.
        plain: model whose cost the history holds in epoch 0, to compare with; None takes `model` as it is given.
        checkpoint: file for the state of the run, written after each epoch and when the run is interrupted.
        best: file for the model of the best epoch, as far as the recipe keeps it.
        resume: whether to continue from `checkpoint` if it exists. A recipe with more epochs than the run had makes it longer: from there
            on, the learning rate follows the curve over all epochs.
        accelerator: accelerator of this process, as `accelerator_for` yields it; None sets one up.
        unreadable: reasons why image files are left out, by path, as far as they were told before. They aren't told again.

    Raises:
        InvalidInput: the model doesn't take the images or gives no logits for their classes, or the recipe can't be followed here.
        RepfxError: the loss is no longer finite.
        Interrupted: SIGINT or SIGTERM ended the training; the state is in the checkpoint.
    """
    with ExitStack() as stack:
        if accelerator is None:
            accelerator = stack.enter_context(accelerator_for(recipe))
        run = _Training(model, data, recipe, schedule or Unchanged(), accelerator, watcher or Watcher(), plain or model)
        run.unreadable = dict(unreadable or {})
        if checkpoint is not None and resume and checkpoint.is_file():
            run.load(checkpoint)
        run.best = None if recipe.keep == "last" else best
        return run.go(checkpoint, stack.enter_context(noticed_signals()))


class _Training:
    """One training in progress: its model, optimizer and driver, and how far it has come."""

    def __init__(
        self,
        model: nn.Module,
        data: DataSet,
        recipe: Recipe,
        schedule: Schedule,
        accelerator: Any,
        watcher: Watcher,
        plain: nn.Module,
    ) -> None:
        _require_possible(recipe, schedule)
        self.recipe, self.place = recipe, Place(accelerator, recipe)
        self.accelerator = accelerator
        self.watcher = watcher if self.place.is_first else Watcher()
        self.model, self.data = self.place.put(model), data
        self.place.put(plain)
        logits = check_fit(model, data, self.place.device)
        images, held_out = hold_out(data.train, recipe.scored_images) if schedule.needs_score else (data.train, None)
        self.supply, score = Supply(images, recipe, self.place), None
        if held_out is not None:
            to_score = self.supply.to_score(held_out)
            score = partial(mean_log_likelihood, batches=to_score, device=self.place.device)
        self.steps = self.supply.steps
        self.cycle = (schedule.cycle or recipe.epochs) * self.steps
        self.curve = curve_of(
            recipe.rates,
            self.cycle,
            warm_up=None if recipe.warm_up is None else round(recipe.warm_up * self.steps),
            steps_down=[epoch * self.steps for epoch in recipe.milestones],
            factor=recipe.milestone_factor,
        )
        self.mix = recipe.augmentation.of_batch(logits)
        teacher = teacher_of(recipe, logits)
        self.place.lay_out([model, *([] if teacher is None else [teacher])], self._two_images())
        self.loss = loss_of(recipe, teacher)
        self._try_loss(logits)
        self.stem = Stem.up_to(model, recipe.freeze)
        self.stem.freeze(model)
        self.unused_parameters = schedule.closes_paths or (self.place.processes > 1 and self._has_other_outputs())
        self.optimizer = make_optimizer(model, recipe, self.place.device)
        self.auxiliary = None
        if recipe.auxiliary is not None:
            self.auxiliary = Auxiliary(model, recipe, self.place.bring(self._two_images()), logits)
        self.average = _average(model, recipe.average) if recipe.average else None
        self.gradients = Gradients() if recipe.gradients else None
        self.progress = _Progress()
        self.unreadable: dict[str, str] = {}
        self.best: Path | None = None
        before = self._cost(plain)
        self.driver = Driver(
            model,
            self.optimizer,
            schedule,
            calibrate=self.supply,
            ema=self.average,
            scaler=accelerator.scaler,
            steps_per_epoch=self.steps,
            score=score,
        )
        self.history = History(
            (Epoch(0, None, None, None, None, None, *before, self._last_actions(), gammas_in(model)),)
        )

    def go(self, checkpoint: Path | None, stopping: Callable[[], bool]) -> Trained:
        """Train to the last epoch; raise `Interrupted` once `stopping` returns True."""
        self._prepare()
        self.watcher.on_epoch(self.history)  # first, because it may clear the folder that a tracker writes into
        if self.recipe.log_with:
            self.accelerator.init_trackers("repfx", config=_loggable(self.recipe))
        patience = self.recipe.patience
        while self.progress.epoch < self.recipe.epochs and not is_over(self.history, patience):
            for x, y in self._rest_of_epoch():
                self._step(x, y)
                if self._looks and self.place.agree(stopping()):
                    self.save(checkpoint)
                    raise Interrupted(f"stopped in epoch {self.progress.epoch + 1} after step {self.progress.step}")
            self._end_epoch()
            self.save(checkpoint)
        if self.place.agree(stopping()):
            raise Interrupted("stopped after the last epoch")
        if self.progress.epoch < self.recipe.epochs:
            self.watcher.on_notice(story_of_end(self.history, patience))
        if self.recipe.drop_path:
            set_drop_path(self.model, 0.0)
        search = self.driver.search
        model = self.model if self.average is None else self.average.module
        return Trained(model.eval(), self.history, None if search is None else search.architecture, self.unreadable)

    def _prepare(self) -> None:
        """Wrap the model and the optimizer for training; to be called again after each change of the structure."""
        self.net = self.place.wrap(self.model, unused_parameters=self.unused_parameters, auxiliary=self.auxiliary)
        self.steppers = [self.accelerator.prepare_optimizer(each, device_placement=False) for each in self._optimizers]

    @property
    def _weight(self) -> float:
        return 0.0 if self.auxiliary is None else self.auxiliary.weight

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer, *([] if self.auxiliary is None else [self.auxiliary.optimizer])]

    def _has_other_outputs(self) -> bool:
        """Tell whether the model in training mode has heads beside the one that is trained."""
        with torch.no_grad():
            return not isinstance(copy_of(self.model).train()(self.place.bring(self._two_images())), Tensor)

    def _two_images(self) -> Tensor:
        return torch.stack([self.data.train[index][0] for index in range(2)])

    def _try_loss(self, logits: int) -> None:
        """Try the loss once, so that a teacher or a mix that doesn't fit the images fails before an older run is replaced."""
        images = self.place.bring(self._two_images())
        x, labels = self.mix(images, self.place.bring(torch.tensor([0, 1 % logits])))
        try:
            self.loss(torch.zeros(2, logits, device=self.place.device), x, labels)
        except RuntimeError as error:
            raise InvalidInput(f"the teacher fails on images {tuple(x.shape[1:])}: {first_line(error)}.") from error

    # ---- a step

    def _rest_of_epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._began = time.perf_counter()
        self.stem.train(self.model)
        if self.recipe.drop_path:
            set_drop_path(self.model, self.recipe.drop_path * self.progress.epoch / self.recipe.epochs)
        yield from self.supply.loader(self.progress.epoch, self.progress.step)

    def _step(self, x: Tensor, y: Tensor) -> None:
        number = self.progress.epoch * self.steps + self.progress.step
        torch.manual_seed(seed_of(self.recipe.seed, self.place.process, number))
        x, labels = self.mix(self.place.bring(x), self.place.bring(y))
        self._set_rate(number)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss = torch.zeros((), device=self.place.device)
        for share in self.driver.shares():
            with self.accelerator.autocast():
                logits, *others = self.net(x)
            part = share * self.loss(logits.float(), x, labels)
            for each in others:
                part = part + share * self._weight * self.loss(each.float(), x, labels)
            self.accelerator.backward(part)
            loss += part.detach()
        self.driver.after_backward()
        if self.gradients is not None:
            self.gradients.add(self.model, self.accelerator.scaler)
        if self.recipe.clip:
            self.accelerator.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        for stepper in self.steppers:
            stepper.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.progress.step += 1
        self.progress.sum_of_losses = self.progress.sum_of_losses + loss
        if self._looks:
            value = loss.item()
            self._require_finite(value)
            self.watcher.on_step(Step(number + 1, self.recipe.epochs * self.steps, self.progress.epoch + 1, value))

    @property
    def _looks(self) -> bool:
        """Whether to read the loss and check for a request to stop after this step; all processes do so at the same step."""
        step = self.progress.step
        return self.place.device.type == "cpu" or step % _STEPS_BETWEEN_LOOKS == 0 or step == self.steps

    def _set_rate(self, number: int) -> None:
        share = self.curve(number % self.cycle)
        for group in [group for each in self._optimizers for group in each.param_groups]:
            group["lr"] = self.recipe.learning_rate * share * group.get(RATE_SCALE, 1.0)

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            epoch, rate = self.progress.epoch + 1, self.recipe.learning_rate
            raise RepfxError(f"the loss is {loss} in epoch {epoch}: try a lower learning rate than {rate}.")

    # ---- an epoch

    def _end_epoch(self) -> None:
        progress = self.progress
        loss = self.place.mean(progress.sum_of_losses) / self.steps
        self._require_finite(loss)
        tested = (progress.epoch + 1) % self.recipe.test_every == 0 or progress.epoch + 1 == self.recipe.epochs
        accuracy = self._accuracy(self.model) if tested else None
        average = self._accuracy(self.average.module) if tested and self.average is not None else None
        self._keep(progress.epoch + 1, accuracy if average is None else average)
        cost, gammas = self._cost(self.model), gammas_in(self.model)
        self.supply.epoch += 1
        torch.manual_seed(seed_of(self.recipe.seed, progress.epoch))  # new branches are the same in a resumed run
        if self.driver.after_epoch():
            self._prepare()
        seconds = progress.seconds + time.perf_counter() - self._began
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        number = progress.epoch + 1
        gradients: Mapping[str, Mapping[str, float]] = {}
        if self.gradients is not None:
            gradients = self.gradients.means()
            self.gradients.clear()
        entry = Epoch(number, loss, accuracy, average, rate, seconds, *cost, self._last_actions(), gammas, gradients)
        self.history = History((*self.history.epochs, entry))
        self.progress = _Progress(number)
        self.watcher.on_epoch(self.history)
        self._log(entry)
        self._tell_unreadable()

    def _keep(self, epoch: int, accuracy: float | None) -> None:
        """Write the model of this epoch into the file for the best one if its accuracy is higher than all before."""
        before = best_of(self.history)
        if self.best is None or not self.place.is_first or accuracy is None:
            return
        if before is None or accuracy > (accuracy_of(before) or 0.0):
            model = self.model if self.average is None else self.average.module
            save(self.best, model, random_state=False, progress={"epoch": epoch})

    def _tell_unreadable(self) -> None:
        found = self.place.gather(self.supply.unreadable)
        new = self.supply.reasons_for([path for path in found if path not in self.unreadable])
        if new:
            self.unreadable |= new
            self.watcher.on_notice(told(new, "training image"))

    def _last_actions(self) -> tuple[Action, ...]:
        return tuple(action for epoch, action in self.driver.history if epoch == self.driver.epoch)

    def _log(self, entry: Epoch) -> None:
        values = {"loss": entry.loss, "accuracy": entry.accuracy, "accuracy of the average": entry.ema_accuracy}
        values |= {"learning rate": entry.learning_rate, "parameters": entry.parameters, "MACs": entry.macs}
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=entry.epoch)

    def _accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the test images, which are divided among the processes."""
        count = len(self.data.test)  # type: ignore[arg-type]
        own = Subset(self.data.test, range(self.place.process, count, self.place.processes))
        right = torch.zeros((), dtype=torch.long, device=self.place.device)
        training = model.training
        self.place.share_buffers(model)
        model.eval()
        with torch.no_grad():
            for x, y in DataLoader(own, self.recipe.batch_size, num_workers=self.recipe.workers):
                right += (logits_of(model(self.place.bring(x))).argmax(1) == self.place.bring(y)).sum()
        self.stem.train(model, training)
        return int(self.accelerator.reduce(right)) / count

    def _cost(self, model: nn.Module) -> tuple[int, int]:
        image = self.place.bring(self.data.test[0][0][None])
        return count_parameters(model), count_macs_in_batch(model, image, self.recipe.batch_size)

    # ---- checkpoints

    def save(self, path: Path | None) -> None:
        """Write all that the run needs to be resumed into the file `path`; do nothing for None."""
        if path is None:
            return
        self.driver.synchronize()
        if self.place.is_first:
            seconds = self.progress.seconds + time.perf_counter() - self._began if self.progress.step else 0.0
            sum_of_losses, history = float(self.progress.sum_of_losses), self.history.to_json()
            state = asdict(self.progress) | {"seconds": seconds, "sum_of_losses": sum_of_losses, "history": history}
            state["unreadable"] = json.dumps(self.unreadable)
            save(path, self.model, self.optimizer, self.driver, random_state=False, progress=state, **self._parts())
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        """Take over the state that `save` wrote."""
        state: dict[str, Any] = {}
        load(path, self.model, self.optimizer, self.driver, random_state=False, progress=state, **self._parts())
        self.place.put(self.model)
        self.stem.freeze(self.model)
        lay_out_state(self.optimizer)
        self.history = History.from_json(state.pop("history"), path)
        self.unreadable |= json.loads(state.pop("unreadable", "{}"))
        self.progress = _Progress(**state)
        self.supply.epoch = self.progress.epoch

    def _parts(self) -> dict[str, Any]:
        parts = {"scaler": self.accelerator.scaler, "auxiliary": self.auxiliary, "gradients": self.gradients}
        return {name: part for name, part in parts.items() if part is not None}


@dataclass
class _Progress:
    """Progress of the training: whole epochs, and steps of the next one."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    sum_of_losses: float | Tensor = 0.0


def hold_out(images: Images, most: int = 0) -> tuple[Images, Images]:
    """Return two parts of the images: all but every tenth of each class, and every tenth of each class.

    Args:
        most: greatest size of the second part, for which it is every n-th image with n > 10 if need be; 0 for any size.

    Raises:
        InvalidInput: no class has ten images, or n images.
    """
    labels = labels_of(images)
    step = max(10, math.ceil(len(labels) / most)) if most else 10
    chosen = every(step, labels)
    if not chosen.any():
        few = f"there are fewer than {step} training images of each class: too few to score candidates on"
        raise InvalidInput(f"{few}{f' with scored_images = {most}' if step > 10 else ''}.")
    kept, held_out = ((mask).nonzero().flatten().tolist() for mask in (~chosen, chosen))
    return part_of(images, kept), part_of(images, held_out)


def _average(model: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _loggable(recipe: Recipe) -> dict[str, Any]:
    return {
        key: value if isinstance(value, (int, float, str)) else str(value)
        for key, value in flat(to_plain(recipe)).items()
    }


def _require_possible(recipe: Recipe, schedule: Schedule) -> None:
    cycle = schedule.cycle or recipe.epochs
    if recipe.warm_up is not None and recipe.warm_up >= cycle:
        raise InvalidInput(
            f"warm_up is {recipe.warm_up} epochs; it must be less than the {cycle} epochs of the learning rate's cycle."
        )
    if schedule.closes_paths and (recipe.keep != "last" or recipe.patience):
        asked = f"keep = {recipe.keep!r}" if recipe.keep != "last" else f"patience = {recipe.patience}"
        raise InvalidInput(
            f"{type(schedule).__name__} is a search, which has found something only at its end: leave {asked} out."
        )
    if recipe.compile and schedule.closes_paths:
        name = type(schedule).__name__
        raise InvalidInput(
            f"{name} opens other gates at every step, so torch.compile would recompile each time: set compile = false."
        )
