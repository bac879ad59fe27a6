"""Reports of verbs: values that stay with the model when it is copied or saved."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import repfx
from repfx.errors import Refused
from repfx.records.notes import copy_of
from repfx.records.provenance import Provenance, attach, provenance_of
from repfx.records.report import Edit, Report, Skip
from tests.small_net import batch, small_net

EDITS = (Edit("fold", "a", ("a", "b")), Edit("merge", "c"), Edit("fold", "d", ("d",)))
SKIPS = (Skip("e", "it is called 2 times", "fold"), Skip("f", "it has hooks"))


def test_as_text_a_report_says_what_was_left_alone() -> None:
    assert str(Report("fuse", EDITS, SKIPS)).splitlines() == [
        "fuse: 3 changes, 2 left alone",
        "  Skip 'e': it is called 2 times (fold)",
        "  Skip 'f': it has hooks",
    ]
    assert str(Report("drop", EDITS[1:2])) == "drop: 1 change, 0 left alone"
    assert str(Report("drop")) == "drop: 0 changes, 0 left alone"
    assert [str(edit) for edit in EDITS] == ["fold 'a' from 'a', 'b'", "merge 'c'", "fold 'd' from 'd'"]


def test_what_was_declined_is_no_loss() -> None:
    declined = Report("fuse", EDITS, declined=SKIPS)
    assert "called 2 times" not in str(declined)
    declined.require_all()
    assert declined.counts == {"fold": 2, "merge": 1}


def test_require_all_is_one_error_with_every_reason() -> None:
    with pytest.raises(Refused) as caught:
        Report("fuse", EDITS, SKIPS).require_all()
    assert str(caught.value).splitlines() == [
        "fuse with strict=True left 2 alone:",
        "  Skip 'e': it is called 2 times (fold)",
        "  Skip 'f': it has hooks",
    ]


def test_reports_are_values() -> None:
    report = Report("fuse", EDITS, SKIPS)
    assert report == Report("fuse", EDITS, SKIPS)
    assert len({report, Report("fuse", EDITS, SKIPS), Report("fuse", EDITS)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.name = "expand"  # type: ignore[misc]


def test_a_model_nothing_was_done_to_has_an_empty_report() -> None:
    report = repfx.report(nn.Linear(2, 2))
    assert (report.applied, report.skipped, report.declined) == ((), (), ())
    assert str(report) == "nothing done yet: 0 changes, 0 left alone"


def graph_module() -> nn.Module:
    return fx.GraphModule(small_net(), fx.Tracer().trace(small_net()))


@pytest.mark.parametrize("make", [small_net, graph_module])
def test_a_report_stays_with_its_model(make: Any, tmp_path: Path) -> None:
    model, first, second = make(), Report("expand", EDITS), Report("fuse", EDITS, SKIPS)
    first.attach(model)
    second.attach(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    twins = [
        model,
        copy.deepcopy(model),
        copy.copy(model),
        loaded,
        copy_of(loaded),
        pickle.loads(pickle.dumps(model)),
    ]
    assert [repfx.report(twin) for twin in twins] == [second] * len(twins)
    assert model.state_dict().keys() == make().state_dict().keys()


def test_of_several_verbs_the_last_one_s_report_counts() -> None:
    expanded = repfx.expand(small_net(), {"stem": "acb"})
    assert repfx.report(expanded).name == "expand"
    fused = repfx.fuse(expanded)
    restored = repfx.restore(fused)
    assert [repfx.report(model).name for model in (expanded, fused, restored)] == ["expand", "fuse", "restore"]
    repfx.drop(expanded, "stem", "1xk")
    assert repfx.report(expanded) == Report("drop", (Edit("drop", "stem", ("stem.1xk",)),))
    assert repfx.report(repfx.fuse(restored)).name == "fuse"


def test_an_outer_model_has_a_report_of_its_own() -> None:
    """The report of a model inside another one says nothing about the outer model."""
    outer = nn.Sequential(repfx.fuse(small_net()))
    assert repfx.report(outer).name == "nothing done yet"
    fused = repfx.fuse(outer)
    assert repfx.report(fused).name == "fuse"
    assert fused(batch()).shape == (6, 4)


def test_an_attribute_of_that_name_that_is_no_report_is_not_taken_for_one() -> None:
    model = nn.Linear(2, 2)
    model.repfx_report = "all is well"  # type: ignore[assignment]
    assert repfx.report(model) == Report("nothing done yet")


# ---- where a fused conv comes from


def test_a_fused_conv_carries_its_origin_through_copying(tmp_path: Path) -> None:
    fused = repfx.fuse(small_net())
    torch.save(fused, tmp_path / "model.pt")
    expected = Provenance(("fold_batch_norm",), ("stem", "norm"), "norm")
    for twin in (fused, copy.deepcopy(fused), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert provenance_of(twin.get_submodule("stem")) == expected
        assert provenance_of(twin.get_submodule("head")) is None


def test_a_block_that_became_a_conv_equals_the_block() -> None:
    expanded = repfx.expand(small_net(), {"plain": ["1x1", "identity"]})
    origin = provenance_of(repfx.fuse(expanded).get_submodule("plain"))
    assert origin is not None
    assert origin.equals == "plain"
    assert "merge_parallel" in origin.rules
    assert {"plain.origin.conv", "plain.1x1.conv", "plain.1x1.norm", "plain.identity.norm"} <= set(origin.sources)


def test_a_later_origin_takes_the_place_of_an_earlier_one() -> None:
    conv = nn.Conv2d(1, 1, 1)
    assert provenance_of(conv) is None
    for equals in ("a", "b"):
        attach(conv, Provenance(("fold",), (equals,), equals))
    assert provenance_of(conv) == Provenance(("fold",), ("b",), "b")
