"""What rules look for: two linear maps in sequence, a single one, or a sum of paths that start at one node.

Patterns are structure only. They see a graph through a `View`, which reads each node as a linear map where it may be touched at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from repfx.arithmetic import ADDITIONS, SUBTRACTIONS
from repfx.bordered_padding import padded_before, read_border
from repfx.constants import Constants
from repfx.functional_conv import is_functional_conv, read_functional_conv
from repfx.kernel import Kernel, NoKernel
from repfx.meaning import Kind, Meaning, has_hooks, has_tensors, is_batch_norm, is_conv, refusal_of
from repfx.operations import Op, read_op
from repfx.viewed_norm import read_viewed_norm

META = torch.empty((), device="meta", dtype=torch.float64)


@dataclass
class View:
    """A graph as patterns and guards see it.

    Args:
        root: the module the graph belongs to.
        calls: how often each module is called in the whole model, by path in `root`.
        registered: under how many paths each module is registered, by path in `root`.
        kernels: the nodes that rules have already merged, with their kernels, in float64 as long as they may be merged further.
        input_axes: how many axes the input of the module at a path in `root` has, if that is known.
    """

    root: nn.Module
    graph: fx.Graph
    calls: Counter[str]
    registered: Counter[str]
    kernels: dict[fx.Node, Kernel] = field(default_factory=dict)
    input_axes: Callable[[str], int | None] = lambda path: None

    def __post_init__(self) -> None:
        read = {str(node.target).rpartition(".")[0] for node in self.graph.nodes if node.op == "get_attr"}
        self._read_elsewhere = read
        self._ops: dict[fx.Node, Op | None] = {}
        self.constants = Constants(self.graph, self.root)

    def op(self, node: fx.Node) -> Op | None:
        """The node as a linear map that may be moved and merged, or None; what was read holds until the graph has changed."""
        if node not in self._ops:
            self._ops[node] = self._read(node)
        return self._ops[node]

    def graph_changed(self) -> None:
        """Let each node be read anew."""
        self._ops.clear()

    def set_kernel(self, node: fx.Node, kernel: Kernel) -> None:
        """Let a node that rules have merged have this kernel."""
        self.kernels[node] = kernel
        self._ops.pop(node, None)

    def _read(self, node: fx.Node) -> Op | None:
        if node in self.kernels:
            kernel = self.kernels[node]
            sizes = (kernel.dimensions, kernel.in_channels)
            meaning = Meaning("conv", *sizes, lambda like, channels, n: kernel.to(like), spare=True)
            return Op(node, node.all_input_nodes[0], meaning)
        if self.refusal(node):
            return None
        return read_op(node, self.root, self.constants) or self._viewed_norm(node)

    def _viewed_norm(self, node: fx.Node) -> Op | None:
        normed = node.args[0] if node.op in ("call_method", "call_function") and node.args else None
        norm = self.module(normed) if isinstance(normed, fx.Node) else None
        if not isinstance(normed, fx.Node) or norm is None or not is_batch_norm(norm) or self.refusal(normed):
            return None
        return read_viewed_norm(node, norm, normed, self.input_axes(str(normed.target)))

    def refusal(self, node: fx.Node) -> str | None:
        """Why the module that a node calls must stay as it is, or None."""
        if node.op != "call_module" or node in self.kernels:
            return None
        path = str(node.target)
        module = self.root.get_submodule(path)
        if has_hooks(module):
            return f"{type(module).__name__} has hooks, which would no longer see what they see now"
        if not has_tensors(module):
            return None
        if self.calls[path] > 1:
            return f"it is called {self.calls[path]} times; a change would change every call"
        if self.registered[path] > 1:
            return f"it is registered under {self.registered[path]} names"
        if self.constants.changes(path):
            return "its parameters are changed in forward"
        if path in self._read_elsewhere and not is_batch_norm(module):  # whose tensors no rewrite changes
            return "its parameters are read elsewhere in the model"
        if any(tensor.is_complex() for tensor in module.parameters()):
            return "its weights are complex"
        return refusal_of(module)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, or None."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_conv(self, node: fx.Node) -> bool:
        """Whether a node is a convolution or a linear layer with weights of its own."""
        module = self.module(node)
        if node in self.kernels or is_functional_conv(node):
            return True
        return module is not None and (is_conv(module) or isinstance(module, nn.Linear))


@dataclass(frozen=True)
class Term:
    """One path of a match: linear maps from the source on; none for the source itself. `sign` is that in the sum."""

    ops: tuple[Op, ...]
    sign: int = 1


@dataclass(frozen=True)
class Match:
    """Nodes that amount to ``root = Σ sign · term(source) + Σ sign · remainder``."""

    root: fx.Node
    source: fx.Node
    terms: tuple[Term, ...]
    inner: tuple[fx.Node, ...] = ()
    remainder: tuple[tuple[int, fx.Node], ...] = ()

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(op for term in self.terms for op in term.ops)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes that the match replaces, the root first."""
        others = [*self.inner, *(node for op in reversed(self.ops) for node in op.nodes)]
        return (self.root, *dict.fromkeys(node for node in others if node is not self.root))

    @property
    def keeps_the_form(self) -> bool:
        """Whether the output has the shape of what the first map gives out: nothing but scales, shifts and identities follow."""
        followers = self.terms[0].ops[1:]
        alone = len(self.terms) == 1 and not self.remainder
        return alone and all(op.meaning.kind in ("affine", "identity") for op in followers)

    def kernel(self, like: Tensor) -> Kernel:
        """The kernel of all terms, in the dtype and on the device of `like`; `META` asks for sizes alone, which several guards do.

        Raises:
            NoKernel: they are no convolution.
        """
        return self._sizes_alone if like is META else self._kernel(like)

    @cached_property
    def _sizes_alone(self) -> Kernel:
        return self._kernel(META)

    def _kernel(self, like: Tensor) -> Kernel:
        channels, dimensions = self.sizes()
        first, *others = self.terms
        total = _signed(term_kernel(first, like, channels, dimensions), first.sign)
        new = len(first.ops) != 1 or first.ops[0].meaning.spare  # in no one else's hands
        for term in others:  # one by one, so that none waits in memory for its turn
            total = total.add(_signed(term_kernel(term, like, channels, dimensions), term.sign), over=new)
            new = True
        return total

    def shifts(self, like: Tensor) -> list[Tensor]:
        """What the scales and shifts among the maps add, each before the maps that follow it."""
        channels, dimensions = self.sizes()
        shifts = [shift for term in self.terms for shift in _shifts(term, like, channels, dimensions)]
        return [shift for shift in shifts if shift is not None]

    def sizes(self) -> tuple[int, int]:
        """Channels and axes of the source.

        Raises:
            NoKernel: the maps don't agree on them.
        """
        dimensions = {op.meaning.dimensions for op in self.ops} - {None}
        channels = {_in_channels(term) for term in self.terms} - {None}
        if len(dimensions) != 1 or len(channels) != 1:
            raise NoKernel(
                f"channels {sorted(map(str, channels))} and dimensions {sorted(map(str, dimensions))} don't fit together"
            )
        return channels.pop() or 0, dimensions.pop() or 0


