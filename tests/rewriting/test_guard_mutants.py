"""Tests of the tests: with one guard off, or reading less than it should, a legal graph is fused wrongly, and its check fails.

A new guard is one more row of `MUTANTS`: a name, what is done to the code, and the checks of which each must fail.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from torch import fx, nn

import repfx.algebra.layers
import repfx.graphs.aliasing
import repfx.graphs.constants
import repfx.records.module_tree
import repfx.rewriting.guards
import repfx.rewriting.patterns
import repfx.rewriting.pipeline
import repfx.rewriting.view
import repfx.tracing.code_around
import repfx.tracing.leaves
import repfx.tracing.trace
import repfx.tracing.traced
import repfx.tracing.tracer
from repfx.algebra.kernel import NoKernel
from repfx.errors import InvalidInput
from repfx.graphs.aliasing import mutated_by
from repfx.reading.source_code import Around
from repfx.rewriting.rule import RULES, Rule
from repfx.rewriting.view import View
from repfx.tracing.tracer import Tracer
from tests.graphs import test_calls_with_tensors
from tests.inline_net import Net, fused_exactly, image
from tests.rewriting import (
    test_carried,
    test_channel_slices,
    test_confluence,
    test_guards,
    test_legal_graphs,
    test_patterns,
    test_sums,
)
from tests.tracing import test_arguments, test_further_arguments, test_trace, test_traps
from tests.tracing.traps import TRAPS

Check = Callable[[], object]
Plant = Callable[[pytest.MonkeyPatch], None]


def conv(kernel_size: int = 1, **keywords: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, kernel_size, **keywords)


def read_twice(first: nn.Module, second: nn.Module) -> Check:
    """Check a net in which the output of `first` enters `second` and one more operation."""
    return lambda: fused_exactly(
        Net(lambda m, x: (lambda y: m.b(y).sum() + y.relu())(m.a(x)), a=first, b=second), image()
    )


def legal(name: str) -> Check:
    return lambda: test_legal_graphs.test_fused_right_or_left_alone_with_the_reason(name)


def in_place(function: Callable[..., Any]) -> Check:
    return lambda: test_guards.test_what_is_changed_in_place_is_not_moved(function)


def trap(name: str) -> Check:
    return lambda: test_traps.test_it_is_fused_right_or_left_alone(name)


def expanded_trap(name: str) -> Check:
    return lambda: test_traps.test_it_is_expanded_right_or_left_alone(name, "acb")


def copied(function: Callable[..., Any]) -> Check:
    return lambda: test_calls_with_tensors.test_a_copy_on_which_others_count_stays(function)


def carried(name: str) -> Check:
    return lambda: test_carried.test_a_norm_that_cannot_pass_stays_with_the_reason(name)


COPIES = (
    test_calls_with_tensors.copied_then_written,
    test_calls_with_tensors.copied_before_it_is_written,
    test_calls_with_tensors.copied_from_the_input,
)
CARRIED = ("a second reader", "a second reader of the norm", "written on the way")
IN_PLACE = (
    test_guards.foreign_term_changed,
    test_guards.foreign_term_written_into,
    test_guards.view_changed,
    test_guards.view_used_afterwards,
    test_guards.another_view_used_afterwards,
    test_guards.changed_inside_a_layer,
)
CHECKS: dict[str, Check] = {
    **{name: legal(name) for name in test_legal_graphs.CASES},
    "padding read twice": read_twice(nn.ZeroPad2d(1), conv(3)),
    "conv read twice": read_twice(conv(), conv()),
    "BatchNorm read twice": read_twice(nn.BatchNorm2d(4), conv()),
    "BatchNorm of a sequence, then linear": lambda: fused_exactly(
        nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), image(3, 4, 4)
    ),
    "linear and BatchNorm of a sequence": lambda: fused_exactly(
        Net(lambda m, x: m.c(x) + m.n(x), c=nn.Linear(4, 4), n=nn.BatchNorm1d(4)), image(3, 4, 4)
    ),
    "a moving parameter": test_guards.test_a_parameter_that_the_forward_changes_is_no_constant,
    "a moving buffer": test_guards.test_a_buffer_that_the_forward_changes_is_no_constant,
    "a moving tensor": test_guards.test_a_tensor_that_the_forward_changes_is_not_traced_through,
    "complex weights": test_guards.test_complex_weights_are_not_made_real,
    "a hook on an identity": lambda: test_guards.test_a_layer_with_a_hook_is_called_as_before(nn.Identity(), "forward"),
    "a hook on a block": lambda: test_trace.test_a_module_with_a_hook_is_called_as_it_is("forward"),
    "another graph in training mode": lambda: test_trace.test_what_has_no_single_graph_is_fused_in_islands(
        test_trace.differs_by_mode, "different things in training and in eval mode"
    ),
    "another constant in training mode": lambda: test_trace.test_what_has_no_single_graph_is_fused_in_islands(
        test_trace.constant_differs_by_mode, "different things in training and in eval mode"
    ),
    "an unknown module of a list": test_trace.test_a_sequence_in_code_that_can_t_be_traced_stays_a_sequence,
    "a default taken": test_trace.test_an_argument_with_a_default_stands_for_it,
    "further arguments": test_further_arguments.test_options_are_refused_by_the_graph,
    "an input left out": test_arguments.test_code_that_asks_whether_it_has_an_input_is_not_answered_for_both,
    **{function.__name__: in_place(function) for function in IN_PLACE},
    **{function.__name__: copied(function) for function in COPIES},
    **{name: carried(name) for name in (*CARRIED, "zero padding")},
    "changed before another path reads it": lambda: (
        test_sums.test_a_shared_conv_that_changes_or_is_read_outside_is_computed_right(
            test_sums.changed_before_it_is_normed
        )
    ),
    "a term read outside": test_patterns.test_of_a_conv_that_is_read_outside_the_sum_nothing_is_taken,
    "a grey image": test_traps.test_a_grey_image_is_spread_over_the_channels_of_a_constant,
    "channels in another order": lambda: test_channel_slices.test_what_stays("a permutation"),
    "one rule at a concatenation": lambda: test_confluence.test_at_most_one_rule_matches_at_a_node_of_a_foreign_block(
        "MobileIE"
    ),
    **{name: trap(name) for name in TRAPS},
    "expanding an alias": lambda: test_traps.test_it_is_expanded_right_or_left_alone("alias in a list", "acb"),
    **{f"{name}, expanded": expanded_trap(f"{name}, traced") for name in ("by name", "no identity")},
    "expanding what is asked for": lambda: test_traps.test_it_is_expanded_right_or_left_alone("asks for convs", "acb"),
}


# --- Mistakes -------------------------------------------------------------------------------------------------------


# Wrong numbers, or an error in the code; `pytest.fail` is how `pytest.raises` reports an error that didn't come.
FAILURES = (AssertionError, InvalidInput, NoKernel, RuntimeError, pytest.fail.Exception)


def never(*_: Any) -> None:
    """Never object: a guard that is off."""


def without_guard(guard: str, *rules: str) -> Plant:
    """Switch one guard off, in these rules or in all."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        for rule in [RULES[name] for name in rules] or RULES.values():
            patch.setitem(rule.__dict__, "guards", weakened(rule, guard))

    return plant


