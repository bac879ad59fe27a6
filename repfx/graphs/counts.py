"""Numbers of parts that are known while code is traced: the chunks of a tensor, and whatever is computed from parameters alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.graphs.constants import is_pure

_CHUNKS = {torch.chunk, "chunk"}
_SPLITS = {torch.split, "split", torch.split_with_sizes, "split_with_sizes"}


def count_of(node: fx.Node, root: nn.Module) -> int | None:
    """Return over how many values code iterates if it iterates over a node, or None if that isn't known.

    `chunk` may give fewer parts than it was asked for, so a graph has to check that it doesn't (`may_be_fewer`).
    """
    value = _value_of(node, root)
    if isinstance(value, (Tensor, tuple, list)):
        return len(value) if not isinstance(value, Tensor) or value.ndim else None
    if node.target in _CHUNKS:
        count = _second(node, "chunks")
        return count if isinstance(count, int) and count > 0 else None
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


def _value_of(node: fx.Node, root: nn.Module) -> Any:
    """Return the value of a node without its numbers, or None if it doesn't depend on parameters alone."""
    if node.op == "get_attr":
        found = _parameter(str(node.target), root)
        return None if found is None else found.detach().to("meta")
    if not is_pure(node):
        return None
    values = {source: _value_of(source, root) for source in node.all_input_nodes}
    if any(value is None for value in values.values()):
        return None
    args, kwargs = (fx.node.map_arg(given, values.__getitem__) for given in (node.args, node.kwargs))
    try:
        with torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # what needs the numbers has no value here
        return None


def _parameter(path: str, root: nn.Module) -> Tensor | None:
    """Return the parameter or buffer at a path, from the module's tables: its attributes are proxies while code is traced."""
    owner_path, _, name = path.rpartition(".")
    owner = root.get_submodule(owner_path)
    found = {**owner._parameters, **owner._buffers}.get(name)
    return found if isinstance(found, Tensor) else None
