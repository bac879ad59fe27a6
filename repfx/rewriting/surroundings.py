"""`Surroundings`: what a model computes around a site, which `fuse` has merged into the site's conv, and how to take it out again.

A residual, a factor or a pooling leaves no key in a state dict. So the class that the weights come from computes it by itself. Weights
that already hold it would count it twice. With W the weight of the site's own conv, t the shift behind it, and K and k the weight and the
bias of the merged conv:

    K = a · W + b,   k = c · t + d(W),   number by number.

The kernels of a few known W and t give a, b, c and d. Then W and t follow from K and k.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.layers import is_batch_norm
from repfx.records.module_tree import attribute, has, place_tensor, set_submodule
from repfx.records.notes import keep, kept
from repfx.rewriting.view import View

CONV = "repfx_conv"  # the call that stands for the site's own conv
NORM = "repfx_norm"  # the call that stands for the BatchNorm of the site
_ATTRIBUTE = "repfx_surroundings"


@dataclass(frozen=True)
class Surroundings:
    """A record, on a merged conv, of the steps from its input to its output as the model computes them.

    Args:
        conv: path of the merged conv in the model in which it stood.
        bias: whether the site's own conv had a bias.
        form: kernel of the site's own conv without its numbers.
        dtype: dtype of the weights when they were merged.
        steps: the steps, with all modules and tensors that they need at their paths in the model; None if they can't be told apart.
        unsaved: paths of the buffers among them that no state dict holds.
        reason: why the steps can't be told apart.
    """

    conv: str
    bias: bool
    form: Kernel
    dtype: torch.dtype
    steps: fx.GraphModule | None = None
    unsaved: frozenset[str] = frozenset()
    reason: str = ""

    @property
    def norms(self) -> tuple[str, ...]:
        """The paths of the BatchNorms among the steps, which stood in front of the site's own conv."""
        named = () if self.steps is None else self.steps.named_modules()
        return tuple(path for path, module in named if is_batch_norm(module))


def surroundings_of(conv: nn.Module) -> Surroundings | None:
    """Return the surroundings that a conv has absorbed, or None if it has absorbed none."""
    found = kept(conv, _ATTRIBUTE)
    return found if isinstance(found, Surroundings) else None


def remember_surroundings(conv: nn.Module, surroundings: Surroundings) -> None:
    """Record on a conv the surroundings that it has absorbed."""
    keep(conv, _ATTRIBUTE, surroundings)


def forget_surroundings(conv: nn.Module) -> None:
    """Delete the record from a conv."""
    if surroundings_of(conv) is not None:
        delattr(conv, _ATTRIBUTE)


def with_steps(around: Surroundings, steps: fx.Graph, root: nn.Module, prefix: str) -> Surroundings:
    """Return surroundings with these steps, and with copies of all that the steps call and read in `root`.

    Args:
        prefix: comes before paths in `root`.
    """
    unsaved = {f"{prefix}{path}" for path in _paths(steps) if not _is_saved(root, path)}
    module = _module(steps, lambda path: f"{prefix}{path}", lambda path: copy.deepcopy(attribute(root, path)))
    return replace(around, steps=module, unsaved=frozenset(unsaved))


def _paths(steps: fx.Graph) -> set[str]:
    """Return the paths of the modules that steps call and of the tensors that they read."""
    targets = {str(node.target) for node in steps.nodes if node.op in ("call_module", "get_attr")}
    return targets - {CONV, NORM}


def _module(steps: fx.Graph, path_of: Callable[[str], str], value_at: Callable[[str], Any]) -> fx.GraphModule:
    """Return steps as a module, in which each path is another one, and which holds the value that stands at the old one."""
    parts: dict[str, Any] = {CONV: nn.Identity(), NORM: nn.Identity()}
    parts |= {path_of(path): value_at(path) for path in _paths(steps)}
    graph = copy.deepcopy(steps)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and node.target not in (CONV, NORM):
            node.target = path_of(str(node.target))
    return fx.GraphModule(parts, graph, class_name="Surroundings")


def _is_saved(root: nn.Module, path: str) -> bool:
    owner_path, _, name = path.rpartition(".")
    owner = root.get_submodule(owner_path)
    kept_out = name in owner._non_persistent_buffers_set
    return any(name in names for names in (owner._parameters, owner._modules, owner._buffers)) and not kept_out


# ---- in a model again


