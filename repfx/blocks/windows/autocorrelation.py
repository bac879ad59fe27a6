"""`Autocorrelation`: the covariance of windows of many channels. `windows_of` makes the form of covariance that fits a conv.

The input is taken to be alike everywhere, so that only the offset between two taps counts: a window of 3×3 has 13 offsets, and 81 pairs of
taps. With C the covariance of the input with itself at an offset, μ its mean, and v the share of positions at which both taps lie inside
the input, two entries of a window have the covariance

    v(t, t') · C(t' - t) + (v(t, t') - v(t, t) · v(t', t')) · μ μᵀ.

So zeros beyond the border are counted exactly, but values near it are taken to vary as those in the middle do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import pad
from repfx.blocks.windows.covariance import FullCovariance, Place, WindowCovariance, output_sizes, parts_of_groups

_MOST_NUMBERS = 1 << 22  # of a full covariance
_WIDEST_WINDOW = 640  # channels of a group times taps, for a full covariance
_MOST_OFFSETS = 128  # between the taps of a window


def offsets_in(window: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the offsets between two taps of a window, one of each pair of opposite ones.

    >>> offsets_in((2, 2))
    [(0, 0), (0, 1), (1, -1), (1, 0), (1, 1)]
    """
    zero = (0,) * len(window)
    return [offset for offset in product(*(range(1 - k, k) for k in window)) if offset >= zero]


class Autocorrelation(WindowCovariance):
    """The covariance of each two channels at each offset between two taps, ``(offsets, groups, channels, channels)``.

    `mean` ``(groups, channels)`` and `coverage` ``(taps, taps)``, the share of positions at which both taps lie inside the input, say what
    zeros beyond the border change.
    """

    mean: Tensor
    coverage: Tensor

    def __init__(self, site: ConvSpec, like: Tensor, eps: float = 1e-5) -> None:
        super().__init__(site, like, eps)
        self.offsets = offsets_in(site.kernel_size)
        self.register_buffer("mean", self.covariance.new_zeros(site.groups, self.channels))
        self.register_buffer("coverage", self.covariance.new_ones(self.taps, self.taps))

    def _first(self, like: Tensor) -> Tensor:
        first = like.new_zeros(len(offsets_in(self.site.kernel_size)), self.site.groups, self.channels, self.channels)
        first[0] = torch.eye(self.channels, dtype=like.dtype, device=like.device)
        return first

    def _measured(self, x: Tensor) -> dict[str, Tensor] | None:
        site = self.site
        if not x.numel() or min(output_sizes(site, x.shape[2:])) < 1:
            return None
        share = 6 * self.share * self.every / math.prod(site.stride)
        some = x.index_select(0, self._some(len(x), math.ceil(len(x) * min(1.0, share)))).to(self.covariance.dtype)
        coverage = self._coverage(x.shape[2:]).to(self.covariance)
        if site.padding_mode != "zeros":
            some = pad(some, site.padding, site.padding_mode)
        by_group = some.reshape(len(some), site.groups, self.channels, *some.shape[2:]).movedim(0, 2)
        mean = by_group.flatten(2).mean(2)
        centred = by_group - mean.reshape(*mean.shape, *(1,) * (some.ndim - 1))
        apart = [tuple(o * d for o, d in zip(offset, site.dilation)) for offset in self.offsets]
        found = [self._at(centred, offset) for offset in apart]
        return {"covariance": torch.stack(found), "mean": mean, "coverage": coverage}

    def _at(self, centred: Tensor, offset: tuple[int, ...]) -> Tensor:
        """Return the covariance of each two channels at a distance of so many positions, of which the second channel is ahead."""
        if any(size <= abs(o) for o, size in zip(offset, centred.shape[3:])):
            return centred.new_zeros(centred.shape[0], self.channels, self.channels)
        whole = (slice(None),) * 3
        here, there = ((*whole, *places) for places in _pairs(offset, centred.shape[3:]))
        rows, ahead = centred[here].flatten(2), centred[there].flatten(2)
        return rows @ ahead.mT / rows.shape[2]

    def _coverage(self, sizes: tuple[int, ...]) -> Tensor:
        """Return the share of positions at which both of two taps lie inside an input of these sizes."""
        site, whole = self.site, torch.ones(1, 1, dtype=torch.float64, device="cpu")
        axes = zip(sizes, output_sizes(site, sizes), site.kernel_size, site.stride, site.padding, site.dilation)
        for size, out, k, s, (before, _), d in axes:
            at = torch.arange(out, device="cpu")[:, None] * s - before + torch.arange(k, device="cpu") * d
            inside = ((at >= 0) & (at < size)).double()
            inside = torch.ones_like(inside) if site.padding_mode != "zeros" else inside
            whole = torch.kron(whole, inside.mT @ inside / out)
        return whole

    def _taps_at(self, places: Place) -> Tensor:
        """Return the numbers of the taps at places of the window."""
        grid = torch.arange(self.taps, device=self.covariance.device).reshape(self.site.kernel_size)
        return grid[places].flatten()

    def _times(self, weight: Tensor, places: Place) -> Tensor:
        groups, window, taps = weight.shape[0], weight.shape[3:], self._taps_at(places)
        coverage = self.coverage[taps][:, taps].to(weight)
        steps = [place.step or 1 for place in places]
        last = weight.movedim(2, -1)  # (groups, out, *window, channels)
        numbers = torch.arange(len(taps), device=weight.device).reshape(window)
        total = torch.zeros_like(last)
        for offset in offsets_in(tuple(window)):
            both = self.covariance[self.offsets.index(tuple(o * s for o, s in zip(offset, steps)))]
            both = parts_of_groups(both.unsqueeze(2).unsqueeze(-1), groups).to(weight)
            here, there = _pairs(offset, window)
            share = coverage[numbers[here].flatten(), numbers[there].flatten()].reshape(*numbers[here].shape, 1)
            here, there = (slice(None), slice(None), *here), (slice(None), slice(None), *there)
            total[there] += _mixed(last[here] * share, both)
            if any(offset):
                total[here] += _mixed(last[there] * share, both.mT)
        mean = self.mean.reshape(groups, -1).to(weight)
        responses = torch.einsum("go...c,gc->go...", last, mean).flatten(2)
        constant = responses @ (coverage - coverage.diagonal() * coverage.diagonal()[:, None])
        total = total + torch.einsum("gon,gc->gonc", constant, mean).reshape(last.shape)
        return total.movedim(-1, 2)

    def _of_mean(self) -> Tensor:
        numbers = torch.arange(self.taps, device=self.covariance.device).reshape(self.site.kernel_size)
        total = torch.zeros_like(self.covariance[0])
        for offset, both in zip(self.offsets, self.covariance):
            here, there = _pairs(offset, self.site.kernel_size)
            weight = self.coverage[numbers[here].flatten(), numbers[there].flatten()].sum()
            total = total + weight * (both + both.mT if any(offset) else both)
        rest = self.coverage.sum() - self.coverage.diagonal().sum().square()
        return (total + rest * torch.einsum("gc,gd->gcd", self.mean, self.mean)) / self.taps**2


