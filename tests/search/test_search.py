"""Searches: what they draw, what they learn and what they end with; a run loses nothing on the way."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import repfx
from repfx.blocks.architecture import Architecture
from repfx.blocks.block import RepBlock
from repfx.blocks.gates import gates_in
from repfx.errors import InvalidInput, UnknownName
from repfx.passes.calibrate import calibrate
from repfx.passes.gate import gate
from repfx.schedules import DES, RandomSearch, RepNAS
from repfx.search.base import PopulationSearch, Search
from repfx.search.heat_map import draw
from repfx.search.observation import Gated
from repfx.search.space import Code, Space
from tests.inline_net import same_state
from tests.small_net import batch, small_net

DATA = [batch(4, seed=seed) for seed in range(3)]
SHORT: dict[str, Search] = {
    "repnas": RepNAS(budget=0.5, warm_up=1, epochs=3, learning_rate=0.1, seed=3),
    "des": DES(population=6, warm_up=1, epochs=4, generation=1, nets=2, learning_rate=0.1, spec="odbb"),
    "random_search": RandomSearch(population=6, warm_up=1, epochs=4, generation=1, nets=2),
}


def score(net: nn.Module) -> float:
    return -float(net(DATA[0]).square().mean())


class Run:
    def __init__(self, search: Search, *, ema: bool = False, model: nn.Module | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model: Any = small_net() if model is None else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.02, momentum=0.9)
        average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.8)) if ema else None
        given = {"calibrate": DATA, "score": score, **options}
        self.driver = repfx.Driver(self.model, self.optimizer, search, ema=average, **given)

    @property
    def search(self) -> Any:
        assert self.driver.search is not None
        return self.driver.search

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model.train()
        for share in self.driver.shares():
            (share * self.model(x).square().mean()).backward()
        self.driver.after_backward()
        self.optimizer.step()
        if self.driver.ema is not None:
            self.driver.ema.update_parameters(self.model)  # type: ignore[operator]

    def epoch(self) -> tuple[Any, ...]:
        for x in DATA:
            self.step(x)
        return self.driver.after_epoch()

    def to_the_end(self) -> Run:
        for _ in range(self.driver.schedule.epochs):  # type: ignore[attr-defined]
            self.epoch()
        return self


def opened(model: nn.Module, *, training: bool) -> int:
    return sum(len(gates.open_in(training)) for gates in gates_in(model).values())


# ---- spaces and budgets

SPACE = Space(tuple((site, name) for site in "ab" for name in ("origin", "1x1", "1xk", "kx1")))
BRANCHES = Space(tuple((site, name) for site in "abcd" for name in ("1x1", "1xk", "kx1", "identity", "1x1-avg")))


@pytest.mark.parametrize(
    ("asked", "count"), [(2, 2), (8, 8), (0.5, 4), (1.0, 8), (1, None), (9, None), (0.1, None), (0, None)]
)
def test_budgets(asked: float, count: int | None) -> None:
    if count is not None:
        assert SPACE.budget(asked) == count
        return
    with pytest.raises(InvalidInput, match=f"a budget of {asked} means .* there are 8 to choose from, and each of 2"):
        SPACE.budget(asked)


@pytest.mark.parametrize(("asked", "count"), [(0.12, 2), (0.13, 3), (0.27, 5), (0.28, 6), (0.99, 20)])
def test_a_share_is_rounded_to_the_nearest_number(asked: float, count: int) -> None:
    assert BRANCHES.budget(asked) == count


def test_without_gates_on_the_sites_own_convs_one_branch_is_enough() -> None:
    assert BRANCHES.budget(1) == 1
    with pytest.raises(InvalidInput, match="there are 20 to choose from, and one is the least"):
        BRANCHES.budget(0)
    with pytest.raises(InvalidInput, match="means 21 branches"):
        BRANCHES.budget(21)


def test_the_best_leave_no_site_without_a_path() -> None:
    scores = [9, 8, 7, 6, 1, 2, 1, 1]
    assert SPACE.digits(SPACE.best(scores, 3)) == "1100 0100"
    assert SPACE.open_at(SPACE.best(scores, 2)) == {"a": ("origin",), "b": ("1x1",)}
    assert BRANCHES.digits(BRANCHES.best([0.0] * 5 + [1.0] * 5 + [0.0] * 10, 4)) == "00000 11110 00000 00000"


# ---- RepNAS


def test_repnas_draws_the_highest_of_alpha_and_noise() -> None:
    search = RepNAS(budget=4, origin=True)
    seen = Gated(SPACE, [0.3, -0.2, 0.0, 0.1, 2.0, 0.0, 0.0, -1.0])
    (draw_,) = search.draws(seen, 5, 7)
    assert draw_.code == SPACE.best([alpha + noise for alpha, noise in zip(seen.alphas, draw_.noise)], 4)
    assert search.draws(seen, 5, 7) == (draw_,) or search.draws(seen, 5, 7) == [draw_]
    assert search.draws(seen, 5, 8) != search.draws(seen, 5, 7)
    assert replace(search, seed=1).draws(seen, 5, 7) != search.draws(seen, 5, 7)
    assert search.choice(seen) == SPACE.best(seen.alphas, 4)


def test_repnas_noise_is_logistic_and_equal_alphas_draw_all_branches_alike() -> None:
    search = RepNAS(budget=5, origin=False)
    seen = Gated(BRANCHES, [0.0] * 20)
    draws = [search.draws(seen, 0, step)[0] for step in range(2000)]
    noise = torch.tensor([value for draw_ in draws for value in draw_.noise], dtype=torch.float64)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - math.pi / math.sqrt(3)) < 0.05
    counts = Counter(index for draw_ in draws for index, is_open in enumerate(draw_.code) if is_open)
    assert all(sum(draw_.code) == 5 for draw_ in draws)
    assert all(abs(count / 2000 - 0.25) < 0.05 for count in counts.values())
    assert len(counts) == 20


def test_repnas_runs_its_budget_in_both_modes() -> None:
    run = Run(SHORT["repnas"])
    total = len(run.search.space.paths)
    budget = run.search.space.budget(0.5)
    assert 0 < budget < total
    for x in DATA:
        assert opened(run.model, training=True) == opened(run.model, training=False) == budget
        run.step(x)


def test_repnas_learns_alpha_after_the_warm_up_alone() -> None:
    run = Run(SHORT["repnas"])
    run.epoch()
    assert not any(run.search.observe().alphas)
    run.epoch()
    alphas = run.search.observe().alphas
    assert any(alphas)
    choice = run.search.space.best(alphas, run.search.space.budget(0.5))
    assert {site: gates.open_in(False) for site, gates in gates_in(run.model).items()} == run.search.space.open_at(
        choice
    )


def test_alpha_decays_if_asked_to() -> None:
    ends = []
    for decay in (0.0, 1e6):  # so much that it drowns the gradient: each of Adam's steps is then the learning rate
        run = Run(replace(SHORT["repnas"], warm_up=0, learning_rate=0.125, weight_decay=decay))
        with torch.no_grad():
            for gates in gates_in(run.model).values():
                for each in gates.of.values():
                    each.alpha.fill_(1.0)  # type: ignore[operator]
        run.step(DATA[0])
        ends.append(run.search.observe().alphas)
    assert sorted({round(alpha, 6) for alpha in ends[1]}) == [0.875, 1.0], "1 is that of a path that didn't run"
    assert ends[0] != pytest.approx(ends[1])
    with pytest.raises(InvalidInput, match="weight_decay is -1"):
        RepNAS(weight_decay=-1)


# ---- DES and random search


def population(count: int = 12, opened_: int = 5) -> list[Code]:
    search = RandomSearch(population=count, budget=opened_)
    return list(search.first_population(BRANCHES))


def seen_with_scores(alphas: list[float] | None = None) -> Gated:
    codes = population()
    scores = [float(index) for index in range(len(codes))]
    return Gated(BRANCHES, alphas or [0.1 * index for index in range(20)], dict.fromkeys("abcd", 0.2), codes, scores)


@pytest.mark.parametrize("search", [DES(population=12, budget=5), RandomSearch(population=12, budget=5)])
def test_populations_differ_and_keep_to_the_budget(search: PopulationSearch) -> None:
    first = search.first_population(BRANCHES)
    following = search.next_population(replace(seen_with_scores(), population=first), 10)
    for codes in (first, following):
        assert len(codes) == len(set(codes)) == 12
        assert all(0 < sum(code) <= 5 for code in codes)
    assert first == search.first_population(BRANCHES)
    assert search.next_population(replace(seen_with_scores(), population=first), 10) == following
    assert search.next_population(replace(seen_with_scores(), population=first), 11) != following


def test_the_best_parents_stay() -> None:
    seen = seen_with_scores()
    best = [seen.population[index] for index in (11, 10, 9)]
    assert list(DES(population=12, budget=5).next_population(seen, 10)[:3]) == best
    assert RandomSearch(population=12, budget=5).next_population(seen, 10)[0] == best[0]


def test_directed_candidates_are_led_by_what_was_learned() -> None:
    alphas = [0.5 if index in (0, 6, 12, 18) else -0.5 for index in range(20)]
    alphas[3] = -0.6
    search = DES(population=40, budget=6, parents=0.0, directed=1.0)
    codes = search.next_population(seen_with_scores(alphas), 10)[1:]
    assert all(code[index] for code in codes for index in (0, 6, 12, 18)), "eq. 8: noise lifts none above the extremes"
    others = Counter(index for code in codes for index in range(20) if code[index] and index not in (0, 6, 12, 18))
    assert len(others) > 8, "what is low now isn't ignored for ever"


def test_a_block_s_beta_leads_as_well() -> None:
    seen = replace(seen_with_scores([0.0] * 10 + [0.01] * 10), betas={"a": 4.0, "b": 4.0, "c": -4.0, "d": -4.0})
    search = DES(population=40, budget=4, parents=0.0, directed=1.0)
    codes = search.next_population(seen, 10)[1:]
    in_first = sum(sum(code[:10]) for code in codes)
    assert in_first > 0.6 * sum(map(sum, codes))


def test_without_crossing_and_mutation_children_are_parents() -> None:
    search = DES(population=12, budget=5, parents=0.5, directed=0.0, crossover=0.0, mutation=0.0)
    codes = search.next_population(seen_with_scores(), 10)
    assert set(seen_with_scores().population[6:]) <= set(codes)
    assert len(codes) == 12, "new ones at random take the place of repetitions"


def test_the_whole_supernet_is_warmed_up() -> None:
    run = Run(SHORT["des"])
    total = len(run.search.space.paths)
    assert opened(run.model, training=True) == opened(run.model, training=False) == total
    run.epoch()
    assert opened(run.model, training=True) <= run.search.space.budget(2 / 3) < total


def test_a_step_averages_over_candidates() -> None:
    run = Run(SHORT["des"])
    run.epoch()
    seen = []
    for share in run.driver.shares():
        assert share == 0.5
        seen.append({site: gates.open_in(True) for site, gates in gates_in(run.model).items()})
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert [next(iter(repfx.Driver(small_net(), [], repfx.schedules.RepAn()).shares()))] == [1.0]


def test_candidates_are_scored_each_generation_and_the_best_one_stays() -> None:
    run = Run(SHORT["des"])
    for _ in range(3):
        run.epoch()
    last = run.search.population
    run.epoch()
    assert [entry["epoch"] for entry in run.search.history] == [2, 3, 4]
    best = max(range(len(last)), key=lambda index: run.search.scores[index])
    found = "".join(code.code[1:] for code in run.search.architecture.sites.values())
    assert found == "".join("01"[is_open] for is_open in last[best])


def test_random_search_learns_nothing_about_branches() -> None:
    run = Run(SHORT["random_search"])
    for _ in range(3):
        run.epoch()
    assert not any(run.search.observe().alphas)


# ---- the beginning and the end


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_search_ends_with_a_net_without_gates_that_fuses_exactly(name: str) -> None:
    run = Run(SHORT[name]).to_the_end()
    assert not gates_in(run.model)
    kinds = [action.kind for action in repfx.journal(run.model)]
    assert kinds[-1] == "calibrate"
    assert {"expand", "gate", "drop", "ungate", "calibrate"} == set(kinds)
    assert all(action.to_dict().get("closed", True) for action in repfx.journal(run.model))
    before = [action for _, action in run.driver.history]
    run.epoch()
    assert [action for _, action in run.driver.history] == before
    x = batch(3, seed=9)
    model = run.model.double().eval()
    torch.testing.assert_close(repfx.fuse(model)(x.double()), model(x.double()), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_the_architecture_file_builds_the_found_net_again(name: str, tmp_path: Path) -> None:
    run = Run(SHORT[name]).to_the_end()
    found = run.search.architecture
    found.save(tmp_path / "architecture.json")
    assert Architecture.load(tmp_path / "architecture.json") == found
    again = repfx.expand(small_net(), str(tmp_path / "architecture.json"))
    assert {key: tuple(value.shape) for key, value in again.state_dict().items()} == {
        key: tuple(value.shape) for key, value in run.model.state_dict().items()
    }
    for path, module in again.named_modules():
        if isinstance(module, RepBlock):
            assert module.running == run.model.get_submodule(path).running
    assert json.loads((tmp_path / "architecture.json").read_text())["sites"]
    draw(found, tmp_path / "architecture.png")
    assert (tmp_path / "architecture.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_open_adds_up_to_the_budget_in_the_end() -> None:
    run = Run(SHORT["repnas"])
    total, budget = len(run.search.space.paths), run.search.space.budget(0.5)
    run.to_the_end()
    codes = [code.code for code in run.search.architecture.sites.values()]
    assert sum(map(len, codes)) == total
    assert "".join(codes).count("1") == budget


def test_a_preserved_model_computes_the_same_at_first() -> None:
    torch.manual_seed(0)
    model = small_net()
    x = batch(3, seed=9)
    expected = model.eval()(x)
    for search in (
        RepNAS(budget=0.5, warm_up=1, epochs=3, preserve=True, origin=False),
        replace(SHORT["des"], preserve=True),
    ):
        run = Run(search, model=copy.deepcopy(model))
        torch.testing.assert_close(run.model.eval()(x), expected, rtol=1e-5, atol=1e-5)


def test_blocks_that_are_there_are_searched_as_they_are() -> None:
    model = repfx.expand(small_net(), {"stem": "acb"})
    run = Run(replace(SHORT["repnas"], spec=None), model=model)
    assert run.search.space.paths == (("stem", "origin"), ("stem", "1xk"), ("stem", "kx1"))


def test_statistics_are_measured_for_the_net_that_is_left() -> None:
    run = Run(SHORT["repnas"]).to_the_end()
    model = copy.deepcopy(run.model)
    calibrate(model, DATA)
    assert same_state(model.state_dict(), run.model.state_dict())


# ---- optimizers, averages, mixed precision


def test_what_gates_learn_is_in_no_other_optimizer() -> None:
    model = repfx.expand(small_net(), "acb")
    sites = [path for path, module in model.named_modules() if isinstance(module, RepBlock)]
    for site in sites:
        gate(model, site, origin=True)
    run = Run(replace(SHORT["repnas"], spec=None), model=model)
    own = {id(parameter) for gates in gates_in(model).values() for parameter in gates.parameters()}
    assert own
    grouped = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert not own & grouped
    everything = {id(parameter) for parameter in model.parameters()}
    assert grouped == everything - own


def test_an_average_runs_the_same_paths() -> None:
    run = Run(SHORT["repnas"], ema=True)
    run.epoch()
    run.epoch()
    average: Any = run.driver.ema
    for training in (True, False):
        mine = {site: gates.open_in(training) for site, gates in gates_in(run.model).items()}
        assert {site: gates.open_in(training) for site, gates in gates_in(average.module).items()} == mine
    run.epoch()
    x = batch(3, seed=9)
    assert not gates_in(average.module)
    fused = repfx.fuse(average.module.eval())
    torch.testing.assert_close(fused(x), average.module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SHORT)
def test_an_average_is_changed_exactly_by_the_end_of_a_search(name: str) -> None:
    run = Run(SHORT[name], ema=True)
    for _ in range(run.driver.schedule.epochs - 1):  # type: ignore[attr-defined]
        run.epoch()
    for x in DATA:
        run.step(x)
    average: Any = run.driver.ema
    average.eval()
    x = batch(3, seed=9)
    run.driver.after_epoch()
    codes = {site: code.code for site, code in run.search.architecture.sites.items()}
    again = Run(SHORT[name], ema=True)
    for _ in range(run.driver.schedule.epochs - 1):  # type: ignore[attr-defined]
        again.epoch()
    for each in DATA:
        again.step(each)
    other: Any = again.driver.ema
    for site, gates in gates_in(other.module).items():
        names = ("origin", *other.module.get_submodule(site).branches)
        gates.choose([n for n, digit in zip(names, codes[site]) if digit == "1" and n in gates.names], (False,))
    torch.testing.assert_close(average(x), other.eval()(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SHORT)
def test_an_equal_copy_is_equal_after_the_beginning(name: str) -> None:
    """timm's averages are deep copies from the start, not copies made at the first update."""
    torch.manual_seed(0)
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    average.update_parameters(model)
    repfx.Driver(model, optimizer, SHORT[name], calibrate=DATA, score=score, ema=average)
    x = batch(3, seed=9)
    torch.testing.assert_close(average.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_gates_learn_nothing_from_a_step_that_is_not_finite() -> None:
    run = Run(replace(SHORT["repnas"], warm_up=0))
    for factor in (1.0, math.inf, math.nan, 1.0):
        run.optimizer.zero_grad()
        (run.model.train()(DATA[0]).square().mean() * factor).backward()
        run.driver.after_backward()
    assert all(map(math.isfinite, run.search.observe().alphas))


def test_a_scaler_changes_nothing_for_gates() -> None:
    runs = []
    for scale in (None, 2.0**12):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        run = Run(replace(SHORT["repnas"], warm_up=0), scaler=scaler)
        for x in DATA:
            run.optimizer.zero_grad()
            loss = run.model.train()(x).square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            run.driver.after_backward()
            if scaler is None:
                run.optimizer.step()
            else:
                scaler.step(run.optimizer)
                scaler.update()
        runs.append(run.search.observe().alphas)
    assert any(runs[0])
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), rtol=1e-4, atol=1e-6)


