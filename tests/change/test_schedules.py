"""Schedules are pure functions from observations to actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

import repfx
from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.spec import BranchSpec
from repfx.change.schedule import SCHEDULES, Candidate, Observation, ObservedBlock, Schedule
from repfx.errors import InvalidInput, UnknownName
from repfx.passes.calibrate import Calibrate
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.passes.freeze import Freeze
from repfx.passes.fuse import Fuse
from repfx.passes.restore import Restore
from repfx.passes.squeeze import Squeeze
from repfx.records.journal import Action

K3 = ConvSpec(8, 8, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
K1 = ConvSpec(8, 8, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
STRIDED = ConvSpec(8, 16, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))


def block(site: str, scales: dict[str, float], **more: Any) -> ObservedBlock:
    return ObservedBlock(site, K3, tuple(scales), scales, **more)


def kinds(action: Action) -> list[str]:
    assert isinstance(action, Expand)
    return [branch.kind for branch in action.branches]


# ---- DyRep


def grown(candidates: Sequence[Candidate], **options: Any) -> list[str]:
    return [action.site for action in repfx.schedules.DyRep(**options).decide(Observation(15, candidates))]


def test_dyrep_grows_the_conv_of_the_highest_saliency() -> None:
    candidates = [Candidate("a", K3, 0, -9.0), Candidate("b", K3, 0, 0.5), Candidate("c", K3, 1, 0.4)]
    assert grown(candidates) == ["b"]
    assert grown([*candidates, Candidate("d", K1, 0, 7.0)]) == ["b"], "1×1 convs are no candidates"
    assert grown([*candidates, Candidate("b.1x1-kxk.conv2", K3, 1, 7.0)]) == ["b.1x1-kxk.conv2"]
    assert grown([*candidates, Candidate("e", K3, 2, 7.0)]) == ["b"], "no deeper than two"
    assert grown([*candidates, Candidate("e", K3, 1, 7.0)], depth=1) == ["b"]
    assert grown([]) == []
    assert grown([Candidate("a", K3, 0, -1.0), Candidate("b", K3, 0, -2.0)]) == ["a"]


def test_dyrep_gives_all_kinds_that_fit() -> None:
    (action,) = repfx.schedules.DyRep().decide(Observation(15, [Candidate("a", K3)]))
    assert kinds(action) == ["1x1", "1x1-kxk", "1x1-avg", "1xk", "kx1", "identity"]
    assert action == Expand("a", action.branches, "batch_norm", "fan_out", 0.01)
    (action,) = repfx.schedules.DyRep().decide(Observation(15, [Candidate("a", STRIDED)]))
    assert kinds(action) == ["1x1", "1x1-kxk", "1x1-avg", "1xk", "kx1"]


@pytest.mark.parametrize(
    ("scales", "gone"),
    [
        ({"1x1": 0.3, "1xk": 0.01, "kx1": 0.09}, ["1xk", "kx1"]),
        ({"1x1": 0.3, "1xk": 0.1}, []),  # just at the limit
        ({"1x1": 0.3, "1xk": 0.11}, []),  # below the mean, but not below 0.1
        ({"1x1": 0.09, "1xk": 0.01}, ["1xk"]),  # below 0.1, but not below the mean
        ({"1x1": 0.02, "1xk": 0.01}, []),  # hardly different
        ({"1x1": 0.01, "1xk": 0.01, "kx1": 0.01}, []),  # at their initial values
        ({"1x1": 0.001}, []),
        ({}, []),
    ],
)
def test_dyrep_drops_branches_that_do_little(scales: dict[str, float], gone: list[str]) -> None:
    seen = Observation(15, (), [block("a", scales)])
    assert repfx.schedules.DyRep().decide(seen) == [Drop("a", branch) for branch in gone]
    assert repfx.schedules.DyRep(drop=False).decide(seen) == []


def test_dyrep_neither_grows_nor_drops_in_a_branch_that_leaves() -> None:
    outer, inner = (
        block("a", {"1x1-kxk": 0.01, "1xk": 0.9}),
        block("a.1x1-kxk.conv2", {"1x1": 0.9, "1xk": 0.01}, depth=1),
    )
    candidates = [Candidate("a.1x1-kxk.conv2.1xk.conv", K3, 1, 9.0), Candidate("b", K3, 0, 1.0)]
    actions = repfx.schedules.DyRep().decide(Observation(15, candidates, [outer, inner]))
    assert [str(action) for action in actions][1:] == ["drop a.1x1-kxk"]
    assert actions[0].site == "b"


def test_dyrep_s_times() -> None:
    dyrep = repfx.schedules.DyRep(interval=5, until=20)
    assert [epoch for epoch in range(40) if dyrep.due(epoch)] == [5, 10, 15]
    short = repfx.schedules.DyRep.over(6)
    assert [epoch for epoch in range(6) if short.due(epoch)] == [1, 2, 3, 4]
    paper = repfx.schedules.DyRep.over(600)
    assert (paper.interval, paper.until) == (15, 500)
    assert repfx.schedules.DyRep.over(600, until=100).until == 100


# ---- RepAn


def test_repan_s_first_cycle_only_expands_a_plain_net() -> None:
    actions = repfx.schedules.RepAn().decide(
        Observation(0, [Candidate("a", K3), Candidate("b", STRIDED), Candidate("c", K1)])
    )
    assert [(action.site, kinds(action)) for action in actions] == [
        ("a", ["1x1", "identity"]),
        ("b", ["1x1"]),
        ("c", ["identity"]),
    ]
    assert actions[0] == Expand("a", (BranchSpec("1x1"), BranchSpec("identity")), weights="small", attach_rate=0.0)


def test_repan_s_next_cycles_fuse_and_restore_first() -> None:
    blocks = [
        block("a", {"1x1": 0.3}),
        block("a.1x1.conv", {"identity": 0.3}, depth=1),
        block("b", {"1x1": 0.3, "1xk": 0.1}, normalised=False),
    ]
    seen = Observation(30, [Candidate("a.1x1.norm", K1, 1), Candidate("c", K1)], blocks)
    actions = repfx.schedules.RepAn(statistics="measured").decide(seen)
    assert actions[:4] == [Drop("b", "1x1"), Drop("b", "1xk"), Fuse("a"), Restore("a", measured=True)]
    assert [action.site for action in actions[4:]] == ["c", "a", "b"]


def test_repan_freezes_while_the_rate_rises() -> None:
    repan = repfx.schedules.RepAn(cycles=2, epochs=6, warm_up=2.5, freeze=True)
    assert [epoch for epoch in range(20) if repan.due(epoch)] == [0, 3, 6, 9]
    actions = repan.decide(Observation(0, [Candidate("a", K3)]))
    assert actions[1:] == [Freeze("a")]
    seen = Observation(3, (), [block("a", {"1x1": 0.3}, frozen=True), block("b", {"1x1": 0.3})])
    assert repan.decide(seen) == [Freeze("a", frozen=False)]
    assert [type(action) for action in repan.decide(Observation(6, (), seen.blocks))][:2] == [Freeze, Fuse]


def test_repan_s_rate() -> None:
    repan = repfx.schedules.RepAn(cycles=2, epochs=10, warm_up=4)
    assert [repan.attach_rate(time) for time in (0, 0.5, 2, 4, 9.9, 10, 12, 20, 25)] == [
        0,
        0.125,
        0.5,
        1,
        1,
        0,
        0.5,
        1,
        1,
    ]
    assert repfx.schedules.RepAn(warm_up=0).attach_rate(0) == 1


@pytest.mark.parametrize(
    ("rise", "rates"),
    [
        ("linear", [0, 0.125, 0.25, 0.5, 1, 1, 0.25]),
        ("cosine", [0, (1 - math.cos(math.pi / 8)) / 2, (2 - 2**0.5) / 4, 0.5, 1, 1, (2 - 2**0.5) / 4]),
        ("step", [0, 0, 0.25, 0.5, 1, 1, 0.25]),
    ],
)
def test_repan_s_rate_rises_in_three_ways(rise: Any, rates: list[float]) -> None:
    repan = repfx.schedules.RepAn(cycles=2, epochs=10, warm_up=4, rise=rise)
    assert [repan.attach_rate(time) for time in (0, 0.5, 1, 2, 4, 7.5, 11)] == pytest.approx(rates)


def test_repan_settles_statistics_before_a_fold_alone() -> None:
    repan = repfx.schedules.RepAn(settle=True)
    assert repan.needs_data
    assert not repfx.schedules.RepAn().needs_data
    assert Calibrate("") not in repan.decide(Observation(0, [Candidate("a", K3)]))
    seen = Observation(30, (), [block("a", {"1x1": 0.3})])
    assert repan.decide(seen)[:3] == [Calibrate(""), Fuse("a"), Restore("a")]
    with pytest.raises(UnknownName, match="rise of λ"):
        repfx.schedules.RepAn(rise="fast")


def test_repan_over_so_many_epochs() -> None:
    for epochs, cycles in ((150, 5), (15, 5), (12, 4), (8, 2), (6, 2), (5, 1), (1, 1)):
        repan = repfx.schedules.RepAn.over(epochs)
        assert (repan.cycles, repan.cycles * repan.epochs) == (cycles, epochs)
    assert repfx.schedules.RepAn.over(150) == repfx.schedules.RepAn()
    assert repfx.schedules.RepAn.over(8, cycles=2).epochs == 4
    with pytest.raises(InvalidInput, match="8 epochs can't be split into 3 cycles"):
        repfx.schedules.RepAn.over(8, cycles=3)


# ---- all of them


@pytest.mark.parametrize("name", SCHEDULES)
def test_deciding_is_repeatable_and_never_acts_out_of_season(name: str) -> None:
    schedule: Schedule = SCHEDULES[name].over(12)
    seen = Observation(0, [Candidate("a", K3, 0, 1.0)], [block("b", {"1x1": 0.3, "1xk": 0.01})])
    assert schedule.decide(seen) == schedule.decide(seen)
    assert schedule == SCHEDULES[name].over(12)
    assert not any(schedule.due(epoch) for epoch in range(12, 40))
    assert (SCHEDULES[name].__doc__ or "").strip()


@pytest.mark.parametrize("name", SCHEDULES)
def test_all_blocks_are_squeezed_for_the_last_epochs(name: str) -> None:
    schedule: Schedule = SCHEDULES[name].over(12)
    last = replace(schedule, squeeze_from=13)
    assert [epoch for epoch in range(40) if last.is_due(epoch)] == [*filter(schedule.due, range(13)), 13]
    blocks = [block("a", {"1x1": 0.3}), block("b", {"1xk": 0.01})]
    seen = Observation(13, [Candidate("c", K3)], blocks, ("a", "b", "untrained"))
    assert last.plan(seen) == [Squeeze("a"), Squeeze("b"), Squeeze("untrained")]
    before = replace(seen, epoch=0, blocks=())
    assert last.plan(before) == schedule.decide(before)


def test_branches_without_batch_norm_can_be_squeezed_from_the_beginning() -> None:
    seen = Observation(0, [Candidate("a", K3)], (), ("b",))
    expand, *squeezes = repfx.schedules.Fixed("orepa", squeeze_from=0).plan(seen)
    assert (expand.kind, squeezes) == ("expand", [Squeeze("b"), Squeeze("a")])


def test_fixed_expands_all_convs_once() -> None:
    seen = Observation(0, [Candidate("a", K3), Candidate("b.1x1.conv", K3, 1)])
    (action,) = repfx.schedules.Fixed({"a": "qarepvgg"}).plan(seen)
    assert action == Expand("a", (BranchSpec("1x1"), BranchSpec("identity")), "none", gamma=1.0, preserve=False)
    assert repfx.schedules.Fixed(None).plan(seen) == []
    (action,) = repfx.schedules.Fixed("acb", preserve=True).plan(seen)
    assert (action.gamma, action.preserve) == (0.0, True)


@pytest.mark.parametrize(("name", "epoch"), [("repan", 0), ("dyrep", 2), ("des", 0), ("fixed", 0)])
def test_a_spec_by_patterns_leaves_other_sites_alone(name: str, epoch: int) -> None:
    schedule = SCHEDULES[name].over(80, spec={"layer*": "acb"})
    seen = Observation(epoch, [Candidate("stem", K3, saliency=9.0), Candidate("layer1.0", K3), Candidate("head", K3)])
    expands = [action for action in schedule.decide(seen) if isinstance(action, Expand)]
    assert [(action.site, kinds(action)) for action in expands] == [("layer1.0", ["1xk", "kx1"])]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("dyrep", {"interval": 0}, InvalidInput, "interval is 0"),
        ("dyrep", {"metric": "taste"}, UnknownName, "saliency 'taste'"),
        ("dyrep", {"spec": "nosuch"}, UnknownName, "preset 'nosuch'"),
        ("dyrep", {"spec": {"a": "nosuch"}}, UnknownName, "preset 'nosuch'"),
        ("dyrep", {"spec": {}}, InvalidInput, "the spec is an empty dict"),
        ("dyrep", {"gamma": 0.0}, InvalidInput, "gamma is 0.0"),
        ("dyrep", {"depth": 0}, InvalidInput, "depth is 0"),
        ("dyrep", {"batches": 0}, InvalidInput, "batches is 0"),
        (
            "repnas",
            {"squeeze_from": 4, "epochs": 5},
            InvalidInput,
            "squeeze_from is 4; blocks can be squeezed only after the 5",
        ),
        ("fixed", {"spec": "nosuch"}, UnknownName, "preset 'nosuch'"),
        ("fixed", {"squeeze_from": 0}, InvalidInput, "BatchNorms in branches have measured nothing yet"),
        (
            "fixed",
            {"squeeze_from": -1},
            InvalidInput,
            "squeeze_from is -1; it must be a whole number of epochs, from 0",
        ),
        ("dyrep", {"squeeze_from": 0}, InvalidInput, "squeeze_from is 0; it must be a whole number of epochs, from 1"),
        ("dyrep", {"squeeze_from": 2.5}, InvalidInput, "squeeze_from is 2.5; it must be a whole number"),
        ("dyrep", {"squeeze_from": True}, InvalidInput, "squeeze_from is True; it must be a whole number"),
        (
            "dyrep",
            {"squeeze_from": 10},
            InvalidInput,
            "squeeze_from is 10; it must be less than the 10 epochs of the training",
        ),
        ("repan", {"cycles": 2, "squeeze_from": 6}, InvalidInput, "after the warm-up of the last cycle, after epoch 6"),
        ("dyrep", {"interval": True}, InvalidInput, "interval is True; it must be a whole number"),
        ("dyrep", {"gamma": True}, InvalidInput, "gamma is True; it must be a number"),
        ("dyrep", {"drop": 1}, InvalidInput, "drop is 1; it must be true or false"),
        ("dyrep", {"interval": "abc"}, InvalidInput, "interval is 'abc'; it must be a whole number"),
        ("repan", {"cycles": "abc"}, InvalidInput, "cycles is 'abc'; it must be a whole number"),
        ("dyrep", {"speed": 1}, InvalidInput, "no option of DyRep 'speed'"),
        (
            "repnas",
            {"epochs": 600},
            InvalidInput,
            "the search takes 600 epochs and the training 10: give the search fewer",
        ),
        ("repan", {"cycles": 0, "epochs": 3}, InvalidInput, "cycles is 0"),
        ("repan", {"warm_up": 99}, InvalidInput, "warm_up is 99 epochs; it must be from 0 to the 5 of a cycle"),
        ("repan", {"statistics": "guessed"}, UnknownName, "statistics 'guessed'"),
        ("repan", {"spec": "nosuch"}, UnknownName, "preset 'nosuch'"),
    ],
)
def test_options_that_can_t_be(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SCHEDULES[name].over(10, **options)


def test_an_unknown_schedule() -> None:
    with pytest.raises(
        AttributeError, match="no schedule Nosuch; it has DES, DyRep, Fixed, RandomSearch, RepAn, RepNAS"
    ):
        repfx.schedules.Nosuch  # noqa: B018
