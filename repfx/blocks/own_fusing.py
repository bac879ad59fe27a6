"""Methods by which classes fuse themselves, such as `reparameterize` of timm's layers: they find plain convs in place of blocks.

Such a method reads the weights of convs and the statistics of BatchNorms. A block has neither where the method looks for them. So each
module around a block gets a `BlocksFirst` in place of each such method of its class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import isfunction
from typing import Any

import torch
from torch import nn

from repfx.algebra.activated_norm import is_rest, joined, norm_of
from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer, keeps_statistics
from repfx.algebra.moments import Moments, set_kernel
from repfx.blocks.block import ORIGIN, RepBlock
from repfx.blocks.one_conv import kernel_in_eval_mode
from repfx.blocks.origin import origin_kernel, require_affine, write_origin
from repfx.blocks.paths import outermost_blocks
from repfx.errors import InvalidInput
from repfx.records.journal import mark_as_rebuilt
from repfx.records.module_tree import module_at, outer_paths, set_submodule

NAMES = ("fuse", "reparameterize", "switch_to_deploy")
_OWN_CONV = f".{ORIGIN}.conv"


class BlocksFirst:
    """A method by which a module fuses itself: the blocks inside become plain convs, then the method of the class is called.

    Args:
        module: the module that has the method.
        path: its path in the model, in which blocks know the places of their BatchNorms.
        name: name of the method.
    """

    def __init__(self, module: nn.Module, path: str, name: str) -> None:
        self.module, self.path, self.name = module, path, name

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the method.

        Raises:
            InvalidInput: a block can't become a conv and a BatchNorm as the class made them. The model is as it was.
        """
        found = dict(outermost_blocks(self.module))
        if found:
            self._make_plain(found)
            mark_as_rebuilt(self.module)
        give_methods_back(self.module)
        result = getattr(self.module, self.name)(*args, **options)
        if found and isinstance(result, nn.Module):
            mark_as_rebuilt(result)
        return result

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make_plain(self, blocks: dict[str, RepBlock]) -> None:
        parts = {site: _Part.of(block, site, self) for site, block in blocks.items()}
        for site, part in parts.items():
            block = part.block
            block.wake()
            block.origin.conv = block.conv  # even if it has become a block itself
            block.norm_path, block.norm_behind = part.norm_path, part.norm_behind
            if part.norm_path is None:
                set_kernel(block.conv, None, without_bias(part.kernel, self.module, block), None)
                set_submodule(self.module, site, block.conv)
            else:
                write_origin(block, part.kernel, Moments.after(block.norm))
                collapse(self.module, site, block)


@dataclass(frozen=True)
class _Part:
    """A block, the kernel that is to be in its place, and the paths of its BatchNorm in the module whose method is called.

    `norm_path` is where the BatchNorm belongs that is in the block, and `norm_behind` where one stands behind the sum; each may be None.
    """

    block: RepBlock
    kernel: Kernel
    norm_path: str | None
    norm_behind: str | None

    @classmethod
    def of(cls, block: RepBlock, site: str, method: BlocksFirst) -> _Part:
        """Read a block.

        Raises:
            InvalidInput: no conv can take its place.
        """
        what = f"{f'{method.path}.{site}'.lstrip('.')!r}"
        require_affine(block, f"the branches of {what}")
        kernel = kernel_in_eval_mode(block, what)
        norm_path = _place_of_norm(block, method.module, method.path)
        norm_behind = _inside(block.norm_behind, method.module, method.path)
        behind = None if norm_behind is None else norm_of(method.module.get_submodule(norm_behind))
        has_place = norm_path is not None or (behind is not None and keeps_statistics(behind))
        if not has_place and block.conv.bias is None and kernel.bias is not None:
            raise InvalidInput(
                f"{what} would become a conv with a bias, which it hadn't, so {method.name!r} of {type(method.module).__name__} may lose "
                "it: call repfx.fuse(model) instead."
            )
        return cls(block, kernel, norm_path, norm_behind)


def _place_of_norm(block: RepBlock, module: nn.Module, path: str) -> str | None:
    """Return the path in a module, which is at `path` in the model, where the BatchNorm of a block stood, or None."""
    inside = _inside(block.norm_path, module, path)
    place = None if inside is None else module.get_submodule(inside)
    return inside if place is not None and (type(place) is nn.Identity or is_rest(place)) else None


def _inside(place: str | None, module: nn.Module, path: str) -> str | None:
    """Return the path in a module, which is at `path` in the model, of a module of the model; None if there is none."""
    prefix = f"{path}." if path else ""
    if place is None or not place.startswith(prefix) or module_at(module, place.removeprefix(prefix)) is None:
        return None
    return place.removeprefix(prefix)


def put_blocks_first(model: nn.Module, site: str) -> None:
    """Let the methods by which modules around a site fuse themselves find a plain conv there."""
    for path in outer_paths(site):
        module = model.get_submodule(path)
        for name in () if isinstance(module, RepBlock) else NAMES:
            own = vars(module).get(name)
            if isfunction(getattr(type(module), name, None)) and (own is None or isinstance(own, BlocksFirst)):
                setattr(module, name, BlocksFirst(module, path, name))


def give_methods_back(model: nn.Module) -> None:
    """Give modules without blocks the methods of their classes again."""
    for module in model.modules():
        for name in [name for name in NAMES if isinstance(vars(module).get(name), BlocksFirst)]:
            if next(outermost_blocks(module), None) is None:
                delattr(module, name)


def collapse(model: nn.Module, site: str, block: RepBlock) -> None:
    """Replace a block by its own conv, and put its BatchNorm back where it stood.

    A BatchNorm or a `Scale` that was made for the block is folded into the conv. What it adds goes into the mean of the BatchNorm behind
    the sum, if there is one, so that the conv gets no bias. While the own conv is a block itself, both blocks stay.
    """
    if block.inner is not None:
        return
    if block.scale is not None or (block.norm is not None and block.norm_path is None):
        set_kernel(block.conv, None, without_bias(origin_kernel(block), model, block), None)
    elif block.norm is not None and block.norm_path is not None:
        rest = model.get_submodule(block.norm_path)
        norm = block.norm.train(block.training)  # even if the block held its statistics
        set_submodule(model, block.norm_path, joined(norm, rest))
    set_submodule(model, site, block.conv)
    around = site.removesuffix(_OWN_CONV)
    if around != site:  # the block around it may have waited for this
        outer = model.get_submodule(around)
        if isinstance(outer, RepBlock) and not outer.branches:
            collapse(model, around, outer)


@torch.no_grad()
def without_bias(kernel: Kernel, model: nn.Module, block: RepBlock) -> Kernel:
    """Take the bias out of a kernel if the block's conv has none and the BatchNorm behind the sum can hold it in its mean."""
    place = None if block.norm_behind is None else module_at(model, block.norm_behind)
    norm: Layer | None = None if place is None else norm_of(place)
    if kernel.bias is None or block.conv.bias is not None or norm is None or not keeps_statistics(norm):
        return kernel
    norm.running_mean.sub_(kernel.bias.to(norm.running_mean))
    return replace(kernel, bias=None)
