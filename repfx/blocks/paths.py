"""Blocks of a model by the paths of their sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from repfx.blocks.block import RepBlock
from repfx.errors import InvalidInput, UnknownName
from repfx.records.module_tree import chosen, module_at


def block_at(model: nn.Module, site: str) -> RepBlock:
    """Return the block at a path.

    Raises:
        InvalidInput: the model has no blocks; UnknownName: there is none at that path.
    """
    found = module_at(model, site) if site else model
    if not isinstance(found, RepBlock):
        raise UnknownName("block at", site, _all_blocks(model))
    return found


def blocks_at(model: nn.Module, sites: str | Sequence[str]) -> dict[str, RepBlock]:
    """Return the blocks whose paths fit a pattern or one of several patterns, including blocks inside blocks.

    Raises:
        InvalidInput: the model has no blocks; UnknownName: a pattern fits no block.
    """
    blocks = _all_blocks(model)
    found = chosen(sites, blocks, "block at")
    return {path: block for path, block in blocks.items() if path in found}


def outermost_blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, RepBlock]]:
    """Yield the blocks in a module that lie in no other block, with their paths, which begin with `prefix`."""
    for name, child in module.named_children():
        if isinstance(child, RepBlock):
            yield f"{prefix}{name}", child
        else:
            yield from outermost_blocks(child, f"{prefix}{name}.")


def _all_blocks(model: nn.Module) -> dict[str, RepBlock]:
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, RepBlock)}
    if not blocks:
        raise InvalidInput(f"{type(model).__name__} has no blocks; repfx.expand makes them.")
    return blocks
