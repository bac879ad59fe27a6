"""The optimizer of a recipe."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from repfx.errors import InvalidInput, UnknownName, first_line
from repfx.training.learning_rate import TIMM, timm_part
from repfx.training.recipe import Recipe

RATE_SCALE = "rate_scale"  # key of a group for the factor on its learning rate
_FUSED_DEVICES = ("cpu", "cuda")
_FUSED = ("Adam", "AdamW")  # SGD can't take up new parameters once it is fused


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Make the recipe's optimizer of all parameters that are trained, fused into one kernel for all of them where torch can.

    Raises:
        InvalidInput: the optimizer doesn't take one of `optimizer_options`, or it fails in a trial step, as one does that needs a closure,
            sparse gradients or second derivatives.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> optimizer = make_optimizer(model, Recipe(optimizer="SGD", decay_vectors=False), torch.device("cpu"))
    >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    [(1, 0.01), (3, 0.0)]
    """
    make = _of_timm if recipe.optimizer.startswith(TIMM) else _of_torch
    optimizer = make(model, recipe, device)
    with torch.random.fork_rng(devices=[]):
        trial = nn.Linear(2, 2, bias=False).to(device)  # a matrix, which all optimizers take
        trial.weight.grad = torch.ones_like(trial.weight)
        try:
            make(nn.Sequential(trial), recipe, device).step()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"{recipe.optimizer} fails in a trial step: {first_line(error)}.") from error
    return optimizer


def _of_torch(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    kind = getattr(torch.optim, recipe.optimizer)
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {"lr": recipe.learning_rate}
    if "weight_decay" in known:
        options["weight_decay"] = recipe.weight_decay
    if (
        recipe.optimizer in _FUSED
        and device.type in _FUSED_DEVICES
        and not {"foreach", "differentiable"} & recipe.optimizer_options.keys()
    ):
        options["fused"] = True
    _require_no_rate(recipe)
    options |= recipe.optimizer_options
    unknown = ", ".join(sorted(options.keys() - known.keys()))
    if unknown:
        raise InvalidInput(f"{recipe.optimizer} has no option {unknown}; it has {', '.join(known)}.")
    try:
        optimizer: torch.optim.Optimizer = kind(_groups(model, recipe), **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{recipe.optimizer} can't be made with {options}: {first_line(error)}.") from error
    return optimizer


def _of_timm(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    library, name = timm_part("optim"), recipe.optimizer.removeprefix(TIMM)
    known = library.list_optimizers()
    if name not in known:
        raise UnknownName("optimizer of timm", name, known)
    _require_no_rate(recipe)
    options = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, **recipe.optimizer_options}
    try:
        optimizer: torch.optim.Optimizer = library.create_optimizer_v2(_groups(model, recipe), opt=name, **options)
    except Exception as error:  # such as that of a package that an optimizer of timm needs
        raise InvalidInput(f"{recipe.optimizer} can't be made with {options}: {first_line(error)}.") from error
    return optimizer


def _require_no_rate(recipe: Recipe) -> None:
    if "lr" in recipe.optimizer_options:
        raise InvalidInput("optimizer_options has lr, which repfx sets at every step: set learning_rate instead.")


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    if recipe.layer_decay == 1:
        return _by_decay([parameter for parameter in model.parameters() if parameter.requires_grad], recipe)
    stages: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            stages.setdefault(name.partition(".")[0], []).append(parameter)
    scales = [recipe.layer_decay**above for above in reversed(range(len(stages)))]
    groups = [(group, scale) for found, scale in zip(stages.values(), scales) for group in _by_decay(found, recipe)]
    return [{**group, RATE_SCALE: scale} for group, scale in groups if group["params"]]


def _by_decay(parameters: list[nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """Return one group, or one of kernels and one of vectors, which don't decay."""
    if recipe.decay_vectors:
        return [{"params": parameters}]
    kernels, vectors = ([each for each in parameters if (each.ndim > 1) == many] for many in (True, False))
    return [{"params": kernels}, {"params": vectors, "weight_decay": 0.0}]
