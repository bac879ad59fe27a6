"""`Driver`: changes a model while it trains, as a schedule decides, together with its optimizers and averages."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from repfx.algebra.activated_norm import norm_of
from repfx.algebra.layers import Layer
from repfx.blocks.block import RepBlock
from repfx.blocks.scales import gammas_of
from repfx.blocks.stages import AttachRate
from repfx.change.carry import carry, require_open
from repfx.change.companion import Companion, Run, Score
from repfx.change.observed_saliency import ObservedSaliency
from repfx.change.ranks import take_from_first_rank
from repfx.change.schedule import Candidate, Observation, ObservedBlock, Schedule, Unchanged
from repfx.errors import InvalidInput
from repfx.passes.freeze import is_frozen
from repfx.records.journal import Action, apply, from_json, journal, to_json
from repfx.records.module_tree import has
from repfx.records.wrappers import bare, require_layers
from repfx.tracing.sites import Site, find_sites, sites_known

_CPU = torch.device("cpu")


class Driver:
    """Change the structure of a model while it trains, as a schedule decides.

    The driver observes the model, asks the schedule what to change, and makes the changes in place: model and optimizer stay the same
    objects. Changes that are due before the first epoch are made at once, so make the driver before the model is wrapped or compiled.

    In a run of `torch.distributed`, make one driver on each rank. Decisions are made from sums over all ranks, and new numbers are taken
    from the first rank.

    Args:
        model: the model to be trained. If it is a `DistributedDataParallel` or a compiled module, the module inside is meant.
        optimizer: the optimizer of the model's parameters, or several.
        schedule: the schedule, which decides when and how the structure changes.
        calibrate: inputs of the model, or a data loader, for the statistics of new BatchNorms. It is read at each adjustment.
        ema: a module that holds a copy of the model, such as `torch.optim.swa_utils.AveragedModel`; it is changed in the same way.
        scaler: the `torch.amp.GradScaler` of the run. With it, saliency is computed from unscaled gradients, and a step that overflowed
            doesn't count.
        steps_per_epoch: number of calls of `after_backward` in an epoch, for schedules that change something step by step.
        score: the score of a candidate in a search, the higher the better: a function of the plain net that the candidate is when fused,
            in eval mode.
        state: the `state_dict` of an earlier driver of this model. The model must have its structure already, and nothing is done at once.

    Raises:
        InvalidInput: the schedule needs data and `calibrate` isn't given, the model's parameters are sharded, an optimizer can't take up
            new parameters, or `ema` is no module.

    >>> import repfx
    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> images = torch.randn(4, 8, 9, 7)
    >>> driver = Driver(model, optimizer, repfx.schedules.DyRep(interval=1), calibrate=[images])
    >>> model(images).square().mean().backward()
    >>> driver.after_backward()
    >>> optimizer.step()
    >>> print(*driver.after_epoch())
    expand 0: 1x1, 1x1-kxk, 1x1-avg, 1xk, kx1, identity
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        schedule: Schedule,
        *,
        calibrate: Iterable[Any] | None = None,
        ema: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        steps_per_epoch: int | None = None,
        score: Score | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        schedule.require_squeezable()
        if schedule.needs_data and calibrate is None:
            raise InvalidInput(
                f"{type(schedule).__name__} measures new BatchNorms on data: give `calibrate`, the training data's loader."
            )
        require_layers(model)
        self.model = bare(model)
        _require_whole(self.model)
        self.optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        if not isinstance(schedule, Unchanged):
            require_open(self.optimizers)
            _require_follower(ema)
        self.schedule = schedule
        self.ema = ema
        self.epoch = 0
        self.history: list[tuple[int, Action]] = []
        self._calibrate = calibrate
        self._scaler = scaler
        self._steps_per_epoch = steps_per_epoch
        self._step = 0
        self._saliency: ObservedSaliency | None = None
        self._found: tuple[object, list[Site]] | None = None
        averages = [] if ema is None else [ema]
        data = None if calibrate is None else _First(calibrate, schedule)
        self.companion: Companion = schedule.companion(Run(self.model, self.optimizers, averages, score, data))
        if state is None:
            self._adjust()
        else:
            self.load_state_dict(state)

    @property
    def parts(self) -> dict[str, Any]:
        """The parts of the run that `repfx.save` and `repfx.load` handle together with the driver, by name."""
        return {} if self.ema is None else {"ema": self.ema}

    @property
    def search(self) -> Any:
        """The companion of the schedule, which for a search is its `Searcher`; None if the schedule has none."""
        return None if type(self.companion) is Companion else self.companion

    def after_backward(self) -> None:
        """Observe the gradients. Call this between `backward()` and the optimizer's step, before a `GradScaler` unscales them."""
        metric, last = self.schedule.metric, self.schedule.squeeze_from
        if metric is not None and (last is None or self.epoch < last):
            if self._saliency is None:
                self._saliency = ObservedSaliency.of(self._candidates())
            weights = [self.model.get_submodule(site).weight for site in self._saliency.sites]
            self._saliency.add(metric, weights, self._scaler)
        self.companion.after_backward(self.epoch, self._scaler)
        self._step += 1
        self.companion.before_step(self.epoch, self._step)
        self._set_attach_rate()

    def shares(self) -> Iterator[float]:
        """Yield the factors of the loss in the next step: a single 1, unless a search averages the step over several nets.

        Do a forward and a backward pass for each factor, and call `after_backward` afterwards:
        ``for share in driver.shares(): (share * loss_fn(model(x), y)).backward()``.
        """
        yield from self.companion.shares(self.epoch, self._step)

    def after_epoch(self) -> tuple[Action, ...]:
        """End an epoch: make the changes that the schedule decides on, in place.

        Returns:
            The actions that were done. If there are any, wrap the model anew in its `DistributedDataParallel`.
        """
        step, saliency = self._step, self._saliency
        self.epoch += 1
        self._step = 0
        try:
            return self._adjust()
        except Exception:  # so that it can be tried again
            self.epoch -= 1
            self._step, self._saliency = step, saliency
            raise

    def observe(self) -> Observation:
        """Return what the schedule would see now, over all ranks together."""
        saliency = {} if self._saliency is None else self._saliency.means()
        blocks = {path: module for path, module in self.model.named_modules() if isinstance(module, RepBlock)}
        candidates = [
            Candidate(site.path, site.conv, _depth(site.path, blocks), saliency.get(site.path, 0.0), site.own)
            for site in self._candidates()
            if site.conv is not None
        ]
        seen = [
            ObservedBlock(
                path,
                block.site,
                tuple(block.branches),
                _relative_scales(block),
                (block.norm_path or block.norm_behind) is not None,
                _depth(path, blocks),
                is_frozen(block),
                None if block.gates is None else block.gates.style,
                block.running_in(training=False),
            )
            for path, block in blocks.items()
            if block.conv.weight.requires_grad or is_frozen(block) or block.rests or block.gates is not None
        ]
        return Observation(self.epoch, candidates, seen, tuple(blocks))

    def synchronize(self) -> None:
        """Give all ranks the mean of what each has observed, so that all have the same state. Call this on all ranks before one saves."""
        if self._saliency is not None:
            self._saliency.share()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the driver. The changes that rebuild the model are in the model's journal."""
        saliency = None if self._saliency is None else self._saliency.state_dict()
        epochs, actions = [epoch for epoch, _ in self.history], [action for _, action in self.history]
        history = {"epochs": epochs, "actions": to_json(actions)}
        companion = self.companion.state_dict()
        return {"epoch": self.epoch, "step": self._step, "saliency": saliency, "history": history, "search": companion}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned.

        Raises:
            InvalidInput: the state is malformed. `repfx.load` then undoes what has been loaded of it.
        """
        history = state["history"]
        epochs, actions = list(history["epochs"]), from_json(history["actions"])
        for name, number in (("epoch", state["epoch"]), ("step", state["step"]), *(("epoch", each) for each in epochs)):
            if type(number) is not int or not 0 <= number < 2**63:
                raise InvalidInput(f"{name} is {str(number)[:80]!r}; it must be a whole number from 0")
        saliency, device = state["saliency"], next((each.device for each in self.model.parameters()), _CPU)
        self._saliency = None if saliency is None else ObservedSaliency.from_state(saliency, device)
        self.history = list(zip(epochs, actions, strict=True))
        self.epoch, self._step = state["epoch"], state["step"]
        if state["search"] is not None:
            self.companion.load_state_dict(state["search"])

    def require_fits(self) -> None:
        """Raise `InvalidInput` if what was loaded is about another model than this one, in the structure that it has now."""
        for site in [] if self._saliency is None else self._saliency.sites:
            if not has(self.model, f"{site}.weight"):
                raise InvalidInput(f"it has observed a conv at {site!r}, and the model has none there")
        self.companion.require_fits()

    def _sites(self) -> list[Site]:
        """Return the model's sites. They are found once and kept until a module or the journal changes."""
        present = tuple(self.model.named_modules())
        now = (journal(self.model), tuple((path, id(module)) for path, module in present))
        if self._found is None or self._found[0] != now:
            self._found = now, find_sites(self.model)
        return self._found[1]

    def _candidates(self) -> list[Site]:
        return [
            site
            for site in self._sites()
            if site.refusal is None
            and not site.branches
            and (self.schedule.takes_linear or not site.linear)
            and (self.schedule.grows_own_convs or not site.own)
            and self.model.get_submodule(site.path).weight.requires_grad
            and _is_affine(self.model, site.norm)
        ]

    def _adjust(self) -> tuple[Action, ...]:
        actions: tuple[Action, ...] = ()
        if self.epoch:
            self.companion.after_epoch(self.epoch)
        if self.schedule.is_due(self.epoch):
            squeezes = self.epoch == self.schedule.squeeze_from
            if self.schedule.metric is not None and self._saliency is None and not squeezes:
                raise InvalidInput(
                    "no gradients were observed: call after_backward() between backward() and the optimizer's step."
                )
            actions = tuple(self.schedule.plan(self.observe()))
            self._saliency = None
        if actions:
            averages, before = [] if self.ema is None else [self.ema], len(journal(self.model))
            with sites_known(self._sites(), self.model), carry(self.model, *self.optimizers, *averages):
                apply(self.model, actions, None if self._calibrate is None else _First(self._calibrate, self.schedule))
            take_from_first_rank(self.model, *averages)
            _forget_compiled()
            actions = journal(self.model)[before:]  # as recorded, with the names of branches
            self.history += [(self.epoch, action) for action in actions]
        if self.schedule.cycle is not None and self.epoch % self.schedule.cycle == 0:
            for optimizer in self.optimizers:
                optimizer.state.clear()
        self.companion.begin(self.epoch)
        self._set_attach_rate()
        return actions

    @torch.no_grad()
    def _set_attach_rate(self) -> None:
        done = min(self._step / self._steps_per_epoch, 1.0) if self._steps_per_epoch else 0.0
        over = math.nextafter(self.epoch + 1, self.epoch)  # an epoch ends when `after_epoch` says so, not before
        rate = self.schedule.attach_rate(min(self.epoch + done, over))
        if rate is not None:
            for module in self.model.modules():
                if isinstance(module, AttachRate):
                    module.rate.fill_(rate)


