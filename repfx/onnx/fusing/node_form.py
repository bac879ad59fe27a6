"""`Form`: an ONNX node in words of torch; and `Operator`: a node with what is known of its inputs, from which a form is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from repfx.algebra.kernel import Ints
from repfx.onnx.fusing.known_values import Array, FoldedValues, Node, Shape, Shapes, Value


@dataclass(frozen=True)
class Form:
    """A node in words of torch: a layer, a function or the name of a method, and its arguments.

    Args:
        args: values of the file, arrays, other forms and plain numbers, in any nesting of tuples.
        covers: further nodes that the form stands for.
    """

    target: nn.Module | Callable[..., Any] | str
    args: tuple[Any, ...]
    covers: tuple[Node, ...] = ()


LATER = Form("later", ())  # a node that the form of a later one covers


@dataclass(frozen=True)
class Operator:
    """A node, and what is known of its inputs."""

    node: Node
    opset: int
    constants: FoldedValues
    shapes: Shapes

    @property
    def x(self) -> Value:
        return self.node.inputs[0]

    def has(self, index: int) -> bool:
        """Whether a node has an input at a place."""
        return len(self.node.inputs) > index and self.node.inputs[index] is not None

    def constant(self, index: int) -> Array | None:
        """Return an input as an array, or None if there is none or if it isn't constant."""
        return self.constants.of(self.node.inputs[index]) if self.has(index) else None

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or its default."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def ints(self, name: str, default: Ints) -> Ints:
        """Return an attribute of several numbers."""
        return tuple(self.get(name, default))

    def shape(self, index: int = 0) -> Shape | None:
        return self.shapes.of(self.node.inputs[index]) if self.has(index) else None

    def axes(self, index: int = 0) -> int | None:
        shape = self.shape(index)
        return None if shape is None else len(shape)

    def why_not_constant(self, index: int, name: str) -> str:
        """Return the reason why an input can't be merged with others."""
        if self.constants.is_default(self.node.inputs[index]):
            return f"its {name} is also an input of the file, which a caller may replace: remove it from the inputs"
        return f"its {name} isn't constant"


Reader: TypeAlias = Callable[[Operator], "Form | str | None"]