def windows_of(site: ConvSpec, like: Tensor, eps: float = 1e-5) -> WindowCovariance:
    """Make the covariance of the windows of a site: the full one where it has few numbers, else the autocorrelation."""
    return (FullCovariance if _is_small(site) else Autocorrelation)(site, like, eps)


def refusal_of_windows(site: ConvSpec) -> str | None:
    """Why the windows of a site can't be tracked, or None."""
    if site.transposed:
        return "the windows of a transposed conv differ from position to position, so no covariance of them is tracked"
    if not _is_small(site) and len(offsets_in(site.kernel_size)) > _MOST_OFFSETS:
        return f"the window {'×'.join(map(str, site.kernel_size))} is too large for its covariance to be tracked"
    return None


def _is_small(site: ConvSpec) -> bool:
    size, taps = site.in_channels // site.groups * math.prod(site.kernel_size), math.prod(site.kernel_size)
    return taps == 1 or (size <= _WIDEST_WINDOW and site.groups * size**2 <= _MOST_NUMBERS)


def _pairs(offset: tuple[int, ...], sizes: Sequence[int]) -> tuple[Place, Place]:
    """Return where the first and the second of two places at an offset lie, for all pairs in a grid of these sizes."""
    here = tuple(slice(max(0, -o), size - max(0, o)) for o, size in zip(offset, sizes))
    there = tuple(slice(max(0, o), size - max(0, -o)) for o, size in zip(offset, sizes))
    return here, there


def _mixed(last: Tensor, both: Tensor) -> Tensor:
    """Return ``(groups, out, *window, channels)`` times ``(groups, channels, channels)``."""
    return (last.reshape(last.shape[0], -1, last.shape[-1]) @ both).reshape(last.shape)