class _First:
    """The first batches of the data; each iteration begins anew."""

    def __init__(self, data: Iterable[Any], schedule: Schedule) -> None:
        self.data = data
        self.count = schedule.batches

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.data), self.count)


def _require_follower(ema: object) -> None:
    if ema is not None and not isinstance(ema, nn.Module):
        raise InvalidInput(
            f"ema is of type {type(ema).__name__}, no module, so it would keep an average of the structure that the model had: "
            "give a module that holds a copy of the model, such as torch.optim.swa_utils.AveragedModel."
        )


def _require_whole(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh") or hasattr(parameter, "_is_flat_param"):
            raise InvalidInput(
                f"{name} is sharded over several processes, so its structure can't be changed: use DistributedDataParallel."
            )


def _forget_compiled() -> None:
    """Let `torch.compile` forget its code for earlier structures. It counts them, and after eight it gives up with a warning."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _depth(path: str, blocks: Mapping[str, RepBlock]) -> int:
    return sum(path.startswith(f"{block}.") for block in blocks)


def _relative_scales(block: RepBlock) -> dict[str, float]:
    own, *others = gammas_of(block).items()
    if own[1] is None:
        return {}
    return {name: mean / own[1] if own[1] else math.inf for name, mean in others if mean is not None}


def _is_affine(model: nn.Module, norm_path: str | None) -> bool:
    """Whether what a branch adds can be subtracted from the origin: its BatchNorm, if it has one, needs γ and β."""
    if norm_path is None:
        return True
    norm: Layer = norm_of(model.get_submodule(norm_path))
    return norm.weight is not None and norm.bias is not None
