"""`restore`: put BatchNorms back behind fused convs, so that the model can be trained again; the function is unchanged.

`Restore` is the action that does so at one site, in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from repfx.algebra.activated_norm import is_rest, joined
from repfx.algebra.baking import conv_from_kernel
from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.layers import KERNEL_LAYERS, Layer
from repfx.algebra.meaning import kernel_of, meaning_of, torch_class
from repfx.algebra.moments import set_kernel
from repfx.blocks.folded_norm import FoldedNorm, folded_norm, forget_norm
from repfx.blocks.stages import Norm
from repfx.errors import InvalidInput
from repfx.measuring.calibration import set_kernels_measured
from repfx.measuring.in_float64 import Inputs
from repfx.measuring.proof import prove
from repfx.records.journal import Action, forget, record
from repfx.records.module_tree import called_by, fits, module_at, patterns_of, set_submodule
from repfx.records.notes import copy_of
from repfx.records.provenance import Provenance, attach
from repfx.records.report import Edit, Report, Skip
from repfx.rewriting.installation import install, prepare
from repfx.rewriting.pipeline import take_over_modes, verb
from repfx.rewriting.surroundings import Steps, Surroundings, forget_surroundings, surroundings_of
from repfx.tracing.aliases import put_back, set_aside
from repfx.tracing.trace import Island, call_counts, trace


@dataclass(frozen=True)
class Restore(Action):
    """Put the BatchNorm back behind a conv that absorbed it in `Fuse`, in place.

    Args:
        measured: take the BatchNorm's statistics from data, instead of those of the sum that was fused.
    """

    kind: ClassVar[str] = "restore"
    measured: bool = False

    @classmethod
    def apply(cls, model: nn.Module, actions: Sequence[Restore], calibrate: Iterable[Any] | None) -> None:
        for action in actions:
            if folded_norm(model.get_submodule(action.site)) is None:
                raise InvalidInput(f"{action.site!r} has absorbed no BatchNorm, so none can be put back.")
            if surroundings_of(model.get_submodule(action.site)) is not None:
                raise InvalidInput(
                    f"{action.site!r} has absorbed more than a BatchNorm. `repfx.restore` takes that out, in a new model."
                )
        places = [_put_back(model, action) for action in actions]
        record(model, actions)  # before measuring: if the data can't be used, the inherited statistics stay
        measured = [place for place, action in zip(places, actions) if action.measured]
        if calibrate is not None and measured:
            set_kernels_measured(model, measured, calibrate)

    def __str__(self) -> str:
        return f"restore {self.site}{', measured' if self.measured else ''}"


def _put_back(model: nn.Module, action: Restore) -> tuple[Layer, Layer, Kernel]:
    conv: Layer = model.get_submodule(action.site)
    folded = folded_norm(conv)
    assert folded is not None  # the caller has checked it
    norm, kernel = _norm_behind(conv, folded)
    rest = model.get_submodule(folded.norm)
    attach(norm, Provenance(("restore",), (action.site,), action.site))
    set_submodule(model, folded.norm, joined(norm.train(conv.training), rest))
    return conv, norm, kernel


@verb
def restore(
    model: nn.Module,
    sites: str | Sequence[str] | None = None,
    *,
    calibrate: Iterable[Any] | None = None,
    example: Inputs | None = None,
    strict: bool = False,
) -> nn.Module:
    """Put a BatchNorm behind convs that have absorbed one, without changing what the model computes in eval mode.

    The result is a new model that can be trained further; `model` is untouched. Each BatchNorm returns to the path it came from, with
    its eps and momentum. What `fuse` merged although the model's code computes it by itself, such as a residual, a factor or a layer
    scale, is taken out of the weights and computed by the graph again. So if a model was conv + BatchNorm to begin with, the restored
    `state_dict` loads strictly into its original class. Where something can't be taken out, the conv is left alone, the report says why,
    and the `state_dict` has keys that don't load strictly. The statistics are those of the sum that was fused, as far as the absorbed
    BatchNorms tell them; with `calibrate` they are measured. Where they are right, the output in training mode is kept as well.

    Args:
        sites: path or pattern of paths, or several, of the convs to be restored. They can name convs that never absorbed a BatchNorm,
            too. Default: all convs that have absorbed one.
        calibrate: inputs of the model, or a data loader, on which the statistics of the BatchNorms are measured.
        example: input of the model, as `check_equivalent` takes it: proves that the model computes what it did, in float64. Without it,
            nothing is compared.
        strict: raise if a conv that `sites` names is left alone.

    Raises:
        InvalidInput: a weight isn't finite, or no conv fits.
        Refused: with `strict`, a conv was left alone; EquivalenceError: the output on `example` would change.

    >>> from repfx.passes.fuse import fuse
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> model.load_state_dict(restore(fuse(model)).state_dict(), strict=True)
    <All keys matched successfully>
    """
    patterns = None if sites is None else patterns_of(sites)
    target: nn.Module = copy_of(model)
    target.eval()
    traces = trace(target)
    set_aside(target, traces)
    calls = call_counts(traces)
    found: list[_Choice] = []
    outcomes: list[_Restored | Skip] = []
    for island in traces.islands:
        root = target.get_submodule(island.path)
        prepare(root, island)
        for node in list(island.graph.nodes):
            chosen = _choice(node, island, root, patterns)
            if chosen is not None:
                found.append(chosen)
                outcomes.append(_attempt(node, island, root, chosen, calls[chosen.path], target))
        target = install(target, island)
    put_back(target)
    if not any(chosen.has_norm for chosen in found):
        raise InvalidInput(_nothing(model, patterns, found))
    take_over_modes(target, model)
    forget(target)
    done = [item for item in outcomes if isinstance(item, _Restored)]
    skips = [item for item in outcomes if isinstance(item, Skip)]
    report = Report("restore", tuple(item.edit for item in done), tuple(skips))
    if strict:
        report.require_all()
    if calibrate is not None:
        set_kernels_measured(target, [item.place for item in done if item.place is not None], calibrate)
    prove("restore", model, target, example)
    report.attach(target)
    return target


@dataclass(frozen=True)
class _Restored:
    """The change at a site, and the conv, the BatchNorm and the kernel of both if there is a BatchNorm."""

    edit: Edit
    place: tuple[Layer, Layer, Kernel] | None


@dataclass(frozen=True)
class _Choice:
    """A conv, what it has absorbed, and the path for the BatchNorm behind it; None if there is to be none."""

    conv: Layer
    path: str
    folded: FoldedNorm | None
    around: Surroundings | None
    norm_path: str | None

    @property
    def has_norm(self) -> bool:
        """Whether a BatchNorm comes back behind the conv or in front of it."""
        return self.norm_path is not None or (self.around is not None and bool(self.around.norms))

    @property
    def norms_in_front(self) -> tuple[str, ...]:
        """The paths of the BatchNorms in front of the conv that come back."""
        if self.around is None:
            return ()
        prefix = self.path.removesuffix(self.around.conv)
        return tuple(f"{prefix}{norm}" for norm in self.around.norms)


def _choice(node: fx.Node, island: Island, root: nn.Module, patterns: Sequence[str] | None) -> _Choice | None:
    """Return the conv that a node calls if it is to be restored, else None.

    A conv that has absorbed no BatchNorm, but something else around it, is restored whatever is named: no state dict may hide that.
    """
    module = called_by(root, node) if node.op == "call_module" else None
    if module is None or torch_class(module) not in KERNEL_LAYERS:
        return None
    path, folded, around = island.full_path(str(node.target)), folded_norm(module), surroundings_of(module)
    normed = folded is not None or (around is not None and bool(around.norms))
    named = patterns is not None and any(fits(path, pattern) for pattern in patterns)
    if named and not normed:
        return _Choice(module, path, None, None, f"{path}_norm")
    if normed and not named and patterns is not None:
        return None
    if folded is None:
        return None if around is None else _Choice(module, path, None, around, None)
    moved = not path.endswith(folded.conv)
    return _Choice(module, path, folded, None if moved else around, _norm_path(path, folded))


def _norm_path(path: str, folded: FoldedNorm) -> str:
    """Return the path for the BatchNorm: where it was, even if the model is inside another one now."""
    prefix = path.removesuffix(folded.conv)
    return prefix + folded.norm if prefix != path else f"{path}_norm"


def _attempt(
    node: fx.Node, island: Island, root: nn.Module, choice: _Choice, calls: int, model: nn.Module
) -> _Restored | Skip:
    reason = _refusal(choice, calls, model)
    if reason is None:
        try:
            return _restore(node, island, root, choice)
        except NoKernel as error:
            reason = f"what the model computes around it can't be taken out of its weight again: {error}"
    if choice.around is not None:
        # one more key, so that the state dict is not taken for one of weights without all that
        choice.conv.register_buffer("merged", choice.conv.weight.detach().new_empty(0))
    return Skip(choice.path, reason, "restore")


def _refusal(choice: _Choice, calls: int, model: nn.Module) -> str | None:
    if calls > 1:
        return f"it is called {calls} times"
    if meaning_of(choice.conv) is None or nn.utils.parametrize.is_parametrized(choice.conv):
        return "its weight is not a plain parameter"
    taken = None if choice.norm_path is None else module_at(model, choice.norm_path)
    if taken is not None and not isinstance(taken, nn.Identity) and not is_rest(taken):
        return f"its BatchNorm belongs at {choice.norm_path!r}, where a {type(taken).__name__} stands"
    if choice.folded is None and choice.around is None and isinstance(choice.conv, nn.Linear):
        return "it is a linear layer that never absorbed a BatchNorm"
    _require_usable(choice)
    return None


def _require_usable(choice: _Choice) -> None:
    """Raise `InvalidInput` if a weight isn't finite, or if the conv has other channels than when it absorbed its BatchNorm."""
    for name, tensor in choice.conv.named_parameters(recurse=False):
        if tensor.device.type != "meta" and not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"the {name} of {choice.path!r} is not finite, so no BatchNorm can be put behind it.")
    moments = None if choice.folded is None else choice.folded.moments
    channels = kernel_of(choice.conv, choice.conv.weight.detach(), 0, 0).out_channels
    if moments is not None and len(moments.mean) != channels:
        raise InvalidInput(
            f"{choice.path!r} gives out {channels} channels, but the BatchNorm that it has absorbed had {len(moments.mean)}. "
            "Restore the model before channels are pruned, or name in `sites` only convs that have all of theirs."
        )


