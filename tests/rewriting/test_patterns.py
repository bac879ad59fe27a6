"""Patterns of rules: single maps, sequences and sums, with the nodes that belong to them and the terms that remain."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra.kernel import NoKernel
from repfx.algebra.meaning import Kind
from repfx.rewriting.match import Match, Term
from repfx.rewriting.patterns import Sequence, Single, Sum
from repfx.rewriting.view import View
from repfx.testing import assert_same_map
from repfx.tracing.trace import trace
from tests.inline_net import Net, image


def view_of(function: Any, **members: Any) -> View:
    """A view of a net's graph, with the true counts of calls and registrations of each module."""
    root = Net(function, **members).double().eval()
    (island,) = (island for island in trace(root).islands if island.path == "")
    for name, value in island.constants.items():
        setattr(root, name, value)
    calls = Counter(str(node.target) for node in island.graph.nodes if node.op == "call_module")
    registered = Counter(path for path, _ in root.named_modules(remove_duplicate=False))
    return View(root, island.graph, calls, registered)


def last(view: View) -> Any:
    """The node whose value the net outputs."""
    (node,) = list(view.graph.nodes)[-1].all_input_nodes
    return node


def first(view: View) -> Any:
    return next(iter(view.graph.nodes))


def named(view: View, name: str) -> Any:
    return next(node for node in view.graph.nodes if node.name == name)


