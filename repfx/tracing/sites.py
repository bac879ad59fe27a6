"""Sites: where the convs of a model sit. Each has the BatchNorm that only its conv feeds, and its branches or why it has none."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import CodeType

from torch import fx, nn

from repfx.algebra.activated_norm import norm_of
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.layers import BATCH_NORMS, CONVS, TRANSPOSED_CONVS, Layer, code_of_its_own, is_batch_norm, is_conv
from repfx.algebra.meaning import refusal_of, torch_class
from repfx.blocks.architecture import Architecture
from repfx.blocks.block import RepBlock
from repfx.blocks.branch import fitting
from repfx.blocks.presets import SpecLike
from repfx.blocks.selection import Selection
from repfx.errors import UnknownName
from repfx.reading.source_code import Around, asked_for
from repfx.records.module_tree import module_paths, outer_paths
from repfx.records.report import report
from repfx.records.wrappers import innermost, require_layers
from repfx.tracing.leaves import is_leaf
from repfx.tracing.recording import code_recorded
from repfx.tracing.trace import Island, Traces, call_counts, trace


@dataclass(frozen=True)
class Site:
    """One conv of a model.

    Args:
        path: path of the conv, or of the block that replaces it.
        conv: sizes of the conv; None if they can't be read.
        norm: path of the BatchNorm that only this conv feeds, or None.
        branches: names of the branches beside the conv; empty for a plain conv.
        block: path of the block that has this conv inside one of its branches, or None.
        refusal: reason why this conv can't be expanded, or None.
        note: summary of what a spec would do here, or the reason why the last `expand` left the conv alone.
    """

    path: str
    conv: ConvSpec | None
    norm: str | None = None
    branches: tuple[str, ...] = ()
    block: str | None = None
    refusal: str | None = None
    note: str = ""

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

    def __str__(self) -> str:
        rows = [("site", "conv", "branches")]
        rows += [(site.path, str(site.conv or "?"), site.outcome) for site in self.sites]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{path:<{widths[0]}}  {conv:<{widths[1]}}  {branches}" for path, conv, branches in rows)


def sites(model: nn.Module, spec: SpecLike | Architecture | None = None) -> SiteTable:
    """List the sites of a model: path, conv, and branches or the reason why a conv was left alone. With `spec`, show what it would add.

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
        return SiteTable(tuple(replace(site, note=_plan(site, selection)) for site in found))
    reasons = {skip.path: skip.reason for skip in report(model).skipped if skip.rule == "expand"}
    return SiteTable(tuple(replace(site, note=reasons.get(site.path, "")) for site in found))


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
        return replace(site, conv=module.site, norm=module.norm_path, branches=tuple(module.branches))
    norm = None if site.norm is None else norm_of(model.get_submodule(site.norm))
    return replace(site, norm=site.norm if norm is not None and is_batch_norm(norm) else None, branches=())


def find_sites(model: nn.Module) -> list[Site]:
    """List all sites of a model, including those inside blocks."""
    traces = trace(model)
    read = _read_elsewhere(traces)
    registered = module_paths(model)
    calls = call_counts(traces)
    owners = _owners(model)
    code = _code_around(model, traces.untraced, _Ran(model))
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
            found.append(Site(path, module.site, module.norm_path, tuple(module.branches), inside))
        elif is_conv(module) and path not in origins:
            refusal = _refusal(module, path, read, registered, owners) or code[path].refusal(
                module, called=calls[path] > 0
            )
            if refusal is None and torch_class(module) in TRANSPOSED_CONVS:
                refusal = _size_refusal(path, traces)
            conv = ConvSpec.of(module) if torch_class(module) in CONVS + TRANSPOSED_CONVS else None
            found.append(Site(path, conv, norms.get(path), (), inside, refusal))
    return found


@dataclass(frozen=True)
class _Code:
    """The code around a layer: what it reads and asks for, and the reason why nothing inside it can be changed (`closed`), or None."""

    around: Around = field(default_factory=Around)
    closed: str | None = None

    def refusal(self, conv: nn.Module, *, called: bool) -> str | None:
        """Why a conv can't become a block, or None. `called` says whether a graph calls the conv."""
        asked = asked_for(conv, self.around.classes)
        if asked is not None:
            return f"code around it asks whether it is a {asked}"
        if self.around.asks_for_bias and conv.bias is None:
            return "code around it asks whether a layer has a bias; it has none now, and would have one later"
        if not called and "weight" in self.around.names:
            return "code around it, which can't be traced, reads its weights"
        return self.closed or self.around.closed

    def needs_norm(self, path: str, norm: nn.Module) -> bool:
        """Whether the code needs a BatchNorm to stay where it is."""
        if path.rpartition(".")[2] in self.around.sets_modes:
            return True
        if _asks_for_identities(self.around) or self.around.closed is not None:
            return True
        return asked_for(norm, self.around.classes) is not None or bool(_OF_NORMS & self.around.names)


def _asks_for_identities(around: Around) -> bool:
    """Whether code asks if a module is an identity, which stands where a BatchNorm was once that has moved."""
    return asked_for(nn.Identity(), around.classes) is not None


_OF_NORMS = frozenset({"eps", "momentum", "num_features", "running_mean", "running_var", "affine"})


class _Ran:
    """The code that runs when a model is called, found by tracing the model once more when somebody first asks."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __contains__(self, code: object) -> bool:
        return self._codes is None or code in self._codes

    @cached_property
    def _codes(self) -> set[CodeType] | None:
        with code_recorded() as codes:
            trace(self._model)
        return codes


def _code_around(model: nn.Module, untraced: Container[str], ran: _Ran) -> dict[str, _Code]:
    """Map the path of each module to the code of all modules that it lies in. `ran` is the code that ran while the model was traced.

    The code of blocks is left out, because it works with whatever their parts become.
    """
    found = {"": _Code()}
    for path, module in model.named_modules():
        code = found.get(path, _Code())
        if not (is_leaf(module) or isinstance(module, RepBlock)):
            code = _Code(code.around.inside(module), code.closed or code_of_its_own(module))
        for name, _ in module.named_children():
            inner = code.around.toward(name, None if path in untraced else ran)
            found[f"{path}.{name}".lstrip(".")] = _Code(inner, code.closed)
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
