"""The arithmetic of benchmarks, and the files they leave behind; no test measures speed."""

from __future__ import annotations

import copy
import gc
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import repfx
from benchmarks._accuracy_methods import DEAREST, SCALES
from benchmarks._accuracy_record import Record
from benchmarks._comparison import Ratio, compare
from benchmarks._evidence_page import page as evidence
from benchmarks._memory import Allocations, bytes_of, peak_of
from benchmarks._paired import Difference
from benchmarks._record import Row, machine, write
from benchmarks._zoo_page import page
from benchmarks.scoring import BRANCHES, FUSED, POPULATIONS, population_row
from benchmarks.search import BUDGET, run, searches
from benchmarks.training import textbook
from benchmarks.transforms import SIZES, deep_net, memory_row, scaling_row
from repfx.change.schedule import SCHEDULES
from repfx.testing import assert_same_map, randomize_batch_norm

RESULTS_FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
RESULTS = sorted(RESULTS_FOLDER.glob("latency-*.json"))


def test_turns_are_set_against_each_other_before_the_median_is_taken() -> None:
    """A machine that is ten times slower in some turns slows both down, and leaves their ratio as it is."""
    slow = [1.0, 10.0, 1.0, 10.0, 1.0]
    ratio = Ratio.of([1.5 * each for each in slow], slow)
    assert ratio == Ratio(1.5, 1.5, 1.5)
    # the ratio of the medians is 1
    assert Ratio.of([10.0, 1.0, 1.0], [1.0, 10.0, 1.0]).median == 1.0


def test_the_interval_holds_the_median_in_95_of_100_runs() -> None:
    generator = random.Random(0)
    held = 0
    for _ in range(400):
        times = [generator.lognormvariate(0, 0.3) for _ in range(60)]
        ratio = Ratio.of(times, [1.0] * 60)
        assert ratio.low <= ratio.median <= ratio.high
        held += ratio.low <= 1 <= ratio.high
    assert 0.93 <= held / 400 <= 0.99


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_few_turns_give_all_that_was_seen(turns: int) -> None:
    times = [float(turn + 1) for turn in range(turns)]
    ratio = Ratio.of(times, [1.0] * turns)
    assert (ratio.low, ratio.high) == (1.0, turns)


def test_each_candidate_is_compared_with_the_baseline() -> None:
    found = compare({"slow": [2.0, 2.0], "base": [1.0, 1.0]}, "base")
    assert [(each.candidate, each.seconds, each.ratio.median) for each in found] == [("slow", 2, 2), ("base", 1, 1)]


def test_a_candidate_without_its_turns_is_no_candidate() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare({"short": [1.0], "base": [1.0, 1.0]}, "base")


def test_a_record_says_where_it_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    rows: list[Row] = [{"model": "a", "ratio": 1.5}, {"model": "b × c", "ratio": 2.0}]
    write(file, {**machine("cpu"), "input": "1 × 3"}, rows)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["rows"] == rows
    assert "thread" in found["hardware"]
    assert set(found) == {"hardware", "python", "torch", "torchvision", "onnxruntime", "input", "rows"}


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_committed_results_name_their_hardware_and_carry_their_noise(file: Path) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["hardware"]
    assert found["torch"]
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in found["rows"])
    assert {"by hand, again", "fused"} <= {row["form"] for row in found["rows"]}


# ---- accuracy


def runs(method: str, accuracies: list[float], macs: int = 100) -> list[dict[str, Any]]:
    return [
        {
            "scale": "cpu",
            "data": "cifar10",
            "method": method,
            "seed": seed,
            "images": 10,
            "accuracy": {"fused": accuracy},
            "flips": {"onnxruntime": seed},
            "test_images": 50,
            "training_macs": macs,
            "cpu_seconds": macs / 2,
            "config": {
                "training": {"epochs": 3},
                "model": {"name": "benchmarks.accuracy:small_vgg", "options": {"width": 8}},
            },
            "hardware": "here",
            "torch": "2",
        }
        for seed, accuracy in enumerate(accuracies)
    ]


def test_the_interval_of_paired_differences() -> None:
    found = Difference.of([3.0, 4.0, 5.5], [1.0, 1.0, 1.0])
    assert (found.mean, found.spread) == pytest.approx((3.1667, 3.1258), abs=1e-4)  # t = 4.3027, s = 1.2583
    assert found.shown
    assert not Difference.of([3.0, 0.5], [1.0, 1.0]).shown
    assert str(Difference.of([2.0], [1.5])) == "+0.50"


