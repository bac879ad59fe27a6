"""`fuse_onnx` on files written by hand, operator by operator, in the spellings that different tools write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import repfx
from repfx.algebra.baking import rounded
from repfx.errors import ExportError, InvalidInput
from repfx.onnx.fusing import lowering
from repfx.onnx.fusing.fuse_file import FileReport, plan_fusion

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

NUMBERS = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return NUMBERS.normal(size=shape).astype(np.float32)


def norm(channels: int) -> list[Any]:
    """Scale, shift, mean and variance of a BatchNormalization."""
    return [normal(channels), normal(channels), normal(channels), 0.5 + NUMBERS.random(channels).astype(np.float32)]


def node(operator: str, inputs: str, output: str, **attributes: Any) -> Any:
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(
        operator, names, output.split(), attributes.pop("name", f"the {output.split()[0]}"), **attributes
    )


def write(
    path: Path,
    nodes: list[Any],
    constants: dict[str, Any],
    *,
    x: tuple[int | str, ...] = ("batch", 4, "height", "width"),
    out: str = "out",
    opset: int = 17,
    as_nodes: bool = False,
    ir_version: int = 8,
    listed: bool = False,
    dtype: int = TensorProto.FLOAT,
) -> Path:
    """Write a file with one input, x. `as_nodes` writes constants as nodes; `listed` lists initializers as inputs, too."""
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    inputs = [helper.make_tensor_value_info("x", dtype, x)]
    if listed:
        inputs += [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in tensors]
    if as_nodes:
        nodes = [*(helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors), *nodes]
        tensors = []
    outputs = [helper.make_tensor_value_info(name, dtype, [None] * len(x)) for name in out.split()]
    graph = helper.make_graph(nodes, "hand-written", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def fused(source: Path, **options: Any) -> tuple[FileReport, list[str]]:
    """Fuse a file. Return the report and the operators of the new file, in order."""
    report = repfx.fuse_onnx(source, source.with_name("fused.onnx"), **options)
    return report, [each.op_type for each in onnx.load(report.path).graph.node]


CONV = node("Conv", "x w b", "y", pads=[1, 1, 1, 1], kernel_shape=[3, 3])
NORM = node("BatchNormalization", "y s t m v", "out")


def conv_and_norm() -> dict[str, Any]:
    return {"w": normal(6, 4, 3, 3), "b": normal(6), **dict(zip("stmv", norm(6)))}


Case = tuple[list[Any], dict[str, Any], list[str]]


def affine_as_mul_and_add() -> Case:
    nodes = [CONV, node("Mul", "y scale", "z"), node("Add", "shift z", "out")]
    return (
        nodes,
        {"w": normal(6, 4, 3, 3), "b": normal(6), "scale": normal(6, 1, 1), "shift": normal(1, 6, 1, 1)},
        ["Conv"],
    )


def pad_before_conv() -> Case:
    nodes = [
        node("Pad", "x pads", "p"),
        node("Conv", "p w", "y", strides=[2, 2]),
        node("BatchNormalization", "y s t m v", "out"),
    ]
    pads = np.array([0, 0, 0, 1, 0, 0, 2, 1])
    return nodes, {"pads": pads, "w": normal(6, 4, 3, 3), **dict(zip("stmv", norm(6)))}, ["Conv"]


def automatic_padding() -> Case:
    nodes = [node("Conv", "x w", "y", auto_pad="SAME_UPPER", kernel_shape=[2, 3]), NORM]
    return nodes, {"w": normal(6, 4, 2, 3), **dict(zip("stmv", norm(6)))}, ["Conv"]


def parallel_convs() -> Case:
    nodes = [
        CONV,
        node("Conv", "x w1", "y1"),
        node("BatchNormalization", "y1 s t m v", "y2"),
        node("BatchNormalization", "x s1 t1 m1 v1", "y3"),
        node("Sum", "y y2 y3", "out"),
    ]
    constants = {"w": normal(4, 4, 3, 3), "b": normal(4), "w1": normal(4, 4, 1, 1)}
    return nodes, {**constants, **dict(zip("stmv", norm(4))), **dict(zip(("s1", "t1", "m1", "v1"), norm(4)))}, ["Conv"]


def sum_in_part() -> Case:
    """A Sum of three, of which two merge."""
    nodes = [CONV, node("Conv", "x w1", "y1"), node("Relu", "x", "r"), node("Sum", "y y1 r", "out")]
    return nodes, {"w": normal(4, 4, 3, 3), "b": normal(4), "w1": normal(4, 4, 1, 1)}, ["Conv", "Relu", "Add"]


def difference_of_convs() -> Case:
    nodes = [CONV, node("Conv", "x w1", "y1"), node("Sub", "y1 y", "z"), node("Neg", "z", "out")]
    return nodes, {"w": normal(4, 4, 3, 3), "b": normal(4), "w1": normal(4, 4, 1, 1)}, ["Conv"]


def transposed() -> Case:
    nodes = [
        node("ConvTranspose", "x w b", "y", strides=[2, 2], group=2, output_padding=[1, 0], pads=[1, 0, 1, 0]),
        NORM,
    ]
    return nodes, {"w": normal(4, 3, 3, 2), "b": normal(6), **dict(zip("stmv", norm(6)))}, ["ConvTranspose"]


def average_pool() -> Case:
    nodes = [
        node("Conv", "x w", "y", group=4),
        node("AveragePool", "y", "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        node("Conv", "x w3", "z", group=4, pads=[1, 1, 1, 1]),
        node("Add", "p z", "out"),
    ]
    return nodes, {"w": normal(4, 1, 1, 1), "w3": normal(4, 1, 3, 3)}, ["Conv"]


def concatenated() -> Case:
    nodes = [
        node("Conv", "x w", "y"),
        node("Conv", "x w2", "y2", pads=[1, 1, 1, 1]),
        node("Concat", "y y2", "z", axis=1),
        node("Conv", "z w3", "out"),
    ]
    return nodes, {"w": normal(8, 4, 1, 1), "w2": normal(8, 4, 3, 3), "w3": normal(4, 16, 1, 1)}, ["Conv"]


def cropped() -> Case:
    nodes = [
        node("Slice", "x one minus_one axes", "c"),
        node("Conv", "c w1", "y1"),
        node("Conv", "x w", "y"),
        node("Add", "y y1", "out"),
    ]
    ones = np.array([1, 1])
    constants = {
        "one": ones,
        "minus_one": -ones,
        "axes": np.array([2, 3]),
        "w1": normal(4, 4, 1, 1),
        "w": normal(4, 4, 3, 3),
    }
    return nodes, constants, ["Conv"]


def every_second_position() -> Case:
    nodes = [
        node("Slice", "x zero end axes two", "c"),
        node("Conv", "c w1", "y1"),
        node("Conv", "x w", "y", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Add", "y y1", "out"),
    ]
    pair = np.array([1, 1])
    constants = {"zero": 0 * pair, "end": 2**62 * pair, "axes": np.array([2, 3]), "two": 2 * pair}
    return nodes, {**constants, "w1": normal(4, 4, 1, 1), "w": normal(4, 4, 3, 3)}, ["Conv"]


def identities() -> Case:
    nodes = [
        CONV,
        node("Identity", "y", "z"),
        node("Dropout", "z", "d mask"),
        node("BatchNormalization", "d s t m v", "out"),
    ]
    return nodes, conv_and_norm(), ["Conv"]


def norm_apart() -> Case:
    nodes = [
        CONV,
        node("Transpose", "y", "z", perm=[0, 1, 3, 2]),
        node("BatchNormalization", "z s t m v", "u"),
        node("Relu", "u", "out"),
    ]
    return nodes, conv_and_norm(), ["Conv", "Transpose", "Relu"]


def computed_weight() -> Case:
    nodes = [
        node("Mul", "w factor", "scaled"),
        node("Conv", "x scaled b", "y", pads=[1, 1, 1, 1]),
        NORM,
    ]
    return nodes, {**conv_and_norm(), "factor": normal(6, 1, 1, 1)}, ["Conv"]


def zeros_for_a_bias() -> Case:
    """A padding between two convs is merged, because a conv without a bias gives zero for zero."""
    nodes = [node("Conv", "x w1 zeros", "y"), node("Pad", "y pads", "p"), node("Conv", "p w", "out")]
    constants = {"zeros": np.zeros(4, np.float32), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    return nodes, {**constants, "w1": normal(4, 4, 1, 1), "w": normal(6, 4, 3, 3)}, ["Conv"]


def bottleneck() -> Case:
    """A bias in front of zero padding, for which the merged conv reads a channel of ones."""
    nodes = [
        node("Conv", "x w1 b1", "y"),
        node("Conv", "y w2", "z", pads=[1, 1, 1, 1], group=24),
        node("Conv", "z w3 b3", "out"),
    ]
    weights = {"w1": normal(24, 4, 1, 1), "b1": normal(24), "w2": normal(24, 1, 3, 3), "w3": normal(4, 24, 1, 1)}
    return nodes, {**weights, "b3": normal(4)}, ["Pad", "Conv"]


def padding_of_different_sides() -> Case:
    nodes = [node("Conv", "x w", "y", pads=[1, 0, 0, 2]), NORM]
    return nodes, {"w": normal(6, 4, 3, 3), **dict(zip("stmv", norm(6)))}, ["Conv"]


CASES: list[Callable[[], Case]] = [
    affine_as_mul_and_add,
    pad_before_conv,
    automatic_padding,
    parallel_convs,
    sum_in_part,
    difference_of_convs,
    transposed,
    average_pool,
    concatenated,
    cropped,
    every_second_position,
    identities,
    norm_apart,
    computed_weight,
    zeros_for_a_bias,
    bottleneck,
    padding_of_different_sides,
]


@pytest.mark.slow_one_in(4)
@pytest.mark.parametrize("as_nodes", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["initializers", "nodes"])
@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
def test_a_spelling_is_fused(case: Callable[[], Case], as_nodes: bool, tmp_path: Path) -> None:
    nodes, constants, expected = case()
    report, operators = fused(write(tmp_path / "in.onnx", nodes, constants, as_nodes=as_nodes))
    assert [name for name in operators if name != "Constant"] == expected
    assert report.max_error < 1e-5
    assert report.convs == sum(name.startswith("Conv") for name in expected)


def left(nodes: list[Any], constants: dict[str, Any]) -> Case:
    return nodes, constants, [each.op_type for each in nodes]


@pytest.mark.parametrize("opset", [7, 10, 11, 13])
def test_padding_is_spelled_as_the_file_s_opset_wants_it(opset: int, tmp_path: Path) -> None:
    nodes, constants, expected = bottleneck()
    report, operators = fused(write(tmp_path / "in.onnx", nodes, constants, opset=opset))
    assert operators == expected
    assert report.max_error < 1e-5


KEPT: dict[str, tuple[Callable[[], tuple[list[Any], dict[str, Any]]], str]] = {
    "padding by a free size": (
        lambda: ([node("Conv", "x w", "y", auto_pad="SAME_LOWER", strides=[2, 2]), NORM], conv_and_norm()),
        "auto_pad=SAME_LOWER pads by the input's size, which the file doesn't fix",
    ),
    "training mode": (
        lambda: ([CONV, node("BatchNormalization", "y s t m v", "out m2 v2", training_mode=1)], conv_and_norm()),
        "it normalises by the batch: export the model in eval mode",
    ),
    "a weight from the input": (
        lambda: (
            [
                node("ReduceMean", "x", "mean", axes=[0, 1, 2, 3], keepdims=1),
                node("Mul", "w mean", "w2"),
                node("Conv", "x w2", "y"),
                NORM,
            ],
            {name: array for name, array in conv_and_norm().items() if name != "b"},
        ),
        "its weight isn't constant",
    ),
    "a second user": (
        lambda: ([CONV, node("BatchNormalization", "y s t m v", "z"), node("Mul", "y z", "out")], conv_and_norm()),
        "'the y' has a second user",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_stays_is_told_with_the_reason(name: str, tmp_path: Path) -> None:
    make, reason = KEPT[name]
    nodes, constants = make()
    report, operators = fused(write(tmp_path / "in.onnx", nodes, constants))
    assert operators == [each.op_type for each in nodes]
    assert any(reason in str(skip) for skip in report.stays), report.stays
    assert report.max_error == 0


def test_a_shrinking_window_at_the_border_stays(tmp_path: Path) -> None:
    nodes, constants, _ = average_pool()
    nodes[1] = node("AveragePool", "y", "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    assert fused(write(tmp_path / "in.onnx", nodes, constants))[1] == ["Conv", "AveragePool", "Conv", "Add"]


def test_a_constant_that_makes_one_channel_into_several_stays(tmp_path: Path) -> None:
    nodes = [node("Mul", "x scale", "y"), node("Conv", "y w", "out")]
    constants = {"scale": normal(4, 1, 1), "w": normal(3, 4, 3, 3)}
    source = write(tmp_path / "in.onnx", nodes, constants, x=("batch", 1, "height", "width"))
    assert fused(source)[1] == ["Mul", "Conv"]
    known = write(tmp_path / "known.onnx", nodes, constants)
    assert fused(known)[1] == ["Conv"]


@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
def test_linear_layers(operator: str, tmp_path: Path) -> None:
    first = (
        [node("Gemm", "x w b", "y", transB=1)]
        if operator == "Gemm"
        else [node("MatMul", "x w", "p"), node("Add", "p b", "y")]
    )
    nodes = [*first, node("BatchNormalization", "y s t m v", "out")]
    weight = normal(6, 4) if operator == "Gemm" else normal(4, 6)
    source = write(
        tmp_path / "in.onnx", nodes, {"w": weight, "b": normal(6), **dict(zip("stmv", norm(6)))}, x=("batch", 4)
    )
    assert fused(source)[1] == ["Gemm"]


def test_a_linear_layer_with_its_bias_stays_two_nodes(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "y"), node("Relu", "y", "out")]
    source = write(tmp_path / "in.onnx", nodes, {"w": normal(4, 6), "b": normal(6)}, x=("batch", 5, 4))
    assert fused(source)[1] == ["MatMul", "Add", "Relu"]


def test_a_scale_behind_a_linear_layer_on_more_axes(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "p"), node("Add", "b p", "y"), node("Mul", "y scale", "out")]
    constants = {"w": normal(4, 6), "b": normal(6), "scale": normal(6)}
    assert fused(write(tmp_path / "in.onnx", nodes, constants, x=("batch", 5, 4)))[1] == ["MatMul", "Add"]


def test_constants_that_take_their_type_from_a_value_that_is_merged(tmp_path: Path) -> None:
    nodes = [
        node("CastLike", "zeros x", "b"),
        CONV,
        node("CastLike", "half y", "h"),
        node("CastLike", "zeros y", "b2"),
        node("BatchNormalization", "y s t m v", "z"),
        node("Relu", "z", "r"),
        node("Conv", "r w2 b2", "q"),
        node("Sub", "q h", "n"),
        node("PRelu", "n h", "out"),
    ]
    constants = {name: array for name, array in conv_and_norm().items() if name != "b"}
    constants |= {"zeros": np.zeros(6), "half": np.array([0.5]), "w2": normal(6, 6, 1, 1)}
    source = write(tmp_path / "in.onnx", nodes, constants)
    model = onnx.load(source)
    for name in ("y", "h"):
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    onnx.save(model, source)
    report, operators = fused(source)
    assert operators == ["Conv", "Relu", "Conv", "PRelu"]
    assert {"h", "zeros"} & {tensor.name for tensor in onnx.load(report.path).graph.initializer} == {"h"}


# ---- what else is in a file


def test_nothing_else_in_a_file_changes(tmp_path: Path) -> None:
    nodes = [
        CONV,
        node("BatchNormalization", "y s t m v", "z"),
        node("Relu", "z", "r"),
        node("Conv", "r w2", "q"),
        node("Sigmoid", "q", "out"),
    ]
    nodes[2].doc_string = "an activation"
    source = write(
        tmp_path / "in.onnx", nodes, {**conv_and_norm(), "w2": normal(3, 6, 1, 1), "unused": normal(3)}, out="out r"
    )
    model = onnx.load(source)
    helper.set_model_props(model, {"author": "somebody", "labels": "a,b"})
    model.doc_string, model.producer_name, model.graph.doc_string = "a model", "a tool", "a graph"
    model.opset_import.append(helper.make_opsetid("com.example", 3))
    model.graph.value_info.append(
        helper.make_tensor_value_info("q", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    )
    onnx.save(model, source)
    report, _ = fused(source)
    result = onnx.load(report.path)

    kept = [each for each in model.graph.node if each.op_type not in ("BatchNormalization",) and each.name != "the y"]
    assert [each.SerializeToString() for each in result.graph.node if each.name != "the y"] == [
        each.SerializeToString() for each in kept
    ]
    for name in ("input", "output", "value_info"):
        assert getattr(result.graph, name) == getattr(model.graph, name)
    for name in ("doc_string", "producer_name", "ir_version", "metadata_props"):
        assert getattr(result, name) == getattr(model, name)
    opsets = [[(entry.domain, entry.version) for entry in each.opset_import] for each in (model, result)]
    assert opsets[0] == opsets[1]
    before = {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer}
    after = {tensor.name: tensor.SerializeToString() for tensor in result.graph.initializer}
    assert {"w2", "unused"} == before.keys() & after.keys()
    assert all(after[name] == before[name] for name in ("w2", "unused"))
    assert set(after) - set(before) == {"the y_fused_weight", "the y_fused_bias"}
    assert next(each for each in result.graph.node if each.name == "the y").output == ["z"]


def test_branches_of_an_if_read_what_replaces_the_values_that_they_captured(tmp_path: Path) -> None:
    branches = [
        helper.make_graph(
            [helper.make_node(operator, ["z"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4)],
        )
        for name, operator in (("then", "Relu"), ("other", "Neg"))
    ]
    nodes = [
        CONV,
        node("BatchNormalization", "y s t m v", "z"),
        helper.make_node("If", ["condition"], ["out"], then_branch=branches[0], else_branch=branches[1]),
    ]
    source = write(tmp_path / "in.onnx", nodes, {**conv_and_norm(), "condition": np.array(False)})
    assert fused(source)[1] == ["Conv", "If"]
    nodes[2] = helper.make_node("If", ["condition"], ["out"], then_branch=branches[0], else_branch=branches[0])
    nodes.insert(2, node("Relu", "y", "unread"))
    inner = onnx.load(
        write(tmp_path / "in.onnx", nodes, {**conv_and_norm(), "condition": np.array(True)}, out="out unread")
    )
    inner.graph.node[3].attribute[0].g.node[0].input[0] = "y"  # the branch reads the conv itself
    onnx.save(inner, source)
    assert fused(source)[1] == ["Conv", "BatchNormalization", "Relu", "If"]


def test_an_output_of_the_file_that_a_rule_passes_by_keeps_its_name(tmp_path: Path) -> None:
    nodes = [CONV, node("Identity", "y", "out"), node("Transpose", "y", "u", perm=[0, 1, 3, 2])]
    nodes.append(node("Identity", "x", "same"))
    source = write(tmp_path / "in.onnx", nodes, conv_and_norm(), out="out u same")
    report, _ = fused(source)
    assert [value.name for value in onnx.load(report.path).graph.output] == ["out", "u", "same"]


@pytest.mark.parametrize("ir_version", [3, 8])
def test_initializers_that_are_listed_as_inputs(ir_version: int, tmp_path: Path) -> None:
    """They are constants in version 3 of the format. Later, they are defaults, which a caller may replace."""
    source = write(tmp_path / "in.onnx", [CONV, NORM], conv_and_norm(), ir_version=ir_version, listed=True, opset=9)
    report, operators = fused(source)
    if ir_version == 3:
        assert operators == ["Conv"]
        assert [value.name for value in onnx.load(report.path).graph.input] == [
            "x",
            "the y_fused_weight",
            "the y_fused_bias",
        ]
    else:
        assert operators == ["Conv", "BatchNormalization"]
        assert "also an input of the file, which a caller may replace" in str(report.stays[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_keep_their_dtype_and_are_rounded_once(dtype: str, tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    constants = {name: array.astype(kind) for name, array in conv_and_norm().items()}
    number = getattr(TensorProto, {"float64": "DOUBLE"}.get(dtype, dtype.upper()))
    source = write(tmp_path / "in.onnx", [CONV, NORM], constants, dtype=number, opset=22, ir_version=10, x=(2, 4, 7, 6))
    report, operators = fused(source)
    assert operators == ["Conv"]
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(report.path).graph.initializer}
    wide = {name: array.astype(np.float64) for name, array in constants.items()}
    exact = wide["w"] * (wide["s"] / np.sqrt(wide["v"] + np.float32(1e-5)))[:, None, None, None]
    assert found["the y_fused_weight"].dtype == np.dtype(kind)
    eps = {"float16": 2**-11, "bfloat16": 2**-8, "float64": 1e-15}[dtype]
    assert np.abs(found["the y_fused_weight"].astype(np.float64) - exact).max() <= eps * np.abs(exact).max()


def test_weights_beside_the_file_stay_beside_it(tmp_path: Path) -> None:
    source = write(tmp_path / "in.onnx", [CONV, NORM], {**conv_and_norm(), "unused": normal(30, 30)})
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="in.data", size_threshold=64)
    assert (tmp_path / "in.data").stat().st_size > 3600
    report, operators = fused(source)
    assert operators == ["Conv"]
    plain = onnx.load(report.path, load_external_data=False)
    outside = {tensor.name for tensor in plain.graph.initializer if tensor.external_data}
    assert outside == {"unused"}
    assert (tmp_path / "fused.onnx.data").is_file()
    before, after = (
        next(numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name == "unused")
        for path in (source, report.path)
    )
    assert np.array_equal(before, after)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused.onnx", "fused.onnx.data", "in.data", "in.onnx"]


def test_the_new_file_may_take_the_place_of_the_old_one(tmp_path: Path) -> None:
    source = write(tmp_path / "in.onnx", [CONV, NORM], {**conv_and_norm(), "unused": normal(30, 30)})
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="in.onnx.data", size_threshold=64)
    report = repfx.fuse_onnx(source, source)
    assert report.convs == 1
    assert report.nodes == {"Conv": 1}
    assert report.path == source.resolve()
    onnx.checker.check_model(str(source))


# ---- examples, sizes and failures


def test_an_example_of_the_right_sizes_is_asked_for_if_none_can_be_made_up(tmp_path: Path) -> None:
    nodes = [CONV, node("BatchNormalization", "y s t m v", "z"), node("Reshape", "z shape", "out")]
    constants = {**conv_and_norm(), "shape": np.array([-1, 6, 5, 7])}
    source = write(tmp_path / "in.onnx", nodes, constants, x=("batch", 4, "height", "width"))
    with pytest.raises(InvalidInput, match="give an example"):
        fused(source)
    assert list(tmp_path.iterdir()) == [source]
    x = torch.randn(1, 4, 5, 7)
    for example in (x, (x,), {"x": x}):
        report, operators = fused(source, example=example)
        assert operators == ["Conv", "Reshape"]
        assert report.max_error < 1e-5
    with pytest.raises(InvalidInput, match="has the inputs"):
        fused(source, example={"image": x})
    with pytest.raises(InvalidInput, match="can't run on the example"):
        fused(source, example=torch.randn(1, 4, 6, 7))


def test_a_file_that_computes_something_else_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.onnx", [CONV, NORM], conv_and_norm())
    target = tmp_path / "fused.onnx"
    target.write_bytes(b"older")
    monkeypatch.setattr(lowering, "rounded", lambda x, dtype: rounded(x * 1.01, dtype))
    with pytest.raises(
        ExportError, match=r"the fused file gives something else than .*in.onnx': worst relative difference"
    ):
        repfx.fuse_onnx(source, target)
    assert target.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused.onnx", "in.onnx"]


def test_random_numbers_are_compared_too(tmp_path: Path) -> None:
    nodes = [
        CONV,
        node("BatchNormalization", "y s t m v", "z"),
        node("RandomNormalLike", "z", "r"),
        node("Add", "r z", "out"),
    ]
    report, operators = fused(write(tmp_path / "in.onnx", nodes, conv_and_norm()))
    assert operators == ["Conv", "RandomNormalLike", "Add"]
    assert report.max_error < 1e-5


def refused(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "in.onnx"
    if name == "no file":
        return path
    if name == "no ONNX file":
        path.write_bytes(b"something else")
        return path
    if name == "nothing to fuse":
        return write(path, [node("Relu", "x", "out")], {})
    if name == "not finite":
        return write(path, [CONV, NORM], {**conv_and_norm(), "s": np.full(6, np.inf, np.float32)})
    quantize = [
        node("QuantizeLinear", "x step", "q"),
        node("DequantizeLinear", "q step", "d"),
        node("Conv", "d w", "out"),
    ]
    return write(path, quantize, {"step": np.float32(0.1), "w": normal(6, 4, 3, 3)})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no file", "there is no file"),
        ("no ONNX file", "can't be read as an ONNX file|can't be read"),
        ("nothing to fuse", "no conv or linear layer, so there is nothing to fuse"),
        ("not finite", "the merged weight of 'the y' is not finite"),
        ("quantized", "is quantized .*: fuse the file before quantizing it"),
    ],
)
def test_refusals(name: str, words: str, tmp_path: Path) -> None:
    source = refused(tmp_path, name)
    with pytest.raises(InvalidInput, match=words):
        fused(source)
    assert not (tmp_path / "fused.onnx").exists()
    with pytest.raises(InvalidInput, match=words):
        plan_fusion(source)


def test_the_plan_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    nodes, constants, _ = sum_in_part()
    source = write(tmp_path / "in.onnx", nodes, constants)
    plan = plan_fusion(source)
    assert (plan.convs_before, plan.convs) == (2, 1)
    assert [(edit.rule, edit.path) for edit in plan.applied] == [("merge_parallel", "the y")]
    assert "2 → 1 Conv" in str(plan)
    assert list(tmp_path.iterdir()) == [source]
    report, _ = fused(source)
    assert report.nodes == plan.nodes
    assert report.stays == plan.stays
