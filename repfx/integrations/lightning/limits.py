"""Limits of the Lightning callback: which set-ups it refuses and why, and which module of a LightningModule it changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from repfx.algebra.layers import is_conv, is_conv_or_linear
from repfx.change.schedule import Schedule
from repfx.errors import InvalidInput
from repfx.tracing.sites import find_sites


def require_served(trainer: Any, module: Any, schedule: Schedule, ema: str | None) -> None:
    """Raise `InvalidInput` if a Trainer would train in a way in which the structure can't change, or would change wrongly."""
    strategy = _strategy(trainer.strategy, schedule)
    for reason in (*strategy, *_optimization(trainer, module, schedule), *_averages(trainer, ema)):
        raise InvalidInput(reason)


def _strategy(strategy: Any, schedule: Schedule) -> Iterator[str]:
    name = type(strategy).__name__
    kinds = {each.__name__ for each in type(strategy).__mro__}  # by name, because there are two packages
    if not kinds & {"SingleDeviceStrategy", "DDPStrategy"}:
        yield f"{name} keeps parameters in pieces or in a way of its own: train with strategy='auto' or 'ddp'."
    if getattr(strategy, "_start_method", "popen") != "popen":
        yield (
            f"{name} with {strategy._start_method!r} hands back weights alone when its processes end, not the changed structure: "
            "train with strategy='ddp'."
        )
    if getattr(strategy, "_layer_sync", None) is not None:
        yield (
            "sync_batchnorm leaves BatchNorms of Lightning's own class in the model, and repfx can't fold these: call "
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm on the net instead."
        )
    finds = getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters", False)
    if schedule.closes_paths and "DDPStrategy" in kinds and not finds:
        yield (
            f"in a search some branches don't run, and {name} would wait for their gradients: train with "
            "strategy='ddp_find_unused_parameters_true'."
        )


def _optimization(trainer: Any, module: Any, schedule: Schedule) -> Iterator[str]:
    automatic = module.automatic_optimization
    if automatic and schedule.nets_per_step > 1:
        yield (
            f"{type(schedule).__name__} averages each step over {schedule.nets_per_step} nets, but automatic optimization makes one "
            "backward pass: give it nets=1, or optimize by hand and loop over `callback.driver.shares()`."
        )
    if not automatic and getattr(trainer.precision_plugin, "scaler", None) is not None:
        yield (
            "with manual optimization, gradients are unscaled before the callback sees them: train with precision='bf16-mixed' or "
            "'32-true'."
        )


def _averages(trainer: Any, ema: str | None) -> Iterator[str]:
    names = [each.__name__ for callback in trainer.callbacks for each in type(callback).__mro__]
    if "StochasticWeightAveraging" in names:
        yield "StochasticWeightAveraging keeps a copy that can't follow the structure: use Lightning's WeightAveraging, which can."
    if "WeightAveraging" in names and ema is not None:
        yield f"there are two averages, WeightAveraging and {ema!r}, but only one can follow the structure: leave one out."


def require_one_trainer(module: Any, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise `InvalidInput` if optimization is manual and not exactly one optimizer trains a model.

    The steps of the model couldn't be told then.
    """
    count = sum(trains(optimizer, model) for optimizer in optimizers)
    if not module.automatic_optimization and count != 1:
        raise InvalidInput(
            f"{count} optimizers train the {type(model).__name__} by hand, but its gradients are observed at the steps of one: name "
            "the module that one optimizer trains, as in RepFXCallback(…, model='net')."
        )


def trains(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Tell whether an optimizer has a parameter of a model."""
    own = set(model.parameters())
    return any(parameter in own for group in optimizer.param_groups for parameter in group["params"])


def model_path(module: Any, ema: str | None, schedule: Schedule) -> str:
    """Return the path of the one child that holds all layers that a schedule serves.

    If there is no such child, the path is empty, for the LightningModule itself.

    Raises:
        InvalidInput: it would be the LightningModule itself, which has no forward of its own.
    """
    served = is_conv_or_linear if schedule.takes_linear else is_conv
    inside = [
        name
        for name, child in module.named_children()
        if not served(child) and any(map(served, child.modules())) and name != (ema or "").split(".")[0]
    ]
    if len(inside) == 1 and not any(map(served, module.children())):
        return str(inside[0])
    if type(module).forward.__module__.split(".")[0] in ("lightning", "pytorch_lightning"):
        raise InvalidInput(
            f"{type(module).__name__} has no forward of its own, and its convs lie in {', '.join(inside) or 'no child'}: name the module "
            "to be changed, as in RepFXCallback(…, model='net')."
        )
    return ""


def require_open_sites(model: nn.Module, schedule: Schedule) -> None:
    """Raise `InvalidInput` if no conv of a model can be expanded, so that nothing could ever change."""
    sites = [site for site in find_sites(model) if not site.own and (schedule.takes_linear or not site.linear)]
    if all(site.refusal is not None for site in sites):
        reasons = "; ".join(f"{site.path}: {site.refusal}" for site in sites[:3]) or "it has no conv"
        raise InvalidInput(f"no conv of {type(model).__name__} can be expanded ({reasons}).")
