"""Each guard on its own: a net that it has to stop, with the reason, and a similar net that passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repfx
from tests.inline_net import Net, convs, fused_exactly, image, norms, ready, reasons


def conv(kernel_size: int = 3, channels: int = 4, **keywords: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size, **{"padding": kernel_size // 2, **keywords})


def two(function: Any, **members: Any) -> Net:
    return Net(function, a=conv(), b=conv(1), c=conv(), n=nn.BatchNorm2d(4), **members)


# ---- nobody writes into what is read


def foreign_term_changed(m: Any, x: Any) -> Any:
    y = m.c(x).relu()
    total = m.a(x) + y
    y.sub_(3)
    return total + m.b(x)


def foreign_term_written_into(m: Any, x: Any) -> Any:
    y = m.c(x).relu()
    total = y
    total += m.a(x)
    return (total + m.b(x)) * y


def view_changed(m: Any, x: Any) -> Any:
    x = m.c(x).relu()
    view = x.view(x.shape)
    first = m.a(x)
    view.sub_(1)
    return first + m.b(x)


def view_used_afterwards(m: Any, x: Any) -> Any:
    x = m.c(x).relu()
    view = x.view(x.shape)
    view += m.a(view)
    return view.sin() + x


def another_view_used_afterwards(m: Any, x: Any) -> Any:
    x = m.c(x).relu()
    view = x.view(x.shape)
    x += m.a(x)
    return x.sin() + view


def changed_inside_a_layer(m: Any, x: Any) -> Any:
    x = m.c(x).tanh()
    first = m.a(x)
    z = m.layer(x)
    return first + m.b(x) + z.tanh()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        return self.act(x)


@pytest.mark.parametrize(
    "function",
    [
        foreign_term_changed,
        foreign_term_written_into,
        view_changed,
        view_used_afterwards,
        another_view_used_afterwards,
        changed_inside_a_layer,
    ],
)
def test_what_is_changed_in_place_is_not_moved(function: Any) -> None:
    fused = fused_exactly(two(function, layer=Layer()), image())
    assert "in place" in reasons(fused)


def other_tensor_changed(m: Any, x: Any) -> Any:
    first = m.a(x)
    other = m.c(x).relu_()
    return first + m.b(x) + other


def sum_in_place(m: Any, x: Any) -> Any:
    total = m.a(x)
    total += m.b(x)
    total *= 2
    return total


@pytest.mark.parametrize(("function", "left"), [(other_tensor_changed, ["a", "c"]), (sum_in_place, ["a", "c"])])
def test_changing_what_only_the_sum_sees_does_no_harm(function: Any, left: list[str]) -> None:
    assert convs(fused_exactly(two(function), image())) == left


# ---- a state that moves


def test_a_parameter_that_the_forward_changes_is_no_constant() -> None:
    def forward(m: Any, x: Any) -> Any:
        m.scale.detach().add_(0)
        m.scale.add_(1)
        return m.a(x) * m.scale

    model = Net(forward, a=conv(), scale=nn.Parameter(torch.ones(1).double(), requires_grad=False)).double().eval()
    fused = repfx.fuse(model)
    x = image()
    assert all(torch.equal(fused(x), model(x)) for _ in range(2))


def test_a_buffer_that_the_forward_changes_is_no_constant() -> None:
    def forward(m: Any, x: Any) -> Any:
        m.scale.add_(1)
        return m.a(x) * m.scale

    model = Net(forward, a=conv(), scale=nn.Buffer(torch.ones(1).double())).double().eval()
    fused = repfx.fuse(model)
    x = image()
    assert all(torch.equal(fused(x), model(x)) for _ in range(2))


def test_a_tensor_that_the_forward_changes_is_not_traced_through() -> None:
    """A plain tensor attribute, neither parameter nor buffer, is changed in forward."""

    def forward(m: Any, x: Any) -> Any:
        m.scale.add_(1)
        return m.a(x) * m.scale

    model = Net(forward, a=conv(), scale=torch.ones(1).double()).double().eval()
    fused = repfx.fuse(model)
    assert "changes its own tensors" in reasons(fused)
    x = image()
    assert all(torch.equal(fused(x), model(x)) for _ in range(2))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.a(x) + m.b(x) - torch.relu(x),
        lambda m, x: m.a(x) - torch.relu(x) + m.b(x),
        lambda m, x: torch.relu(x) - (m.a(x) + m.b(x)),
        lambda m, x: torch.relu(x) - (m.a(x) - (m.b(x) - torch.tanh(x))),
    ],
)
def test_what_remains_of_a_sum_keeps_its_sign(function: Any) -> None:
    fused = fused_exactly(Net(function, a=conv(), b=conv(1)), image())
    assert len(convs(fused)) == 1


# ---- hooks see what they saw


@pytest.mark.parametrize("layer", [nn.Identity(), nn.AvgPool2d(3, 1, 1), nn.ZeroPad2d(1), nn.BatchNorm2d(4)])
@pytest.mark.parametrize("kind", ["forward", "before"])
def test_a_layer_with_a_hook_is_called_as_before(layer: nn.Module, kind: str) -> None:
    seen = []

    def hook(module: nn.Module, inputs: Any, output: Any = None) -> Any:
        seen.append(module)
        return inputs[0] * 2 if output is None else output * 2

    register = layer.register_forward_hook if kind == "forward" else layer.register_forward_pre_hook
    handle = register(hook)
    fused = fused_exactly(nn.Sequential(conv(bias=False), layer, nn.Conv2d(4, 4, 3)), image())
    assert len(seen) == 2  # once in each model
    assert "1" in dict(fused.named_children())
    handle.remove()


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_a_layer_with_a_hook_of_any_kind_stays(kind: str, layer: int) -> None:
    model = ready(nn.Sequential(conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Identity(), conv()))
    calls: list[str] = []
    getattr(model[layer], f"register_{kind}")(lambda *_: calls.append(kind))
    fused = repfx.fuse(model)
    assert type(fused.get_submodule(str(layer))) is type(model[layer])
    fused(image().requires_grad_()).sum().backward()
    assert calls == [kind]


# ---- modules that others use


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.n(m.a(m.a(x))), "called 2 times"),
        (lambda m, x: m.n(m.a(x)) + m.n(m.c(x)), "called 2 times"),
        (lambda m, x: m.n(m.a(x)) + F.conv2d(x, m.a.weight, padding=1), "read elsewhere"),
        (lambda m, x: (lambda y: m.n(y) + y.relu())(m.a(x)), "second user"),
    ],
)
def test_what_others_use_stays(function: Any, reason: str) -> None:
    fused = fused_exactly(two(function), image())
    assert norms(fused) == ["n"]
    assert reason in reasons(fused)


def test_a_module_of_two_names_stays_if_one_is_no_module_s_name() -> None:
    shared = conv()
    fused = fused_exactly(Net(lambda m, x: m.n(m.a(x)), a=shared, b=(shared,), n=nn.BatchNorm2d(4)), image())
    assert norms(fused) == ["n"]
    assert "registered under 2 names" in reasons(fused)


def test_complex_weights_are_not_made_real() -> None:
    parts = [nn.Conv2d(2, 2, 1, dtype=torch.complex128) for _ in "ab"]
    model = Net(lambda m, x: m.a(x) + m.b(x), a=parts[0], b=parts[1])
    x = torch.randn(1, 2, 3, 3, dtype=torch.complex128)
    fused = repfx.fuse(model)
    assert torch.equal(fused(x), model(x))
    assert "complex" in reasons(fused)


# ---- what is a conv, and what it costs


def test_zero_padding_after_a_bias_is_no_conv() -> None:
    fused = fused_exactly(nn.Sequential(nn.BatchNorm2d(4), conv()), image())
    assert "bias does not reach the border" in reasons(fused)
    assert norms(fused_exactly(nn.Sequential(nn.BatchNorm2d(4), conv(padding=0)), image())) == []


def test_a_merge_that_costs_more_is_not_made() -> None:
    narrow = nn.Sequential(nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1))
    fused = fused_exactly(narrow, image(1, 16, 5, 5))
    assert convs(fused) == ["0", "1"]
    assert "would have 256 weights, the convs it replaces have 128" in reasons(fused)
    wide = nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1))
    assert len(convs(fused_exactly(wide, image()))) == 1


def test_a_conv_that_the_sum_reads_twice_counts_once() -> None:
    """72 + 16 weights are fewer than 144, so nothing is merged; counted twice, 2 · 72 + 16 would be more than 144."""
    model = two(lambda m, x: (lambda y: (y + y) + m.b(x))(m.grouped(x)), grouped=conv(groups=2))
    fused = fused_exactly(model, image())
    assert {"b", "grouped"} <= set(convs(fused))
    assert "would have 144 weights, the convs it replaces have 88" in reasons(fused)
    dense = two(lambda m, x: (lambda y: (y + y) + m.b(x))(m.a(x)))
    assert "b" not in convs(fused_exactly(dense, image()))


def test_a_pooling_behind_a_conv_is_not_bought_with_weights() -> None:
    """A transition of DenseNet: one 2×2 conv of stride 2 would need the same multiply-adds, and four times the weights."""
    fused = fused_exactly(nn.Sequential(nn.Conv2d(4, 4, 1), nn.AvgPool2d(2)), image())
    assert [type(module) for module in fused.children()] == [nn.Conv2d, nn.AvgPool2d]


def test_linear_and_batch_norm_meet_only_on_two_axes() -> None:
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4)]
    fused = fused_exactly(nn.Sequential(*layers), image(3, 4, 4))
    assert "isn't known to be (batch, channels)" in reasons(fused)
    kept = fused_exactly(nn.Sequential(nn.Flatten(0, 1), *layers), image(3, 4, 4))
    assert norms(kept) == ["2"]


FLAT = [
    nn.Flatten(),
    lambda x: torch.flatten(x, 1),
    lambda x: torch.flatten(input=x, start_dim=1, end_dim=-1),
    lambda x: torch.flatten(x, end_dim=-1, start_dim=1),
    lambda x: x.flatten(start_dim=1),
    lambda x: x.flatten(1, -1),
    lambda x: x.flatten(1, end_dim=-1),
]


@pytest.mark.parametrize("flatten", FLAT)
def test_after_flattening_there_are_two_axes(flatten: Any) -> None:
    model = Net(
        lambda m, x: m.d(m.n(m.c(m.r(m.flatten(x))))),
        flatten=flatten,
        r=nn.ReLU(),
        c=nn.Linear(4, 4),
        n=nn.BatchNorm1d(4),
        d=nn.Linear(4, 4),
    )
    assert norms(fused_exactly(model, image(3, 2, 2))) == []


NOT_FLAT = [
    nn.Flatten(1, 2),
    nn.Flatten(1, -2),
    nn.Flatten(2),
    lambda x: torch.flatten(x, 1, 2),
    lambda x: x.flatten(start_dim=1, end_dim=2),
    lambda x: x.flatten(2),
    lambda x: torch.flatten(x, end_dim=1),
    lambda x: x.flatten(end_dim=1),
]


@pytest.mark.parametrize("flatten", NOT_FLAT)
def test_after_flattening_other_axes_there_are_more(flatten: Any) -> None:
    """The second axis holds the channels of a BatchNorm1d and the last one those of the linear layer, so the two don't meet."""
    x = image(6, 2, 3, 6)
    sizes = flatten(x).shape
    linear, norm = nn.Linear(sizes[-1], sizes[1]), nn.BatchNorm1d(sizes[1])
    model = Net(lambda m, x: m.n(m.c(m.flatten(x))), flatten=flatten, c=linear, n=norm)
    assert norms(fused_exactly(model, x)) == ["n"]


