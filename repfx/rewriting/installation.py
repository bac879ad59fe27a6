"""Installation of an island's graph in place of its module. Code around the module finds what it found before.

A module becomes a `torch.fx.GraphModule` with the attributes of the original. The parts that its graph never used stay, so that the state
dict has the same keys. Two kinds of module keep their own form, because code around them may iterate over them or index them. A plain
sequence of layers stays a sequence, with identities in place of layers that have been merged. A block, or a conv with a forward of its
own, that has become one plain conv is replaced by that conv.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import fx, nn

from repfx.algebra.activated_norm import bare, join
from repfx.algebra.layers import is_conv, is_plain_sequence, own_classes
from repfx.blocks.block import RepBlock
from repfx.records.module_tree import has, set_part, set_submodule
from repfx.records.notes import NotedGraphModule, keep, kept
from repfx.tracing.trace import Island

_NOT_SAVED = "repfx_not_saved"


def install(model: nn.Module, island: Island) -> nn.Module:
    """Put the island's graph in place of its module. Return the model, which is a new module if the island is the whole model."""
    root = model.get_submodule(island.path)
    prepare(root, island)
    join(root, island.graph)
    island.graph.lint()
    calls = _chain(island.graph)
    if island.path and is_plain_sequence(root) and calls is not None and _keep_sequence(root, calls):
        return model
    if island.path and (isinstance(root, RepBlock) or is_conv(root)) and calls is not None and len(calls) == 1:
        set_submodule(model, island.path, root.get_submodule(calls[0]))
        return model
    compiled = _compile(root, island)
    if not island.path:
        return compiled
    set_submodule(model, island.path, compiled)
    return model


def prepare(root: nn.Module, island: Island) -> None:
    """Make a module fit its graph: give it the constants that tracing made, and let its norms leave their activation to the graph."""
    for name, value in island.constants.items():
        setattr(root, name, value)
    bare(root, island.graph)


def take_back(root: nn.Module, island: Island) -> None:
    """Undo `prepare` for a graph that isn't installed."""
    join(root, island.graph)
    for name in island.constants:
        delattr(root, name)


# ---- modules that keep their form


def _chain(graph: fx.Graph) -> list[str] | None:
    """Return the paths of the modules that a graph calls one after another, or None if the graph does anything else."""
    nodes = list(graph.nodes)
    if [node.op for node in nodes] != ["placeholder", *["call_module"] * (len(nodes) - 2), "output"]:
        return None
    if any(node.args != (before,) or node.kwargs for before, node in itertools.pairwise(nodes)):
        return None
    return [str(node.target) for node in nodes[1:-1]]


def _keep_sequence(root: nn.Module, calls: list[str]) -> bool:
    """Replace each layer of a sequence by what is still called of it. Return False, and change nothing, if the calls have another order."""
    left = {path: [call for call in calls if f"{call}.".startswith(f"{path}.")] for path in _layers(root)}
    if [call for parts in left.values() for call in parts] != calls:
        return False
    if any(path in parts != [path] for path, parts in left.items()):
        return False
    for path, parts in left.items():
        if parts != [path]:
            set_submodule(root, path, _sequence_of(root, parts))
    return True


def _sequence_of(root: nn.Module, paths: list[str]) -> nn.Module:
    """Return a sequence of the modules at `paths` under their own names, or the identity if there are none."""
    modules = OrderedDict((path.rpartition(".")[2], root.get_submodule(path)) for path in paths)
    return nn.Sequential(modules) if modules else nn.Identity()


def _layers(sequence: nn.Module, prefix: str = "") -> Iterator[str]:
    """Yield the paths of the layers of a plain sequence, and of plain sequences inside it, in order."""
    for name, module in sequence.named_children():
        if is_plain_sequence(module):
            yield from _layers(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


# ---- modules that become graphs


def _compile(root: nn.Module, island: Island) -> fx.GraphModule:
    saved = root.state_dict().keys() - island.constants.keys() - _not_saved(root)
    compiled = NotedGraphModule(root, island.graph, class_name=type(root).__name__)
    _take_over_attributes(compiled, root)
    _keep_unused(compiled, root, island.used)
    _save_as_before(compiled, set(saved))
    return compiled


def _take_over_attributes(compiled: fx.GraphModule, root: nn.Module) -> None:
    """Copy the plain attributes of the module, because code around it may read them."""
    own = set(vars(nn.Module())) | set(vars(compiled))
    for name, value in {**_class_attributes(root), **vars(root)}.items():
        if name not in own and not isinstance(value, (nn.Module, torch.Tensor)):
            keep(compiled, name, value)


def _class_attributes(root: nn.Module) -> dict[str, object]:
    """Return the numbers, strings and tuples that the class of a module defines, as values or properties."""
    names = {name for cls in own_classes(type(root)) if cls is not fx.GraphModule for name in vars(cls)}
    found: dict[str, object] = {}
    for name in names:
        value = None if name.startswith("__") else getattr(root, name, None)
        if isinstance(value, (bool, int, float, str, tuple)):
            found[name] = value
    return found


def _keep_unused(compiled: fx.GraphModule, root: nn.Module, used: frozenset[str]) -> None:
    """Keep the modules, parameters and buffers that the graph never used."""
    touched = {".".join(path.split(".")[:length]) for path in used for length in range(1, path.count(".") + 2)}
    for path, child in root.named_modules(remove_duplicate=False):
        if path in used or _lies_in(path, used):
            continue
        if path and path not in touched:
            if path.rpartition(".")[0] in ("", *touched) and not has(compiled, path):
                set_submodule(compiled, path, child)
            continue
        for name, _ in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
            full = f"{path}.{name}" if path else name
            if full not in used and not has(compiled, full):
                set_part(compiled, full, root)


def _lies_in(path: str, used: frozenset[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:length]) in used for length in range(1, len(parts)))


def _not_saved(root: nn.Module) -> set[str]:
    """Return the buffers that a GraphModule was told to keep out of its state dict. The note is needed because copying forgets them."""
    names = kept(root, _NOT_SAVED)
    return set(names) if isinstance(names, tuple) else set()


def _save_as_before(compiled: fx.GraphModule, saved: set[str]) -> None:
    """Keep out of the state dict what was not in it before. torch.fx makes every tensor that is no parameter a saved buffer."""
    others = tuple(name for name, _ in compiled.named_buffers() if name not in saved and _is_own_copy(compiled, name))
    for path in others:
        owner, _, name = path.rpartition(".")
        compiled.get_submodule(owner)._non_persistent_buffers_set.add(name)
    keep(compiled, _NOT_SAVED, others)


def _is_own_copy(compiled: fx.GraphModule, name: str) -> bool:
    """Whether a buffer belongs to the module itself or to its graph, not to a module that it calls."""
    return "." not in name or any(node.op == "get_attr" and node.target == name for node in compiled.graph.nodes)