def convs() -> dict[str, nn.Module]:
    return {name: nn.Conv2d(4, 4, size, padding=size // 2) for name, size in {"a": 3, "b": 1, "c": 5}.items()}


def sum_of(function: Any, **members: Any) -> tuple[View, Match]:
    """The match of the sum that a net outputs."""
    view = view_of(function, **{**convs(), **members})
    match = Sum().match(last(view), view)
    assert match is not None
    return view, match


def text(match: Match) -> str:
    """The terms and the remaining nodes, with their factors, as text."""
    terms = [f"{factor(term.factor)}{' '.join(op.node.name for op in term.ops) or 'source'}" for term in match.terms]
    return " ".join([*sorted(terms), *sorted(f"{factor(own)}({node.name})" for own, node in match.remainder)])


def factor(value: float) -> str:
    return ("+" if value > 0 else "-") if abs(value) == 1 else f"{value:+g}·"


SUMS: dict[str, tuple[Any, str]] = {
    "two convs": (lambda m, x: m.a(x) + m.b(x), "+a +b"),
    "a difference": (lambda m, x: m.a(x) - m.b(x), "+a -b"),
    "a difference of a difference": (lambda m, x: m.a(x) - (m.b(x) - m.c(x)), "+a +c -b"),
    "a tree": (lambda m, x: (m.a(x) + m.b(x)) + (m.c(x) + x), "+a +b +c +source"),
    "the source itself": (lambda m, x: x + m.a(x), "+a +source"),
    "the source subtracted": (lambda m, x: m.a(x) - x, "+a -source"),
    "the source twice": (lambda m, x: x + m.a(x) + x, "+a +source +source"),
    "x + x": (lambda m, x: (x + x) + m.a(x), "+a +source +source"),
    "functions and methods": (lambda m, x: torch.add(m.a(x).add(m.b(x)), torch.sub(m.c(x), x)), "+a +b +c -source"),
    "chains": (lambda m, x: m.n(m.a(x)) + m.b(m.p(x)), "+a n +p b"),
    "scaled": (lambda m, x: m.a(x) * 2 + -m.b(x) / 3, "+a mul +b neg truediv"),
    "a pooling": (lambda m, x: m.a(x) + F.avg_pool2d(x, 3, 1, 1), "+a +avg_pool2d"),
    "a foreign term": (lambda m, x: m.a(x) + x.sin() + m.b(x), "+a +b +(sin)"),
    "a foreign term subtracted": (lambda m, x: m.a(x) - (x.sin() - m.b(x)), "+a +b -(sin)"),
    "two foreign terms": (lambda m, x: x.cos() - m.a(x) - x.sin() + m.b(x), "+b -a +(cos) -(sin)"),
    "a term used elsewhere": (lambda m, x: (lambda y: (m.a(x) + y + m.b(x)) * y.sum())(m.c(x)), "+a +b +(c)"),
    "an inner sum used elsewhere": (
        lambda m, x: (lambda y: (m.b(x) + (y + m.a(x))) * y.sum())(m.c(x) + x),
        "+a +b +(add)",
    ),
    "the source with more terms": (
        lambda m, x: (lambda y: m.a(x) + m.b(x) + m.c(y) + y + m.n(y))(x.sin()),
        "+c +n +source +(a) +(b)",
    ),
    "a term twice": (lambda m, x: (lambda y: m.b(x) - (y + y))(m.a(x)), "+b -a -a"),
    "a factor": (lambda m, x: torch.add(m.a(x), m.b(x), alpha=2), "+2·b +a"),
    "a factor subtracted": (lambda m, x: x - m.a(x).sub(m.b(x), alpha=0.5), "+0.5·b +source -a"),
    "a stack": (lambda m, x: torch.stack([m.a(x), m.b(x), x]).sum(0), "+a +b +source"),
    "a stack in a tree": (lambda m, x: m.c(x) - torch.sum(torch.stack((m.a(x), m.b(x)), 1), dim=1), "+c -a -b"),
    "a mean": (
        lambda m, x: torch.stack([m.a(x), x.sin(), m.b(x) + x, x]).mean(0),
        "+0.25·a +0.25·b +0.25·source +0.25·source +0.25·(sin)",
    ),
    "a mean by function": (lambda m, x: torch.mean(torch.stack([m.a(x), m.b(x)], dim=0), (0,)), "+0.5·a +0.5·b"),
    "a map in two terms": (lambda m, x: (lambda y: m.n(y) + y)(m.a(x)), "+a +a n"),
    "other sizes": (lambda m, x: m.a(x) + m.b(x) + m.strided(x), "+a +b +(strided)"),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_its_terms_and_what_remains(name: str) -> None:
    function, expected = SUMS[name]
    members = {
        "n": nn.BatchNorm2d(4),
        "p": nn.AvgPool2d(3, 1, 1),
        "strided": nn.Conv2d(4, 4, (9, 10), padding=0),
    }
    view = view_of(function, **convs(), **members)
    node = last(view)
    while view.sum_of(node) is None:  # behind other operations on the sum
        node = node.all_input_nodes[0]
    match = next(match for match in Sum().matches(node, view) if match.root is node)
    assert text(match) == expected


def test_parts_that_are_one_convolution_come_before_a_whole_that_leaves_a_remainder() -> None:
    view = view_of(
        lambda m, x: (m.a(x) + m.b(x)) + (m.c(x) + m.strided(x)), **convs(), strided=nn.Conv2d(4, 4, (9, 10))
    )
    assert [text(match) for match in Sum().matches(last(view), view)] == ["+a +b", "+a +b +c +(strided)"]


@pytest.mark.parametrize("name", [name for name in SUMS if "elsewhere" not in name])
def test_terms_and_remainder_together_are_the_sum(name: str) -> None:
    members = {"n": nn.BatchNorm2d(4), "p": nn.AvgPool2d(3, 1, 1), "strided": nn.Conv2d(4, 4, (9, 10), padding=0)}
    view, match = sum_of(SUMS[name][0], **members)
    x = image()
    values: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(fx.GraphModule(view.root, view.graph)).run(x)
        merged = match.kernel(x)(values[match.source])
    total = merged + sum(factor * values[node] for factor, node in match.remainder)
    assert_same_map(lambda _: total, lambda _: values[match.root], x)


NO_SUM: dict[str, Any] = {
    "no conv": lambda m, x: m.n(x) + x,
    "one term of each source": lambda m, x: m.a(x) + m.b(x.sin()),
    "a conv and a foreign term": lambda m, x: m.a(x) + x.sin(),
    "a constant": lambda m, x: m.a(x) + 1,
    "a parameter": lambda m, x: m.a(x) + m.gamma,
    "a product": lambda m, x: m.a(x) * m.b(x),
    "a stack along another axis": lambda m, x: torch.stack([m.a(x), m.b(x)], 1).sum(0),
    "a stack whose axis stays": lambda m, x: torch.stack([m.a(x), m.b(x)]).sum(0, keepdim=True),
    "a stack as a whole": lambda m, x: torch.stack([m.a(x), m.b(x)]).sum(),
    "a stack read twice": lambda m, x: (lambda y: y.sum(0) * y.amax())(torch.stack([m.a(x), m.b(x)])),
    "a factor that depends on the input": lambda m, x: torch.einsum(
        "k,kbchw->bchw", x[0, 0, 0, :2], torch.stack([m.a(x), m.b(x)])
    ),
    "a sum over another axis": lambda m, x: torch.einsum(
        "k,bkchw->bchw", torch.ones(2).double(), torch.stack([m.a(x), m.b(x)])
    ),
    "sizes that don't fit": lambda m, x: m.a(x) + m.whole(x),
}


@pytest.mark.parametrize("name", NO_SUM)
def test_what_is_no_sum_of_convs_is_not_matched(name: str) -> None:
    members = {"n": nn.BatchNorm2d(4), "gamma": nn.Parameter(torch.ones(4, 1, 1)), "whole": nn.Conv2d(4, 4, (9, 10))}
    view = view_of(NO_SUM[name], **convs(), **members)
    assert [Sum().match(node, view) for node in view.graph.nodes] == [None] * len(view.graph.nodes)


def test_a_part_of_a_sum_is_seen_from_the_whole_alone() -> None:
    view, match = sum_of(lambda m, x: (m.a(x) + m.b(x)) - (m.c(x) + x))
    assert [node.name for node in view.graph.nodes if Sum().match(node, view) is not None] == ["sub"]
    assert {node.name for node in match.inner} == {"add", "add_1"}
    assert match.nodes[0] is last(view)
    assert {node.name for node in match.nodes} == {"sub", "add", "add_1", "a", "b", "c"}
    assert len(match.nodes) == len(set(match.nodes))


def test_of_a_conv_that_is_read_outside_the_sum_nothing_is_taken() -> None:
    view = view_of(lambda m, x: (lambda y: m.n(y) + y + y.sum())(m.a(x)), **convs(), n=nn.BatchNorm2d(4))
    assert [Sum().match(node, view) for node in view.graph.nodes] == [None] * len(view.graph.nodes)


# ---- single maps and sequences

CONV: frozenset[Kind] = frozenset({"conv"})
AFFINE: frozenset[Kind] = frozenset({"affine"})
POOL: frozenset[Kind] = frozenset({"pool"})


def test_a_single_map_is_matched_by_its_kind() -> None:
    view = view_of(lambda m, x: m.i(m.a(x)).relu(), **convs(), i=nn.Identity())
    kinds: list[Kind] = ["conv", "identity", "affine"]
    found = {kind: [n.name for n in view.graph.nodes if Single(frozenset({kind})).match(n, view)] for kind in kinds}
    assert found == {"conv": ["a"], "identity": ["i"], "affine": []}
    match = Single(CONV).match(named(view, "a"), view)
    assert match is not None
    assert (match.source, match.nodes, match.remainder) == (first(view), (named(view, "a"),), ())


def test_a_sequence_is_two_maps_in_that_order() -> None:
    view = view_of(lambda m, x: m.p(m.n(m.a(x))), **convs(), n=nn.BatchNorm2d(4), p=nn.AvgPool2d(2))
    orders = {
        (one, other): [n.name for n in view.graph.nodes if Sequence(a, b).match(n, view)]
        for one, a in zip("cap", (CONV, AFFINE, POOL))
        for other, b in zip("cap", (CONV, AFFINE, POOL))
    }
    assert {order: names for order, names in orders.items() if names} == {("c", "a"): ["n"], ("a", "p"): ["p"]}
    match = Sequence(CONV, AFFINE).match(named(view, "n"), view)
    assert match is not None
    assert [op.node.name for op in match.ops] == ["a", "n"]
    assert [node.name for node in match.nodes] == ["n", "a"]
    x = image()
    assert_same_map(match.kernel(x), lambda x: view.root.n(view.root.a(x)), x)  # type: ignore[operator]


def test_a_sequence_sees_a_conv_that_others_use_and_leaves_it_to_the_guards() -> None:
    view = view_of(lambda m, x: (lambda y: m.n(y) * y)(m.a(x)), **convs(), n=nn.BatchNorm2d(4))
    assert Sequence(CONV, AFFINE).match(named(view, "n"), view) is not None


# ---- what may be touched at all


def hooked() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.a(m.a(x)), "called 2 times"),
        (lambda m, x: m.h(x), "has hooks"),
        (lambda m, x: m.a(x) * m.a.weight.sum(), "read elsewhere"),
        (lambda m, x: m.z(x), "complex"),
    ],
)
def test_what_may_not_be_touched_is_no_map_and_says_why(function: Any, reason: str) -> None:
    view = view_of(function, **convs(), h=hooked(), z=nn.Conv2d(4, 4, 1, dtype=torch.complex64))
    (node, *_) = [node for node in view.graph.nodes if node.op == "call_module"]
    assert reason in str(view.refusal(node))
    assert view.op(node) is None


def test_a_layer_without_weights_may_be_called_twice() -> None:
    view = view_of(lambda m, x: m.p(m.p(x)), **convs(), p=nn.AvgPool2d(2, 1))
    nodes = [node for node in view.graph.nodes if node.op == "call_module"]
    assert [view.refusal(node) for node in nodes] == [None, None]
    assert all(view.op(node) is not None for node in nodes)


def test_maps_of_other_sizes_are_no_kernel() -> None:
    view = view_of(lambda m, x: m.l(m.a(x)), **convs(), l=nn.Linear(10, 4))
    linear, conv = view.op(named(view, "l")), view.op(named(view, "a"))
    assert linear is not None
    assert conv is not None
    match = Match(linear.node, conv.source, (Term((conv,)), Term((linear,))))
    with pytest.raises(NoKernel, match=r"dimensions \['0', '2'\] don't fit together"):
        match.kernel(image())
