"""How the runs of the accuracy benchmark are shared, resumed and recorded, at the smallest size; no test measures accuracy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _accuracy_runs
from benchmarks._accuracy_methods import DEAREST, LONG_METHODS, SCALES, TEACHER, Method
from benchmarks._accuracy_record import Record, Spent, claimed
from benchmarks._accuracy_runs import Work, draw, measure, runs_of
from benchmarks._evidence_page import FIVE_TIMES, LONGER, PLAIN
from benchmarks._evidence_page import page as evidence
from benchmarks._evidence_questions import QUESTIONS, agreement, answer, answers, importance_of
from benchmarks._paired import Difference
from benchmarks.accuracy import noise
from repfx.blocks.architecture import Architecture
from repfx.data.augmentation import Augmentation
from repfx.errors import Interrupted
from repfx.schedules import DyRep, RepNAS
from repfx.training import experiment
from repfx.training.experiment import Experiment
from repfx.training.loop import Step, Watcher
from repfx.training.models import ModelReference
from repfx.training.recipe import Recipe
from repfx.training.run_folder import METRICS, STATE

NET = ModelReference("benchmarks.accuracy:small_vgg", options={"width": 2})
TINY = {
    PLAIN: Method([]),
    "DyRep": Method(schedule={"name": "dyrep", "interval": 1, "until": 2}),
    "odbb, at DyRep's cost": Method("odbb", length="DyRep"),
    "search": Method(schedule={"name": "repnas", "warm_up": 0, "epochs": 1}, clip=1.0, length=0.5, listed=False),
    "found": Method(found_by="search"),
    "drawn": Method(drawn=0.5),
    LONGER: Method([], length=DEAREST),
}
Row = dict[str, Any]


def tiny_work(folder: Path) -> Work:
    (folder / "work").mkdir(parents=True)
    data = noise(folder / "noise.npz", 48)
    return Work("smoke", data, Record.at(folder / "runs.jsonl"), folder / "work")


def rows(work: Work) -> list[Row]:
    return Record.at(work.record.file).rows


@pytest.fixture(autouse=True, scope="module")
def _tiny() -> Iterator[None]:
    recipe = replace(SCALES["smoke"].training, epochs=2, batch_size=16, warm_up=0.0, augmentation=Augmentation())
    tiny = replace(SCALES["smoke"], net=NET, teacher=NET, training=recipe, images=32, methods=TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCALES, "smoke", tiny)
        yield


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """Work whose runs are recorded, but not done."""

    def row(work: Work, name: str, seed: int) -> Row:
        return {"scale": "smoke", "method": name, "seed": seed, "accuracy": {"fused": 0.5}, "seconds": 1.0}

    monkeypatch.setattr(Work, "row", row)
    return tiny_work(tmp_path)


# ---- which runs there are, and who does them


def test_the_first_seed_of_all_methods_comes_before_the_next_seed() -> None:
    found = runs_of(SCALES["long"], SCALES["long"].listed, None)
    assert [seed for seed, _ in found] == sorted(seed for seed, _ in found)
    assert [name for seed, name in found if seed == 0] == SCALES["long"].listed
    assert {name for seed, name in found if seed == 4} == {
        PLAIN,
        "RepVGG",
        "DBB",
        "DyRep",
        "RepAn",
        "odbb, at DyRep's cost",
    }
    assert sum(name == TEACHER for _, name in found) == 1
    assert len({*found}) == len(found) == sum(method.seeds for method in LONG_METHODS.values() if method.listed)


def test_seeds_that_are_asked_for_are_done_by_all_methods() -> None:
    assert runs_of(SCALES["long"], ["DBB", "ACB"], [7, 3]) == [(7, "DBB"), (7, "ACB"), (3, "DBB"), (3, "ACB")]


def test_a_run_that_another_process_is_at_is_left_to_it(work: Work) -> None:
    """A lock of another file object counts like one of another process."""
    with claimed(work.path(PLAIN, 0, ".claim")) as ours:
        assert ours
        measure(work, [PLAIN], [0])
        assert not rows(work)
    measure(work, [PLAIN], [0])
    assert [row["method"] for row in rows(work)] == [PLAIN]


def test_a_run_that_another_process_has_recorded_is_not_done_again(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read again before each run, not once at the beginning."""
    Record.at(work.record.file).add({"scale": "smoke", "method": PLAIN, "seed": 0})
    monkeypatch.setattr(Work, "row", lambda *_: pytest.fail("it was done again"))
    measure(work, [PLAIN], [0])


