"""`equalize`: even out the ranges of weights between layers before 8 bits, without changing what the model computes.

A positive factor for each channel passes through whatever commutes with it: ReLU, PReLU, LeakyReLU, pooling, padding with zeros,
upsampling, sums. So the convs that make a tensor can be divided by it, and the convs that read the tensor multiplied. Source: Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1. The factors are powers of two here, so no
weight is rounded.

The same section also absorbs high biases: it subtracts a constant c from a channel before its ReLU and adds W·c to the bias behind. This
is left out, because it changes what the model computes. relu(p - c) = relu(p) - c holds only where p ≥ c. And a conv that pads with zeros
reads 0 at the border, where it would have to read -c.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra.layers import TRANSPOSED_CONVS, Layer, has_hooks, is_patched
from repfx.errors import InvalidInput
from repfx.graphs.dropout import MODULES
from repfx.graphs.operations import split
from repfx.graphs.vocabulary import ADDITIONS, PRODUCTS, SIZE_METHODS, SUBTRACTIONS
from repfx.measuring.in_float64 import Inputs, by_name
from repfx.measuring.proof import prove
from repfx.records.modes import set_modes
from repfx.records.notes import copy_of
from repfx.records.report import Edit, Report
from repfx.rewriting.input_shapes import InputShapes
from repfx.rewriting.installation import take_back
from repfx.rewriting.pipeline import Views, verb
from repfx.rewriting.view import View
from repfx.tracing.trace import trace

_ROUNDS = 20
_FURTHEST = 20  # a factor is at most 2²⁰


@verb
def equalize(model: nn.Module, *, example: Inputs | None = None) -> nn.Module:
    """Even out the ranges of weights, channel by channel, between the convs and linear layers that share a tensor.

    Quantization to 8 bits divides the range of all weights of a layer evenly. If one channel's weights are a hundred times as large as
    the others', those others get two or three of the 256 values. Equalization moves factors from such channels into the next layers. It
    is for fused models: a BatchNorm keeps the factors from passing. The result is a new model of the same class; `model` is untouched.
    Its outputs stay the same in eval mode, bit for bit where arithmetic doesn't overflow, since all factors are powers of two.

    Args:
        example: input of the model, as `check_equivalent` takes it: proves that the model computes what it did, in float64.

    Raises:
        EquivalenceError: the output on `example` would change.
        InvalidInput: the model has no two layers between which a factor can pass.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> model[0].weight.data[5] *= 1000
    >>> even = equalize(model)
    >>> even[0].weight[5].abs().max().item() < 50
    True
    """
    target: nn.Module = copy_of(model)
    modes = [(module, module.training) for module in target.modules()]
    target.eval()
    given = None if example is None else by_name(target, example)
    traces = trace(target, given)
    views = Views(target, traces, InputShapes(target, given))
    counts = Counter(id(tensor) for _, tensor in target.named_parameters(remove_duplicate=False))
    shared = {each for each, count in counts.items() if count > 1}
    edits: list[Edit] = []
    found = False
    for island in traces.islands:
        spaces = _Spaces(views.of(island), shared).found()
        found = found or bool(spaces)
        take_back(target.get_submodule(island.path), island)
        changed = _evened_out(spaces)
        edits += [
            Edit(
                "equalize",
                island.full_path(space.makers[0].path),
                tuple(island.full_path(end.path) for end in space.readers),
            )
            for space in spaces
            if id(space) in changed
        ]
    if not found:
        raise InvalidInput(
            f"{type(model).__name__} has no two convs or linear layers between which a factor can pass: fuse the model first."
        )
    set_modes(modes)
    prove("equalize", model, target, example)
    Report("equalize", tuple(edits)).attach(target)
    return target


# ---- factors


@dataclass(frozen=True)
class _End:
    """A layer that makes or reads a tensor, as `(groups, outputs, inputs, …)`."""

    path: str
    layer: Layer

    @property
    def weight(self) -> Tensor:
        """The weight, `(groups, outputs of a group, inputs of a group, window)`. It shares the layer's memory."""
        weight: Tensor = self.layer.weight.detach()
        groups: int = getattr(self.layer, "groups", 1)
        split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return split.transpose(1, 2) if isinstance(self.layer, TRANSPOSED_CONVS) else split

    def ranges(self, *, made: bool) -> Tensor:
        """Return the largest weight of each channel that the layer makes, or reads."""
        return self.weight.abs().amax((2, 3) if made else (1, 3)).flatten().double()

    def ratio(self) -> float:
        """Return how many times larger the largest range is than the median one, of what the layer makes or of what it reads."""
        sides = (self.ranges(made=made) for made in (True, False))
        some = [side[side != 0] for side in sides]
        return max((float(side.max() / side.median()) for side in some if len(side)), default=1.0)

    def scale(self, factors: Tensor, *, made: bool) -> None:
        """Multiply the weights of each channel that the layer makes, or reads."""
        weight = self.weight
        factors = factors.to(weight).reshape(len(weight), -1)
        weight.mul_(factors[:, :, None, None] if made else factors[:, None, :, None])
        if made and self.layer.bias is not None:
            self.layer.bias.detach().mul_(factors.flatten())

    def unchanged_by(self, factors: Tensor, *, made: bool) -> Tensor:
        """Return for each channel whether its weights can be multiplied and divided again without rounding."""
        weight = self.weight
        each = factors.to(weight).reshape(len(weight), -1)
        each = each[:, :, None, None] if made else each[:, None, :, None]
        same = ((weight * each) / each == weight).all(3).all(2 if made else 1).flatten()
        if made and self.layer.bias is not None:
            bias, flat = self.layer.bias.detach(), factors.to(weight)
            same &= (bias * flat) / flat == bias
        return same