def _in_channels(term: Term) -> int | None:
    """The channels that enter the term; every map that doesn't say so keeps their number."""
    return next((op.meaning.in_channels for op in term.ops if op.meaning.in_channels is not None), None)


def term_kernel(term: Term, like: Tensor, channels: int, dimensions: int) -> Kernel:
    """The kernel of one path."""
    if not term.ops:
        return Kernel.identity(like, channels=channels, dimensions=dimensions)
    first, *others = term.ops
    total = _kernel_of(first, None if first.meaning.kind == "conv" else like, channels, dimensions)
    if not others or others[0].meaning.kind != "affine" or total.weight.device != like.device:
        total = total.to(like)  # else the product with the scale, which is in full precision, is, too
    for op in others:
        total = total.compose(_kernel_of(op, like, total.out_channels, dimensions))
    return total


def _shifts(term: Term, like: Tensor, channels: int, dimensions: int) -> Iterator[Tensor | None]:
    for op in term.ops:
        affine = op.meaning.kind == "affine"
        kernel = _kernel_of(op, like if affine else META, channels, dimensions)
        if affine:
            yield kernel.bias
        channels = kernel.out_channels


def _kernel_of(op: Op, like: Tensor | None, channels: int, dimensions: int) -> Kernel:
    if op.meaning.dimensions not in (None, dimensions):
        raise NoKernel(f"{op.node.name!r} has {op.meaning.dimensions} dimensions, not {dimensions}")
    return op.meaning.build(like, channels, dimensions)


