"""Values of an ONNX file that are known before it runs: constants, and the shapes that onnx infers.

Constants are initializers, and what the file computes from them alone.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from repfx.onnx.file import package

Value: TypeAlias = Any  # of onnx_ir: a value in a graph
Node: TypeAlias = Any  # of onnx_ir: a node of a graph
Array: TypeAlias = Any  # of numpy
Shape: TypeAlias = "tuple[int | None, ...]"
OWN_DOMAINS = ("", "ai.onnx")
_FEW = 64
_SMALL = 1 << 10  # bytes of an initializer that may hold a shape

# operators whose output depends on their inputs alone, without randomness, state or subgraphs
_FOLDED = frozenset(
    (
        *(
            "Abs",
            "Add",
            "Cast",
            "Clip",
            "Concat",
            "ConstantOfShape",
            "Div",
            "Exp",
            "Expand",
            "Flatten",
            "Gather",
            "Gemm",
        ),
        *(
            "Identity",
            "MatMul",
            "Max",
            "Min",
            "Mul",
            "Neg",
            "Pad",
            "Pow",
            "Reciprocal",
            "ReduceL2",
            "ReduceMean",
            "ReduceSum",
        ),
        *(
            "ReduceSumSquare",
            "Reshape",
            "Shape",
            "Size",
            "Slice",
            "Split",
            "Sqrt",
            "Squeeze",
            "Sub",
            "Sum",
            "Tile",
            "Transpose",
        ),
        *("Unsqueeze", "Where"),
    )
)


class FoldedValues:
    """The values of a graph that are known before it runs, as arrays in the file's own dtypes.

    An initializer that is also an input is only a default, which a caller may replace. Before version 4 of the file format, each
    initializer had to be an input, and was a constant all the same.
    """

    def __init__(self, model: Any) -> None:
        self._defaults_are_constant = model.ir_version < 4
        self._opset = model.graph.opset_imports.get("", 1)
        self._known: dict[Value, Array | None] = {}

    def of(self, value: Value | None) -> Array | None:
        """Return a value as an array, or None if it isn't known."""
        pending = [value]
        while pending:  # without recursion, because chains of nodes may be long
            now = pending[-1]
            missing = [source for source in self._sources(now) if source not in self._known]
            if now in self._known or now is None or not missing:
                pending.pop()
                if now is not None and now not in self._known:
                    self._known[now] = self._compute(now)
            else:
                pending += missing
        return None if value is None else self._known[value]

    def of_sizes(self, graph: Any) -> dict[str, Array]:
        """Return the values of a graph that may be sizes, axes or places, by name: those of a few whole numbers."""
        outputs = (output for node in graph for output in node.outputs)
        found = {output.name: array for output in outputs if (array := self.of(output)) is not None}
        return {name: array for name, array in found.items() if array.dtype == "int64" and array.size <= _FEW}

    def is_default(self, value: Value | None) -> bool:
        """Whether a value is an initializer that a caller may replace."""
        given = value is not None and value.is_graph_input() and value.is_initializer()
        return given and not self._defaults_are_constant

    def _sources(self, value: Value | None) -> list[Value]:
        node = None if value is None else value.producer()
        if node is None or not _may_fold(node):
            return []
        read = node.inputs[:1] if _casts_like(node) else node.inputs
        return [source for source in read if source is not None]

    def _compute(self, value: Value) -> Array | None:
        node = value.producer()
        if node is None:
            constant = value.is_initializer() and not self.is_default(value) and value.const_value is not None
            return value.const_value.numpy() if constant else None
        if node.domain in OWN_DOMAINS and node.op_type == "Constant":
            return _constant(node)
        if _casts_like(node):
            array, dtype = self._known.get(node.inputs[0]), node.inputs[1].dtype
            return None if array is None or dtype is None else array.astype(dtype.numpy())
        sources = [None if source is None else self._known.get(source) for source in node.inputs]
        unknown = any(array is None and source is not None for array, source in zip(sources, node.inputs))
        if unknown or not sources or not _may_fold(node):
            return None
        return _run(node, value, self._opset, sources)


def _may_fold(node: Node) -> bool:
    return node.domain in OWN_DOMAINS and (node.op_type in _FOLDED or _casts_like(node))


def _casts_like(node: Node) -> bool:
    """Whether a node casts its first input to the type of the second, whose numbers don't count."""
    return bool(node.op_type == "CastLike" and node.domain in OWN_DOMAINS)


def _constant(node: Node) -> Array | None:
    import numpy as np

    (name, attribute), *others = node.attributes.items()
    if others or name in ("sparse_value", "value_string", "value_strings"):
        return None
    if name == "value":
        return attribute.value.numpy()
    return np.array(attribute.value, np.float32 if name.startswith("value_float") else np.int64)


def _run(node: Node, value: Value, opset: int, sources: list[Array | None]) -> Array | None:
    """Compute one output of a node by onnx's reference implementation, in the dtypes of the file."""
    onnx, ir = package("onnx"), package("onnx_ir")
    proto = ir.to_proto(node)
    names = list(dict.fromkeys(name for name in proto.input if name))
    anything = onnx.TypeProto()
    graph = onnx.helper.make_graph(
        [proto],
        "node",
        [onnx.ValueInfoProto(name=name, type=anything) for name in names],
        [onnx.ValueInfoProto(name=value.name, type=anything)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    feeds = {source.name: array for source, array in zip(node.inputs, sources) if source is not None}
    try:
        return package("onnx.reference").ReferenceEvaluator(model).run(None, feeds)[0]
    except Exception:  # it doesn't know this version of the operator; then the value isn't known
        return None


# ---- shapes


class Shapes:
    """The shapes of the values of a file's main graph. The file's own notes on values inside it aren't trusted."""

    def __init__(self, path: Path, constants: dict[str, Array]) -> None:
        """Infer the shapes in a file, some of which depend on `constants` that the file computes."""
        onnx = package("onnx")
        model = onnx.load(path, load_external_data=False)
        del model.graph.value_info[:]
        computed = [node for node in model.graph.node if {*node.output} - {""} <= constants.keys()]
        for node in computed:  # onnx follows initializers alone
            model.graph.node.remove(node)
        names = [name for node in computed for name in node.output if name]
        model.graph.initializer.extend(onnx.numpy_helper.from_array(constants[name], name) for name in names)
        for tensor in model.graph.initializer:
            if tensor.HasField("raw_data") and len(tensor.raw_data) > _SMALL:
                tensor.raw_data = b""
        with suppress(Exception):  # what isn't inferred isn't known
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
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