def weakened(rule: Rule, guard: str) -> tuple[Any, ...]:
    return tuple(never if known.__name__ == guard else known for known in rule.guards)


def without_refusal(piece: str) -> Plant:
    """Switch off the refusal of modules whose reason contains `piece`."""
    refusal = View.refusal

    def weaker(view: View, node: fx.Node) -> str | None:
        reason = refusal(view, node)
        return None if reason is not None and piece in reason else reason

    return lambda patch: patch.setattr(View, "refusal", weaker)


def without_what_changes(patch: pytest.MonkeyPatch) -> None:
    """Make views take a parameter for a constant even if the forward writes to it."""
    patch.setattr(repfx.graphs.constants, "mutated_by", never)


def without_own_code(patch: pytest.MonkeyPatch) -> None:
    for module in (repfx.tracing.trace, repfx.tracing.leaves, repfx.algebra.layers):
        patch.setattr(module, "code_of_its_own", never)


def written_by_functions_alone(node: fx.Node, root: nn.Module) -> fx.Node | None:
    return None if node.op == "call_module" else mutated_by(node, root)


def puts(owner: object, attribute: str, mistake: Any) -> Plant:
    return lambda patch: patch.setattr(owner, attribute, mistake)


def itself_alone(node: fx.Node, root: nn.Module) -> set[fx.Node]:
    """Take views for tensors with memory of their own."""
    return {node}