class Steps:
    """The steps around a conv of a model, ready to be computed and to be put into the model's graph.

    What the model still holds is taken from there; the rest comes from the record.

    Args:
        around: the record on the conv.
        conv: the merged conv.
        root: the module to which the graph belongs.
        path_of: function from a path in the record to the path in `root`.

    Raises:
        NoKernel: the steps can't be told apart.
    """

    def __init__(self, around: Surroundings, conv: nn.Module, root: nn.Module, path_of: Callable[[str], str]) -> None:
        if around.steps is None:
            raise NoKernel(around.reason)
        weight: Any = conv.weight
        recorded = copy.deepcopy(around.steps).to(weight.device)
        recorded = recorded if weight.dtype == around.dtype else recorded.to(weight.dtype)

        def value_at(path: str) -> Any:
            found = attribute(root, path_of(path)) if has(root, path_of(path)) else None
            return attribute(recorded, path) if found is None or type(found) is nn.Identity else found

        self._around, self._root = around, root
        self._module = _module(recorded.graph, path_of, value_at)
        self._unsaved = {path_of(path) for path in around.unsaved}

    def site_kernel(self, merged: Kernel, dtype: torch.dtype) -> Kernel:
        """Return the kernel of the site's own conv and BatchNorm, for a merged kernel that was rounded to `dtype`.

        It has a bias only if the shift is more than a rounding error, or the site's own conv had a bias.

        Raises:
            NoKernel: the rest can't be taken out of the merged kernel.
        """
        probe = _Probe(self._module, self._around.form, merged, 16 * torch.finfo(dtype).eps)
        weight = probe.weight()
        shift = probe.shift(weight)
        return replace(self._around.form, weight=weight, bias=shift if self._around.bias or shift.any() else None)

    def insert(self, node: fx.Node, norm: str | None) -> None:
        """Put the steps into the graph in place of the call of the conv, which stays one of them.

        Args:
            norm: path of the BatchNorm, or None for none.
        """
        for path in _paths(self._module.graph):
            self._place(path)
        targets = {CONV: node.target, NORM: norm}
        known: dict[fx.Node, Any] = {}
        with node.graph.inserting_before(node):
            for step in self._module.graph.nodes:
                if step.op == "placeholder":
                    known[step] = node.args[0]
                elif step.op == "output":
                    node.replace_all_uses_with(known[step.args[0]])
                elif step.target in targets:
                    known[step] = node.graph.call_module(str(targets[step.target]), (known[step.args[0]],))
                else:
                    known[step] = node.graph.node_copy(step, lambda source: known[source])
        node.graph.erase_node(node)

    def _place(self, path: str) -> None:
        value = attribute(self._module, path)
        if isinstance(value, nn.Module):
            set_submodule(self._root, path, value)
        elif not has(self._root, path):
            owner, _, name = path.rpartition(".")
            place_tensor(self._root, owner, name, value, saved=path not in self._unsaved)


class _Probe:
    """The kernels of all steps for known kernels of the site."""

    def __init__(self, steps: fx.GraphModule, form: Kernel, merged: Kernel, tolerance: float) -> None:
        self._form, self._merged, self._tolerance = form, merged, tolerance
        self._view = View(steps, steps.graph, Counter(), Counter())
        self._has_norm = any(node.target == NORM for node in steps.graph.nodes)

    def weight(self) -> Tensor:
        """Return the weight W of the site's own conv. The place of each of its numbers in K is found from the kernel of 1, 2, 3, …"""
        merged, size = self._merged.weight, math.prod(self._form.weight.shape)
        numbers = torch.arange(1, size + 1).to(merged)
        beside = self._kernel(torch.zeros_like(numbers)).weight
        factor = self._kernel(torch.ones_like(numbers)).weight - beside
        touched, rest = factor != 0, merged - beside
        index = ((self._kernel(numbers).weight - beside)[touched] / factor[touched]).round().long() - 1
        if not torch.equal(index.sort().values, torch.arange(size).to(index)):
            raise NoKernel("a factor of zero or a map over several positions stands before or behind it")
        if bool((rest[~touched].abs() > self._tolerance * merged.abs().max()).any()):
            raise NoKernel("its weight has changed where its own conv has none")
        found = torch.zeros_like(numbers)
        found[index] = rest[touched] / factor[touched]
        return found.reshape(self._form.weight.shape)

    def shift(self, weight: Tensor) -> Tensor:
        """Return the shift t behind the site's own conv with this weight, and 0 where it is only a rounding error."""
        nothing, merged = weight.new_zeros(self._form.out_channels), _bias(self._merged)
        base = _bias(self._kernel(weight, nothing))
        factor = _bias(self._kernel(weight, nothing + 1)) - base
        is_error = (merged - base).abs() <= self._tolerance * torch.maximum(merged.abs(), base.abs())
        return torch.where(is_error, 0.0, (merged - base) / factor)

    def _kernel(self, weight: Tensor, shift: Tensor | None = None) -> Kernel:
        """Return the kernel of all steps, for this weight of the site's own conv and this shift behind it."""
        kernel = self._run(replace(self._form, weight=weight.reshape(self._form.weight.shape), bias=None), shift)
        if _sizes(kernel) != _sizes(self._merged):
            raise NoKernel("its sizes aren't those with which it was merged")
        return kernel

    def _run(self, conv: Kernel, shift: Tensor | None) -> Kernel:
        behind = Kernel.diagonal(conv.weight.new_ones(conv.out_channels), shift, conv.dimensions)
        shifted = conv if self._has_norm else conv.compose(behind)
        known: dict[Any, Kernel] = {}
        for node in self._view.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                channels = self._merged.in_channels
                known[node] = Kernel.identity(conv.weight, channels=channels, dimensions=conv.dimensions)
            elif node.target in (CONV, NORM):
                known[node] = known[node.args[0]].compose(shifted if node.target == CONV else behind)
            elif (total := self._view.sum_of(node)) is not None:
                known[node] = Kernel.sum(known[term].scaled(factor) for factor, term in total.terms)
            elif (op := self._view.op(node)) is not None and op.source in known:
                before = known[op.source]
                known[node] = before.compose(op.meaning.build(conv.weight, before.out_channels, conv.dimensions))
        return known[node.args[0]]


def _bias(kernel: Kernel) -> Tensor:
    return kernel.weight.new_zeros(kernel.out_channels) if kernel.bias is None else kernel.bias


def _sizes(kernel: Kernel) -> tuple[object, ...]:
    """Return all that two kernels have in common if their weights may be compared number by number."""
    mode = kernel.padding_mode if kernel.padded else "zeros"
    sizes = (tuple(kernel.weight.shape), kernel.groups, kernel.transposed, kernel.output_padding, mode)
    return (*sizes, tuple(kernel.stride), tuple(map(tuple, kernel.padding)), tuple(kernel.dilation))