def _signed(kernel: Kernel, sign: int) -> Kernel:
    return kernel if sign > 0 else kernel.negate()


class Pattern:
    """What a rule looks for at a node."""

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        """All that the rule may take here, the best first."""
        raise NotImplementedError

    def match(self, node: fx.Node, view: View) -> Match | None:
        """The first of them, if there is one."""
        return next(self.matches(node, view), None)


@dataclass(frozen=True)
class Single(Pattern):
    """One linear map of these kinds."""

    kinds: frozenset[Kind]

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        op = view.op(node)
        if op is not None and op.meaning.kind in self.kinds:
            yield Match(node, op.source, (Term((op,)),))


@dataclass(frozen=True)
class FunctionalConv(Pattern):
    """One call of a function for convs, with a weight that depends on no input. Other patterns don't see such calls."""

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        op = read_functional_conv(node, view.constants)
        if op is not None:
            yield Match(node, op.source, (Term((op,)),))


@dataclass(frozen=True)
class BorderedPadding(Pattern):
    """A 1×1 conv whose output is padded with what it gives out for zero."""

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        pad = view.op(node)
        conv = view.op(pad.source) if pad is not None and pad.meaning.kind == "pad" else None
        if pad is None or conv is None or conv.meaning.kind != "conv":
            return
        channels, dimensions = conv.meaning.in_channels or 0, conv.meaning.dimensions or 0
        try:
            out_channels = conv.meaning.build(META, channels, dimensions).out_channels
            zeros = pad.meaning.build(META, out_channels, pad.meaning.dimensions or dimensions)
        except NoKernel:
            return
        if zeros.padding_mode != "zeros" or zeros.dimensions != dimensions:
            return
        border = read_border(node, zeros.padding, out_channels, view.constants)
        padded = None if border is None else padded_before(conv, zeros.padding, border)
        if border is not None and padded is not None:
            yield Match(node, conv.source, (Term((padded,)),), inner=border.writes)


@dataclass(frozen=True)
class Sequence(Pattern):
    """A linear map of one of the `first` kinds whose output enters one of the `second` kinds."""

    first: frozenset[Kind]
    second: frozenset[Kind]

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        second = view.op(node)
        if second is None or second.meaning.kind not in self.second:
            return
        first = view.op(second.source)
        if first is not None and first.meaning.kind in self.first:
            yield Match(node, first.source, (Term((first, second)),))


@dataclass(frozen=True)
class Sum(Pattern):
    """A tree of additions and subtractions, of which at least two terms are linear maps of one node, one of them a conv.

    The terms that fit none are the match's remainder. Where the tree can't be merged as a whole, its parts may be: two blocks of a
    sum whose windows don't go together are still one conv each.
    """

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        if not is_sum(node, view) or _is_inner(node, view):
            return
        _, inner = _leaves(node, view)
        whole = list(_matches_of_tree(node, view))
        yield from (
            match for match in whole if not match.remainder
        )  # none has more terms, so the parts may not be asked at all
        found = [match for match in whole if match.remainder]
        found += [match for part in inner for match in _matches_of_tree(part, view)]
        # one with a remainder last: it takes the tree apart, and other parts of it may have been one convolution
        yield from sorted(found, key=lambda match: (bool(match.remainder), -len(match.terms)))


