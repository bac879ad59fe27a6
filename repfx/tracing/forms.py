"""Forms of constants while code is traced: the shapes of tensors that it computes from parameters alone.

Code that asks for such a shape gets plain numbers, as it does when it runs.
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from repfx.graphs.aliasing import mutated_by
from repfx.graphs.constants import Forms, NotConstant, origins
from repfx.graphs.vocabulary import SIZE_METHODS

SIZES = SIZE_METHODS | {"shape", "ndim"}  # what a form tells of a tensor


class GrowingForms:
    """The forms of a graph while it is traced. A tensor that code has written to has none, because a write may change its shape."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self._forms = Forms(graph, root)
        self._root = root
        self._computed: set[fx.Node] = set()  # from parameters alone

    def add(self, node: fx.Node) -> None:
        """Take note of a node that the graph has got."""
        if node.op == "get_attr":
            self._computed.add(node)
            return
        sources = node.all_input_nodes
        if not sources or self._computed.isdisjoint(sources):
            return
        written = mutated_by(node, self._root)
        if written is not None and written.op != "get_attr":
            self._computed.discard(written)
        elif written is None and node.op != "call_module" and self._computed.issuperset(sources):
            self._computed.add(node)

    def of(self, node: fx.Node) -> Tensor | None:
        """Return the form of a tensor, or None as `Forms.of` does."""
        return self._forms.of(node) if node in self._computed else None

    def parts_of(self, node: fx.Node) -> int | None:
        """Return how many parts a tensor, a tuple or a list has, or None if it has none or `of` doesn't know it."""
        try:
            found = self._forms.literal(node) if node in self._computed else None
        except NotConstant:
            return None
        if isinstance(found, Tensor):
            return len(found) if found.ndim else None
        return len(found) if isinstance(found, (tuple, list)) else None

    def parameters_of(self, node: fx.Node) -> str:
        """Name the tensors that a value is computed from; an empty text if it may depend on an input."""
        if node not in self._computed:
            return ""
        names = {str(source.target) for source in origins(node) if source.op == "get_attr"}
        return ", ".join(map(repr, sorted(names)))
