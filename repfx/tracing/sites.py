"""Sites: where the convs and linear layers of a model sit. Each has its branches, or why it has none.

A conv has the BatchNorm that only it feeds.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from torch import fx, nn

from repfx.algebra.activated_norm import norm_of
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.layers import (
    BATCH_NORMS,
    CONVS,
    KERNEL_LAYERS,
    TRANSPOSED_CONVS,
    Layer,
    is_batch_norm,
    is_conv_or_linear,
)
from repfx.algebra.meaning import refusal_of, torch_class
from repfx.blocks.architecture import Architecture
from repfx.blocks.block import RepBlock
from repfx.blocks.branch import fitting
from repfx.blocks.presets import SpecLike
from repfx.blocks.selection import Selection
from repfx.errors import UnknownName
from repfx.records.module_tree import module_paths, outer_paths
from repfx.records.report import report
from repfx.records.wrappers import innermost, require_layers
from repfx.tracing.code_around import code_around
from repfx.tracing.trace import Island, Traces, call_counts, trace


@dataclass(frozen=True)
class Site:
    """One conv or linear layer of a model.

    Args:
        path: path of the conv, or of the block that replaces it.
        conv: sizes of the conv; None if they can't be read.
        linear: whether it is a linear layer. A BatchNorm never belongs to one: it stays behind the block, because a linear layer has its
            channels on the last axis, and where BatchNorm1d looks for them depends on the input.
        norm: path of the BatchNorm that only this conv feeds, or None.
        branches: names of the branches beside the conv; empty for a plain conv.
        block: path of the block that has this conv inside one of its branches, or None.
        refusal: reason why this conv can't be expanded, or None.
        own: whether it is the own conv of a block, which can become a block only as `Spec.norm_behind` says.
        note: summary of what a spec would do here, or the reason why the last `expand` left the conv alone.
    """

    path: str
    conv: ConvSpec | None
    norm: str | None = None
    branches: tuple[str, ...] = ()
    block: str | None = None
    refusal: str | None = None
    note: str = ""
    linear: bool = False
    own: bool = False

    @property
    def outcome(self) -> str:
        """The names of the branches, or in brackets the reason why there are none."""
        return ", ".join(self.branches) or f"({self.refusal or self.note or 'plain'})"


@dataclass(frozen=True)
class SiteTable:
    """The sites of a model, in order. `print` shows them as a table."""

    sites: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, path: str) -> Site:
        return {site.path: site for site in self.sites}[path]

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """The table as text: its head, then the path, the conv and the branches of each site."""
        head = ("site", "conv", "branches")
        return [head, *((site.path, str(site.conv or "?"), site.outcome) for site in self.sites)]

    def __str__(self) -> str:
        rows = self.rows
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{path:<{widths[0]}}  {conv:<{widths[1]}}  {branches}" for path, conv, branches in rows)


def sites(model: nn.Module, spec: SpecLike | Architecture | None = None) -> SiteTable:
    """List the sites of a model: path, conv, and branches or the reason why a conv was left alone. With `spec`, show what it would add.

    Linear layers are listed where they are blocks, or where a spec for linear layers was or would be asked for them.

    >>> print(sites(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)), "repvgg"))
    site  conv     branches
    0     3×3 3→8  (would get 1x1; not identity: 3 channels go in and 8 come out)
    2     1×1 8→8  (would get identity; not 1x1: the window is 1×1 already)
    """
    require_layers(model)
    model = innermost(model)
    found = [site for site in find_sites(model) if site.block is None]
    if spec is not None:
        selection = Selection.of(spec)
        planned = [site for site in found if selection.takes(site.path, linear=site.linear)]
        return SiteTable(tuple(replace(site, note=_plan(site, selection)) for site in planned))
    reasons = {skip.path: skip.reason for skip in report(model).skipped if skip.rule == "expand"}
    shown = [site for site in found if not site.linear or site.branches or site.path in reasons]
    return SiteTable(tuple(replace(site, note=reasons.get(site.path, "")) for site in shown))


def _plan(site: Site, selection: Selection) -> str:
    spec = selection.spec_for(site.path)
    if spec is None:
        return "no pattern of the spec names it"
    if site.conv is None or site.branches:
        return ""
    branches, refusals = fitting(spec.branches_for(site.conv), site.conv)
    plan = f"would get {', '.join(branch.kind for branch in branches)}" if branches else "would stay plain"
    return "; ".join(filter(None, (plan, refusals)))


@dataclass(frozen=True)
class _Known:
    """Sites that were found already, and the models, all of one structure, that have them."""

    sites: dict[str, Site]
    models: tuple[nn.Module, ...]

    def holds_for(self, model: nn.Module) -> bool:
        return any(each is model for each in self.models)

    def tells(self, model: nn.Module, paths: Iterable[str]) -> bool:
        """Whether they say all of the sites at some paths; of a block they don't say which BatchNorm stands behind its sum."""
        sites = [self.sites.get(path) for path in paths]
        return self.holds_for(model) and all(site is not None and (site.norm or not site.branches) for site in sites)