def test_an_overflow_teaches_gates_nothing() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    run = Run(replace(SHORT["repnas"], warm_up=0), scaler=scaler)
    scaler.scale(run.model.train()(DATA[0]).square().mean() * math.inf).backward()
    run.driver.after_backward()
    assert not any(run.search.observe().alphas)


# ---- resuming


@pytest.mark.slow_one_in(3)
@pytest.mark.slow
@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("stop", [4, 10])
def test_a_search_goes_on_from_a_checkpoint_to_the_same_bits(name: str, stop: int, tmp_path: Path) -> None:
    def go(run: Run, first: int, last: int) -> None:
        for number in range(first, last):
            run.step(DATA[number % len(DATA)])
            if (number + 1) % len(DATA) == 0:
                run.driver.after_epoch()

    whole, stopped = Run(SHORT[name]), Run(SHORT[name])
    go(whole, 0, 15)
    go(stopped, 0, stop)
    repfx.save(tmp_path / "run.ckpt", stopped.model, stopped.optimizer, stopped.driver)
    again = Run(SHORT[name])
    repfx.load(tmp_path / "run.ckpt", again.model, again.optimizer, again.driver)
    go(again, stop, 15)
    assert same_state(again.model.state_dict(), whole.model.state_dict())
    assert again.search.history == whole.search.history
    assert again.search.architecture == whole.search.architecture


