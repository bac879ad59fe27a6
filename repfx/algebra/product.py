"""The product of two convs' weights: the weight of the one conv that equals both in sequence."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def product(
    first: Tensor, second: Tensor, groups: tuple[int, int], spread: tuple[int, ...], spread2: tuple[int, ...]
) -> Tensor:
    """Return P with ``P[o, i, t·f + t'·f'] += W'[o, m, t'] · W[m, i, t]``, which is one transposed conv.

    The channels m fall into *pieces*. Each piece lies within one group of each map, so that weights that are zero anyway aren't computed.
    The result has g groups, the first map p·g and the second q·g. One of p and q has to be 1. A group of the result has p·q pieces.

    Args:
        first: W, ``(middle, in / groups, *window)``.
        second: W', ``(out, middle / groups, *window)``.
        groups: number of groups of each map.
        spread, spread2: f and f', the distances between the taps of each map on their common lattice.
    """
    common = math.gcd(*groups)
    p, q = groups[0] // common, groups[1] // common
    pieces = common * p * q
    out, channels, middle = second.shape[0] // groups[1], first.shape[1], first.shape[0] // pieces
    window, window2 = tuple(first.shape[2:]), tuple(second.shape[2:])
    if first.is_meta and second.is_meta:
        spans = ((k - 1) * f + (k2 - 1) * f2 + 1 for k, f, k2, f2 in zip(window, spread, window2, spread2))
        return first.new_empty((second.shape[0], p * channels, *spans))
    taps = second.reshape(common * q, out, p, middle, -1).transpose(1, 2).flatten(0, 1)
    if middle == 1 and 1 in (math.prod(window), math.prod(window2)):
        composed = taps * first.reshape(pieces, 1, channels, -1)
        window = tuple(map(max, window, window2))
    elif math.prod(window) == 1:
        composed = torch.einsum("gomt,gmi->goit", taps, first.reshape(pieces, middle, channels))
        window = window2
    elif math.prod(window2) == 1:
        composed = torch.einsum("gom,gmit->goit", taps.squeeze(3), first.reshape(pieces, middle, channels, -1))
    else:
        by_middle = taps.transpose(1, 2).reshape(pieces * middle, out, *window2)
        turned = first.transpose(0, 1)
        spread_out = CONV_TRANSPOSE[len(window)](turned, by_middle, stride=spread, dilation=spread2, groups=pieces)
        window = tuple(spread_out.shape[2:])
        composed = spread_out.reshape(channels, pieces, out, -1).permute(1, 2, 0, 3)
    parts = composed.reshape(common * q, p, out, channels, -1).transpose(1, 2)
    return parts.reshape(second.shape[0], p * channels, *window)