_KNOWN: ContextVar[_Known | None] = ContextVar("known sites", default=None)


@contextmanager
def sites_known(sites: Iterable[Site], *models: nn.Module) -> Iterator[None]:
    """Let `sites_at` answer for these models from sites that were found already, so that nothing is traced again.

    Inside the block nothing may change the models' structure but actions of repfx.
    """
    token = _KNOWN.set(_Known({site.path: site for site in sites}, models))
    try:
        yield
    finally:
        _KNOWN.reset(token)


@contextmanager
def sites_known_of(other: nn.Module, model: nn.Module) -> Iterator[None]:
    """Let what is known of one model's sites hold for another one of the same structure, such as an average."""
    known = _KNOWN.get()
    if known is None or not known.holds_for(other):
        yield
        return
    with sites_known(known.sites.values(), *known.models, model):
        yield


def sites_at(model: nn.Module, paths: Collection[str], *, anew: bool = False) -> dict[str, Site]:
    """Give the sites at some paths, as they are now, by path; the model is traced only where `sites_known` doesn't tell them all.

    Args:
        anew: trace it all the same.

    Raises:
        UnknownName: there is no site at a path.
    """
    known = _KNOWN.get()
    if known is not None and known.tells(model, paths) and not anew:
        return {path: _as_now(known.sites[path], model) for path in paths}
    found = {site.path: site for site in find_sites(model)}
    if known is not None and known.holds_for(model):
        known.sites.update(found)
    for path in paths:
        if path not in found:
            raise UnknownName("site", path, found)
    return {path: found[path] for path in paths}


def _as_now(site: Site, model: nn.Module) -> Site:
    """Give a site as actions have left it: they change what stands at its path, and whether its BatchNorm stands behind it."""
    module = model.get_submodule(site.path)
    if isinstance(module, RepBlock):
        return _site_of(module, site.path, site.block)
    norm = None if site.norm is None else norm_of(model.get_submodule(site.norm))
    norm_path = site.norm if norm is not None and is_batch_norm(norm) else None
    return replace(site, norm=norm_path, branches=(), refusal=None if site.refusal == _GROWN else site.refusal)


_GROWN = "its own conv has become a block"


def _site_of(block: RepBlock, path: str, around: str | None) -> Site:
    """Return the site of a block. `around` is the path of the block around it, or None."""
    refusal = None if block.branches else _GROWN
    norm = block.norm_path or block.norm_behind
    return Site(path, block.site, norm, tuple(block.branches), around, refusal, linear=block.site.is_linear)


def find_sites(model: nn.Module) -> list[Site]:
    """List all sites of a model, including those inside blocks."""
    traces = trace(model)
    read = _read_elsewhere(traces)
    registered = module_paths(model)
    calls = call_counts(traces)
    owners = _owners(model)
    code = code_around(model, traces)
    norms = {
        conv: norm
        for conv, norm in _own_norms(model, traces, calls, registered, read).items()
        if not code[norm].needs_norm(norm, model.get_submodule(norm)) and _is_writable(norm, model, owners)
    }
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, RepBlock)}
    origins = {f"{path}.origin.conv" for path in blocks}
    found = []
    for path, module in model.named_modules():
        inside = next((outer for outer in outer_paths(path)[1:] if outer in blocks), None)
        if isinstance(module, RepBlock):
            found.append(_site_of(module, path, inside))
        elif is_conv_or_linear(module):
            refusal = _refusal(module, path, read, registered, owners) or code[path].refusal(
                module, called=calls[path] > 0
            )
            if refusal is None and torch_class(module) in TRANSPOSED_CONVS:
                refusal = _size_refusal(path, traces)
            conv = ConvSpec.of(module) if torch_class(module) in KERNEL_LAYERS else None
            linear = isinstance(module, nn.Linear)
            own = path in origins
            if own and norms.get(path) is None:
                refusal = "it is the own conv of a block, and no BatchNorm follows it there"
            found.append(Site(path, conv, norms.get(path), (), inside, refusal, linear=linear, own=own))
    return found