# ---- what goes wrong on the way


@pytest.mark.slow
def test_a_score_that_fails_can_be_asked_again() -> None:
    failures = [OSError("the disk"), OSError("the disk")]

    def failing(net: nn.Module) -> float:
        if run.driver.epoch == 4 and failures:
            raise failures.pop()
        return score(net)

    run = Run(SHORT["des"], score=failing)
    for _ in range(3):
        run.epoch()
    for x in DATA:
        run.step(x)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk"):
            run.driver.after_epoch()
        assert run.driver.epoch == 3
    assert run.driver.after_epoch()
    assert not gates_in(run.model)
    whole = Run(SHORT["des"]).to_the_end()
    assert run.search.architecture == whole.search.architecture


def test_a_net_without_batch_norms_has_none_to_measure() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(1)).double()
    spec = repfx.Spec(["1x1", "1xk"], norm="scale")
    run = Run(RepNAS(budget=0.5, warm_up=0, epochs=2, weights="default", spec=spec), model=model).to_the_end()
    assert not gates_in(run.model)


def test_a_conv_that_is_frozen_on_the_way_is_settled_all_the_same() -> None:
    run = Run(SHORT["repnas"])
    run.model.stem.conv.weight.requires_grad_(False)
    run.to_the_end()
    assert not gates_in(run.model)


