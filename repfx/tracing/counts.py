"""Numbers of parts that are known while code is traced: chunks and splits of a tensor, where code says the number itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_CHUNKS = {torch.chunk, "chunk"}
_EQUAL_SPLITS = {torch.tensor_split, "tensor_split"}
_SPLITS = {torch.split, "split", torch.split_with_sizes, "split_with_sizes"}


def count_of(node: fx.Node) -> int | None:
    """Return over how many values code iterates if it iterates over a node, or None if that isn't known.

    `chunk` may give fewer parts than it was asked for, so a graph has to check that it doesn't (`may_be_fewer`).
    """
    if node.target in _CHUNKS:
        count = _second(node, "chunks")
        return count if isinstance(count, int) and count > 0 else None
    if node.target in _EQUAL_SPLITS:
        count = _second(node, "indices_or_sections", "sections")
        return count if isinstance(count, int) else None
    sizes = _second(node, "split_size_or_sections", "split_size", "split_sizes") if node.target in _SPLITS else None
    return len(sizes) if isinstance(sizes, (tuple, list)) else None


def may_be_fewer(node: fx.Node) -> bool:
    """Whether a node may give fewer parts than `count_of` says."""
    return node.target in _CHUNKS


def _second(node: fx.Node, *names: str) -> Any:
    """Return the second argument of a call, which may be given by one of these names."""
    return (
        node.args[1] if len(node.args) > 1 else next((node.kwargs[name] for name in names if name in node.kwargs), None)
    )
