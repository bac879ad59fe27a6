"""The origin of a block, its site's own conv and the modules behind it: its kernel, and how it takes over the kernels of branches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer
from repfx.algebra.meaning import meaning_of, refusal_of
from repfx.algebra.moments import Moments, set_kernel, set_norm, signs_of
from repfx.blocks.block import ORIGIN, RepBlock
from repfx.blocks.cropped_conv import unshare
from repfx.errors import InvalidInput

_LEAST = 0.01  # part of its variance that an origin keeps at least, where what is added to it wasn't measured


def origin_kernel(block: RepBlock) -> Kernel:
    """Return the kernel of the site's own conv and the modules behind it, in float64 and in tensors of its own."""
    return copy.deepcopy(block.origin).equivalent_kernel(block.conv.weight.detach().double())


@torch.no_grad()
def write_origin(
    block: RepBlock,
    kernel: Kernel,
    moments: Moments | None,
    scale: Tensor | None = None,
    within: Sequence[Moments] = (),
) -> None:
    """Write a kernel into the site's own conv and the modules behind it; see `set_kernel`. Their `Scale` becomes 1, or `scale` if given.

    If the own conv has become a block, that block's own conv takes what changes, and its branches go on computing what they did.

    Args:
        within: measured moments for the origins of the blocks that the own conv has become, the outer one first.
    """
    if block.inner is not None and block.norm is not None:
        _write_into(block.inner, block.norm, kernel, moments, within)
        return
    if block.scale is not None:
        block.scale.weight.fill_(1.0) if scale is None else block.scale.weight.copy_(scale)
        kernel = kernel.fold_affine(1 / block.scale.weight.to(kernel.weight))
    set_kernel(block.conv, block.norm, kernel, moments)


def _write_into(
    inner: RepBlock, norm: Layer, kernel: Kernel, moments: Moments | None, within: Sequence[Moments]
) -> None:
    """Write a kernel into a block and the BatchNorm behind it.

    The factor |γ| / √(σ² + ε) of the BatchNorm moves to the ends of the block's paths, so nothing is divided by γ. The block's own conv
    gets the rest. In eval mode this is exact. In training mode it is as accurate as the moments; without measured ones, the paths are
    taken for uncorrelated.
    """
    sign, factor, before = signs_of(norm), factor_of(norm), Moments.after(norm)
    shift = sign * norm.bias.double() - factor * norm.running_mean.double()
    for path in (inner.origin, *inner.branches.values()):
        for number in () if path.last_norm is None else (path.last_norm.weight, path.last_norm.bias):
            number.mul_(factor.to(number))
    own = None
    if inner.norm is not None:
        inner.norm.bias.add_(shift.to(inner.norm.bias))
        own = Moments.after(inner.norm)
    if own is not None and moments is not None:
        variance = (own.variance + moments.variance - before.variance).clamp_min(_LEAST * own.variance)
        variance = within[0].variance if within else variance
        own = Moments(own.mean + sign * (moments.mean - before.mean), variance)
    branches = (inner.kernel_of(name, kernel.weight) for name in inner.branches)
    write_origin(inner, reduce(Kernel.subtract, branches, kernel.fold_affine(sign)), own, within=within[1:])
    set_norm(norm, moments or Moments.unknown(kernel), sign)


def factor_of(norm: Layer) -> Tensor:
    """Return the size of a BatchNorm's factor in eval mode, |γ| / √(σ² + ε), in float64."""
    factor: Tensor = norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()
    return factor


def require_affine(block: RepBlock, what: str) -> None:
    """Raise `InvalidInput` if the origin can't take over `what`, because its conv can't be written into or its BatchNorm has no γ or β."""
    norm = block.norm
    unwritable = _unwritable(block.conv)
    if unwritable is not None:
        raise InvalidInput(f"the origin can't absorb {what}: {unwritable}.")
    if norm is not None and is_parametrized(norm):
        raise InvalidInput(f"the origin can't absorb {what}: its BatchNorm computes γ or β by a parametrization.")
    if norm is not None and (norm.weight is None or norm.bias is None):
        missing = "γ" if norm.weight is None else "β"
        raise InvalidInput(f"the origin can't absorb {what}: its BatchNorm has no {missing} to put it into.")
    if block.inner is not None:
        require_affine(block.inner, what)


def require_absorbable(block: RepBlock, name: str) -> None:
    """Raise `UnknownName` if there is no branch of that name, `InvalidInput` if the origin can't absorb it."""
    block.require_branch(name)
    require_affine(block, repr(name))
    if not block.rests and ORIGIN not in block.running_in(training=False):
        raise InvalidInput(f"the origin can't absorb {name!r}: its own gate is closed.")


def absorb_branch(block: RepBlock, name: str) -> None:
    """Remove a branch and add its kernel to the origin, in float64 and rounded once, so that the function stays the same.

    The kernel of a branch whose gate is closed isn't added. Branches that shared the origin's weights get weights of their own.
    """
    require_absorbable(block, name)
    for branch in block.branches.values():
        unshare(branch)
    like: Tensor = block.conv.weight.detach().double()
    own = block.nothing(like) if block.rests else block.kernel_of(ORIGIN, like)
    is_open = name in block.running_in(training=False)
    write_origin(block, own.add(block.kernel_of(name, like)) if is_open else own, _moments_with(block, name))
    block.wake()
    block.remove(name)


def _moments_with(block: RepBlock, name: str) -> Moments | None:
    """Return the moments of the sum of the origin and a branch; None if the origin has no BatchNorm.

    Without a BatchNorm at the end of the branch, they are the moments of the origin's own BatchNorm.
    """
    norm, other = block.norm, block.branches[name].last_norm
    if norm is None or other is None:
        return None if norm is None else Moments.after(norm)
    added = _times_factor(block, name, Moments.after(other))
    return added if block.rests else _times_factor(block, ORIGIN, Moments.after(norm)).add(added)


def _times_factor(block: RepBlock, name: str, moments: Moments) -> Moments:
    return moments.affine(block.factor_of(name).to(moments.mean).expand_as(moments.mean), None)


def _unwritable(conv: Layer) -> str | None:
    """Why a kernel can't be written into the module in the place of a site's own conv, or None."""
    if is_parametrized(conv):
        return f"its {type(conv).__name__} computes weights by a parametrization"
    if meaning_of(conv) is None:
        return refusal_of(conv) or f"in place of its conv there is a {type(conv).__name__}"
    return None