@dataclass(eq=False)
class _Space:
    """Tensors whose channels must all have the same factors.

    Args:
        makers: layers that make them.
        readers: layers that read them.
        dimensions: number of axes behind the channels.
        fixed: whether something reads or makes them that no factor passes.
    """

    makers: list[_End] = field(default_factory=list)
    readers: list[_End] = field(default_factory=list)
    dimensions: int | None = None
    fixed: bool = False

    def divide(self, factors: Tensor) -> None:
        """Divide each channel of the tensors by its factor, and multiply what reads the channel."""
        for end in self.makers:
            end.scale(1 / factors, made=True)
        for end in self.readers:
            end.scale(factors, made=False)

    def worst(self) -> float:
        """Return the largest ratio of its layers."""
        return max(end.ratio() for end in self.makers + self.readers)


def _evened_out(spaces: list[_Space]) -> set[int]:
    """Move factors between the layers of each space until none moves. Return the ids of the spaces that changed."""
    changed: set[int] = set()
    for _ in range(_ROUNDS):
        moved = [space for space in spaces if _even_out(space)]
        if not moved:
            break
        changed |= set(map(id, moved))
    return changed


def _even_out(space: _Space) -> bool:
    """Choose the factors that leave the least variance between the channels' ranges, over all layers, on the scale of a logarithm.

    For one maker and one reader this is the paper's s = √(r₁ / r₂), up to a factor that all channels share. The factors are taken back
    if the worst range of these layers isn't narrower with them: powers of two are too coarse for layers that are nearly even.
    """
    made = torch.stack([end.ranges(made=True) for end in space.makers]).log2()
    read = torch.stack([end.ranges(made=False) for end in space.readers]).log2()
    possible = made.isfinite().all(0) & read.isfinite().all(0)
    if not possible.any():
        return False
    exponents = torch.zeros(made.shape[1], dtype=torch.float64, device=made.device)
    above = _centred(made[:, possible]).sum(0) - _centred(read[:, possible]).sum(0)
    exponents[possible] = (above / (len(made) + len(read))).round()
    factors = torch.exp2(exponents.clamp(-_FURTHEST, _FURTHEST))
    for end in space.makers:
        factors[~end.unchanged_by(1 / factors, made=True)] = 1
    for end in space.readers:
        factors[~end.unchanged_by(factors, made=False)] = 1
    if bool((factors == 1).all()):
        return False
    before = space.worst()
    space.divide(factors)
    if space.worst() < before:
        return True
    space.divide(1 / factors)
    return False


def _centred(logarithms: Tensor) -> Tensor:
    return logarithms - logarithms.mean(1, keepdim=True)


# ---- which tensors share their factors