def test_a_second_search_counts_what_has_gates() -> None:
    run = Run(SHORT["repnas"]).to_the_end()
    assert any(module.rests for module in run.model.modules() if isinstance(module, RepBlock))
    total = sum(len(module.running) for module in run.model.modules() if isinstance(module, RepBlock))
    again = Run(RepNAS(budget=total, warm_up=0, epochs=2, spec=None), model=run.model)
    assert len(again.search.space.paths) == total


def test_blocks_with_other_gates_are_refused() -> None:
    model = repfx.expand(small_net(), {"stem": "acb"})
    gate(model, "stem", "sigmoid")
    with pytest.raises(InvalidInput, match="'stem' has sigmoid gates, and RepNAS takes straight_through ones"):
        Run(SHORT["repnas"], model=model)
    nested = repfx.expand(repfx.expand(small_net(), {"stem": "dbb"}), {"stem.1x1-kxk.conv2": "acb"})
    with pytest.raises(InvalidInput, match="is a block inside a block"):
        Run(SHORT["repnas"], model=nested)


def test_what_an_optimizer_knows_of_gates_leaves_with_them() -> None:
    model = repfx.expand(small_net(), "acb", preserve=False)
    for site in [path for path, module in model.named_modules() if isinstance(module, RepBlock)]:
        gate(model, site, origin=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    model(DATA[0]).square().mean().backward()
    optimizer.step()
    repfx.Driver(model, optimizer, replace(SHORT["repnas"], spec=None), calibrate=DATA)
    assert optimizer.state_dict()["state"]


def test_branches_begin_as_the_spec_says() -> None:
    run = Run(RepNAS(budget=0.5, warm_up=0, epochs=2, spec="dyrep"))
    assert all(float(each.norm.weight.mean()) == 0.01 for each in [run.model.stem.get_submodule("1x1")])


@pytest.mark.parametrize("population", [2, 3, 7, 12])
@pytest.mark.parametrize(("parents", "directed"), [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.25, 0.25)])
def test_populations_keep_their_size(population: int, parents: float, directed: float) -> None:
    search = DES(population=population, budget=5, parents=parents, directed=directed)
    codes = search.first_population(BRANCHES)
    scores = [float(index) for index in range(population)]
    alphas = [0.1 * index for index in range(20)]
    seen = Gated(BRANCHES, alphas, dict.fromkeys("abcd", 0.2), codes, scores)
    assert len(search.next_population(seen, 10)) == len(codes) == population