class Mutant(NamedTuple):
    name: str
    plant: Plant
    checks: tuple[str, ...]


MUTANTS = [
    Mutant("used_once", without_guard("used_once"), ("two consumers", "two outputs")),
    Mutant("used_once, padding", without_guard("used_once", "absorb_padding"), ("padding read twice",)),
    Mutant("used_once, convs", without_guard("used_once", "merge_sequential"), ("conv read twice",)),
    Mutant("used_once, forward", without_guard("used_once", "fold_batch_norm_forward"), ("BatchNorm read twice",)),
    Mutant(
        "unmutated",
        without_guard("unmutated"),
        (
            "input changed in place between the reads",
            "output added into an input that is used again",
            *(function.__name__ for function in IN_PLACE),
        ),
    ),
    Mutant(
        "changes by others ignored",
        puts(repfx.rewriting.guards, "_halfway", never),
        ("input changed in place between the reads",),
    ),
    Mutant(
        "own changes ignored",
        puts(repfx.rewriting.guards, "_relied_on", never),
        ("another_view_used_afterwards",),
    ),
    Mutant(
        "late reads ignored",
        puts(repfx.rewriting.guards, "_read_late", never),
        ("changed before another path reads it",),
    ),
    Mutant(
        "paths left open",
        puts(repfx.rewriting.patterns, "closed", lambda terms, inside: terms),
        ("a term read outside",),
    ),
    Mutant(
        "views ignored",
        puts(repfx.rewriting.guards, "may_share_memory", itself_alone),
        ("view_changed", "view_used_afterwards"),
    ),
    Mutant(
        "in-place layers ignored",
        puts(repfx.rewriting.guards, "mutated_by", written_by_functions_alone),
        ("changed_inside_a_layer",),
    ),
    Mutant(
        "is_convolution",
        without_guard("is_convolution"),
        ("BatchNorm before a padded conv", "padded convs in a row"),
    ),
    Mutant(
        "no_dearer",
        without_guard("no_dearer"),
        ("bottleneck of two 1×1", "grouped and dense, dearer when merged"),
    ),
    Mutant("handed_on_alone", without_guard("handed_on_alone"), tuple(function.__name__ for function in COPIES)),
    Mutant("carried_alone", without_guard("carried_alone"), CARRIED),
    Mutant(
        "is_convolution, through averages",
        without_guard("is_convolution", "fold_batch_norm_through"),
        ("zero padding",),
    ),
    Mutant("channels_stay_put", without_guard("channels_stay_put"), ("linear on a sequence of equal sizes",)),
    Mutant("weight_of_its_own", without_guard("weight_of_its_own"), ("a weight that two calls read",)),
    Mutant(
        "channels_stay_put, forward",
        without_guard("channels_stay_put", "fold_batch_norm_forward"),
        ("BatchNorm of a sequence, then linear",),
    ),
    Mutant(
        "channels_stay_put, parallel",
        without_guard("channels_stay_put", "merge_parallel"),
        ("linear and BatchNorm of a sequence",),
    ),
    Mutant("pads_alike", without_guard("pads_alike"), ("one-sided padding",)),
    Mutant(
        "calls not counted",
        puts(repfx.rewriting.pipeline, "call_counts", lambda traces: Counter[str]()),
        ("conv called twice", "conv and BatchNorm called twice", "one call without BatchNorm"),
    ),
    Mutant(
        "names not counted",
        puts(repfx.rewriting.pipeline, "module_paths", lambda model: {}),
        ("a conv in a plain list, too",),
    ),
    Mutant("reads not seen", without_refusal("read elsewhere"), ("weight read elsewhere",)),
    Mutant("complex taken for real", without_refusal("complex"), ("complex weights",)),
    Mutant("hooks on layers ignored", puts(repfx.rewriting.view, "has_hooks", never), ("a hook on an identity",)),
    Mutant(
        "hooks on blocks ignored", puts(repfx.tracing.leaves, "has_hooks", lambda module: False), ("a hook on a block",)
    ),
    Mutant("what moves taken for a constant", without_what_changes, ("a moving parameter", "a moving buffer")),
    Mutant("moving tensors traced through", puts(repfx.tracing.traced, "tensor_state", never), ("a moving tensor",)),
    Mutant("one mode for both", puts(repfx.tracing.traced, "_text", never), ("another graph in training mode",)),
    Mutant(
        "constants of one mode",
        puts(repfx.tracing.traced, "_same_tensors", lambda *_: True),
        ("another constant in training mode",),
    ),
    Mutant(
        "+= taken for +",
        puts(Tracer, "proxy", lambda tracer, node: fx.Proxy(node, tracer)),
        ("output added into an input that is used again",),
    ),
    Mutant("input_is_known", without_guard("input_is_known"), ("a grey image",)),
    Mutant("slices_channels", without_guard("slices_channels"), ("channels in another order",)),
    Mutant("apart_from_concat", without_guard("apart_from_concat"), ("one rule at a concatenation",)),
    Mutant(
        "writing layers ignored", puts(repfx.graphs.aliasing, "writes_in_place", never), ("in place without saying so",)
    ),
    Mutant("caught errors forgotten", puts(Tracer, "_noting_failure", lambda tracer, f, x: f(x)), ("error caught",)),
    Mutant("code around not read", puts(Around, "reason", never), ("helper function", "asks for blocks")),
    Mutant("other arguments not seen", puts(Around, "other_arguments", never), ("argument with a default",)),
    Mutant("parts of sequences not seen", puts(Around, "takes_apart", never), ("tapped", "indexed")),
    Mutant("children in order not seen", puts(Around, "order_of_children", None), ("children",)),
    Mutant("own code ignored", without_own_code, ("… of a part of what can't be traced",)),
    Mutant(
        "plain attributes not seen",
        puts(repfx.records.module_tree, "modules_in", lambda *_: ()),
        ("expanding an alias",),
    ),
    Mutant(
        "classes not asked for", puts(repfx.tracing.code_around, "asked_for", never), ("expanding what is asked for",)
    ),
    Mutant(
        "uses not seen",
        puts(Around, "toward", lambda around, child, *_: around),
        ("submodule, untraced", "by name, expanded", "without source: ReadsAWeight"),
    ),
    Mutant(
        "settings not compared",
        puts(repfx.tracing.tracer, "changed_setting", never),
        ("batch statistics, traced", "other eps, traced", "other eps of a part, traced"),
    ),
    Mutant(
        "exact classes of values ignored",
        puts(repfx.tracing.leaves, "asks_for_exact_class", never),
        ("exactly a tensor, traced", "tensor by a helper, traced", "without source: AsksForATensor"),
    ),
    Mutant(
        "what is kept ignored",
        puts(repfx.tracing.trace, "kept_from_outside", never),
        ("kept in a list", "methods kept", "a part of a part kept"),
    ),
    Mutant("keepers in leaves ignored", puts(repfx.tracing.trace, "kept_by_a_leaf", never), ("kept by a part",)),
    Mutant(
        "no question for identities",
        puts(repfx.tracing.code_around, "_asks_for_identities", lambda around: False),
        ("no identity, expanded",),
    ),
    Mutant("defaults not kept", puts(repfx.tracing.tracer, "require_default", never), ("a default taken",)),
    Mutant("inputs not required", puts(repfx.tracing.tracer, "require_given", never), ("an input left out",)),
    Mutant("options not refused", puts(repfx.tracing.tracer, "require_nothing", never), ("further arguments",)),
]
ROWS = [pytest.param(mutant, check, id=f"{mutant.name}-{check}") for mutant in MUTANTS for check in mutant.checks]


@contextlib.contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        mutant.plant(patch)
        yield


@pytest.mark.parametrize(("mutant", "check"), ROWS)
def test_the_check_sees_the_mistake(mutant: Mutant, check: str) -> None:
    with planted(mutant), pytest.raises(FAILURES):
        CHECKS[check]()


@pytest.mark.parametrize("check", sorted({check for mutant in MUTANTS for check in mutant.checks}))
def test_the_check_passes_without_a_mistake(check: str) -> None:
    CHECKS[check]()


def test_every_guard_has_a_mistake() -> None:
    guards = {guard.__name__ for rule in RULES.values() for guard in rule.guards}
    assert guards <= {mutant.name for mutant in MUTANTS}