def test_the_page_says_of_each_method_what_its_interval_allows() -> None:
    rows = [
        *runs("plain", [0.50, 0.51, 0.52]),
        *runs("good", [0.60, 0.61, 0.63], macs=250),
        *runs("cheap", [0.55, 0.56, 0.57], macs=114),
        *runs("bad", [0.40, 0.41, 0.41]),
        *runs("unclear", [0.60, 0.45, 0.53]),
        *runs("unfinished", [0.99]),
        *runs("plain, longer", [0.61, 0.62, 0.64], macs=250),
        *runs("DBB", [0.50]),
    ]
    text = evidence(rows)
    assert "| good | 3 | 61.33 ± 1.53 | +10.33 ± 1.43 | -1.00 ± 0.00 | 2.50 | 2.50 | 3 of 150 |  |" in text
    assert "| unfinished | 1 | 99.00 | +49.00 | +38.00 | 1.00 | 1.00 | 0 of 50 |  |" in text
    assert "| DBB | 1 | 50.00 | +0.00 | -11.00 | 1.00 | 1.00 | 0 of 50 | +0.67 (VGG-16), +0.62 (in RepNAS) |" in text
    assert "Better than *plain* beyond chance: good; cheap; plain, longer. Worse: bad." in text
    assert "Better than *plain, longer* beyond chance: none. Worse: plain; good; cheap; bad." in text
    assert "Better than *plain at equal cost* beyond chance: cheap. Worse: good; bad." in text
    assert "from the first epoch on, a training would cost 2.98 times plain's multiply-adds;" in text


def test_without_plain_nothing_is_relative() -> None:
    assert "| DBB | 1 | 50.00 |  |  | 0 of 50 |" in evidence(runs("DBB", [0.50]))


def test_the_page_is_that_of_the_committed_runs() -> None:
    files = sorted(RESULTS_FOLDER.glob("accuracy-*.jsonl"))
    rows = [row for file in files for row in Record.at(file).rows]
    assert (RESULTS_FOLDER.parents[1] / "docs" / "evidence.md").read_text(encoding="utf-8") == evidence(rows)
    runs_of = [(row["data"], row["scale"], row["method"], row["seed"]) for row in rows]
    assert len({*runs_of}) == len(runs_of)
    assert all(row["accuracy"]["fused"] == row["accuracy"]["expanded"] and row["flips"]["fused"] == 0 for row in rows)


def test_a_run_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    record = Record.at(tmp_path / "runs.jsonl")
    for row in [*runs("plain", [0.5]), *runs("DBB", [0.6], macs=260)]:
        record.add(row)
    again = Record.at(tmp_path / "runs.jsonl")
    assert again.rows == record.rows
    assert again.has("cpu", "DBB", 0)
    assert not again.has("cpu", "DBB", 1)
    assert again.dearest("cpu", 0) == 2.6


@pytest.mark.parametrize(("scale", "name"), [(scale, name) for scale in SCALES for name in SCALES[scale].methods])
def test_every_method_can_be_asked_for(scale: str, name: str) -> None:
    setting = SCALES[scale]
    method = setting.methods[name]
    length = method.length if isinstance(method.length, float) else 1.0
    if method.schedule is not None:
        options = dict(method.schedule) | ({} if method.spec is None else {"spec": method.spec})
        SCHEDULES[options.pop("name")].over(round(length * setting.training.epochs), **options)
    assert {method.found_by, method.length} - {None, DEAREST, length} <= setting.methods.keys()


def test_the_textbook_block_is_a_diverse_branch_block() -> None:
    """The textbook block equals a `dbb` block in eval mode. In training mode it pads with running statistics."""
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)).double()
    ours = randomize_batch_norm(repfx.expand(plain, "dbb")).eval()
    theirs = textbook(plain).double().eval()
    ordered = zip(theirs.state_dict(), ours.state_dict().values(), strict=True)
    theirs.load_state_dict(dict(ordered))
    assert_same_map(theirs, ours, torch.randn(2, 4, 9, 7).double())


# ---- searches


def test_the_committed_searches_find_what_is_there_and_chance_does_not() -> None:
    rows = json.loads((RESULTS_FOLDER / "search.json").read_text(encoding="utf-8"))["rows"]
    by_chance = {row["seed"]: row for row in rows if row["search"] == "random_search"}
    learned = [row for row in rows if row["search"] != "random_search"]
    assert len(by_chance) == 5
    assert len(learned) == 10
    for row in learned:
        assert row["found"] == row["kept"] == row["budget"] == BUDGET
        assert row["error"] < 1e-3 < by_chance[row["seed"]]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repnas", "des"])