# ---- what can't be


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (RepNAS(budget=3, epochs=9, warm_up=1), "a budget of 3 means 3 branches; .* each of .* sites needs one"),
        (RepNAS(budget=10_000, epochs=9, warm_up=1), "a budget of 10000 means 10000 branches; there are"),
        (DES(budget=10_000, epochs=9, warm_up=1), "a budget of 10000 means 10000 branches; there are"),
        (RepNAS(spec=None, epochs=9, warm_up=1), "RepNAS finds no conv"),
    ],
)
def test_a_budget_that_can_t_be_leaves_the_model_as_it_was(search: Search, message: str) -> None:
    model = nn.Sequential(
        *[nn.Sequential(nn.Conv2d(3 if first else 4, 4, 3), nn.BatchNorm2d(4)) for first in (True, False, False, False)]
    )
    before = copy.deepcopy(model)
    with pytest.raises(InvalidInput, match=message):
        Run(search, model=model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert same_state(model.state_dict(), before.state_dict())


def test_a_search_that_scores_needs_a_score() -> None:
    with pytest.raises(InvalidInput, match="DES scores candidates: give `score`"):
        Run(SHORT["des"], score=None)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RepNAS(budget=0), InvalidInput, "budget is 0"),
        (lambda: RepNAS(budget=1.5), InvalidInput, "a fraction is at most 1"),
        (lambda: RepNAS(warm_up=400), InvalidInput, "less than the 400"),
        (lambda: RepNAS(preserve=True), InvalidInput, "give origin=False"),
        (lambda: RepNAS(budget="0.5"), InvalidInput, "budget is '0.5'; it must be a positive number"),
        (lambda: RepNAS(epochs=2.5, warm_up=1), InvalidInput, "epochs is 2.5; it must be a whole number"),
        (lambda: RepNAS(betas=(2, 1)), InvalidInput, "betas is"),
        (lambda: RepNAS(betas=(0.9,)), InvalidInput, "betas is"),
        (lambda: DES(learning_rate=0), InvalidInput, "learning_rate is 0"),
        (lambda: DES(population=1), InvalidInput, "population is 1; it must be at least 2"),
        (lambda: DES(generation=0), InvalidInput, "generation is 0"),
        (lambda: DES(nets=0), InvalidInput, "nets is 0"),
        (lambda: DES(flips=2), InvalidInput, "flips is 2"),
        (lambda: DES(parents=0.7, directed=0.7), InvalidInput, "together they must be at most 1"),
        (lambda: DES(statistics="guessed"), UnknownName, "statistics 'guessed'"),
        (lambda: RandomSearch(spec="odb"), UnknownName, "preset 'odb'"),
    ],
)
def test_options_that_can_t_be(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
