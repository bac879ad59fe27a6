"""Statistics measured on data, for new BatchNorms and for the inputs of given modules. The rest of the model stays as it was."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer, keeps_statistics
from repfx.algebra.moments import Moments, set_kernel
from repfx.blocks.block import RepBlock
from repfx.errors import InvalidInput, first_line
from repfx.measuring.in_float64 import device_of, map_tensors
from repfx.records.modes import in_eval_mode

Batches: TypeAlias = Iterable[Any]


@torch.no_grad()
def calibrate_norms(model: nn.Module, norms: Sequence[Layer], batches: Batches) -> None:
    """Set the running statistics of `norms` to their mean over `batches`. Everything else runs in eval mode and is not touched.

    BatchNorms that no data reach keep their statistics.

    Args:
        batches: inputs of the model: tensors, or what a data loader gives. The first entry of a tuple or list is the input.
    """
    before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    with ExitStack() as stack:
        stack.enter_context(in_eval_mode(model))
        for norm, (momentum, _) in zip(norms, before):
            norm.reset_running_stats()
            norm.momentum = None  # torch's sign for a cumulative average
            stack.callback(setattr, norm, "momentum", momentum)
            stack.callback(norm.register_forward_pre_hook(_count_if_there_is_any, with_kwargs=True).remove)
        run(model, batches)
    for norm, (_, state) in zip(norms, before):
        if not norm.num_batches_tracked:
            norm.load_state_dict(state)


def _count_if_there_is_any(norm: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
    """A pre-hook that leaves out an empty batch, which would be averaged in as zeros."""
    (x,) = (*inputs, *named.values())
    norm.train(x.numel() > 0)


@torch.no_grad()
def measure_inputs(model: nn.Module, modules: Sequence[nn.Module], batches: Batches) -> list[Moments]:
    """Return mean and variance per channel of what enters each of `modules` in eval mode, over all of `batches`."""
    sums = {module: _Sums() for module in modules}
    with ExitStack() as stack:
        stack.enter_context(in_eval_mode(model))
        for module, total in sums.items():
            stack.callback(module.register_forward_pre_hook(total).remove)
        run(model, batches)
    return _all_of(model, [(module, sums[module].known) for module in modules])


def set_kernels_measured(model: nn.Module, places: Sequence[tuple[Layer, Layer, Kernel]], batches: Batches) -> None:
    """Write kernels into their convs and BatchNorms again, now with the measured moments. The convs must hold the kernels already."""
    measured = measure_inputs(model, [norm for _, norm, _ in places], batches)
    for (conv, norm, kernel), moments in zip(places, measured):
        mean = moments.mean if kernel.bias is None else moments.mean + kernel.bias  # the conv itself has no bias
        set_kernel(conv, norm, kernel, Moments(mean, moments.variance))


@torch.no_grad()
def measure_sums(model: nn.Module, sums: Sequence[PartialSum], batches: Batches) -> list[Moments]:
    """Return the moments that a BatchNorm in the place of each sum would have to output in training mode.

    All BatchNorms use the statistics of the batch and keep none; everything else runs in eval mode. Means and variances are taken of each
    batch and averaged, as BatchNorms do.
    """
    norms: list[Layer] = [module for module in model.modules() if keeps_statistics(module)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    with ExitStack() as stack:
        stack.enter_context(in_eval_mode(model))
        for norm, momentum, count in kept:
            norm.train()
            norm.momentum = 0.0
            norm.num_batches_tracked = count.clone()
            stack.callback(_give_back, norm, momentum, count)
        for each in sums:
            for part in each.parts:
                stack.callback(part.register_forward_hook(each.hear).remove)
            stack.callback(each.block.register_forward_hook(each.close).remove)
        run(model, batches)
    return _all_of(model, [(each.block, each.moments) for each in sums])


def _all_of(model: nn.Module, measured: Sequence[tuple[nn.Module, Moments | None]]) -> list[Moments]:
    """Return what was measured at each module, or raise `InvalidInput` if no data reached one of them."""
    paths = {module: path for path, module in model.named_modules()}
    found = []
    for module, moments in measured:
        if moments is None:
            raise InvalidInput(
                f"calibrate gave data that never reached {paths[module]!r}, whose statistics are needed."
            )
        found.append(moments)
    return found


def _give_back(norm: Layer, momentum: float | None, count: Tensor) -> None:
    norm.momentum = momentum
    norm.num_batches_tracked = count


class PartialSum:
    """Part of the sum that a block outputs, measured by hooks.

    Args:
        block: module that outputs the sum.
        parts: modules whose outputs are summed, with the factor of each, which may be one for each channel, ``(channels, 1, …)``.
        instead: part whose output the block outputs alone while the hooks are there.
    """

    def __init__(
        self, block: nn.Module, parts: Mapping[nn.Module, float | Tensor], instead: nn.Module | None = None
    ) -> None:
        self.block = block
        self.parts = parts
        self.instead = instead
        self._outputs: dict[nn.Module, Tensor] = {}
        self._all: list[Moments] = []

    def hear(self, part: nn.Module, inputs: Any, output: Tensor) -> None:
        """Keep the output of a part. This is the forward hook of each part."""
        self._outputs[part] = output

    def close(self, block: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """Measure the sum, and return the output of `instead`, if there is one. This is the forward hook of the block."""
        total = sum(self._outputs[part].double() * factor for part, factor in self.parts.items())
        assert isinstance(total, Tensor)
        on_last_axis = isinstance(block, RepBlock) and block.site.is_linear
        channels = total.reshape(-1, total.shape[-1]).T if on_last_axis else total.transpose(0, 1).flatten(1)
        if channels.shape[1]:
            self._all.append(Moments(channels.mean(1), channels.var(1, correction=0)))
        instead = None if self.instead is None else self._outputs[self.instead]
        self._outputs = {}
        return instead

    @property
    def moments(self) -> Moments | None:
        """The moments averaged over all calls that got any data; None if none did."""
        if not self._all:
            return None
        means, variances = ([getattr(each, name) for each in self._all] for name in ("mean", "variance"))
        return Moments(torch.stack(means).mean(0), torch.stack(variances).mean(0))


class _Sums:
    """A forward pre-hook that measures its input in float64. It works batch by batch, so that a mean far from zero costs no digits."""

    def __init__(self) -> None:
        self.count = 0
        self.known: Moments | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        channels = inputs[0].double().transpose(0, 1).flatten(1)
        count = channels.shape[1]
        if not count:
            return
        new = Moments(channels.mean(1), channels.var(1, correction=0))
        self.count += count
        self.known = new if self.known is None else _pooled(self.known, new, count / self.count)


def _pooled(a: Moments, b: Moments, share: float) -> Moments:
    """Return the moments of two sets of data together. `share` is the part of all data that is in the second."""
    apart = b.mean - a.mean
    between = apart.square() * share * (1 - share)
    return Moments(a.mean + apart * share, a.variance + (b.variance - a.variance) * share + between)


def run(model: nn.Module, batches: Batches) -> None:
    """Run the model on every batch, on the model's device. Compiled code runs uncompiled, because otherwise it would call no hooks."""
    count, device = 0, device_of(model)
    for batch in batches:
        several = isinstance(batch, (tuple, list))
        try:
            given = map_tensors(lambda tensor: tensor.to(device or tensor.device), batch[0] if several else batch)
            with _uncompiled():
                if isinstance(given, dict) and not several:
                    model(**given)
                else:
                    model(given)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            what = f"the first entry of batch {count}" if several else f"batch {count}"
            hint = "; a list that is one input goes inside a tuple" if isinstance(batch, list) else ""
            raise InvalidInput(
                f"{what} of calibrate doesn't fit {type(model).__name__}: {first_line(error)}{hint}."
            ) from error
        count += 1
    if not count:
        raise InvalidInput("calibrate gave no batch; it takes an iterable of inputs.")


def _uncompiled() -> AbstractContextManager[Any]:
    """Return a context in which compiled code runs uncompiled. Loading torch's compiler takes a second, so don't load it for this."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
