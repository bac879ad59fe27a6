"""`Match`: nodes of a graph that amount to a sum of paths of linear maps, and the kernel of that sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from repfx.algebra.cost import Shape, output_shape
from repfx.algebra.kernel import Kernel, NoKernel, Padding
from repfx.algebra.ones import bias_on_ones, with_ones
from repfx.graphs.operations import Op
from repfx.rewriting.view import META, View


@dataclass(frozen=True)
class Term:
    """One path of a match: linear maps from the source on. No maps mean the source itself.

    Args:
        factor: the path's factor in the sum, such as 1 or -1.
        adder: the addition that the path's end enters, or None if there is none.
    """

    ops: tuple[Op, ...]
    factor: float = 1
    adder: fx.Node | None = None


@dataclass(frozen=True)
class Match:
    """Nodes that amount to ``root = Σ factor · term(source) + Σ factor · remainder``.

    Args:
        inner: nodes of the match that are no maps, such as the additions below the root.
        written: nodes of the match that write in place what its maps account for, a border.
        cropped: nodes of the match that others read, too, each with the padding that was put around it. They are the root's value, cropped.
        carried: a scale and shift among the maps that stands elsewhere, before or behind `carriers`. Its place is left to its input.
        others: further matches that must be made together with this one.
        ones: whether the merged conv reads a further channel of ones behind those of the source. So shifts pass its padding.
    """

    root: fx.Node
    source: fx.Node
    terms: tuple[Term, ...]
    inner: tuple[fx.Node, ...] = ()
    remainder: tuple[tuple[float, fx.Node], ...] = ()
    written: tuple[fx.Node, ...] = ()
    cropped: tuple[tuple[fx.Node, Padding], ...] = ()
    carried: fx.Node | None = None
    carriers: tuple[fx.Node, ...] = ()
    others: tuple[Match, ...] = ()
    ones: bool = False

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(op for term in self.terms for op in term.ops)

    @property
    def shares_maps(self) -> bool:
        """Whether a map stands in several terms."""
        nodes = [op.node for op in self.ops]
        return len(set(nodes)) < len(nodes)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes that the match replaces: the root first, then each node before those that it reads."""
        others = {*self.inner, *(node for op in self.ops for node in op.nodes)} - {self.root, self.carried}
        return (self.root, *sorted(others, reverse=True))

    @property
    def keeps_the_form(self) -> bool:
        """Whether the output has the shape of the first map's output, because only scales, shifts and identities follow that map."""
        followers = self.terms[0].ops[1:]
        alone = len(self.terms) == 1 and not self.remainder
        return alone and all(op.meaning.kind in ("affine", "identity") for op in followers)

    def kernel(self, like: Tensor, *, owned: bool = False) -> Kernel:
        """Return the kernel of all terms, in the dtype and on the device of `like`.

        Args:
            owned: whether the kernel of the first map may be written over, because it is nobody else's.

        Raises:
            NoKernel: they are no convolution.
        """
        sizes = self.sizes()
        kernels = (term_kernel(term, like, *sizes, ones=self.ones).scaled(term.factor) for term in self.terms)
        return Kernel.sum(kernels, owned=owned or len(self.terms[0].ops) != 1)

    @cached_property
    def form(self) -> Kernel:
        """The kernel of all terms without its numbers: a kernel on the meta device, which has the sizes alone.

        Raises:
            NoKernel: they are no convolution.
        """
        with torch.no_grad():  # so that it can be copied
            return self.kernel(META)

    def shifts(self, like: Tensor) -> list[Tensor]:
        """Return what each scale or shift among the maps adds, times its term's factor, as it is before the maps that follow."""
        channels, dimensions = self.sizes()
        found = ((term.factor, shift) for term in self.terms for shift in _shifts(term, like, channels, dimensions))
        return [shift * factor for factor, shift in found if shift is not None]

    def sizes(self) -> tuple[int, int]:
        """Return the channels and the spatial axes of the source.

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


def shape_before(match: Match, view: View) -> Shape | None:
    """Return the shape of a match's source, or None if it isn't known."""
    known = (view.shape_before(term.ops[0].node) for term in match.terms if term.ops)
    return next((shape for shape in known if shape is not None), None)


def cost_of_convs(
    terms: Iterable[Term], match: Match, cost: Callable[[Kernel, Shape | None], float], view: View
) -> float:
    """Return what the convs of some terms of a match cost. A conv that stands in several terms counts once."""
    steps = (step for term in terms for step in forms_along(term, match, view))
    return sum({id(op): cost(form, shape) for op, form, shape in steps if op.meaning.kind == "conv"}.values())


def forms_along(term: Term, match: Match, view: View) -> Iterator[tuple[Op, Kernel, Shape | None]]:
    """Yield each map of a term of a match, with its kernel without numbers and with the shape of its input, if that is known."""
    channels, dimensions = match.sizes()
    shape = shape_before(match, view)
    for op in term.ops:
        kernel = op.meaning.build(META, channels, dimensions)
        yield op, kernel, shape
        channels, shape = kernel.out_channels, output_shape(kernel, shape)


def _in_channels(term: Term) -> int | None:
    """Return how many channels enter the term, or None if no map says so. A map that doesn't say so keeps their number."""
    return next((op.meaning.in_channels for op in term.ops if op.meaning.in_channels is not None), None)


def term_kernel(term: Term, like: Tensor, channels: int, dimensions: int, *, ones: bool = False) -> Kernel:
    """Return the kernel of one path.

    Args:
        ones: whether it reads a further channel of ones.
    """
    if not term.ops:
        return Kernel.identity(like, channels=channels, dimensions=dimensions)
    first, *others = term.ops
    total = _kernel_of(first, None if first.meaning.kind == "conv" else like, channels, dimensions)
    if not others or others[0].meaning.kind != "affine" or total.weight.device != like.device:
        total = total.to(like)  # else the product with the scale, which is in full precision, is, too
    total = with_ones(total) if ones else total
    for op in others:
        behind = _kernel_of(op, like, total.out_channels, dimensions)
        total = (bias_on_ones(total) if ones and behind.padded else total).compose(behind)
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
