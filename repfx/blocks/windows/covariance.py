"""`WindowCovariance`: a running covariance of the windows that a block's conv sees, from which the variance of any kernel's output follows.

With k the kernel of one output channel, flattened, and Σ the covariance of the windows, the output's variance over batch and positions is
``k Σ kᵀ``. Σ is measured without gradient, every few steps and at some of the positions, and averaged. The variance is differentiable in k.

There are two forms of Σ. `FullCovariance` has a number for each two entries of a window. The file `autocorrelation` has the form for many
channels, and chooses between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from repfx.algebra.arithmetic import is_transformed
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel, NoKernel, pad, taps_within
from repfx.blocks.windows.quadratic_form import quadratic_form

Place = tuple[slice, ...]


class WindowCovariance(nn.Module):
    """A running covariance of the windows of one conv's input. `windows_of` chooses the form.

    It begins as that of independent inputs of variance 1, and the first measurement takes its place.

    Args:
        site: sizes of the conv.
        like: tensor that gives dtype and device; float32 in place of half precision.
        eps: number that is added to variances, as BatchNorm adds it.

    Attributes:
        every: number of forward passes in training mode for each measurement.
        momentum: share of a new measurement in the running covariance.
        share: part of all positions that is measured, in each pass on average; at least `fewest` of them.
        synchronized: whether measurements are averaged over all processes of `torch.distributed`.
        unit: ``(out,)``, the standard deviation of the output of the site's own conv at the first measurement, in which the factors of
            `TrackedNorm`s count. So the first measurement changes nothing of that conv's part.
        steps: number of forward passes in training mode, as a plain number. The buffer `passes` gets it when the state is read, so that
            a pass without a measurement writes into no tensor.
    """

    every = 4
    momentum = 0.1
    share = 0.01
    fewest = 256
    synchronized = True

    covariance: Tensor
    unit: Tensor
    passes: Tensor

    def __init__(self, site: ConvSpec, like: Tensor, eps: float = 1e-5) -> None:
        super().__init__()
        self.site = site
        self.eps = eps
        self.taps = math.prod(site.kernel_size)
        self.channels = site.in_channels // site.groups  # of a group
        self.steps = 0
        wide = torch.promote_types(like.dtype, torch.float32)
        self.register_buffer("covariance", self._first(torch.empty(0, dtype=wide, device=like.device)))
        self.register_buffer("unit", torch.ones(site.out_channels, dtype=wide, device=like.device))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64, device=like.device))

    def _first(self, like: Tensor) -> Tensor:
        raise NotImplementedError

    def _measured(self, x: Tensor) -> dict[str, Tensor] | None:
        """Return new values of buffers from an input, or None if there is no window in it."""
        raise NotImplementedError

    def _times(self, weight: Tensor, places: Place) -> Tensor:
        """Return ``k Σ`` for kernels ``(groups, out, channels, *window)`` whose taps lie at these places of the window."""
        raise NotImplementedError

    def _of_mean(self) -> Tensor:
        """Return the covariance ``(groups, channels, channels)`` of the mean over the window."""
        raise NotImplementedError

    # ---- tracking

    @torch.no_grad()
    def begin(self, own: Kernel) -> None:
        """Set the unit by the kernel of the site's own conv."""
        variance = self.variance(own)
        self.unit.copy_(torch.where(variance > 0, (variance + self.eps).sqrt(), 1.0))

    @_disable_dynamo  # `torch.compiler.disable` would import torch's compiler with repfx, which takes longer than all the rest
    @torch.no_grad()
    def see(self, x: Tensor, own: Callable[[], Kernel]) -> None:
        """Count a forward pass in training mode, and measure its input ``(batch, channels, *axes)`` if it is its turn.

        If an input that is to be measured has no window, it isn't counted, and the next one takes its turn.

        Args:
            own: returns the kernel of the site's own conv.
        """
        if is_transformed():
            return
        count, self.steps = self.steps, self.steps + 1
        if count and count % self.every:
            return
        with torch.autocast(x.device.type, enabled=False):
            measured = self._of_all_processes(self._measured(x.detach()))
            if measured is None:
                self.steps = count
                return
            first = count == 0
            before = self.deviation(own()) if first else None
            for name, value in measured.items():
                self.get_buffer(name).lerp_(value.to(self.covariance), 1.0 if first else self.momentum)
            if before is not None:
                self.unit *= self.deviation(own()) / before

    def _of_all_processes(self, measured: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Return the mean over the processes that measured anything."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not self.synchronized or not several or torch.distributed.get_world_size() == 1:
            return measured
        names = [name for name in self._buffers if name not in ("unit", "passes")]
        given = (
            [self.get_buffer(name) * 0 for name in names] if measured is None else [measured[name] for name in names]
        )
        flat = torch.cat([value.to(self.covariance).flatten() for value in given])
        total = torch.cat([flat, flat.new_full((1,), float(measured is not None))])
        torch.distributed.all_reduce(total)
        if not total[-1]:
            return None
        parts = (total[:-1] / total[-1]).split([value.numel() for value in given])
        return {name: part.reshape(value.shape) for name, part, value in zip(names, parts, given)}

    def _some(self, count: int, wanted: int) -> Tensor:
        """Return `wanted` of the numbers below `count`, all different, spread over them, and others each time."""
        wanted = min(count, wanted)
        step = max(1, int(count * 0.6180339887))
        while math.gcd(step, count) > 1:
            step += 1
        device = self.covariance.device
        return (torch.arange(wanted, device=device) * step + self.steps * 7919) % count

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self.steps = 0 if self.passes.is_meta else int(self.passes)

    def _save_to_state_dict(self, state: Any, prefix: str, keep_vars: bool) -> None:
        self.passes = torch.full_like(self.passes, self.steps)
        super()._save_to_state_dict(state, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WindowCovariance:
        """Do as torch does, but never go below float32."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            now = self._buffers[name]
            if kept is not None and now is not None and now.is_floating_point() and now.itemsize < 4:
                self._buffers[name] = kept.to(now.device)
        return self

    # ---- variances

    def deviation(self, kernel: Kernel) -> Tensor:
        """Return the root ``(out,)`` of the variance and ε of what a kernel outputs; differentiable in its weight."""
        return (self.variance(kernel) + self.eps).sqrt()

    def variance(self, kernel: Kernel) -> Tensor:
        """Return the variance ``(out,)`` of what a kernel outputs; differentiable in its weight.

        A kernel on another grid than the site's, such as one between two convs of a branch, is one of a single tap, and is taken to see
        what the middle of the window sees.

        Raises:
            NoKernel: the kernel's taps don't lie in the site's window.
        """
        return self._form(kernel, lambda weight: self._times(weight, self._places(kernel)))

    def variance_of_mean(self, kernel: Kernel) -> Tensor:
        """Return the variance ``(out,)`` of the mean over the site's window of what a 1×1 kernel outputs; differentiable in its weight."""

        def times(weight: Tensor) -> Tensor:
            mean = parts_of_groups(self._of_mean().unsqueeze(2).unsqueeze(-1), weight.shape[0])
            return (weight.flatten(2) @ mean.to(weight)).reshape(weight.shape)

        return self._form(kernel, times)

    def _form(self, kernel: Kernel, times: Callable[[Tensor], Tensor]) -> Tensor:
        if kernel.transposed or kernel.groups % self.site.groups:
            raise NoKernel(f"{kernel.groups} groups can't be normalised by the inputs of {self.site.groups}")
        weight = kernel.weight.to(torch.promote_types(kernel.weight.dtype, self.covariance.dtype))
        weight = weight.reshape(kernel.groups, -1, *weight.shape[1:])
        return quadratic_form(weight, times, self.covariance).flatten().clamp_min(0)

    def _places(self, kernel: Kernel) -> Place:
        site = self.site
        reach = tuple(sum(p) - d * (k - 1) for p, d, k in zip(site.padding, site.dilation, site.kernel_size))
        if kernel.stride == site.stride and kernel.reach == reach:
            places = taps_within(site, kernel)
            if places is not None:
                return places[1:]  # type: ignore[return-value]
        if math.prod(kernel.kernel_size) > 1:
            raise NoKernel(f"a kernel of {kernel.kernel_size} taps isn't in the window of {site}")
        return tuple(slice((k - 1) // 2, (k - 1) // 2 + 1) for k in site.kernel_size)

    def extra_repr(self) -> str:
        return f"{self.site}, every={self.every}, momentum={self.momentum}"


class FullCovariance(WindowCovariance):
    """The covariance of each two entries of a window, ``(groups, channels · taps, channels · taps)``.

    Measured at all positions, it gives the exact variance of each output, borders included.
    """

    def _first(self, like: Tensor) -> Tensor:
        size = self.channels * self.taps
        return torch.eye(size, dtype=like.dtype, device=like.device).repeat(self.site.groups, 1, 1)

    def _measured(self, x: Tensor) -> dict[str, Tensor] | None:
        chosen = self._rows_of(x) if self.site.is_linear else self._windows_of(x)
        if chosen is None or not chosen.numel():
            return None
        rows = chosen.to(self.covariance.dtype).reshape(len(chosen), self.site.groups, -1).transpose(0, 1)
        rows = rows - rows.mean(1, keepdim=True)
        return {"covariance": rows.mT @ rows / rows.shape[1]}

    def _rows_of(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return rows[self._some(len(rows), self._wanted(len(rows)))]

    def _windows_of(self, x: Tensor) -> Tensor | None:
        """Return some windows of some images, ``(windows, channels, taps)``; None if no window fits into an image."""
        site, sizes = self.site, output_sizes(self.site, x.shape[2:])
        if not x.numel() or min(sizes) < 1:
            return None
        positions = len(x) * math.prod(sizes)
        wanted = self._wanted(positions)
        images = self._some(len(x), math.ceil(len(x) * min(1.0, 8 * wanted / positions)))
        padded = pad(x.index_select(0, images), site.padding, site.padding_mode)
        places = torch.unravel_index(self._some(len(images) * math.prod(sizes), wanted), (len(images), *sizes))
        # numbers of pixels: each window's first, and the distance of its others
        first, ahead = places[0], places[0].new_zeros(1)
        for axis, (size, k, s, d) in enumerate(zip(padded.shape[2:], site.kernel_size, site.stride, site.dilation), 1):
            first = first * size + places[axis] * s
            ahead = (ahead[:, None] * size + torch.arange(k, device=x.device) * d).flatten()
        pixels = padded.movedim(1, -1).reshape(-1, site.in_channels)
        return pixels[(first[:, None] + ahead).flatten()].reshape(wanted, self.taps, -1).transpose(1, 2)

    def _wanted(self, positions: int) -> int:
        return min(positions, max(self.fewest, int(positions * self.share * self.every)))

    def _times(self, weight: Tensor, places: Place) -> Tensor:
        own = (self.channels, *self.site.kernel_size)
        every = slice(None)
        whole = self.covariance.reshape(self.site.groups, *own, *own)
        whole = whole[(every, every, *places, every, *places)]
        taps = math.prod(weight.shape[3:])
        whole = whole.reshape(self.site.groups, self.channels, taps, self.channels, taps)
        product = weight.flatten(2) @ parts_of_groups(whole, weight.shape[0]).to(weight)
        return product.reshape(weight.shape)

    def _of_mean(self) -> Tensor:
        own = (self.channels, self.taps)
        return self.covariance.reshape(self.site.groups, *own, *own).mean((2, 4))


def output_sizes(site: ConvSpec, sizes: tuple[int, ...]) -> list[int]:
    """Return the numbers of positions along each axis that a conv gives for an input of these sizes."""
    axes = zip(sizes, site.padding, site.dilation, site.kernel_size, site.stride)
    return [(size + sum(p) - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in axes]


def parts_of_groups(whole: Tensor, groups: int) -> Tensor:
    """Return the parts ``(groups, channels · taps, channels · taps)`` of ``(fewer groups, channels, taps, channels, taps)``."""
    own, channels, taps, *_ = whole.shape
    several = groups // own
    if several == 1:
        return whole.reshape(groups, channels * taps, -1)
    parts = whole.reshape(own, several, channels // several, taps, several, channels // several, taps)
    return parts.diagonal(dim1=1, dim2=4).movedim(-1, 1).reshape(groups, channels // several * taps, -1)
