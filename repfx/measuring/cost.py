"""The cost of a model: parameters, multiply-adds, and its latency beside that of other models."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.measuring.in_float64 import Inputs, as_arguments
from repfx.records.modes import in_eval_mode


def count_parameters(model: nn.Module) -> int:
    """Count the parameters, trainable or not. A shared parameter counts once.

    >>> count_parameters(nn.Conv2d(3, 8, 3))
    224
    """
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class LayerCount:
    """How many convs and BatchNorms there are."""

    convs: int
    norms: int


def count_layers(model: nn.Module, under: str = "", without: Sequence[str] = ()) -> LayerCount:
    """Count the convs and BatchNorms of a model: of the whole, or under the path `under` but not under the paths in `without`.

    >>> count_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    LayerCount(convs=1, norms=1)
    """
    start, other = f"{under}." if under else "", tuple(f"{path}." for path in without)
    found = [(f"{path}.", module) for path, module in model.named_modules()]
    inside = [module for path, module in found if path.startswith(start) and not path.startswith(other)]
    return LayerCount(sum(map(is_conv, inside)), sum(map(is_batch_norm, inside)))


def count_macs(model: nn.Module, x: Inputs) -> int:
    """Count the multiply-adds of convs and matrix products in one forward pass of `x` in eval mode. The model is not changed.

    Args:
        x: a tensor, a tuple of positional inputs, a dict of keyword inputs, or a list that is one input.

    >>> count_macs(nn.Conv2d(3, 8, 3, groups=1), torch.zeros(1, 3, 5, 5)) == 3 * 8 * 9 * 9
    True
    """
    counter = Flops()
    args, kwargs = as_arguments(x)
    with in_eval_mode(model), torch.no_grad(), counter:
        model(*args, **kwargs)
    return counter.total // 2


class Flops(TorchDispatchMode):
    """A counter with torch's formulas but without its counter's hooks: where a hook listens, squeezed blocks run branch by branch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = function.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = function(*args, **kwargs)
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result


def count_macs_in_batch(model: nn.Module, x: Tensor, batch: int) -> int:
    """Count the multiply-adds for one image, `x`, of a batch of `batch` images.

    The images share the work that is done once for all of them: the kernels of squeezed blocks.

    >>> count_macs_in_batch(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 5, 5), 128) == 3 * 8 * 9 * 9
    True
    """
    one, two = count_macs(model, x), count_macs(model, torch.cat([x, x]))
    return two - one + round((2 * one - two) / batch)


def measure_latency(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int = 30, warm_up: int = 3, limit: float = 5.0
) -> dict[str, float]:
    """Return the median seconds per call of each candidate; see `measure_times`."""
    times = measure_times(candidates, rounds=rounds, warm_up=warm_up, limit=limit)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure_times(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int = 30, warm_up: int = 3, limit: float = math.inf
) -> dict[str, list[float]]:
    """Return the seconds of each call of each candidate. The candidates take turns, so that all see the same state of the machine.

    Each turn begins with the next candidate, so that none always follows the same other one.

    Args:
        rounds: number of turns that count, after `warm_up` turns that don't.
        limit: seconds after which no further turn begins, once one turn has counted.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    started = time.perf_counter()
    for turn in range(warm_up + rounds):
        for name in order:
            seconds = _time(candidates[name])
            if turn >= warm_up:
                times[name].append(seconds)
        order.append(order.pop(0))
        if turn >= warm_up and time.perf_counter() - started > limit:
            break
    return times


def _time(candidate: Callable[[], Any]) -> float:
    _wait_for_device()
    if torch.cuda.is_available():  # the device's own clock also counts the time in which the device waits for the CPU
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        candidate()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    started = time.perf_counter()
    candidate()
    _wait_for_device()
    return time.perf_counter() - started


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
