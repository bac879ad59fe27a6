"""`Kernel`: a linear, shift-equivariant map with a finite window, as a value; and its algebra.

Between two nonlinearities a conv net is linear, and every such map *is* a convolution. Along one axis a kernel has
the taps ``t = 0 … k-1`` and computes ``y[o] = Σ_t w[t] · x[o·s - p + t·d]`` with stride s, padding (p, q) before and after, dilation d.
Two things say everything about borders: the offsets of the taps, ``-p + t·d``, and the *reach* ``p + q - d(k-1)``,
which fixes the size of the output, ``⌊(n + reach - 1) / s⌋ + 1``.

Laws, for every x, borders included:

=====================  ==================================================================================================
``a.add(b)``           a(x) + b(x). Needs equal stride and reach. Taps are laid on the common lattice of offsets.
``a.compose(b)``       b(a(x)). Stride ``s·s'``, padding ``p + s·p'``, taps at ``t·d + t'·d'·s``. Where b pads with zeros, a's output
                       there has to be zero too: a has no bias and ``d(k-1) ≤ p + s - 1``, ``d(k-1) ≤ q``.
                       Where b pads otherwise (reflect, …), a must act on each position alone.
                       A transposed map composes with 1×1 maps alone, and with a bias only in front of the 1×1 map.
``a.fold_affine``      scale · a(x) + shift. Always.
``widen``, ``densify`` the same map on a larger window, on a finer lattice.
``regroup(g)``         the same map with g groups, g a divisor of its groups; ``ungroup`` is ``regroup(1)``.
``concat``             several maps of one x, outputs side by side; ``slice_channels`` undoes it.
``slice_inputs``       what a part of the input contributes; the sum over all parts, plus the bias, is the map.
=====================  ==================================================================================================

Where a law does not apply, `NoKernel` gives the reason; a wrong kernel is never returned. All operations are pure, differentiable tensor
functions for any number of axes (0 is a linear layer). They take dtype and device from their operands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from types import EllipsisType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.algebra.arithmetic import full, has_room, plus, plus_in_place, times
from repfx.algebra.product import CONV, CONV_TRANSPOSE, product
from repfx.algebra.torch_faults import may_corrupt_memory
from repfx.algebra.transposed_window import TransposedWindow
from repfx.errors import RepfxError

Ints = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]


class Window(Protocol):
    """The taps of a kernel or a site, without their weights."""

    @property
    def kernel_size(self) -> Ints: ...

    @property
    def padding(self) -> Padding: ...

    @property
    def dilation(self) -> Ints: ...


class NoKernel(RepfxError):
    """The map that was asked for is not a convolution; the message is the reason."""


def subsample(x: Tensor, stride: Ints) -> Tensor:
    """Return every s-th position along each of the last axes of `x`, from the first one on, as a view."""
    places: list[EllipsisType | slice] = [..., *(slice(None, None, step) for step in stride)]
    return x[tuple(places)]


def pad(x: Tensor, padding: Padding, mode: str = "zeros") -> Tensor:
    """Pad the last axes of `x` by (before, after) each; negative numbers crop. Takes any sign and any of torch's padding modes.

    >>> pad(torch.arange(3.0), ((1, -1),), "replicate")
    tensor([0., 0., 1.])
    """
    grow = [max(side, 0) for pair in reversed(padding) for side in pair]
    crop = [min(side, 0) for pair in reversed(padding) for side in pair]
    if any(grow):
        x = _grow(x, grow, "constant" if mode == "zeros" else mode)
    return F.pad(x, crop) if any(crop) else x


def _grow(x: Tensor, sides: list[int], mode: str) -> Tensor:
    """Call `F.pad` with axes for batch and channels in front, which it needs unless it fills in a constant."""
    if mode == "constant":
        return F.pad(x, sides)
    missing = len(sides) // 2 + 2 - x.ndim
    padded = F.pad(x.reshape((1,) * missing + x.shape), sides, mode=mode)
    return padded.reshape(padded.shape[max(missing, 0) :])


def is_symmetric(padding: Padding) -> bool:
    """Whether torch's convs can apply this padding themselves: both sides are equal, and nothing is cropped."""
    return all(before == after >= 0 for before, after in padding)


