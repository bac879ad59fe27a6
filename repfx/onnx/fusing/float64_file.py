"""An ONNX file with float64 in place of every other floating-point type, run by onnx's reference implementation: what the file means.

onnxruntime has no convs in float64 or bfloat16 for the CPU, and a file in float32 doesn't show how much of a difference is rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from repfx.onnx.file import package

_TYPED = ("to", "dtype")  # attributes that name a type


def run_in_float64(path: Path, feeds: dict[str, Any]) -> list[Any]:
    """Return the outputs of a file in float64 for inputs as arrays, by name."""
    import numpy as np

    wide = {name: array.astype(np.float64) if array.dtype.kind in "fV" else array for name, array in feeds.items()}
    found: list[Any] = package("onnx.reference").ReferenceEvaluator(_in_float64(path)).run(None, wide)
    return found


def _in_float64(path: Path) -> Any:
    model = package("onnx").load(path)
    _widen_graph(model.graph)
    for function in model.functions:
        _widen_nodes(function.node)
    return model


def _floating() -> set[int]:
    types = package("onnx").TensorProto
    return {types.FLOAT, types.FLOAT16, types.BFLOAT16}


def _widen_graph(graph: Any) -> None:
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _floating():
            value.type.tensor_type.elem_type = package("onnx").TensorProto.DOUBLE
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    _widen_nodes(graph.node)


def _widen_tensor(tensor: Any) -> None:
    if tensor.data_type in _floating():
        numpy_helper = package("onnx").numpy_helper
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float64"), tensor.name))


def _widen_nodes(nodes: Iterable[Any]) -> None:
    onnx = package("onnx")
    for node in nodes:
        if node.op_type == "ConstantOfShape" and not node.attribute:
            zero = onnx.helper.make_tensor("value", onnx.TensorProto.DOUBLE, [1], [0.0])
            node.attribute.append(onnx.helper.make_attribute("value", zero))
        for attribute in node.attribute:
            if attribute.name in _TYPED and attribute.i in _floating():
                attribute.i = onnx.TensorProto.DOUBLE
            elif attribute.name in ("value_float", "value_floats"):
                numbers = onnx.helper.get_attribute_value(attribute)
                shape = [] if attribute.name == "value_float" else [len(numbers)]
                values = numbers if shape else [numbers]
                wide = onnx.helper.make_tensor("value", onnx.TensorProto.DOUBLE, shape, values)
                attribute.CopyFrom(onnx.helper.make_attribute("value", wide))
            _widen_tensor(attribute.t)
            for graph in (attribute.g, *attribute.graphs):
                _widen_graph(graph)
