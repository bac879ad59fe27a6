"""Convert a model to an older version of ONNX's operators than torch writes, for runtimes that know no newer one.

Between two versions an operator mostly gains types, or an attribute whose default keeps the old meaning. Such a node is valid in the older
version, too. In the older version, a few operators take an attribute in place of an input, or must be written as several nodes. These
nodes are rewritten. A node that uses anything else that the older version doesn't have is refused.
"""

from __future__ import annotations

from typing import Any

from repfx.errors import ExportError, first_line

LOWEST = 13
LOWEST_OF_TORCH = 18
_OWN = ("", "ai.onnx")
_WITH_AXES = {
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
}


def lowered(model: Any, opset: int) -> Any:
    """Convert an ONNX model to an older opset, 13 or newer, and to the file format of that time.

    Raises:
        ExportError: the model uses something that this opset doesn't have.
    """
    import onnx

    (domain,) = (entry for entry in model.opset_import if entry.domain in _OWN)
    older = _Older(opset, domain.version, model.graph)
    nodes = [new for node in model.graph.node for new in older.instead_of(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    domain.version = opset
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise ExportError(
            f"the model can't be written in opset {opset} ({first_line(error)}): choose {LOWEST_OF_TORCH} or newer."
        ) from error
    return model


class _Older:
    """A converter of a graph's nodes to an older opset."""

    def __init__(self, opset: int, newer: int, graph: Any) -> None:
        self._opset, self._newer, self._graph = opset, newer, graph
        self._constants = {each.name: each for each in graph.initializer}

    def instead_of(self, node: Any) -> list[Any]:
        """Return the one or more nodes that replace `node`. A node that is valid as it is stays the same object."""
        import onnx

        if node.domain not in _OWN:
            return [node]
        if node.op_type == "HardSwish" and self._opset < 14:
            return self._hard_swish(node)
        if not onnx.defs.has(node.op_type, self._opset, ""):
            raise ExportError(f"opset {self._opset} has no {node.op_type}, which the model needs: choose a newer one.")
        newer, older = (onnx.defs.get_schema(node.op_type, version, "") for version in (self._newer, self._opset))
        if newer.since_version == older.since_version:
            return [node]
        if node.op_type == "Shape" and self._opset < 15:
            return self._part_of_shape(node)
        if node.op_type in _WITH_AXES and len(node.input) == 2 and node.input[1] in self._constants:
            node.attribute.append(onnx.helper.make_attribute("axes", self._values(node.input[1])))
            del node.input[1]
        kept = [
            each
            for each in node.attribute
            if each.name in older.attributes or not (_is_default(each, newer) or self._says_nothing(each, node))
        ]
        del node.attribute[:]
        node.attribute.extend(kept)
        return [node]

    def _hard_swish(self, node: Any) -> list[Any]:
        """Write HardSwish by its definition, x · HardSigmoid(x)."""
        import onnx

        part = f"{node.output[0]}_hard_sigmoid"
        return [
            onnx.helper.make_node("HardSigmoid", [node.input[0]], [part], alpha=1 / 6, beta=0.5),
            onnx.helper.make_node("Mul", [node.input[0], part], [node.output[0]], name=node.name),
        ]

    def _part_of_shape(self, node: Any) -> list[Any]:
        """Take the sizes from `start` to `end` out of the whole shape by a Slice: older versions of Shape can't select them."""
        import onnx

        limits = {each.name: each.i for each in node.attribute}
        del node.attribute[:]
        if not limits.get("start") and "end" not in limits:
            return [node]
        whole, part = f"{node.output[0]}_whole", node.output[0]
        node.output[0] = whole
        names = []
        for name, value in (("start", limits.get("start", 0)), ("end", limits.get("end", 2**31))):
            names.append(f"{part}_{name}")
            self._graph.initializer.append(onnx.helper.make_tensor(names[-1], onnx.TensorProto.INT64, [1], [value]))
        return [node, onnx.helper.make_node("Slice", [whole, *names], [part], name=f"{node.name}_part")]

    def _says_nothing(self, attribute: Any, node: Any) -> bool:
        """Whether a node does the same without an attribute that isn't at its default.

        A Split into even parts has as many parts as outputs, so `num_outputs` says nothing. `allowzero` of a Reshape says nothing if no
        size is 0.
        """
        if (node.op_type, attribute.name) == ("Split", "num_outputs"):
            return True
        return (node.op_type, attribute.name) == ("Reshape", "allowzero") and 0 not in self._values(node.input[1])

    def _values(self, name: str) -> list[int]:
        import onnx

        return onnx.numpy_helper.to_array(self._constants[name]).tolist() if name in self._constants else []


def _is_default(attribute: Any, schema: Any) -> bool:
    import onnx

    known = schema.attributes.get(attribute.name)
    default = None if known is None else known.default_value
    return default is not None and onnx.helper.get_attribute_value(attribute) == onnx.helper.get_attribute_value(
        default
    )
