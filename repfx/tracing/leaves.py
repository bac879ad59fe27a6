"""How far tracing goes: which modules stay leaves, and which sequences have to stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from repfx.algebra.layers import (
    code_of_its_own,
    has_hooks,
    has_tensors,
    is_batch_norm,
    is_conv,
    is_patched,
    is_plain_sequence,
)
from repfx.algebra.meaning import torch_class
from repfx.blocks.block import RepBlock
from repfx.blocks.stages import RowNorm
from repfx.reading.function_source import all_names
from repfx.reading.source_code import asks_for_exact_class, calls, reads_attribute

_AUTOCAST = frozenset(
    {
        "autocast",
        "_enter_autocast",
        "set_autocast_enabled",
        "set_autocast_cpu_enabled",
        "set_autocast_gpu_enabled",
        "set_autocast_dtype",
    }
)
CONV_FUNCTIONS = frozenset(f"{name}{n}d" for name in ("conv", "conv_transpose") for n in (1, 2, 3))


def is_only_a_function(module: nn.Module) -> bool:
    """Whether a module is a layer of torch without tensors, parts, hooks and modes, so that only its arguments decide what it computes.

    >>> is_only_a_function(nn.LeakyReLU(0.1)), is_only_a_function(nn.PReLU()), is_only_a_function(nn.Dropout())
    (True, False, False)
    """
    if not type(module).__module__.startswith("torch.nn.modules.") or is_patched(module) or has_hooks(module):
        return False
    return (
        not module._modules and not has_tensors(module) and "training" not in all_names(type(module).forward.__code__)
    )


def is_container(module: nn.Module) -> bool:
    """Whether code around a module may index it or iterate over it, so that it has to stay what it is.

    A sequence of layers alone is no container here, because it stays what it is as an island, too. Nor is a list or dict with a forward of
    its own, because it is run as a module.
    """
    if holds_modules(module):
        return type(module).forward is nn.Module.forward
    return is_plain_sequence(module) and not all(_is_layer(child) for child in module.children())


def holds_modules(module: nn.Module) -> bool:
    """Whether a module is a list or a dict of others."""
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _is_layer(module: nn.Module) -> bool:
    if is_plain_sequence(module):
        return all(_is_layer(child) for child in module.children())
    return isinstance(module, RepBlock) or is_conv(module) or is_leaf(module)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has nothing inside to trace: it is a layer of torch, or it holds neither a conv nor a BatchNorm.

    A block of a linear layer can be traced, but a module that holds it is a leaf if it was one before the linear layer was expanded.
    """
    if is_conv(module):
        return torch_class(module) is not None or not calls_conv(module)
    if is_batch_norm(module) or isinstance(module, RowNorm):
        return True
    if isinstance(module, RepBlock):
        return False
    if is_plain_sequence(module):
        return False
    return not any(
        is_conv(inner) or is_batch_norm(inner) or calls_conv(inner) for inner in _outside_linear_blocks(module)
    )


def is_only_linear(module: nn.Module) -> bool:
    """Whether a module is a sequence without convs, BatchNorms and blocks. That it can't be traced is no loss worth reporting."""
    inside = any(
        is_conv(inner) or is_batch_norm(inner) or isinstance(inner, RepBlock) or calls_conv(inner)
        for inner in module.modules()
    )
    return is_plain_sequence(module) and not inside


def is_linear_block(module: nn.Module) -> bool:
    """Whether a module is the block of a linear layer."""
    return isinstance(module, RepBlock) and module.site.is_linear


def _outside_linear_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and all modules inside it, but for the blocks of linear layers."""
    yield module
    for child in module.children():
        if not is_linear_block(child):
            yield from _outside_linear_blocks(child)


def stays_whole(module: nn.Module) -> str | None:
    """Why tracing can't go into a module, or None. This can be told before its code is traced."""
    if has_hooks(module):
        return "it has hooks, which would no longer run"
    if _calls(module, _AUTOCAST):
        return "it switches autocast on or off"
    return code_of_its_own(module) or asks_for_exact_class(module)


def may_write_in_one_mode(module: nn.Module) -> bool:
    """Whether the code of a module asks for a mode and may write into tensors, by ``.data`` or ``copy_``."""
    cls: Any = type(module)
    own_code = not cls.__module__.startswith("torch.")
    return (
        own_code
        and reads_attribute(cls, "training")
        and (reads_attribute(cls, "data") or reads_attribute(cls, "copy_"))
    )


def calls_conv(module: nn.Module) -> bool:
    """Whether the code of a module that has parameters calls a function for convs."""
    own_code = not type(module).__module__.startswith("torch.nn.")
    return own_code and _calls(module, CONV_FUNCTIONS) and any(True for _ in module.parameters())


def _calls(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether the code of a module calls a function by one of these names.

    For a GraphModule the nodes are read, because its code would have to be parsed for each graph.
    """
    if isinstance(module, fx.GraphModule):
        return any(getattr(node.target, "__name__", None) in names for node in module.graph.nodes)
    return calls(type(module), names)  # type: ignore[arg-type]