def _restore(node: fx.Node, island: Island, root: nn.Module, choice: _Choice) -> _Restored:
    """Restore one conv.

    Raises:
        NoKernel: what the model computes around the conv can't be taken out of its weight.
    """
    steps = None if choice.around is None else _take_apart(node, island, root, choice, choice.around)
    conv: Layer = called_by(root, node)
    attach(conv, Provenance(("restore",), (choice.path,)))
    if choice.norm_path is None:
        assert steps is not None  # a conv without a BatchNorm is chosen only for what is around it
        steps.insert(node, None)
        return _Restored(Edit("restore", choice.path, choice.norms_in_front), None)
    norm, kernel = _norm_behind(conv, choice.folded)
    attach(norm, Provenance(("restore",), (choice.path,), choice.path))
    inside = choice.norm_path.removeprefix(f"{island.path}.") if island.path else choice.norm_path
    _place_norm(norm, inside, island.graph, root)
    if steps is None:
        _call_behind(node, inside)
    else:
        steps.insert(node, inside)
    return _Restored(Edit("restore", choice.path, (choice.norm_path, *choice.norms_in_front)), (conv, norm, kernel))


def _take_apart(node: fx.Node, island: Island, root: nn.Module, choice: _Choice, around: Surroundings) -> Steps:
    """Put the site's own conv in place of the merged one, and return the steps that the graph has to compute around it from now on."""
    prefix, beginning = choice.path.removesuffix(around.conv), f"{island.path}." if island.path else ""

    def path_of(path: str) -> str:
        if not choice.path.endswith(around.conv) or not f"{prefix}{path}".startswith(beginning):
            raise NoKernel("it stands in another place now")
        return f"{prefix}{path}".removeprefix(beginning)

    steps = Steps(around, choice.conv, root, path_of)
    merged = kernel_of(choice.conv, choice.conv.weight.detach().double(), 0, 0)
    site = steps.site_kernel(merged, choice.conv.weight.dtype)
    set_submodule(root, str(node.target), conv_from_kernel(site, choice.conv, choice.path))
    return steps