def _refusal(
    conv: Layer, path: str, read: set[str], registered: dict[int, list[str]], owners: dict[int, list[str]]
) -> str | None:
    if not path:
        return "it is the model itself: put it into an nn.Sequential"
    if refusal_of(conv) is not None:
        return refusal_of(conv)
    if nn.utils.parametrize.is_parametrized(conv):
        return "its weight is computed by a parametrization"
    if len(registered[id(conv)]) > 1:
        return f"it is registered under {len(registered[id(conv)])} names: {', '.join(registered[id(conv)])}"
    if path in read:
        return "its parameters are read elsewhere in the model"
    shared = [name for tensor in conv.parameters() for name in owners[id(tensor)] if name.rpartition(".")[0] != path]
    if shared:
        return f"its weights are shared with {shared[0].rpartition('.')[0]!r}"
    if not conv.weight.is_floating_point():
        return f"its weights are {conv.weight.dtype}"
    return None


def _size_refusal(path: str, traces: Traces) -> str | None:
    """Why a transposed conv can't become a block, which takes no `output_size` as the conv does, or None."""
    nodes = [
        node
        for island in traces.islands
        for node in island.graph.nodes
        if node.op == "call_module" and island.full_path(str(node.target)) == path
    ]
    if not nodes:
        return "it is a transposed conv, and code around it, which can't be traced, may ask it for an output size"
    if any(len(node.args) + len(node.kwargs) > 1 for node in nodes):
        return "code around it asks it for an output size"
    return None


def _is_writable(path: str, model: nn.Module, owners: dict[int, list[str]]) -> bool:
    """Whether numbers can be written into a BatchNorm: none is computed by a parametrization, or is another module's, too."""
    norm = norm_of(model.get_submodule(path))
    if nn.utils.parametrize.is_parametrized(norm):
        return False
    return all(len(owners[id(tensor)]) == 1 for tensor in (*norm.parameters(), *norm.buffers()))


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in itertools.chain(*named):
        owners.setdefault(id(tensor), []).append(name)
    return owners


def _read_elsewhere(traces: Traces) -> set[str]:
    return {
        island.full_path(str(node.target)).rpartition(".")[0]
        for island in traces.islands
        for node in island.graph.nodes
        if node.op == "get_attr"
    }


def _own_norms(
    model: nn.Module, traces: Traces, calls: Counter[str], registered: dict[int, list[str]], read: set[str]
) -> dict[str, str]:
    """Map the path of each conv that feeds one BatchNorm and nothing else to the path of that BatchNorm. Both are called once.

    A BatchNorm whose tensors other code reads belongs to that code. DBB's padding, for example, is such code.
    """
    pairs: dict[str, str] = {}
    for island in traces.islands:
        for node in island.graph.nodes:
            paths = _conv_and_norm(node, island, model)
            if paths is None or paths[1] in read:
                continue
            if all(calls[path] == 1 and len(registered[id(model.get_submodule(path))]) == 1 for path in paths):
                pairs[paths[0]] = paths[1]
    return pairs


def _conv_and_norm(node: fx.Node, island: Island, model: nn.Module) -> tuple[str, str] | None:
    """Return the paths of a conv and of the BatchNorm that `node` calls on its output, or None unless the conv feeds nothing else."""
    if node.op != "call_module" or len(node.all_input_nodes) != 1:
        return None
    before = node.all_input_nodes[0]
    if before.op != "call_module" or len(before.users) != 1 or {before.target, node.target} & island.constants.keys():
        return None
    paths = island.full_path(str(before.target)), island.full_path(str(node.target))
    conv, norm = model.get_submodule(paths[0]), norm_of(model.get_submodule(paths[1]))
    if (
        torch_class(conv) not in CONVS + TRANSPOSED_CONVS
        or torch_class(norm) not in BATCH_NORMS
        or refusal_of(norm) is not None
    ):
        return None
    return paths