def test_a_search_finds_what_is_there(name: str) -> None:
    row = run(name, searches(40, 7)[name], 7, 1024)
    assert row["found"] == BUDGET


# ---- scoring


def test_what_a_population_takes_is_scaled_from_its_candidates() -> None:
    """Ratios are taken turn by turn. Work that is done once counts once, so it weighs less in a large population."""
    fused, branches = [1.0, 10.0, 3.0], [4.0, 40.0, 12.0]
    small, large = (population_row(size, fused, branches, once=24.0) for size in (8, 80))
    assert (small["seconds"], large["seconds"]) == (8 * 3 + 24, 80 * 3 + 24)
    assert (small["saved"], large["saved"]) == (1 - 0.25 - 24 / 96, 1 - 0.25 - 24 / 960)
    uneven = population_row(8, [1.0, 1.0, 1.0], [2.0, 4.0, 5.0], once=0.0)
    assert (uneven["low"], uneven["saved"], uneven["high"]) == (0.5, 0.75, 0.8)


def test_committed_scores_are_those_of_the_nets_with_their_branches() -> None:
    files = sorted(RESULTS_FOLDER.glob("scoring-*.json"))
    assert files
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert {row["population"] for row in found["rows"]} == set(POPULATIONS)
        assert {row["form"] for row in found["rows"]} >= {BRANCHES, FUSED}
        assert all(row["low"] <= row["saved"] <= row["high"] for row in found["rows"])
        assert all(row["difference"] < 1e-6 for row in found["rows"])


# ---- transforms


def test_memory_is_counted_while_it_is_held_and_once_for_all_views() -> None:
    with Allocations() as found:
        x = torch.zeros(8, dtype=torch.float64)
        x.add_(1)
        y = x.view(2, 4)[1]
        del x
        assert found.now == 64  # by the view
        z = torch.cat([y, y])
        del y
    assert (found.now, found.peak) == (64, 128)
    assert z.sum() == 8


def test_what_has_no_numbers_takes_no_memory() -> None:
    assert peak_of(lambda: torch.zeros(8, device="meta") + 1) == 0


def test_a_copy_of_a_model_takes_what_its_tensors_take() -> None:
    model = deep_net(4)
    assert bytes_of(model) <= peak_of(lambda: copy.deepcopy(model)) <= 1.05 * bytes_of(model)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 4


def test_what_fusing_takes_beyond_a_copy_is_told_in_layers() -> None:
    model, fused = nn.Linear(4, 4), nn.Linear(4, 2, bias=False)  # 80 bytes; a layer of 8 in float64 has 64
    row = memory_row("net", "form", 80 + 3 * 64, model, fused)
    assert (row["copy"], row["fused"], row["layer"], row["layers_beyond"]) == (80, 32, 64, 3)


def test_time_per_conv_is_set_against_the_first_size_turn_by_turn() -> None:
    row = scaling_row("fuse", 500, [0.002, 0.02, 0.003], [0.001, 0.01, 0.001])
    assert (row["milliseconds"], row["ratio"], row["low"], row["high"]) == (3, 2, 2, 3)


@pytest.mark.slow
def test_fusing_leaves_nothing_behind_but_its_result() -> None:
    """`fuse` frees its memory without garbage collection. At the peak it holds kernels in float64 and nothing for a backward pass."""
    channels = 32
    layer = 8 * 9 * channels**2  # in float64
    model = randomize_batch_norm(repfx.expand(deep_net(30, channels), "acb")).eval()
    repfx.fuse(model)
    gc.collect()
    gc.disable()
    try:
        with Allocations() as found:
            fused = repfx.fuse(model)
    finally:
        gc.enable()
    assert found.now <= 1.1 * bytes_of(fused)
    assert found.peak <= bytes_of(model) + 2 * bytes_of(fused) + 8 * layer


@pytest.mark.parametrize("spec", [None, "acb"])
def test_fusing_takes_a_copy_of_the_model_and_a_layer_in_float64(spec: str | None) -> None:
    largest = nn.Conv2d(64, 128, (3, 5))
    plain = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), largest, nn.BatchNorm2d(128))
    model = randomize_batch_norm(plain if spec is None else repfx.expand(plain, spec)).eval()
    repfx.fuse(model)
    layer = 8 * largest.weight.numel()
    assert peak_of(lambda: repfx.fuse(model)) <= bytes_of(model) + 1.1 * layer


