"""Modules that are registered under several names. Where one graph makes all calls, all names but the first are set aside meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from repfx.records.module_tree import module_at, outer_paths, set_submodule
from repfx.tracing.trace import Traces


class Alias(nn.Module):
    """A stand-in at one more name of a module, while that module is rewritten or after it was merged into another one.

    Args:
        path: the path in the model at which the module itself is registered.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def extra_repr(self) -> str:
        return repr(self.path)


def set_aside(model: nn.Module, traces: Traces) -> None:
    """Put an `Alias` at every name but the first of each module that a single graph calls, so that it has one name."""
    for names in list(_names_of_each(model)):
        first = module_at(model, names[0])
        present = [name for name in names if module_at(model, name) is first]  # others lie in what is set aside already
        if first is not None and _is_one_graphs(present, traces):
            for name in present[1:]:
                set_submodule(model, name, Alias(names[0]))


def put_back(model: nn.Module) -> None:
    """Register under all its names what stands in the place of a module whose names were set aside. If nothing does, the `Alias` stays."""
    for path, module in list(model.named_modules()):
        found = module_at(model, module.path) if isinstance(module, Alias) else None
        if found is not None:
            set_submodule(model, path, found)


def _names_of_each(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of each module that has several, outer modules before those inside."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    return (each for each in names.values() if len(each) > 1)


def _is_one_graphs(names: list[str], traces: Traces) -> bool:
    """Whether a single graph makes all calls of a module: no other code, traced or not, stands around any of its names."""
    graphs = {island.path for island in traces.islands}
    called = {
        island.full_path(str(node.target))
        for island in traces.islands
        for node in island.graph.nodes
        if node.op == "call_module"
    }
    code = {*graphs, *called, *traces.untraced}
    owners = {next((path for path in reversed(outer_paths(name)) if path in code), None) for name in names}
    return len(names) > 1 and len(owners) == 1 and owners <= graphs