@dataclass(frozen=True, eq=False)
class Kernel:
    """One convolution as a value.

    Args:
        weight: ``(out, in / groups, *window)``; for a transposed kernel ``(in, out / groups, *window)``, as torch has it.
        bias: ``(out,)`` or None.
        stride, dilation: one number per axis.
        padding: (before, after) per axis; negative crops. For a transposed kernel: the amount cut off its output.
        groups: as in torch.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``; ignored without padding.
        transposed, output_padding: settings of transposed convolutions. They add to each other, and compose with 1×1 convs and affine maps.

    >>> blur = Kernel.average_pool(torch.ones(1), channels=3, kernel_size=(3, 3), padding=((1, 1), (1, 1)))
    >>> both = blur.add(Kernel.identity(torch.ones(1), channels=3, dimensions=2))
    >>> x = torch.randn(2, 3, 5, 7)
    >>> torch.allclose(both(x), F.avg_pool2d(x, 3, 1, 1) + x, atol=1e-6)
    True
    """

    weight: Tensor
    bias: Tensor | None
    stride: Ints
    padding: Padding
    dilation: Ints
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: Ints = ()

    # ---- what it is

    @property
    def dimensions(self) -> int:
        return self.weight.ndim - 2

    @property
    def kernel_size(self) -> Ints:
        return tuple(self.weight.shape[2:])

    @property
    def in_channels(self) -> int:
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def reach(self) -> Ints:
        """Padding minus the extent of the window, per axis. Kernels of equal stride and reach give outputs of equal size."""
        return tuple(sum(p) - d * (k - 1) for p, d, k in self._axes())

    @property
    def padded(self) -> bool:
        return any(side > 0 for pair in self.padding for side in pair)

    @property
    def is_channelwise_affine(self) -> bool:
        """Whether the map is ``x · scale + shift`` per channel and nothing else, such as a BatchNorm in eval mode."""
        return self.is_channelwise and not any(side for pair in self.padding for side in pair)

    @property
    def is_pointwise(self) -> bool:
        """Whether the map only mixes the channels of each position."""
        plain = not self.transposed and not any(side for pair in self.padding for side in pair)
        return plain and all(size == 1 for size in (*self.kernel_size, *self.stride))

    @property
    def is_channelwise(self) -> bool:
        """Whether the map is ``x · scale + shift`` per channel after padding x."""
        alone = not self.transposed and self.groups == self.in_channels == self.out_channels
        return alone and all(k == 1 for k in self.kernel_size) and all(s == 1 for s in self.stride)

    def _axes(self) -> list[tuple[tuple[int, int], int, int]]:
        return list(zip(self.padding, self.dilation, self.kernel_size))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map: ``(batch, in, *axes)`` to ``(batch, out, *axes)``; with no axes, ``(…, in)`` to ``(…, out)``."""
        if self.dimensions == 0:
            return F.linear(x, self.ungroup().weight, self.bias)
        if self.transposed:
            cut = tuple(before for before, _ in self.padding)
            transpose = CONV_TRANSPOSE[self.dimensions]
            return transpose(
                x, self.weight, self.bias, self.stride, cut, self.output_padding, self.groups, self.dilation
            )
        around, stride = (0,) * self.dimensions, self.stride
        if self.padding_mode == "zeros" and is_symmetric(self.padding):
            around = tuple(before for before, _ in self.padding)
        else:
            x = pad(x, self.padding, self.padding_mode)
        if may_corrupt_memory(self.in_channels, self.kernel_size, stride, around):
            x, stride = subsample(x, stride), (1,) * self.dimensions
        return CONV[self.dimensions](x, self.weight, self.bias, stride, around, self.dilation, self.groups)

    def to(self, like: Tensor | torch.dtype | torch.device | str) -> Kernel:
        """Return this kernel in another dtype or on another device."""
        return replace(self, weight=self.weight.to(like), bias=None if self.bias is None else self.bias.to(like))

    def copy(self) -> Kernel:
        """Return this kernel in memory of its own, without gradients."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return replace(self, weight=self.weight.detach().clone(), bias=bias)

    # ---- maps that are no conv yet

    @staticmethod
    def diagonal(scale: Tensor, shift: Tensor | None, dimensions: int, padding: Padding | None = None) -> Kernel:
        """Return the kernel of ``x · scale + shift`` per channel, both ``(channels,)``, after padding x."""
        channels = scale.shape[0]
        single = (1,) * dimensions
        weight = scale.reshape((channels, 1, *single))
        return Kernel(weight, shift, single, padding or ((0, 0),) * dimensions, single, groups=channels)

    @staticmethod
    def identity(like: Tensor, *, channels: int, dimensions: int) -> Kernel:
        """Return the kernel of the identity: x itself."""
        return Kernel.diagonal(full(like, (channels,), 1.0), None, dimensions)

    @staticmethod
    def average_pool(
        like: Tensor,
        *,
        channels: int,
        kernel_size: Ints,
        stride: Ints = (),
        padding: Padding = (),
        area: int | None = None,
    ) -> Kernel:
        """Return the kernel of the mean over the window, padding counted: each channel's window times ``1 / area`` (default: its size)."""
        dimensions = len(kernel_size)
        weight = full(like, (channels, 1, *kernel_size), 1 / (area or math.prod(kernel_size)))
        single = (1,) * dimensions
        return Kernel(weight, None, stride or single, padding or ((0, 0),) * dimensions, single, groups=channels)

    # ---- the same map, written otherwise

    def widen(self, before: Ints, after: Ints) -> Kernel:
        """Return the same map on a window with `before` and `after` more taps of zero on each axis."""
        self._refuse_transposed("widened")
        if min((*before, *after), default=0) < 0:
            raise NoKernel(f"a window can't be widened by {before} and {after} taps")
        if not any((*before, *after)):
            return self
        sides = [side for pair in zip(reversed(before), reversed(after)) for side in pair]
        padding = tuple((p + b * d, q + a * d) for (p, q), b, a, d in zip(self.padding, before, after, self.dilation))
        if self.weight.is_meta:
            window = (k + b + a for k, b, a in zip(self.kernel_size, before, after))
            return replace(self, weight=self.weight.new_empty((*self.weight.shape[:2], *window)), padding=padding)
        return replace(self, weight=F.pad(self.weight, sides), padding=padding)

    def densify(self, factors: Ints | None = None) -> Kernel:
        """Return the same map with the dilation divided by its divisors `factors` (default: all of it) and zeros between the taps."""
        self._refuse_transposed("densified")
        factors = factors or self.dilation
        if any(d % f for d, f in zip(self.dilation, factors)):
            raise NoKernel(f"dilation {self.dilation} can't be divided by {factors}")
        if all(f == 1 for f in factors):
            return self
        window = tuple((k - 1) * f + 1 for k, f in zip(self.kernel_size, factors))
        weight = full(self.weight, (*self.weight.shape[:2], *window), 0.0)
        taps: tuple[EllipsisType | slice, ...] = (..., *(slice(None, None, f) for f in factors))
        if not weight.is_meta:
            weight[taps] = self.weight
        return replace(self, weight=weight, dilation=tuple(d // f for d, f in zip(self.dilation, factors)))

    def regroup(self, groups: int) -> Kernel:
        """Return the same map with `groups` groups, a divisor of the present number. The weights between former groups are zero."""
        if groups == self.groups:
            return self
        if self.groups % groups:
            raise NoKernel(f"{self.groups} groups can't be written as {groups}")
        inner = self.groups // groups
        whole, part = self.weight.shape[:2]  # outputs and the inputs of a group; the other way round if transposed
        if self.weight.is_meta:
            return replace(self, weight=self.weight.new_empty((whole, inner * part, *self.kernel_size)), groups=groups)
        blocks = self.weight.reshape(groups, inner, whole // self.groups, part, *self.kernel_size)
        spread = torch.diag_embed(blocks.movedim(1, -1), dim1=1, dim2=3)
        weight = spread.reshape(whole, inner * part, *self.kernel_size)
        return replace(self, weight=weight, groups=groups)

    def ungroup(self) -> Kernel:
        """Return the same map with one group."""
        return self.regroup(1)

    def _refuse_transposed(self, what: str) -> None:
        if self.transposed:
            raise NoKernel(f"a transposed convolution can't be {what}")

    def _on_lattice(self, first: Ints, last: Ints, step: Ints) -> Kernel:
        """Return the same map with taps from offset `first` to `last` in steps of `step`, per axis."""
        fine = self.densify(tuple(d // s if k > 1 else 1 for d, s, k in zip(self.dilation, step, self.kernel_size)))
        fine = replace(fine, dilation=step)
        before = tuple((-p - f) // s for (p, _), f, s in zip(fine.padding, first, step))
        after = tuple((end + p) // s - (k - 1) for (p, _), end, s, k in zip(fine.padding, last, step, fine.kernel_size))
        return fine.widen(before, after)

    # ---- laws

    def add(self, other: Kernel) -> Kernel:
        """Return the kernel of ``self(x) + other(x)``."""
        if self.transposed or other.transposed:
            return self._add_transposed(other)
        first, second, mode = self._with_common_groups(other)
        first, second = _align([first, second])
        if second.weight is not other.weight:  # written anew just now, so the sum can be written there
            weight = plus_in_place(second.weight, first.weight)
        else:
            weight = plus(first.weight, second.weight)
        return replace(first, weight=weight, bias=_sum(self.bias, other.bias), padding_mode=mode)

    @staticmethod
    def sum(kernels: Iterable[Kernel], *, owned: bool = False) -> Kernel:
        """Return the kernel of ``Σ kernel(x)``, for at least one kernel. It needs no more memory than a sum of two.

        Args:
            kernels: asked for one by one, so that none waits in memory for its turn.
            owned: whether the first one's weight may be written over, which is then lost.
        """
        pending = iter(kernels)
        total = next(pending)
        for kernel in pending:
            total = total._add_over(kernel) if owned else total.add(kernel)
            owned = True
            del kernel  # before the next one is made
        return total

    def _add_over(self, other: Kernel) -> Kernel:
        """Return the sum, written over this kernel's weight where there is room for it."""
        if self.transposed or other.transposed:
            return self._add_transposed(other)
        first, second, mode = self._with_common_groups(other)
        taps = taps_within(first, second) if has_room(first.weight, second.weight) else None
        whole = first.weight.shape == second.weight.shape
        if taps is None or not (whole or not first.weight.requires_grad):  # a part's gradient would cost a copy
            return self.add(other)
        plus_in_place(first.weight if whole else first.weight[taps], second.weight)
        return replace(first, bias=_sum(self.bias, other.bias), padding_mode=mode)

    def _with_common_groups(self, other: Kernel) -> tuple[Kernel, Kernel, str]:
        """Return both kernels with as many groups as both can have, and their padding mode; refuse kernels that don't add."""
        _require_alike(self, other)
        mode, groups = _common_padding_mode(self, other), math.gcd(self.groups, other.groups)
        return self.regroup(groups), other.regroup(groups), mode

    def _add_transposed(self, other: Kernel) -> Kernel:
        if self.transposed != other.transposed:
            raise NoKernel("a transposed convolution doesn't add to one that isn't")
        _require_equal_channels(self, other)
        if self.stride != other.stride:
            raise NoKernel(f"strides differ: {self.stride} and {other.stride}")
        windows = list(zip(self._transposed_windows(), other._transposed_windows()))
        if any(first.extent != second.extent for first, second in windows):
            raise NoKernel("output sizes of transposed convolutions differ")
        both = [first.with_taps_of(second, stride) for (first, second), stride in zip(windows, self.stride)]
        groups = math.gcd(self.groups, other.groups)
        first, second = (kernel.regroup(groups)._over(both) for kernel in (self, other))
        return replace(first, weight=plus(first.weight, second.weight), bias=_sum(self.bias, other.bias))

    def _transposed_windows(self) -> list[TransposedWindow]:
        cut = (before for before, _ in self.padding)
        return [TransposedWindow(*sizes) for sizes in zip(self.kernel_size, cut, self.dilation, self.output_padding)]

    def _over(self, windows: list[TransposedWindow]) -> Kernel:
        """Return the same transposed map on windows that hold its taps."""
        weight = self.weight.new_zeros((*self.weight.shape[:2], *(window.size for window in windows)))
        own = self._transposed_windows()
        places: list[EllipsisType | slice] = [..., *(one.places_in(window) for one, window in zip(own, windows))]
        weight[tuple(places)] = self.weight
        padding = tuple((window.padding, window.padding) for window in windows)
        dilation = tuple(window.dilation for window in windows)
        more = tuple(window.output_padding for window in windows)
        return replace(self, weight=weight, padding=padding, dilation=dilation, output_padding=more)

    def scaled(self, factor: float) -> Kernel:
        """Return the kernel of ``factor · self(x)``."""
        if factor == 1:
            return self
        bias = None if self.bias is None else times(self.bias, factor)
        return replace(self, weight=times(self.weight, factor), bias=bias)

    def negate(self) -> Kernel:
        """Return the kernel of ``-self(x)``."""
        return self.scaled(-1)

    def subtract(self, other: Kernel) -> Kernel:
        """Return the kernel of ``self(x) - other(x)``."""
        return self.add(other.negate())

    def fold_affine(self, scale: Tensor, shift: Tensor | None = None) -> Kernel:
        """Return the kernel of ``scale · self(x) + shift``, both ``(out,)``: BatchNorm in eval mode, a gate, a layer scale."""
        single = (1,) * self.dimensions
        bias = _sum(None if self.bias is None else times(self.bias, scale), shift)
        if not self.transposed:
            return replace(self, weight=times(self.weight, scale.reshape(-1, 1, *single)), bias=bias)
        per_group = self.weight.reshape(self.groups, -1, *self.weight.shape[1:])
        weight = times(per_group, scale.reshape(self.groups, 1, -1, *single)).reshape(self.weight.shape)
        return replace(self, weight=weight, bias=bias)

    def fold_affine_before(self, scale: Tensor, shift: Tensor | None = None) -> Kernel:
        """Return the kernel of ``self(scale · x + shift)``, both ``(in,)``. A shift is possible only if no zero padding comes between."""
        if shift is not None and (self.transposed or (self.padded and self.padding_mode == "zeros")):
            what = "a transposed convolution" if self.transposed else "the zero padding of the second map"
            raise NoKernel(f"the first map's bias does not reach the border: {what} stands between")
        single = (1,) * self.dimensions
        if self.transposed:
            return replace(self, weight=times(self.weight, scale.reshape(-1, 1, *single)))
        per_group = self.weight.reshape(self.groups, -1, *self.weight.shape[1:])
        weight = times(per_group, scale.reshape(self.groups, 1, -1, *single)).reshape(self.weight.shape)
        bias = self.bias if shift is None else _sum(self.bias, self._response(shift))
        return replace(self, weight=weight, bias=bias)

    def _response(self, constant: Tensor) -> Tensor:
        """Return the output ``(out,)`` of the map without its bias, for an input that is `constant` ``(in,)`` everywhere."""
        if self.weight.is_meta:
            return self.weight.new_empty(self.out_channels)
        total = self.weight.reshape(*self.weight.shape[:2], -1).sum(2)
        per_group = total.reshape(self.groups, -1, self.weight.shape[1])
        return torch.einsum("goi,gi->go", per_group, constant.reshape(self.groups, -1)).flatten()

    def compose(self, second: Kernel) -> Kernel:
        """Return the kernel of ``second(self(x))``."""
        _require_meeting(self, second)
        if second.is_channelwise_affine:
            return self.fold_affine(second.weight.flatten(), second.bias)
        if self.is_channelwise_affine:
            return second.fold_affine_before(self.weight.flatten(), self.bias)
        if self.transposed or second.transposed:
            return self._compose_transposed(second)
        _require_same_borders(self, second)
        padding = tuple(
            (p + s * p2, q + s * q2) for (p, q), s, (p2, q2) in zip(self.padding, self.stride, second.padding)
        )
        mode = self.padding_mode if self.padded else second.padding_mode
        if self.is_channelwise:
            folded = second.fold_affine_before(self.weight.flatten(), self.bias)
            return replace(folded, padding=padding, padding_mode=mode)
        if second.is_channelwise:
            folded = self.fold_affine(second.weight.flatten(), second.bias)
            return replace(folded, padding=padding, padding_mode=mode)
        weight, dilation = _composed_weight(self, second)
        bias = second.bias if self.bias is None else _sum(second.bias, second._response(self.bias))
        stride = tuple(s * s2 for s, s2 in zip(self.stride, second.stride))
        return Kernel(weight, bias, stride, padding, dilation, math.gcd(self.groups, second.groups), mode)

    def _compose_transposed(self, second: Kernel) -> Kernel:
        """Return the kernel of a transposed conv and a 1×1 conv, in either order."""
        up, point = (self, second) if self.transposed else (second, self)
        if not point.is_pointwise:
            raise NoKernel("a transposed convolution composes with nothing but a 1×1 conv, a scale or a shift")
        if point is self and point.bias is not None:
            raise NoKernel("the first map's bias does not reach the border: a transposed convolution stands between")
        groups = math.gcd(self.groups, second.groups)
        taps, mix = up.regroup(groups).weight, point.regroup(groups).weight.flatten(1)
        taps = taps.reshape(groups, -1, *taps.shape[1:])
        mix = mix.reshape(groups, -1, mix.shape[1])
        if point is self:
            weight, bias = torch.einsum("gmo...,gmi->gio...", taps, mix), second.bias
        else:
            weight = torch.einsum("gim...,gom->gio...", taps, mix)
            bias = second.bias if self.bias is None else _sum(second.bias, second._response(self.bias))
        return replace(up, weight=weight.flatten(0, 1), bias=bias, groups=groups)

    @staticmethod
    def concat(kernels: Sequence[Kernel]) -> Kernel:
        """Return the kernel that gives the outputs of all `kernels` for one x, side by side along the channels."""
        for other in kernels[1:]:
            kernels[0]._refuse_transposed("concatenated")
            other._refuse_transposed("concatenated")
            _require_alike(kernels[0], other, same_outputs=False)
        mode = reduce(_common_padding_mode_of, kernels, None) or "zeros"
        parts = _align([kernel.ungroup() for kernel in kernels])
        bias = None
        if any(kernel.bias is not None for kernel in kernels):
            biases = [k.weight.new_zeros(k.out_channels) if k.bias is None else k.bias for k in kernels]
            bias = torch.cat(biases)
        return replace(parts[0], weight=torch.cat([part.weight for part in parts]), bias=bias, padding_mode=mode)

    def slice_channels(self, start: int, stop: int) -> Kernel:
        """Return the kernel of the output channels from `start` up to `stop`."""
        whole = self.ungroup()
        weight = whole.weight[:, start:stop] if self.transposed else whole.weight[start:stop]
        return replace(whole, weight=weight, bias=None if self.bias is None else self.bias[start:stop])

    def slice_inputs(self, start: int, stop: int) -> Kernel:
        """Return the kernel of what the input channels from `start` up to `stop` contribute to the output, without the bias."""
        whole = self.ungroup()
        weight = whole.weight[start:stop] if self.transposed else whole.weight[:, start:stop]
        return replace(whole, weight=weight, bias=None)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return plus(a, b)


def _require_alike(a: Kernel, b: Kernel, *, same_outputs: bool = True) -> None:
    _require_equal_channels(a, b, same_outputs=same_outputs)
    if a.stride != b.stride:
        raise NoKernel(f"strides differ: {a.stride} and {b.stride}")
    if a.reach != b.reach:
        raise NoKernel(f"output sizes differ: padding less window is {a.reach} and {b.reach}")


def _require_equal_channels(a: Kernel, b: Kernel, *, same_outputs: bool = True) -> None:
    if a.dimensions != b.dimensions:
        raise NoKernel(f"{a.dimensions} and {b.dimensions} dimensions can't be merged")
    if a.in_channels != b.in_channels or (same_outputs and a.out_channels != b.out_channels):
        have, other = f"{a.in_channels}→{a.out_channels}", f"{b.in_channels}→{b.out_channels}"
        raise NoKernel(f"channels differ: {have} and {other}")


def _common_padding_mode(a: Kernel, b: Kernel) -> str:
    if a.padded and b.padded and a.padding_mode != b.padding_mode:
        raise NoKernel(f"padding modes differ: {a.padding_mode} and {b.padding_mode}")
    return a.padding_mode if a.padded else b.padding_mode


def _common_padding_mode_of(mode: str | None, kernel: Kernel) -> str | None:
    if not kernel.padded:
        return mode
    if mode not in (None, kernel.padding_mode):
        raise NoKernel(f"padding modes differ: {mode} and {kernel.padding_mode}")
    return kernel.padding_mode


def taps_within(whole: Window, part: Kernel) -> tuple[EllipsisType | slice, ...] | None:
    """Return where the taps of `part` lie in the window of `whole`, or None if one of them lies elsewhere."""
    places: list[EllipsisType | slice] = [...]
    for axis, (size, own) in enumerate(zip(part.kernel_size, whole.kernel_size)):
        step = whole.dilation[axis]
        start, offset = divmod(whole.padding[axis][0] - part.padding[axis][0], step)
        stride, rest = divmod(part.dilation[axis], step) if size > 1 else (1, 0)
        last = start + (size - 1) * stride
        if offset or rest or start < 0 or last >= own:
            return None
        places.append(slice(start, last + 1, stride))
    return tuple(places)


def _align(kernels: list[Kernel]) -> list[Kernel]:
    """Return the same maps with one window and one dilation: the coarsest lattice that holds every tap of every kernel."""
    first, last, step = [], [], []
    for axis in range(kernels[0].dimensions):
        taps = [(-k.padding[axis][0], k.dilation[axis], k.kernel_size[axis]) for k in kernels]
        first.append(min(start for start, _, _ in taps))
        last.append(max(start + d * (size - 1) for start, d, size in taps))
        gaps = [d for _, d, size in taps if size > 1] + [start - first[-1] for start, _, _ in taps]
        step.append(math.gcd(*gaps) or 1)
    return [kernel._on_lattice(tuple(first), tuple(last), tuple(step)) for kernel in kernels]


def _require_meeting(first: Kernel, second: Kernel) -> None:
    if first.dimensions != second.dimensions or first.out_channels != second.in_channels:
        have = f"{first.out_channels} channels in {first.dimensions} dimensions"
        raise NoKernel(f"{have} can't enter a map of {second.in_channels} in {second.dimensions}")


def _require_same_borders(first: Kernel, second: Kernel) -> None:
    if not second.padded:
        return
    if second.padding_mode != "zeros":
        alone = all(k == 1 for k in first.kernel_size) and all(s == 1 for s in first.stride)
        if not alone or any(side for pair in first.padding for side in pair):
            raise NoKernel(
                f"{second.padding_mode} padding between two convs commutes only with a plain 1×1 conv before it"
            )
        return
    if first.bias is not None:
        raise NoKernel(
            "padding between two convs isn't zero-equivalent: the first map's bias does not reach the border"
        )
    if first.padded and first.padding_mode != "zeros":
        raise NoKernel(f"zero padding after {first.padding_mode} padding is not one padding")
    for (p, q), s, d, k, (p2, q2) in zip(
        first.padding, first.stride, first.dilation, first.kernel_size, second.padding
    ):
        extent = d * (k - 1)
        if (p2 > 0 and extent > p + s - 1) or (q2 > 0 and extent > q):
            raise NoKernel(
                "padding between two convs isn't zero-equivalent: the first conv's window still sees the image there"
            )


def _composed_weight(first: Kernel, second: Kernel) -> tuple[Tensor, Ints]:
    """Return the weight of ``second(first(x))`` and its dilation: the coarsest lattice that holds the sums of both maps' offsets."""
    dilation, spread, spread2 = [], [], []
    for axis, (k, k2) in enumerate(zip(first.kernel_size, second.kernel_size)):
        d, d2 = first.dilation[axis], second.dilation[axis] * first.stride[axis]
        step = math.gcd(d if k > 1 else 0, d2 if k2 > 1 else 0) or 1
        dilation.append(step)
        spread.append(d // step if k > 1 else 1)
        spread2.append(d2 // step if k2 > 1 else 1)
    groups = math.gcd(first.groups, second.groups)
    if first.groups > groups and second.groups > groups:
        first = first.regroup(groups)
    weight = product(first.weight, second.weight, (first.groups, second.groups), tuple(spread), tuple(spread2))
    return weight, tuple(dilation)
