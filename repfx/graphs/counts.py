"""Numbers of parts that are known while code is traced: the chunks of a tensor, and whatever is computed from parameters alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.graphs.constants import is_pure
from repfx.graphs.functional_conv import origins_of

_CHUNKS = {torch.chunk, "chunk"}
_EQUAL_SPLITS = {torch.tensor_split, "tensor_split"}
_SPLITS = {torch.split, "split", torch.split_with_sizes, "split_with_sizes"}


def count_of(node: fx.Node, root: nn.Module) -> int | None:
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
    value = sizes if isinstance(sizes, (tuple, list)) else _value_of(node, root)
    if isinstance(value, Tensor) and value.ndim == 0:
        return None
    return len(value) if isinstance(value, (Tensor, tuple, list)) else None


def may_be_fewer(node: fx.Node) -> bool:
    """Whether a node may give fewer parts than `count_of` says."""
    return node.target in _CHUNKS


def _second(node: fx.Node, *names: str) -> Any:
    """Return the second argument of a call, which may be given by one of these names."""
    return (
        node.args[1] if len(node.args) > 1 else next((node.kwargs[name] for name in names if name in node.kwargs), None)
    )


def _value_of(node: fx.Node, root: nn.Module) -> Any:
    """Return the value of a node without its numbers, or None if it doesn't depend on parameters alone."""
    origins = origins_of(node)
    if not all(origin.op == "get_attr" or is_pure(origin) for origin in origins):
        return None
    known: dict[fx.Node, Any] = {}
    try:
        with torch.no_grad():
            for origin in sorted(origins):
                known[origin] = _compute(origin, root, known)
    except Exception:  # what needs the numbers has no value here
        return None
    return known[node]


def _compute(node: fx.Node, root: nn.Module, known: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return _parameter(str(node.target), root).detach().to("meta")
    args, kwargs = (fx.node.map_arg(given, known.__getitem__) for given in (node.args, node.kwargs))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _parameter(path: str, root: nn.Module) -> Tensor:
    """Return the parameter or buffer at a path, from the module's tables: its attributes are proxies while code is traced."""
    owner_path, _, name = path.rpartition(".")
    owner = root.get_submodule(owner_path)
    found = {**owner._parameters, **owner._buffers}[name]
    assert found is not None  # None is no node
    return found