# what factors pass, and on how many axes behind the channels it works; None for any number
_OVER_PLACES = (
    "Dropout",
    "ZeroPad",
    "ReflectionPad",
    "ReplicationPad",
    "MaxPool",
    "AvgPool",
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
)
_LAYERS: dict[type[nn.Module], int | None] = {
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout), None),
    **dict.fromkeys((nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), 2),
    **{getattr(nn, f"{name}{n}d"): n for name in _OVER_PLACES for n in (1, 2, 3)},
}
_FUNCTIONS: dict[Any, int | None] = {
    **dict.fromkeys(
        (torch.relu, torch.relu_, F.relu, F.relu_, F.leaky_relu, F.leaky_relu_, torch.clone, *MODULES), None
    ),
    **dict.fromkeys(("relu", "relu_", "contiguous", "clone"), None),
    **{
        getattr(F, f"{name}{n}d"): n
        for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
        for n in (1, 2, 3)
    },
}
_MEANS = (torch.mean, "mean")


class _Spaces:
    """The spaces of the tensors in a graph, by union of what must have the same factors."""

    def __init__(self, view: View, shared: set[int]) -> None:
        self._view = view
        self._shared = shared  # ids of tensors that have several names
        self._parents: dict[_Space, _Space] = {}
        self._of: dict[fx.Node, _Space] = {}
        self._single: set[fx.Node] = set()  # tensors with one place for each channel

    def found(self) -> list[_Space]:
        """Return the spaces through which factors can pass."""
        for node in self._view.graph.nodes:
            self._visit(node)
        roots = {self._root(space): None for space in self._of.values()}
        return [space for space in roots if _is_free(space)]

    def _visit(self, node: fx.Node) -> None:
        if _asks_for_sizes(node):
            return
        source = split(node)[0]
        if self._is_layer(node):
            self._visit_layer(node, source)
        elif self._hands_factors_on(node) or self._keeps_one_place(node):
            self._of[node] = self._space(source)
            if source in self._single or self._leaves_one_place(node):
                self._single.add(node)
        elif node.target in ADDITIONS | SUBTRACTIONS and len(node.all_input_nodes) == 2 and len(node.args) == 2:
            self._of[node] = self._united(*node.all_input_nodes)
            if all(each in self._single for each in node.all_input_nodes):
                self._single.add(node)
        elif node.target in PRODUCTS and len(node.all_input_nodes) == 2:
            self._visit_product(node)
        else:
            self._fix(node)

    def _visit_layer(self, node: fx.Node, source: Any) -> None:
        end = _End(str(node.target), self._view.module(node))
        flat = isinstance(end.layer, nn.Linear)
        dimensions = 0 if flat else len(end.layer.kernel_size)
        read = self._space(source)
        read.readers.append(end)
        read.fixed |= read.dimensions != dimensions and not (flat and source in self._single)
        self._of[node] = _Space([end], dimensions=dimensions)

    def _visit_product(self, node: fx.Node) -> None:
        """A factor passes a product with a tensor that has none, such as a gate."""
        spaces = [self._space(each) for each in node.all_input_nodes]
        free = [space for space in spaces if not space.fixed]
        if len(free) == 1 and len({id(space) for space in spaces}) == 2:
            self._of[node] = free[0]
        else:
            self._fix(node)

    def _fix(self, node: fx.Node) -> None:
        for each in node.all_input_nodes:
            self._space(each).fixed = True
        self._of[node] = _Space(fixed=True)

    def _united(self, *nodes: fx.Node) -> _Space:
        first, *others = (self._space(node) for node in nodes)
        for other in others:
            if other is first:
                continue
            first.fixed |= other.fixed or first.dimensions != other.dimensions
            first.makers += other.makers
            first.readers += other.readers
            self._parents[other] = first
        return first

    def _space(self, node: Any) -> _Space:
        return self._root(self._of[node]) if node in self._of else _Space(fixed=True)

    def _root(self, space: _Space) -> _Space:
        while space in self._parents:
            space = self._parents[space]
        return space

    def _is_layer(self, node: fx.Node) -> bool:
        view = self._view
        op = view.op(node)
        if op is None or op.meaning.kind != "conv" or view.module(node) is None or view.refusal(node) is not None:
            return False
        layer: Any = view.module(node)
        mine = isinstance(layer.weight, nn.Parameter) and not self._shared & {id(layer.weight), id(layer.bias)}
        return (
            mine and layer.weight.is_contiguous() and not layer.weight.is_meta and isinstance(split(node)[0], fx.Node)
        )

    def _hands_factors_on(self, node: fx.Node) -> bool:
        source = split(node)[0]
        if not isinstance(source, fx.Node) or node.all_input_nodes != [source]:
            return False
        places = self._space(source).dimensions
        if node.target is F.pad:
            return bool(places) and _pads_places(node, places or 0)
        if node.target is F.interpolate:
            return bool(places)
        if node.op != "call_module":
            return node.target in _FUNCTIONS and _FUNCTIONS[node.target] in (None, places)
        layer: Any = self._view.module(node)
        if is_patched(layer) or has_hooks(layer) or getattr(layer, "return_indices", False):
            return False
        return (type(layer) is nn.Upsample and bool(places)) or (
            type(layer) in _LAYERS and _LAYERS[type(layer)] in (None, places)
        )

    def _keeps_one_place(self, node: fx.Node) -> bool:
        """Whether a node is the mean over all places, or leaves out the axes of the one place that there is."""
        source = split(node)[0]
        if not isinstance(source, fx.Node):
            return False
        flattened = source in self._single and _is_flattening(node, self._view)
        return flattened or _is_mean_of_places(node, self._space(source).dimensions)

    def _leaves_one_place(self, node: fx.Node) -> bool:
        """Whether a node leaves one place of each channel."""
        if node.target in _MEANS:
            return True
        if node.op == "call_module":
            size = getattr(self._view.module(node), "output_size", None)
        else:
            called = getattr(node.target, "__name__", "")
            size = split(node)[1][0] if called.startswith("adaptive") and len(node.args) > 1 else None
        sizes = size if isinstance(size, (tuple, list)) else (size,)
        return all(each == 1 for each in sizes)


