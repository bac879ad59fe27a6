"""Random small ONNX graphs of all operators that rules read, and of some that they don't."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LINEAR = (
    "conv",
    "conv",
    "depthwise",
    "batch_norm",
    "scale",
    "shift",
    "neg",
    "pool",
    "identity",
    "dropout",
    "transposed",
)
SHAPED = ("pad", "crop", "stride", "transpose", "concat", "shape", "split", "minus")
OTHERS = ("relu", "sigmoid", "if", "global", "leaky")


class RandomFile:
    """A writer of a graph, one random operator after another, each on values of `(batch, channels, *axes)`."""

    def __init__(self, seed: int, *, opset: int = 17, dtype: Any = np.float32) -> None:
        self._random, self._numbers = random.Random(seed), np.random.default_rng(seed)
        self._opset, self._dtype = opset, np.dtype(dtype)
        self._axes = self._random.choice((1, 2, 2, 2, 3))
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []
        self._values: list[tuple[str, int, str]] = []  # name, channels, and a text that is equal where shapes are
        self._count = 0

    def write(self, path: Path, length: int = 14) -> Path:
        """Write a graph of so many operators."""
        self._values = [("x", 4, "")]
        self._conv(*self._values[0])
        for _ in range(length):
            self._step()
        read = {name for node in self._nodes for name in node.input}
        ends = [value for value in self._values[1:] if value[0] not in read]
        ends.append(self._random.choice(self._values[1:]))
        names = list(dict.fromkeys(name for name, _, _ in ends))
        kind = helper.np_dtype_to_tensor_dtype(self._dtype)
        size: list[Any] = ["batch", 4, *(f"side_{axis}" for axis in range(self._axes))]
        graph = helper.make_graph(
            self._nodes,
            "random",
            [helper.make_tensor_value_info("x", kind, size)],
            [helper.make_tensor_value_info(name, kind, [None] * len(size)) for name in names],
            self._initializers,
            doc_string="a graph",
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self._opset)], ir_version=8)
        helper.set_model_props(model, {"author": "a test"})
        onnx.save(model, path)
        return path

    def _step(self) -> None:
        kind = self._random.choice(LINEAR * 3 + SHAPED + OTHERS + ("sum",) * 12)
        chosen = (
            self._random.choice(self._values[-3:]) if self._random.random() < 0.8 else self._random.choice(self._values)
        )
        getattr(self, f"_{kind}")(*chosen)

    def _add(self, operator: str, inputs: list[str], channels: int, shape: str, **attributes: Any) -> str:
        self._count += 1
        name = f"v{self._count}"
        title = f"node {self._count}" if self._random.random() < 0.7 else ""
        outputs = [name, ""] if operator == "Dropout" and self._random.random() < 0.3 else [name]
        self._nodes.append(helper.make_node(operator, inputs, outputs, title, **attributes))
        self._values.append((name, channels, shape))
        return name

    def _constant(self, array: Any) -> str:
        self._count += 1
        name, how = f"c{self._count}", self._random.random()
        array = np.asarray(array)
        array = array if array.dtype == np.int64 else array.astype(self._dtype)
        tensor = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        if how < 0.6:
            self._initializers.append(tensor)
        elif how < 0.8:
            self._nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            tensor.name = f"{name}_source"
            self._initializers.append(tensor)
            self._nodes.append(helper.make_node("Identity", [tensor.name], [name]))
        return name

    def _normal(self, *shape: int) -> Any:
        return self._numbers.normal(size=shape)

    # ---- linear maps

    def _conv(self, x: str, channels: int, shape: str) -> None:
        window = self._random.choice(
            [(1,) * self._axes, (3,) * self._axes, *([(3, 1), (1, 2)] if self._axes == 2 else [])]
        )
        groups = self._random.choice([g for g in (1, 1, 2) if channels % g == 0])
        out = self._random.choice((channels, channels, 6))
        weight = self._normal(out, channels // groups, *window) / (channels * len(window)) ** 0.5
        inputs = [x, self._constant(weight)]
        if self._random.random() < 0.5:
            inputs.append(self._constant(self._normal(out)))
        same = [(size - 1) // 2 for size in window]
        how = self._random.choice(("same", "same", "valid", "upper", "asymmetric"))
        attributes: dict[str, Any] = {"group": groups}
        if how == "upper":
            attributes["auto_pad"] = self._random.choice(("SAME_UPPER", "SAME_LOWER"))
            after = shape
        else:
            pads = {
                "same": [*same, *same],
                "valid": [0] * 2 * self._axes,
                "asymmetric": [1] + [0] * (2 * self._axes - 1),
            }[how]
            attributes["pads"] = pads
            total = [pads[axis] + pads[axis + self._axes] - size + 1 for axis, size in enumerate(window)]
            after = _moved(shape, total)
        self._add("Conv", inputs, out, after, **attributes)

    def _depthwise(self, x: str, channels: int, shape: str) -> None:
        weight = self._normal(channels, 1, *(3,) * self._axes) / 3
        self._add(
            "Conv",
            [x, self._constant(weight)],
            channels,
            shape,
            group=channels,
            pads=[1] * 2 * self._axes,
            kernel_shape=[3] * self._axes,
        )

    def _transposed(self, x: str, channels: int, shape: str) -> None:
        weight = self._normal(channels, channels, *(3,) * self._axes) / channels
        inputs = [x, self._constant(weight), self._constant(self._normal(channels))]
        self._add("ConvTranspose", inputs, channels, shape, pads=[1] * 2 * self._axes)

    def _batch_norm(self, x: str, channels: int, shape: str) -> None:
        numbers = [
            self._normal(channels),
            self._normal(channels),
            self._normal(channels),
            0.5 + self._numbers.random(channels),
        ]
        self._add("BatchNormalization", [x, *map(self._constant, numbers)], channels, shape, epsilon=1e-3)

    def _scale(self, x: str, channels: int, shape: str) -> None:
        size = self._random.choice([(channels, *(1,) * self._axes), (1, channels, *(1,) * self._axes), (), (1,)])
        number = self._constant(0.5 + self._numbers.random(size))
        operator = self._random.choice(("Mul", "Div"))
        swapped = operator == "Mul" and self._random.random() < 0.5
        self._add(operator, [number, x] if swapped else [x, number], channels, shape)

    def _shift(self, x: str, channels: int, shape: str) -> None:
        number = self._constant(self._normal(*self._random.choice([(channels, *(1,) * self._axes), ()])))
        self._add(self._random.choice(("Add", "Sub")), self._random.choice(([number, x], [x, number])), channels, shape)

    def _neg(self, x: str, channels: int, shape: str) -> None:
        self._add("Neg", [x], channels, shape)

    def _pool(self, x: str, channels: int, shape: str) -> None:
        count = self._random.choice((0, 1))
        self._add(
            "AveragePool",
            [x],
            channels,
            shape,
            kernel_shape=[3] * self._axes,
            pads=[1] * 2 * self._axes,
            count_include_pad=count,
        )

    def _identity(self, x: str, channels: int, shape: str) -> None:
        self._add("Identity", [x], channels, shape)

    def _dropout(self, x: str, channels: int, shape: str) -> None:
        self._add("Dropout", [x], channels, shape)

    # ---- borders and parts

    def _pad(self, x: str, channels: int, shape: str) -> None:
        before = [self._random.choice((0, 1)) for _ in range(self._axes)]
        after = [self._random.choice((0, 1)) for _ in range(self._axes)]
        pads = self._constant(np.array([0, 0, *before, 0, 0, *after], np.int64))
        mode = self._random.choice(("constant", "constant", "edge"))
        inputs = [x, pads]
        if mode == "constant" and self._random.random() < 0.3:
            inputs.append(self._constant(np.array(self._random.choice((0.0, 1.5)))))
        self._add("Pad", inputs, channels, _moved(shape, [a + b for a, b in zip(before, after)]), mode=mode)

    def _crop(self, x: str, channels: int, shape: str) -> None:
        ints = [self._constant(np.array([number], np.int64)) for number in (1, self._random.choice((2**40, -1)), -1)]
        end = -1 if self._read(ints[1]) == -1 else 0
        self._add("Slice", [x, *ints], channels, _moved(shape, [0] * (self._axes - 1) + [end - 1]))

    def _read(self, name: str) -> int:
        """The number in a constant."""
        tensors = {tensor.name.removesuffix("_source"): tensor for tensor in self._initializers}
        tensors |= {node.output[0]: node.attribute[0].t for node in self._nodes if node.op_type == "Constant"}
        return int(numpy_helper.to_array(tensors[name])[0])

    def _stride(self, x: str, channels: int, shape: str) -> None:
        ints = [self._constant(np.array([number], np.int64)) for number in (0, 2**40, 2, 2)]
        self._add("Slice", [x, *ints], channels, f"{shape}/{self._count}")

    def _transpose(self, x: str, channels: int, shape: str) -> None:
        order = [0, *range(2, self._axes + 2), 1]
        back = [0, self._axes + 1, *range(1, self._axes + 1)]
        self._add("Transpose", [x], channels, f"turned {self._count}", perm=order)
        turned = self._values.pop()[0]
        self._add("Transpose", [turned], channels, shape, perm=back)

    def _concat(self, x: str, channels: int, shape: str) -> None:
        others = [value for value in self._values if value[2] == shape and value[1] + channels <= 12]
        if others:
            other, more, _ = self._random.choice(others)
            self._add("Concat", [x, other], channels + more, shape, axis=self._random.choice((1, -1 - self._axes)))

    def _split(self, x: str, channels: int, shape: str) -> None:
        if channels % 2 == 0:
            self._count += 1
            names = [f"v{self._count}_{part}" for part in (0, 1)]
            sizes = self._constant(np.array([channels // 2] * 2, np.int64))
            self._nodes.append(helper.make_node("Split", [x, sizes], names, axis=1))
            self._values += [(name, channels // 2, shape) for name in names]

    def _shape(self, x: str, channels: int, shape: str) -> None:
        self._count += 1
        name = f"v{self._count}"
        self._nodes.append(helper.make_node("Shape", [x], [name]))
        zeros = numpy_helper.from_array(np.zeros(1, self._dtype))
        self._nodes.append(helper.make_node("ConstantOfShape", [name], [f"{name}_zeros"], value=zeros))
        self._add("Add", [x, f"{name}_zeros"], channels, shape)

    # ---- sums, and what isn't linear

    def _sum(self, x: str, channels: int, shape: str) -> None:
        others = [value for value in self._values if value[1:] == (channels, shape)]
        chosen = [self._random.choice(others)[0] for _ in range(self._random.choice((1, 1, 2)))]
        if len(chosen) == 1:
            self._add(self._random.choice(("Add", "Sub")), [x, *chosen], channels, shape)
        else:
            self._add("Sum", [x, *chosen], channels, shape)

    def _minus(self, x: str, channels: int, shape: str) -> None:
        self._add("Sub", [self._values[-1][0], x], channels, shape) if self._values[-1][1:] == (
            channels,
            shape,
        ) else None

    def _relu(self, x: str, channels: int, shape: str) -> None:
        self._add("Relu", [x], channels, shape)

    def _leaky(self, x: str, channels: int, shape: str) -> None:
        self._add("LeakyRelu", [x], channels, shape, alpha=0.3)

    def _sigmoid(self, x: str, channels: int, shape: str) -> None:
        self._add("Sigmoid", [x], channels, shape)

    def _global(self, x: str, channels: int, shape: str) -> None:
        self._add("GlobalAveragePool", [x], channels, f"{shape} averaged {self._count}")
        average = self._values.pop()[0]
        self._add("Mul", [x, average], channels, shape)

    def _if(self, x: str, channels: int, shape: str) -> None:
        """Add an If whose branches read values from outside."""
        self._count += 1
        branches = []
        for name, operator in (("then_branch", "Relu"), ("else_branch", "Neg")):
            output = helper.make_tensor_value_info(
                f"{name}_{self._count}", helper.np_dtype_to_tensor_dtype(self._dtype), [None] * (self._axes + 2)
            )
            node = helper.make_node(operator, [x], [output.name])
            branches.append(helper.make_graph([node], name, [], [output]))
        condition = numpy_helper.from_array(np.array(self._random.random() < 0.5), f"condition_{self._count}")
        self._initializers.append(condition)
        self._add("If", [condition.name], channels, shape, then_branch=branches[0], else_branch=branches[1])


def _moved(shape: str, change: list[int]) -> str:
    """The text of a shape that has grown or shrunk along each axis."""
    numbers = [int(part) for part in shape.split(",")] if shape and "/" not in shape else [0] * len(change)
    if "/" in shape:
        return f"{shape},{change}" if any(change) else shape
    moved = [a + b for a, b in zip(numbers, change)]
    return ",".join(map(str, moved)) if any(moved) else ""


def kind_of(dtype: Any) -> int:
    """The number by which onnx knows a dtype."""
    return {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "float16": TensorProto.FLOAT16}[
        np.dtype(dtype).name
    ]