def test_committed_transforms_have_each_size_and_their_noise() -> None:
    files = list(RESULTS_FOLDER.glob("transforms-*.json"))
    assert files
    for file in files:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        assert {row["convs"] for row in rows if row["asks"] == "scaling"} == set(SIZES)
        assert {row["asks"] for row in rows} == {"scaling", "memory", "timm"}
        assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows if "ratio" in row)


# ---- the zoo's page


def zoo_row(name: str, **changes: Any) -> dict[str, Any]:
    errors = {"traced": 0.0, "fused": 2e-12, "timm": 0.0, "torch": 3e-3}
    found = {"fused": [4, 0], "timm": [4, 2], "torch": [3, 1], "errors": errors, "onnx": "", "problem": ""}
    counts = {"parameters": 1.5, "input": "2×3×64×96", "convs": 4, "batch_norms": 4, "reached": 4, "missed": {}}
    reasons = {"norms_that_stay": {}, "untraced": {}, "refused": {"dbb": {"the window is 1×1": 1}}}
    return {"name": name, "sites": {"dbb": 3}, "seconds": {"fuse": 0.25}, **counts, **found, **reasons, **changes}


def zoo_page(*rows: dict[str, Any]) -> str:
    versions = dict.fromkeys(("torch", "torchvision", "timm", "onnxruntime", "python", "hardware"), "1")
    return page({**versions, "structure_only_above": 150e6, "listed": 4, "rows": list(rows)})


def test_the_zoo_s_page_adds_up_and_names_what_is_wrong() -> None:
    text = zoo_page(
        zoo_row("torchvision/a", onnx=2e-6),
        zoo_row(
            "torchvision/b", reached=3, missed={"head.conv": "nobody calls it"}, problem="wrong output: {'fused': 0.5}"
        ),
        zoo_row("timm/c", timm="TypeError", norms_that_stay={"'add_1' comes before": 1, "'add_2' comes before": 2}),
    )
    for line in (
        "**Not finished: 3 of 4 models have been examined.**",
        "| models | 2 | 1 |",
        "| equal, unchanged, no exception | 1 | 1 |",
        "| … reached | 7 (87.5%) | 4 (100.0%) |",
        "| … expanded by `dbb` | 6 | 3 |",
        "| ONNX: exported, and equal in onnxruntime | 1 | 0 |",
        "| `timm.utils.reparameterize_model` | 3 | 1 | 0 | 8 / 4 | 8 / 0 |",
        "| torch's `fuse` | 3 | 0 | 3 | 9 / 3 | 12 / 0 |",
        "| a | 1.5 | 2×3×64×96 | 4 / 4 | 4 | 3 |  | 4 / 0 | 4 / 2 | **3 / 1** | 2e-12 | 2e-6 | 0.2 | equal |",
        "- **b**: nobody calls it",
        "- **b**: wrong output: {'fused': 0.5}",
        "- **c**: '…' comes before (3×)",
        "| the window is 1×1 | 3 | a, b, c |",
    ):
        assert f"\n{line}\n" in text, line


def test_the_zoo_s_page_is_that_of_its_record() -> None:
    names = ("zoo.json", "zoo_libraries.json")
    record, others = (json.loads((RESULTS_FOLDER / name).read_text(encoding="utf-8")) for name in names)
    assert (RESULTS_FOLDER.parents[1] / "docs" / "zoo.md").read_text(encoding="utf-8") == page(record, others)


def test_the_zoo_s_page_has_the_other_libraries_beside() -> None:
    record = {**dict.fromkeys(("torch", "monai", "onnxruntime", "python", "hardware"), "1"), "listed": 3}
    rows = [
        zoo_row("monai/a", onnx=2e-6, restored="loads"),
        zoo_row("monai/b", onnx="it draws numbers", restored="no conv of B has absorbed a BatchNorm"),
    ]
    versions = dict.fromkeys(("torch", "torchvision", "timm", "onnxruntime", "python", "hardware"), "1")
    text = page({**versions, "structure_only_above": 150e6, "listed": 0, "rows": []}, {**record, "rows": rows})
    for line in (
        "**Not finished: 2 of 3 nets have been examined.**",
        "Made with torch 1, monai 1, onnxruntime 1, python 1, on 1.",
        "| restored weights load strictly | 0 | 0 | 1 | 0 | 0 |",
        "| a | 1.50 | 2×3×64×96 | 4 / 4 | 4 | 3 |  | 4 / 0 | 2e-12 | 2e-6 | loads | equal |",
        "| b | 1.50 | 2×3×64×96 | 4 / 4 | 4 | 3 |  | 4 / 0 | 2e-12 | refused | no BatchNorm | equal |",
        "- **b**: it draws numbers",
    ):
        assert f"\n{line}\n" in text, line