def test_one_sided_padding_is_not_traded_for_itself() -> None:
    fused = fused_exactly(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(padding=0)), image())
    assert "pads both sides alike" in reasons(fused)
    assert repfx.report(fused).applied == ()
    both = fused_exactly(nn.Sequential(nn.ZeroPad2d((1, 1, 2, 2)), conv(padding=0)), image())
    assert both.get_submodule("1").padding == (2, 1)


GROWS, CROPS = [(0, 1, 2, 0), (3, 0, 0, 1), (0, 2, 0, 0)], [(-1, 0, 2, -2), (0, -2, 1, 0), (-1, -2, 0, -1)]


@pytest.mark.parametrize(
    ("sides", "mode"), [*((sides, "constant") for sides in GROWS + CROPS), *((sides, "reflect") for sides in GROWS)]
)
def test_a_sum_behind_one_sided_padding_pads_the_same_sides(sides: tuple[int, ...], mode: str) -> None:
    """The merged conv can't pad so, and an operation in front of it does: `F.pad` counts axes from the last."""

    def padded(m: Any, x: Any) -> Any:
        y = F.pad(x, sides, mode=mode)
        return m.a(y) + m.b(F.pad(x, sides, mode=mode))

    model = Net(padded, a=conv(padding=0), b=conv(padding=0))
    fused = fused_exactly(model, image(2, 4, 8, 11))
    assert len(convs(fused)) == 1