def _matches_of_tree(root: fx.Node, view: View) -> Iterator[Match]:
    leaves, inner = _leaves(root, view)
    for match in _groups(leaves, view):
        yield replace(match, root=root, inner=tuple(inner))


def is_sum(node: fx.Node, view: View) -> bool:
    """Whether a node adds or subtracts two nodes, neither of which is a constant."""
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS | SUBTRACTIONS:
        return False
    both = len(node.args) == 2 and not node.kwargs and all(isinstance(argument, fx.Node) for argument in node.args)
    return both and all(view.constants.number(argument) is None for argument in node.args)


def _is_inner(node: fx.Node, view: View) -> bool:
    """Whether a sum is only a part of a larger one, and will be seen from there."""
    return len(node.users) == 1 and is_sum(next(iter(node.users)), view)


def _leaves(root: fx.Node, view: View) -> tuple[list[tuple[int, fx.Node]], list[fx.Node]]:
    """The signed terms of a sum, and the additions below its root that no one else uses."""
    leaves, inner, pending = [], [], [(1, root)]
    while pending:
        sign, node = pending.pop(0)
        if node is not root and (len(node.users) > 1 or not is_sum(node, view)):
            leaves.append((sign, node))
            continue
        if node is not root:
            inner.append(node)
        second_sign = -sign if node.target in SUBTRACTIONS else sign
        pending[:0] = [(s, term) for s, term in zip((sign, second_sign), node.args) if isinstance(term, fx.Node)]
    return leaves, inner


def _groups(leaves: list[tuple[int, fx.Node]], view: View) -> Iterator[Match]:
    """For each node that two or more terms start at: those terms, in as many groups as it takes for each to be one convolution."""
    paths = [linear_paths(leaf, view) for _, leaf in leaves]
    sources = Counter(source for path in paths for source in path)
    for source, count in sources.items():
        if count < 2:
            continue
        terms = [(index, Term(path[source], leaves[index][0])) for index, path in enumerate(paths) if source in path]
        # terms with a conv first: they fix the sizes that an identity or a pooling takes on
        terms.sort(key=lambda item: not _has_conv(item[1], view))
        while terms and _has_conv(terms[0][1], view):
            chosen = _that_add_up(terms, source)
            if len(chosen) > 1:
                remainder = tuple(leaf for index, leaf in enumerate(leaves) if index not in chosen)
                yield Match(source, source, tuple(chosen.values()), remainder=remainder)
            taken = chosen or {terms[0][0]}  # a term that is no convolution even by itself
            terms = [(index, term) for index, term in terms if index not in taken]


def _has_conv(term: Term, view: View) -> bool:
    return any(view.is_conv(op.node) for op in term.ops)


def linear_paths(leaf: fx.Node, view: View) -> dict[fx.Node, tuple[Op, ...]]:
    """Every node from which linear maps that no one else uses lead to `leaf`, with those maps; `leaf` itself first."""
    paths: dict[fx.Node, tuple[Op, ...]] = {leaf: ()}
    ops: tuple[Op, ...] = ()
    while len(leaf.users) == 1:
        op = view.op(leaf)
        if op is None:
            break
        ops = (op, *ops)
        leaf = op.source
        paths[leaf] = ops
    return paths


def _that_add_up(terms: list[tuple[int, Term]], source: fx.Node) -> dict[int, Term]:
    """The first term that is a convolution by itself, and each later one that makes a convolution with those before it."""
    chosen: dict[int, Term] = {}
    total: Kernel | None = None
    for index, term in terms:
        try:
            channels, dimensions = Match(source, source, (*chosen.values(), term)).sizes()
            kernel = _signed(term_kernel(term, META, channels, dimensions), term.sign)
            total = kernel if total is None else total.add(kernel)
        except NoKernel:
            continue
        chosen[index] = term
    return chosen