def _is_free(space: _Space) -> bool:
    """Whether factors can pass a space: layers make it and read it, and they agree on its channels."""
    if space.fixed or not space.makers or not space.readers:
        return False
    made = {len(end.ranges(made=True)) for end in space.makers}
    read = {len(end.ranges(made=False)) for end in space.readers}
    return len(made | read) == 1


def _asks_for_sizes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in SIZE_METHODS
    return bool(node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device"))


def _pads_places(node: fx.Node, places: int) -> bool:
    """Whether a call pads some of the axes behind the channels, with zeros or what is there."""
    call: dict[str, Any] = {**dict(zip(("input", "pad", "mode", "value"), node.args)), **node.kwargs}
    pad = call.get("pad")
    if not isinstance(pad, (tuple, list)) or len(pad) > 2 * places:
        return False
    return call.get("mode", "constant") != "constant" or call.get("value") in (None, 0)


def _is_mean_of_places(node: fx.Node, dimensions: int | None) -> bool:
    """Whether a node is the mean over all axes behind the channels."""
    if node.target not in _MEANS or not dimensions:
        return False
    call = {**dict(zip(("input", "dim", "keepdim"), node.args)), **node.kwargs}
    axes = call.get("dim")
    axes = [axes] if isinstance(axes, int) else axes
    if (
        not isinstance(axes, (tuple, list))
        or not all(isinstance(axis, int) for axis in axes)
        or call.get("dtype") is not None
    ):
        return False
    count = dimensions + 2
    return sorted(axis % count for axis in axes) == list(range(2, count))


def _is_flattening(node: fx.Node, view: View) -> bool:
    """Whether a node flattens all axes from the channels on."""
    if node.op == "call_module":
        layer = view.module(node)
        return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1) and not has_hooks(layer)
    call = {**dict(zip(("input", "start_dim", "end_dim"), node.args)), **node.kwargs}
    return node.target in (torch.flatten, "flatten") and (call.get("start_dim", 0), call.get("end_dim", -1)) == (1, -1)


def range_ratios(model: nn.Module) -> Iterator[tuple[str, float]]:
    """For each conv and linear layer, how many times larger the largest channel's range is than the median channel's.

    The channels that the layer makes are compared with each other, and so are those that it reads. The ratio is the larger of the two.
    Channels of zeros don't count.

    >>> conv = nn.Conv2d(1, 3, 1, bias=False)
    >>> conv.weight.data = torch.tensor([1.0, 2.0, 8.0]).reshape(3, 1, 1, 1)
    >>> list(range_ratios(conv))
    [('', 4.0)]
    """
    for path, layer in model.named_modules():
        if isinstance(getattr(layer, "weight", None), Tensor) and layer.weight.ndim > 1 and hasattr(layer, "bias"):
            yield path, _End(path, layer).ratio()
