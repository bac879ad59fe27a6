"""Older versions of ONNX's operators than torch writes, for runtimes that know no newer ones.

Between two versions an operator mostly gains types, or an attribute whose default means what it did before; such a node is as good in
the older version. A few take as an input what was an attribute. What else a node uses that the older version doesn't have is refused.
"""

from __future__ import annotations

from typing import Any

from repfx.errors import ExportError, first_line

LOWEST = 13
LOWEST_OF_TORCH = 18
_AXES_AS_INPUT = {
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
}


def lowered(model: Any, opset: int) -> Any:
    """An ONNX model in an older opset, from 13 on, with the file format of that time.

    Raises:
        ExportError: it uses what this opset doesn't have.
    """
    import onnx

    constants = {each.name: each for each in model.graph.initializer}
    (domain,) = (entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx"):
            _lower(node, onnx.defs.get_schema(node.op_type, domain.version, ""), opset, constants)
    domain.version = opset
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise ExportError(
            f"the model can't be written in opset {opset} ({first_line(error)}): choose {LOWEST_OF_TORCH} or newer."
        ) from error
    return model


def _lower(node: Any, schema: Any, opset: int, constants: dict[str, Any]) -> None:
    import onnx

    if not onnx.defs.has(node.op_type, opset, ""):
        raise ExportError(f"opset {opset} has no {node.op_type}, which the model needs: choose a newer one.")
    older = onnx.defs.get_schema(node.op_type, opset, "")
    if schema.since_version == older.since_version:
        return
    if node.op_type in _AXES_AS_INPUT and len(node.input) == 2 and node.input[1] in constants:
        node.attribute.append(onnx.helper.make_attribute("axes", _values(node.input[1], constants)))
        del node.input[1]
    kept = [
        each
        for each in node.attribute
        if each.name in older.attributes or not (_is_default(each, schema) or _says_nothing(each, node, constants))
    ]
    del node.attribute[:]
    node.attribute.extend(kept)


def _says_nothing(attribute: Any, node: Any, constants: dict[str, Any]) -> bool:
    """Whether a node does the same without an attribute that is no default: even parts are as many as outputs, and no size is 0."""
    if (node.op_type, attribute.name) == ("Split", "num_outputs"):
        return True
    return (node.op_type, attribute.name) == ("Reshape", "allowzero") and 0 not in _values(node.input[1], constants)


def _values(name: str, constants: dict[str, Any]) -> list[int]:
    import onnx

    return onnx.numpy_helper.to_array(constants[name]).tolist() if name in constants else []


def _is_default(attribute: Any, schema: Any) -> bool:
    import onnx

    known = schema.attributes.get(attribute.name)
    default = None if known is None else known.default_value
    return default is not None and onnx.helper.get_attribute_value(attribute) == onnx.helper.get_attribute_value(
        default
    )