def _place_norm(norm: nn.Module, path: str, graph: fx.Graph, root: nn.Module) -> None:
    for name, part in _rest_at(root, path):
        norm.add_module(name, part)
    if module_at(root, path) is not None:  # asked first, because `find_nodes` looks at every call
        for call in graph.find_nodes(op="call_module", target=path):
            call.replace_all_uses_with(call.args[0])  # the identity that stood there in the meantime
            graph.erase_node(call)
    set_submodule(root, path, norm)


def _call_behind(node: fx.Node, path: str) -> None:
    with node.graph.inserting_after(node):
        call = node.graph.call_module(path)
    node.replace_all_uses_with(call)
    call.args = (node,)


def _norm_behind(conv: Layer, folded: FoldedNorm | None) -> tuple[Layer, Kernel]:
    """Return a new BatchNorm, and the kernel that the conv had. The conv is changed so that the two together compute this kernel."""
    settings = Norm()
    if folded is not None:
        settings = Norm("batch_norm", folded.eps, folded.momentum, folded.synchronized, folded.frozen)
    kernel = kernel_of(conv, conv.weight.detach().double(), 0, 0).copy()
    norm: Layer = settings.batch_norm(kernel.out_channels, kernel.dimensions or 1, conv.weight)
    for name in () if folded is None else folded.missing:
        norm.register_parameter(name, None)
        norm.affine = norm.weight is not None
    norm.requires_grad_(conv.weight.requires_grad)
    if folded is None or not folded.bias:
        conv.bias = None
    set_kernel(conv, norm, kernel, None if folded is None else folded.moments)
    forget_norm(conv)
    forget_surroundings(conv)
    return norm, kernel


def _rest_at(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """Return the drop and the activation that a BatchNorm did by itself; the graph now calls them after it, and they stay its children."""
    place = module_at(root, path)
    return [] if place is None else list(place.named_children())


def _nothing(model: nn.Module, patterns: Sequence[str] | None, found: list[_Choice]) -> str:
    if patterns is not None:
        return f"no conv of {type(model).__name__} fits {', '.join(map(repr, patterns))}."
    apart = ((each.path, each.around.reason) for each in found if each.around is not None and each.around.reason)
    why = next((f" that can be put back (at {path!r}, {reason})" for path, reason in apart), "")
    return f"no conv of {type(model).__name__} has absorbed a BatchNorm{why}; name those to be restored in `sites`."