def test_the_most_expensive_method_is_awaited(work: Work) -> None:
    with claimed(work.path("DyRep", 0, ".claim")):
        measure(work, [PLAIN, "DyRep", LONGER], [0])
    assert [row["method"] for row in rows(work)] == [PLAIN]
    measure(work, [PLAIN, "DyRep", LONGER], [0])
    assert [row["method"] for row in rows(work)] == [PLAIN, "DyRep", LONGER]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Work, dict[str, Row]]:
    """Work that is done with one seed, and its rows by method."""
    work = tiny_work(tmp_path_factory.mktemp("done"))
    measure(work, ["odbb, at DyRep's cost", "DyRep", "found"], [3])
    return work, {row["method"]: row for row in rows(work)}


Done = tuple[Work, dict[str, Row]]


# ---- a run that was killed


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_from_its_own_state(
    tmp_path: Path, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupted run and one that wasn't interrupted leave the same row, and the seconds of both parts count."""
    work, run = tiny_work(tmp_path / "killed"), experiment.run

    def killed(job: Experiment, watcher: Watcher) -> Any:
        def on_step(step: Step) -> None:
            if step.number == 3:
                raise Interrupted("killed in the second epoch")

        return run(job, replace(watcher, on_step=on_step))

    monkeypatch.setattr(_accuracy_runs, "run", killed)
    with pytest.raises(Interrupted):
        measure(work, ["DyRep"], [3])
    assert not rows(work)
    assert (work.path("DyRep", 3) / STATE).is_file()
    spent = Spent(work.path("DyRep", 3, ".seconds")).seconds[0]
    steps: list[int] = []

    def resumed(job: Experiment, watcher: Watcher) -> Any:
        return run(job, replace(watcher, on_step=lambda step: steps.append(step.number)))

    monkeypatch.setattr(_accuracy_runs, "run", resumed)
    measure(work, ["DyRep"], [3])
    assert steps == [3, 4]  # two steps an epoch; the first epoch isn't trained again
    assert (work.path("DyRep", 3) / METRICS).is_file()
    (row,), expected = rows(work), done[1]["DyRep"]
    assert row["cpu_seconds"] > spent
    same = ("epochs", "accuracy", "training_macs", "actions", "config")
    assert [row[key] for key in same] == [expected[key] for key in same]


def test_seconds_add_up_over_processes(tmp_path: Path) -> None:
    file = tmp_path / "run.seconds"
    file.write_text(json.dumps([100.0, 200.0]))
    spent = Spent(file)
    spent.write()
    processor, clock = Spent(file).seconds
    assert 100 < processor < 160
    assert 200 < clock < 260


# ---- what a row holds


@pytest.mark.slow
def test_a_row_holds_the_options_in_effect(done: Done) -> None:
    row = done[1]["DyRep"]
    config = row["config"]
    assert set(config["schedule"]) == {"name", *(each.name for each in fields(DyRep))}
    assert (config["schedule"]["metric"], config["schedule"]["interval"]) == ("synflow", 1)
    assert set(config["training"]) == {each.name for each in fields(Recipe)}
    assert (config["training"]["epochs"], config["training"]["seed"]) == (2, 3)
    assert config["training"]["distillation"] is None
    assert config["model"] == {"name": NET.name, "num_classes": 10, "options": {"width": 2}}
    assert config["data"]["name"] == "noise.npz"
    assert row["images"] == 32
    assert row["actions"][0].startswith("1: expand ")


@pytest.mark.slow
def test_no_row_names_a_folder_of_this_machine(done: Done) -> None:
    assert str(done[0].folder.parent) not in done[0].record.file.read_text()


@pytest.mark.slow
def test_a_found_architecture_is_trained_from_the_beginning_and_its_search_counts(done: Done) -> None:
    work, found = done[0], done[1]["found"]
    assert (found["config"]["schedule"], found["config"]["spec"]) == (None, "architecture.json")
    assert found["config"]["training"]["clip"] == 0
    search = found["search"]["config"]
    assert set(search["schedule"]) == {"name", *(each.name for each in fields(RepNAS))}
    assert (search["schedule"]["learning_rate"], search["training"]["clip"]) == (0.03, 1)
    assert (search["training"]["epochs"], found["config"]["training"]["epochs"]) == (1, 2)
    assert len(found["epochs"]) == 2 + 3  # with the state before each training
    both = [work.finish(name, 3) for name in ("search", "found")]  # neither is done again
    assert found["training_macs"] == 32 * 3 * sum(stage.macs for stage in both)
    assert found["search"]["architecture"].keys() == {"0", "4", "7", "11", "14", "18", "21"}
    importance = importance_of(found)
    assert len(importance) == sum(len(code["code"]) for code in found["search"]["architecture"].values())
    assert all(isinstance(value, float) for value in importance.values())


@pytest.mark.slow
def test_full_blocks_get_as_many_multiply_adds_as_the_method_that_is_named(done: Done) -> None:
    """DyRep comes later in the list, and was done on the way."""
    work, rows_of = done
    dyrep, full = (work.finish(name, 3) for name in ("DyRep", "odbb, at DyRep's cost"))
    epochs = rows_of["odbb, at DyRep's cost"]["config"]["training"]["epochs"]
    assert epochs == max(1, round(dyrep.macs / full.history.epochs[1].macs))
    assert set(rows_of) == {"odbb, at DyRep's cost", "DyRep", "found"}


@pytest.mark.slow
def test_a_drawn_architecture_keeps_the_budget_and_depends_on_the_seed_alone(done: Done) -> None:
    one, same, other = (draw(NET, 0.5, seed) for seed in (3, 3, 4))
    assert one == same != other
    digits = [code.code for code in one.sites.values()]
    assert sum(code.count("1") for code in digits) == int(0.5 * sum(map(len, digits)) + 0.5)
    assert all("1" in code for code in digits)
    job = done[0].experiment("drawn", 3)
    assert Architecture.load(job.spec) == one
    assert (job.schedule, job.training.epochs) == (None, 2)


# ---- the questions


def test_every_comparison_has_its_methods_and_enough_seeds() -> None:
    for pairs in QUESTIONS.values():
        assert any(decides for _, _, decides in pairs)
        for method, other, _ in pairs:
            assert min(LONG_METHODS[each].seeds for each in (method, other)) >= 3


def test_one_seed_is_no_answer() -> None:
    assert answer(Difference(5.0, None), 1) == answer(Difference(5.0, 0.1), 2) == answer(None, 0) == "not done"


def long_row(method: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    same = {"scale": "long", "data": "cifar10", "images": 10, "flips": {"onnxruntime": 0}, "test_images": 50}
    config = {"training": {"epochs": 100}, "model": {"name": NET.name, "options": {"width": 2}}}
    cost = {"training_macs": 100, "cpu_seconds": 5.0, "hardware": "here", "torch": "2", "config": config}
    return {"method": method, "seed": seed, "accuracy": {"fused": accuracy}, **same, **cost, **more}


def test_the_page_answers_each_question_by_its_comparisons() -> None:
    found = [long_row(PLAIN, seed, 0.86) for seed in range(3)]
    found += [long_row("RepVGG", seed, 0.87 + seed / 1000) for seed in range(3)]
    found += [long_row("ACB", seed, 0.86) for seed in range(3)]
    found += [long_row(FIVE_TIMES, 0, 0.9)]
    text = evidence(found)
    assert "| **RepVGG − plain** | 3 | +1.10 ± 0.25 | a gain |" in text
    assert "| ACB − plain | 3 | +0.00 ± 0.00 | no gain of half a point |" in text
    assert "| **DBB − plain** | 0 | missing | not done |" in text
    assert "against plain, 5 times" in text
    assert "RepNAS: not done" in text
    assert text.index("### cifar10") < text.index("#### The questions")


def test_rankings_agree_or_not() -> None:
    same = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]] * 3
    found, by_chance = agreement(same)
    assert found == pytest.approx(1)
    assert 0.2 < by_chance < 0.8
    assert agreement([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])[0] == pytest.approx(-1)


def test_importance_that_is_the_kind_s_alone_is_no_ranking_of_paths() -> None:
    """Every seed prefers 1×1 to 1×k at each of eight sites, but otherwise ranks the sites at random."""
    noises = ((1, 5, 2, 8, 3, 7, 4, 6), (4, 1, 8, 3, 6, 2, 7, 5), (7, 6, 1, 4, 2, 8, 5, 3))

    def architecture(noise: tuple[int, ...]) -> dict[str, Any]:
        kinds = ["1x1", "1xk"]
        return {
            str(site): {"branches": kinds, "code": "111", "importance": [None, 100 + value, -value]}
            for site, value in enumerate(noise)
        }

    text = answers([long_row("RepNAS", seed, 0.8, architecture=architecture(each)) for seed, each in enumerate(noises)])
    assert "of 16 paths, 3 seeds" in text
    assert text.count("they agree") == 1
    assert "no more than by chance" in text
