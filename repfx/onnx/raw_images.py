"""Preprocessing inside an ONNX file: the file takes raw images of any size, and may give probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repfx.errors import ExportError
from repfx.onnx.file import package
from repfx.onnx.preprocessing import Preprocessing

IMAGES, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
NORMALIZED = "normalized"  # the name of the input before it takes raw images
_PREFIX = "preprocessing/"
_OPSET = 18  # the first whose Resize has antialiasing


def take_raw_images(path: Path, preprocessing: Preprocessing) -> None:
    """Put a preprocessing in front of a file's one input. The input is then ``images``, `(batch, height, width, channels)` in uint8.

    Raises:
        ExportError: the opset is too low, or the images are no pictures.
    """
    onnx = package("onnx")
    model = onnx.load(path, load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < _OPSET:
        raise ExportError(f"preprocessing inside the file needs opset {_OPSET} or newer, and this file has {opset}.")
    if len(preprocessing.shape) != 3 or preprocessing.shape[0] not in (1, 3):
        raise ExportError(
            f"an image is {preprocessing.shape}; only pictures with 1 or 3 channels can be prepared inside."
        )
    value = model.graph.input[0]
    kind = value.type.tensor_type
    batch = kind.shape.dim[0].dim_param or kind.shape.dim[0].dim_value
    nodes = list(_nodes(preprocessing, value.name, kind.elem_type))
    shape = [batch, "height", "width", preprocessing.shape[0]]
    value.CopyFrom(onnx.helper.make_tensor_value_info(IMAGES, onnx.TensorProto.UINT8, shape))
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    onnx.save(model, path)


def give_probabilities(path: Path) -> None:
    """Put a softmax over the classes behind a file's one output."""
    onnx = package("onnx")
    model = onnx.load(path, load_external_data=False)
    value = model.graph.output[0]
    model.graph.node.append(onnx.helper.make_node("Softmax", [value.name], [PROBABILITIES], axis=1, name=PROBABILITIES))
    value.name = PROBABILITIES
    onnx.save(model, path)


def _nodes(preprocessing: Preprocessing, output: str, elem_type: int) -> Iterator[Any]:
    """Make the nodes from ``images`` to the normalized images."""
    onnx = package("onnx")
    channels, height, width = preprocessing.shape
    size = preprocessing.resized

    def name(text: str) -> str:
        return f"{_PREFIX}{text}"

    def constant(text: str, kind: int, shape: list[int], values: list[Any]) -> Any:
        tensor = onnx.helper.make_tensor(name(text), kind, shape, values)
        return onnx.helper.make_node("Constant", [], [name(text)], value=tensor, name=name(text))

    def node(operator: str, inputs: list[str], made: str, **attributes: Any) -> Any:
        return onnx.helper.make_node(operator, inputs, [made], name=made, **attributes)

    kinds = onnx.TensorProto
    yield node("Transpose", [IMAGES], name("channels_first"), perm=[0, 3, 1, 2])
    yield node("Cast", [name("channels_first")], name("floats"), to=kinds.FLOAT)
    mode = {"bilinear": "linear", "bicubic": "cubic"}[preprocessing.interpolation]
    resize: dict[str, Any] = {"mode": mode, "axes": [2, 3], "coordinate_transformation_mode": "half_pixel"}
    if preprocessing.fit == "stretch":
        yield constant("sizes", kinds.INT64, [2], [height, width])
        yield node("Resize", [name("floats"), "", "", name("sizes")], name("fitted"), **resize)
    else:
        # the shorter side becomes `size`: floor(side × size / shorter)
        yield node("Shape", [name("floats")], name("sides"), start=2, end=4)
        yield node("ReduceMin", [name("sides")], name("shorter"), keepdims=1)
        yield constant("size", kinds.INT64, [1], [size])
        yield node("Mul", [name("sides"), name("size")], name("scaled_sides"))
        yield node("Div", [name("scaled_sides"), name("shorter")], name("sizes"))
        # the filter of PIL, whose cubic has a = -1/2
        resize |= {"antialias": 1, "cubic_coeff_a": -0.5}
        yield node("Resize", [name("floats"), "", "", name("sizes")], name("resized"), **resize)
        yield node("Round", [name("resized")], name("rounded"))
        yield constant("black", kinds.FLOAT, [], [0.0])
        yield constant("white", kinds.FLOAT, [], [255.0])
        yield node("Clip", [name("rounded"), name("black"), name("white")], name("bytes"))
        # the middle: half of what is left over, rounded to even as Python does
        yield constant("shown", kinds.INT64, [2], [height, width])
        yield node("Sub", [name("sizes"), name("shown")], name("left_over"))
        yield node("Cast", [name("left_over")], name("left_over_float"), to=kinds.FLOAT)
        yield constant("half", kinds.FLOAT, [], [0.5])
        yield node("Mul", [name("left_over_float"), name("half")], name("begin_float"))
        yield node("Round", [name("begin_float")], name("begin_rounded"))
        yield node("Cast", [name("begin_rounded")], name("begin"), to=kinds.INT64)
        yield node("Add", [name("begin"), name("shown")], name("end"))
        yield constant("axes", kinds.INT64, [2], [2, 3])
        yield node("Slice", [name("bytes"), name("begin"), name("end"), name("axes")], name("fitted"))
    yield constant("divisor", kinds.FLOAT, [], [preprocessing.divisor])
    yield constant("mean", kinds.FLOAT, [channels, 1, 1], list(preprocessing.mean))
    yield constant("std", kinds.FLOAT, [channels, 1, 1], list(preprocessing.std))
    yield node("Div", [name("fitted"), name("divisor")], name("divided"))
    yield node("Sub", [name("divided"), name("mean")], name("centred"))
    yield node("Div", [name("centred"), name("std")], name("standardized"))
    yield node("Cast", [name("standardized")], output, to=elem_type)
