"""Every way to write an addition, a scale, a padding or a pooling is read, and nothing else is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from repfx.algebra.meaning import kernel_of
from repfx.blocks.stages import Pad, Scale
from repfx.graphs.aliasing import may_share_memory, mutated_by
from repfx.graphs.checks import with_axes
from repfx.graphs.operations import Op, read_op
from repfx.testing import assert_same_map
from repfx.tracing.trace import trace
from tests.inline_net import Net, convs, fused_exactly, image

Function = Callable[[Any, Any], Any]


def last(function: Function, **members: Any) -> tuple[nn.Module, list[fx.Node]]:
    """Return a net with these members, and all nodes of its graph except the output."""
    root = Net(function, **members).double()
    (island,) = (island for island in trace(root).islands if island.path == "")
    for name, value in island.constants.items():
        setattr(root, name, value)
    return root, list(island.graph.nodes)[:-1]


def read(function: Function, **members: Any) -> tuple[nn.Module, Op | None]:
    root, nodes = last(function, **members)
    return root, read_op(nodes[-1], root)


ops: Any = operator  # the stubs have no types
SCALE = torch.tensor([0.5, -2.0, 3.0, 1.5], dtype=torch.float64)
CHANNELS = SCALE.reshape(4, 1, 1)

LINEAR: dict[str, Function] = {
    "x * number": lambda m, x: x * 2,
    "number * x": lambda m, x: 2.5 * x,
    "torch.mul": lambda m, x: torch.mul(x, 3),
    "torch.multiply": lambda m, x: torch.multiply(x, 3),
    "method mul": lambda m, x: x.mul(3),
    "method mul in place": lambda m, x: x.mul_(3),
    "x * constant": lambda m, x: x * CHANNELS,
    "constant * x": lambda m, x: CHANNELS * x,
    "x * parameter": lambda m, x: x * m.gamma,
    "x * buffer": lambda m, x: x * m.buffer,
    "x * one number in a tensor": lambda m, x: x * torch.tensor(0.25, dtype=torch.float64),
    "x / number": lambda m, x: x / 4,
    "x / constant": lambda m, x: x / CHANNELS,
    "torch.div": lambda m, x: torch.div(x, 4),
    "torch.true_divide": lambda m, x: torch.true_divide(x, 4),
    "method div": lambda m, x: x.div(4),
    "x + number": lambda m, x: x + 1,
    "number + x": lambda m, x: 1 + x,
    "x + constant": lambda m, x: x + CHANNELS,
    "torch.add": lambda m, x: torch.add(x, 1.5),
    "method add": lambda m, x: x.add(1),
    "x - number": lambda m, x: x - 1,
    "number - x": lambda m, x: 1 - x,
    "constant - x": lambda m, x: CHANNELS - x,
    "torch.sub": lambda m, x: torch.sub(x, 1),
    "torch.subtract": lambda m, x: torch.subtract(x, 1),
    "method sub": lambda m, x: x.sub(1),
    "-x": lambda m, x: -x,
    "torch.neg": lambda m, x: torch.neg(x),
    "torch.neg by keyword": lambda m, x: torch.neg(input=x),
    "method neg": lambda m, x: x.neg(),
    "operator": lambda m, x: ops.imul(x, 2),
    "F.pad": lambda m, x: F.pad(x, (1, 2, 3, 0)),
    "F.pad by keyword": lambda m, x: F.pad(input=x, pad=(1, 2, 3, 0), mode="reflect"),
    "F.pad that crops": lambda m, x: F.pad(x, (-1, 1, 0, -2)),
    "F.pad, replicate": lambda m, x: F.pad(x, (1, 1, 1, 1), "replicate"),
    "F.pad, circular": lambda m, x: F.pad(x, (1, 0, 1, 0), mode="circular"),
    "cropped by slices": lambda m, x: x[:, :, 1:-1, 2:],
    "cropped at one side": lambda m, x: x[:, :, :, :-3],
    "cropped behind an ellipsis": lambda m, x: x[..., :-1, 1:-1],
    "the last axis cropped": lambda m, x: x[..., 2:],
    "cropped around an ellipsis": lambda m, x: x[:, ..., 1:-2],
    "F.avg_pool2d": lambda m, x: F.avg_pool2d(x, 3, 1, 1),
    "F.avg_pool2d by keyword": lambda m, x: F.avg_pool2d(input=x, kernel_size=(2, 3), padding=(1, 0)),
    "F.avg_pool2d, other divisor": lambda m, x: F.avg_pool2d(x, 2, divisor_override=3),
    "unpadded, padding not counted": lambda m, x: F.avg_pool2d(x, 2, count_include_pad=False),
    "AvgPool2d": lambda m, x: m.pool(x),
    "Identity": lambda m, x: m.identity(x),
    "ZeroPad2d": lambda m, x: m.zeros(x),
    "ReflectionPad2d": lambda m, x: m.reflect(x),
    "Pad": lambda m, x: m.pad(x),
    "Scale": lambda m, x: m.scale(x),
    "conv": lambda m, x: m.conv(x),
}


def members() -> dict[str, Any]:
    return {
        "gamma": nn.Parameter(torch.randn(1, 4, 1, 1)),
        "buffer": nn.Buffer(torch.randn(4, 1, 1)),
        "pool": nn.AvgPool2d((3, 2), 2, (1, 0)),
        "identity": nn.Identity(),
        "zeros": nn.ZeroPad2d((1, 2, 0, 3)),
        "reflect": nn.ReflectionPad2d(2),
        "pad": Pad(((1, -1), (0, 2))),
        "scale": Scale(4, 2),
        "conv": nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"),
    }


@pytest.mark.parametrize("way", LINEAR)
def test_what_is_linear_is_read_as_the_map_that_it_is(way: str) -> None:
    root, op = read(LINEAR[way], **members())
    assert op is not None
    assert op.source.op == "placeholder"
    x = image()
    kernel = op.meaning.build(x, 4, 2)
    assert_same_map(kernel, root, x.clone())


OTHER: dict[str, Function] = {
    "number / x": lambda m, x: 1 / x,
    "x * x": lambda m, x: x * x,
    "x ** 2": lambda m, x: x**2,
    "rounded division": lambda m, x: torch.div(x, 4, rounding_mode="floor"),
    "x // number": lambda m, x: x // 2,
    "addition with alpha": lambda m, x: torch.add(x, 1, alpha=2),
    "padding with ones": lambda m, x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "padding by a size of the graph": lambda m, x: F.pad(x, (x.shape[0] - 1, 0)),
    "pooling by a size of the graph": lambda m, x: F.avg_pool2d(x, x.shape[2]),
    "ceil mode": lambda m, x: F.avg_pool2d(x, 2, ceil_mode=True),
    "padding not counted": lambda m, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "ceil mode of the module": lambda m, x: m.ceil(x),
    "up to a fixed position": lambda m, x: x[:, :, :5, 1:-1],
    "the last positions": lambda m, x: x[:, :, -5:, 1:-1],
    "every other position": lambda m, x: x[:, :, ::2, 1:-1],
    "one position": lambda m, x: x[:, :, 1:-1, 0],
    "some channels": lambda m, x: x[:, 1:, 1:-1, 1:-1],
    "some images": lambda m, x: x[1:, :, 1:-1, 1:-1],
    "a new axis": lambda m, x: x[:, :, None, 1:-1],
    "all positions": lambda m, x: x[:, :, :, :],
    "up to a size of the graph": lambda m, x: x[:, :, : x.shape[2] - 1, 1:-1],
    "max pooling": lambda m, x: F.max_pool2d(x, 3),
    "relu": lambda m, x: x.relu(),
    "bool": lambda m, x: x * True,
    "a layer of two inputs": lambda m, x: m.bilinear(x, x),
}


UNTRACED = {"pooling by a size of the graph"} if torch.__version__ < (2, 9) else set()  # type: ignore[operator]


@pytest.mark.parametrize("way", [way for way in OTHER if way not in UNTRACED])
def test_what_is_not_linear_is_left_alone(way: str) -> None:
    _, op = read(OTHER[way], ceil=nn.AvgPool2d(2, ceil_mode=True), bilinear=nn.Bilinear(10, 10, 10))
    assert op is None


@pytest.mark.parametrize(
    "constant", [torch.ones(4), torch.ones(9, 10), torch.ones(4, 9, 1), torch.ones(2, 1, 1, 1), torch.ones(3, 1, 1)]
)
def test_a_constant_that_is_no_scale_of_each_channel_stays(constant: torch.Tensor) -> None:
    model = Net(lambda m, x: m.conv(x) * m.constant, conv=nn.Conv2d(4, 1, 1), constant=nn.Parameter(constant))
    if constant.shape == (4,):
        model.conv = nn.Conv2d(4, 1, (1, 7))
    fused = fused_exactly(model, image())
    assert dict(fused.named_parameters()).keys() == {"conv.weight", "conv.bias", "constant"}


WRITES: dict[str, Function] = {
    "+=": lambda m, x: ops.iadd(x, 1),
    "-=": lambda m, x: ops.isub(x, 1),
    "*=": lambda m, x: ops.imul(x, 2),
    "/=": lambda m, x: ops.itruediv(x, 2),
    "method": lambda m, x: x.add_(1),
    "function": lambda m, x: torch.relu_(x),
    "F.relu": lambda m, x: F.relu(x, True),
    "out": lambda m, x: torch.abs(torch.ones(1), out=x),
    "layer": lambda m, x: m.relu(x),
    "layer inside a layer": lambda m, x: m.nested(x),
}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        return self.relu(x)


@pytest.mark.parametrize("way", WRITES)
def test_writing_in_place_is_seen(way: str) -> None:
    root, nodes = last(WRITES[way], relu=nn.ReLU(inplace=True), nested=Nested())
    assert mutated_by(nodes[-1], root) is nodes[0]


@pytest.mark.parametrize("way", ["x + number", "method mul", "F.pad", "conv", "AvgPool2d"])
def test_what_does_not_write_is_not_taken_for_it(way: str) -> None:
    root, nodes = last(LINEAR[way], **members())
    assert mutated_by(nodes[-1], root) is None


def test_augmented_assignment_is_recorded_as_writing() -> None:
    def assign(m: Any, x: Any) -> Any:
        y = x
        y += 1
        y *= 2
        y -= 1
        y /= 3
        return y

    root, nodes = last(assign)
    assert [mutated_by(node, root) for node in nodes[1:]] == nodes[:-1]


@pytest.mark.parametrize(
    "name", ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"]
)
def test_each_operator_in_place_is_seen(name: str) -> None:
    in_place = getattr(operator, f"i{name}")
    root, nodes = last(lambda m, x: in_place(x, 2))
    assert mutated_by(nodes[-1], root) is nodes[0]


# Functions of a tensor of size (1, 4, 3, 3). Whether the result shares memory is asked of torch itself.
RESHAPED: dict[str, Function] = {
    "torch.flatten": lambda m, x: torch.flatten(x, 1),
    "torch.reshape": lambda m, x: torch.reshape(x, (4, 9)),
    "torch.transpose": lambda m, x: torch.transpose(x, 1, 2),
    "torch.squeeze": lambda m, x: torch.squeeze(x),
    "torch.unsqueeze": lambda m, x: torch.unsqueeze(x, 0),
    "torch.permute": lambda m, x: torch.permute(x, (0, 2, 3, 1)),
    "torch.movedim": lambda m, x: torch.movedim(x, 1, 2),
    "flatten": lambda m, x: x.flatten(1),
    "reshape": lambda m, x: x.reshape(4, 9),
    "view": lambda m, x: x.view(4, 9),
    "expand": lambda m, x: x.expand(2, 4, 3, 3),
    "contiguous": lambda m, x: x.contiguous(),
    "to": lambda m, x: x.to(torch.float64),
    "detach": lambda m, x: x.detach(),
    "index": lambda m, x: x[:, 1:],
    "Flatten": lambda m, x: m.flatten(x),
    "Identity": lambda m, x: m.identity(x),
    "Unflatten": lambda m, x: m.unflatten(x),
}
NEW: dict[str, Function] = {
    "F.pad": lambda m, x: F.pad(x, (0, 0, 0, 0)),
    "torch.cat": lambda m, x: torch.cat([x]),
    "torch.stack": lambda m, x: torch.stack([x]),
    "torch.matmul": lambda m, x: torch.matmul(x, m.weight[0, 0]),
    "F.linear": lambda m, x: F.linear(x, m.weight[0, 0]),
    "F.conv2d": lambda m, x: F.conv2d(x, m.weight),
    "torch.add": lambda m, x: torch.add(x, 0),
    "mul": lambda m, x: x.mul(1),
    "conv": lambda m, x: m.conv(x),
    "BatchNorm": lambda m, x: m.norm(x),
}


def parts() -> dict[str, Any]:
    layers = {"flatten": nn.Flatten(), "identity": nn.Identity(), "unflatten": nn.Unflatten(1, (2, 2))}
    return {**layers, "weight": torch.ones(4, 4, 3, 3).double(), "conv": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4)}


@pytest.mark.parametrize("way", [*RESHAPED, *NEW])
def test_what_shares_the_memory_of_its_input_is_known(way: str) -> None:
    function = {**RESHAPED, **NEW}[way]
    root, nodes = last(function, **parts())
    x = torch.ones(1, 4, 3, 3, dtype=torch.float64)
    shares = function(root.eval(), x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert shares is (way in RESHAPED)
    assert (nodes[0] in may_share_memory(nodes[-1], root)) is shares


def test_what_may_be_one_piece_of_memory() -> None:
    root, nodes = last(lambda m, x: m.conv(x.view(x.shape)).relu().mul_(2) + 1, conv=nn.Conv2d(4, 4, 1), relu=nn.ReLU())
    x, _, view, conv, relu, product, total = nodes
    assert may_share_memory(view, root) >= {x, view}
    assert may_share_memory(product, root) == {conv, relu, product}
    assert may_share_memory(total, root) == {total}


def test_kernel_of_what_is_no_linear_map_says_so() -> None:
    with pytest.raises(Exception, match="ReLU is no linear map"):
        kernel_of(nn.ReLU(), torch.ones(1), 4, 2)


@pytest.mark.parametrize("way", ["x * parameter", "constant - x", "x / constant", "-x", "x + number", "method mul"])
def test_arithmetic_after_a_conv_is_folded(way: str) -> None:
    gamma = nn.Parameter(torch.randn(1, 4, 1, 1))
    model = Net(lambda m, x: LINEAR[way](m, m.conv(x)), conv=nn.Conv2d(4, 4, 3), gamma=gamma)
    fused = fused_exactly(model, image())
    assert convs(fused) == ["conv"]
    # the constant has the axis of a batch, and gives it to an input without one
    nodes = [node for node in fused.graph.nodes if node.target is not with_axes]
    assert [node.op for node in nodes] == ["placeholder", "call_module", "output"]
    assert (len(nodes) < len(fused.graph.nodes)) == (way == "x * parameter")
