"""The shapes of the values of an ONNX file, as onnx infers them. A size that isn't fixed is None."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from repfx.onnx.file import package
from repfx.onnx.folded_values import Value

Shape: TypeAlias = "tuple[int | None, ...]"
_SMALL = 1 << 10  # bytes of an initializer that may hold a shape


class Shapes:
    """The shapes of the values of a file's main graph. The file's own notes on values inside it aren't trusted."""

    def __init__(self, path: Path) -> None:
        onnx = package("onnx")
        model = onnx.load(path, load_external_data=False)
        del model.graph.value_info[:]
        for tensor in model.graph.initializer:
            if tensor.HasField("raw_data") and len(tensor.raw_data) > _SMALL:
                tensor.raw_data = b""
        try:
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        except Exception:  # what isn't inferred isn't known
            pass
        known = (*model.graph.input, *model.graph.output, *model.graph.value_info)
        self._known: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        self._known |= {each.name: shape for each in known if (shape := _shape(each)) is not None}

    def of(self, value: Value | None) -> Shape | None:
        """Return the shape of a value, or None if its number of axes isn't known."""
        return None if value is None else self._known.get(value.name)

    def axes(self, value: Value | None) -> int | None:
        """Return the number of axes of a value, or None if it isn't known."""
        shape = self.of(value)
        return None if shape is None else len(shape)

    def note(self, value: Value, shape: Shape) -> None:
        """Note the shape of a value, unless it is known already."""
        self._known.setdefault(value.name, shape)


def _shape(value: Any) -> Shape | None:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        return None
    return tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim)
