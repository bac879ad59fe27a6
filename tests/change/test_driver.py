"""The driver observes, acts in place and loses nothing of the run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import repfx
from repfx.blocks.spec import BranchSpec
from repfx.blocks.stages import AttachRate
from repfx.change.carry import carry
from repfx.change.schedule import SCHEDULES, Observation, Schedule
from repfx.errors import InvalidInput
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.passes.freeze import Freeze
from repfx.passes.fuse import Fuse
from repfx.passes.restore import Restore
from repfx.records.journal import Action, apply
from repfx.testing import assert_same_map, randomize_batch_norm, relative_error
from tests.inline_net import same_state
from tests.small_net import batch, small_net

DATA = [batch(4, seed=seed) for seed in range(6)]
SHORT: dict[str, Schedule] = {
    "dyrep": repfx.schedules.DyRep(interval=1, until=9, deviation=0.0),
    "repan": repfx.schedules.RepAn(cycles=3, epochs=1, warm_up=0.5, freeze=True),
}


@pytest.fixture(autouse=True)
def _leave_no_schedule_behind() -> Iterator[None]:
    before = dict(SCHEDULES)
    yield
    SCHEDULES.clear()
    SCHEDULES.update(before)


@dataclass(frozen=True)
class Listed(Schedule):
    """A schedule of fixed actions by epoch, whatever it observes."""

    actions: tuple[tuple[int, Action], ...] = ()
    metric: str | None = "snip"

    def decide(self, seen: Observation) -> Sequence[Action]:
        return [action for epoch, action in self.actions if epoch == seen.epoch]


class Run:
    """A training run, resumable at every step."""

    def __init__(self, schedule: Schedule, *, ema: bool = False, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: Any = small_net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)
        average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.8)) if ema else None
        self.driver = repfx.Driver(
            self.model, self.optimizer, schedule, calibrate=DATA[:3], ema=average, steps_per_epoch=len(DATA)
        )
        self.done = 0

    def step(self) -> None:
        x = DATA[self.done % len(DATA)] + 0.1 * torch.randn(())
        self.optimizer.zero_grad()
        self.model.train()(x).square().mean().backward()
        self.driver.after_backward()
        self.optimizer.step()
        if self.driver.ema is not None:
            self.driver.ema.update_parameters(self.model)  # type: ignore[operator]
        self.done += 1
        if self.done % len(DATA) == 0:
            self.driver.after_epoch()

    def go(self, until: int) -> Run:
        while self.done < until:
            self.step()
        return self


# ---- what it observes


def test_saliency_is_the_mean_over_the_steps_of_the_metric() -> None:
    formulas: dict[str, Callable[[Tensor, Any], Tensor]] = {
        "synflow": lambda w, g: (w * g).sum(),
        "snip": lambda w, g: (w * g).abs().sum(),
        "gradient_norm": lambda w, g: g.square().sum().sqrt(),
    }
    for name, formula in formulas.items():
        model: Any = small_net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        driver = repfx.Driver(model, optimizer, Listed(metric=name))
        expected = []
        for x in DATA[:3]:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            driver.after_backward()
            convs = [model.stem, model.plain, model.depthwise]
            expected.append(torch.stack([formula(conv.weight, conv.weight.grad) for conv in convs]))
            optimizer.step()
        seen = driver.observe()
        assert [candidate.site for candidate in seen.candidates] == ["stem", "plain", "depthwise"]
        means = torch.stack(expected).mean(0).tolist()
        assert [candidate.saliency for candidate in seen.candidates] == pytest.approx(means, rel=1e-12)
        assert max(map(abs, means)) > 1e-4


def test_averages_begin_anew_after_each_adjustment() -> None:
    run = Run(Listed()).go(2 * len(DATA))
    assert {candidate.saliency for candidate in run.driver.observe().candidates} == {0.0}
    run.model(DATA[0]).square().mean().backward()
    run.driver.after_backward()
    for candidate in run.driver.observe().candidates:
        weight = run.model.get_submodule(candidate.site).weight
        assert candidate.saliency == pytest.approx(float((weight.grad * weight.detach()).abs().sum()))


def test_in_front_of_a_batch_norm_the_signed_saliency_is_nothing_but_eps() -> None:
    """The scale of such weights doesn't matter, so Σ g·W is zero but for ε: DyRep's own metric ranks these convs by their ε."""
    first = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(280, 1)).double()
    signed, unsigned = (repfx.Driver(model, [], Listed(metric=name)) for name in ("synflow", "snip"))
    model(DATA[0]).square().mean().backward()
    signed.after_backward()
    unsigned.after_backward()
    pairs = zip(signed.observe().candidates, unsigned.observe().candidates)
    ratios = {first.site: abs(first.saliency) / second.saliency for first, second in pairs}
    assert ratios["0"] < 1e-3
    assert ratios["3"] > 0.02


@torch.no_grad()
def test_blocks_are_seen_with_the_scale_of_their_branches() -> None:
    model: Any = repfx.expand(small_net(), {"stem": ["1x1", "1xk"], "plain": ["1x1"], "depthwise": "repvgg"})
    repfx.expand(model, {"depthwise.1x1.conv": ["identity"]}, inplace=True)
    stem = model.stem
    stem.norm.weight.copy_(torch.tensor([2.0, -2.0] * 4))
    stem.branches["1x1"].last_norm.weight.fill_(-0.5)
    stem.branches["1xk"].last_norm.weight.fill_(0.1)
    driver = repfx.Driver(model, [], Listed())
    blocks = {block.site: block for block in driver.observe().blocks}
    assert blocks["stem"].scales == pytest.approx({"1x1": 0.25, "1xk": 0.05})
    assert (blocks["plain"].scales, blocks["plain"].normalised) == ({}, False)
    assert (blocks["depthwise"].depth, blocks["depthwise.1x1.conv"].depth) == (0, 1)
    depths = {candidate.site: candidate.depth for candidate in driver.observe().candidates}
    assert depths["stem.1x1.conv"] == 1
    assert not any(site.endswith("origin.conv") for site in depths)


def test_what_can_t_be_grown_is_no_candidate() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), weight_norm(nn.Conv2d(4, 4, 3)))
    assert repfx.Driver(model, [], Listed()).observe().candidates == []


def test_a_transposed_conv_is_a_candidate() -> None:
    candidate = repfx.Driver(nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), [], Listed()).observe().candidates[0]
    assert (candidate.site, str(candidate.conv)) == ("0", "3×3 4→4 transposed")


def test_gradients_that_overflow_count_for_nothing() -> None:
    model: Any = small_net()
    driver = repfx.Driver(model, [], Listed())
    model(DATA[0]).square().mean().backward()
    driver.after_backward()
    before = driver.observe()
    model.plain.weight.grad.fill_(float("inf"))
    driver.after_backward()
    assert driver.observe() == before


def test_saliency_is_that_of_unscaled_gradients() -> None:
    model: Any = small_net().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plain, scaled = (repfx.Driver(model, optimizer, Listed(), scaler=each) for each in (None, scaler))
    x = DATA[0].float()
    model(x).square().mean().backward()
    plain.after_backward()
    optimizer.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    scaled.after_backward()
    seen = [[candidate.saliency for candidate in driver.observe().candidates] for driver in (plain, scaled)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_gradients_of_half_precision_are_summed_in_float32() -> None:
    model: Any = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten()).to(torch.float16)
    model[0].weight.data.fill_(100.0)
    model[0].weight.grad = torch.full_like(model[0].weight, 10.0)
    driver = repfx.Driver(model, [], Listed())
    driver.after_backward()
    assert driver.observe().candidates[0].saliency == pytest.approx(64 * 64 * 9 * 1000)


def test_without_gradients_there_is_nothing_to_decide_by() -> None:
    driver = repfx.Driver(small_net(), [], Listed())
    with pytest.raises(InvalidInput, match=r"no gradients were observed: call after_backward\(\)"):
        driver.after_epoch()


def test_data_are_asked_for_at_once() -> None:
    with pytest.raises(InvalidInput, match="DyRep measures new BatchNorms on data: give `calibrate`"):
        repfx.Driver(small_net(), [], repfx.schedules.DyRep())


# ---- what it does


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_the_last_epochs_run_squeezed_and_a_resumed_run_does_too(name: str, tmp_path: Path) -> None:
    def begin() -> Run:
        return Run(schedules[name], ema=True)

    last = repfx.schedules.RepAn(cycles=1, epochs=4, warm_up=1, squeeze_from=2)
    schedules = {"dyrep": replace(SHORT["dyrep"], squeeze_from=2), "repan": last}
    whole = begin().go(4 * len(DATA))
    blocks = [module for module in whole.model.modules() if isinstance(module, repfx.RepBlock)]
    assert blocks
    assert all(block.squeezed and block.holds_statistics for block in blocks)
    assert [action.kind for epoch, action in whole.driver.history if epoch >= 2] == ["squeeze"] * len(blocks)
    half = begin().go(2 * len(DATA) + 1)
    repfx.save(tmp_path / "run.ckpt", half.model, half.optimizer, half.driver)
    generator = torch.get_rng_state()
    again = begin()
    repfx.load(tmp_path / "run.ckpt", again.model, again.optimizer, again.driver)
    again.done = half.done
    torch.set_rng_state(generator)
    again.go(4 * len(DATA))
    assert same_state(again.model.state_dict(), whole.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_the_function_stays_at_every_adjustment(name: str) -> None:
    run = Run(SHORT[name], ema=True)
    model, optimizer = run.model, run.optimizer
    kinds: set[str] = set()
    for epoch in range(1, 4):
        run.go(epoch * len(DATA) - 1)
        run.done += 1  # the last step by hand, to see what `after_epoch` alone does
        average: Any = run.driver.ema
        before = [copy.deepcopy(net).eval() for net in (model, average)]
        kinds |= {action.kind for action in run.driver.after_epoch()}
        for net, reference in zip((model, average), before):
            assert_same_map(copy.deepcopy(net).eval(), reference, batch(seed=50))
    assert run.model is model
    assert run.optimizer is optimizer
    assert {parameter for group in optimizer.param_groups for parameter in group["params"]} == set(model.parameters())
    assert kinds == {"dyrep": {"expand", "drop"}, "repan": {"expand", "fuse", "restore", "freeze", "drop"}}[name]
    fused = repfx.fuse(model)
    assert_same_map(fused.eval(), model.eval(), batch(seed=50))


def test_repan_begins_at_once_and_its_rate_rises_by_step() -> None:
    run = Run(repfx.schedules.RepAn(cycles=2, epochs=2, warm_up=1))
    assert [str(action).split(":")[0] for _, action in run.driver.history] == [
        "expand stem",
        "expand plain",
        "expand depthwise",
    ]
    rates = []
    for _ in range(3 * len(DATA)):
        rates.append(float(run.model.stem.attach_rate))
        run.step()
    first = [step / len(DATA) for step in range(len(DATA))]
    assert rates == pytest.approx([*first, *[1.0] * len(DATA), *first])


def test_an_optimizer_begins_each_cycle_anew_and_not_in_between() -> None:
    run = Run(repfx.schedules.RepAn(cycles=2, epochs=2, warm_up=1, freeze=True)).go(len(DATA))
    assert str(run.driver.history[-1][1]).startswith("thaw")
    assert run.optimizer.state
    run.go(2 * len(DATA))
    assert not run.optimizer.state
    assert run.optimizer.param_groups[0]["momentum"] == 0.9


def test_momentum_is_kept_where_a_conv_grows() -> None:
    run = Run(SHORT["dyrep"]).go(len(DATA) - 1)
    before = {
        name: run.optimizer.state[parameter]["momentum_buffer"].clone()
        for name, parameter in run.model.named_parameters()
        if parameter.ndim > 1
    }
    held = dict(run.model.named_parameters())
    run.done += 1
    (action,) = run.driver.after_epoch()
    assert isinstance(action, Expand)
    for name, buffer in before.items():
        assert torch.equal(run.optimizer.state[held[name]]["momentum_buffer"], buffer)


def test_calibration_takes_no_more_batches_than_asked_for() -> None:
    asked = 0

    class Endless:
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal asked
            while True:
                asked += 1
                yield DATA[0]

    schedule = repfx.schedules.DyRep(interval=1, until=9, batches=4)
    model = small_net()
    driver = repfx.Driver(model, [], schedule, calibrate=Endless())
    model(DATA[0]).mean().backward()
    driver.after_backward()
    assert len(driver.after_epoch()) == 1
    assert asked in (2 * 4, 3 * 4)


def test_a_decision_that_can_t_be_done_leaves_all_as_it_was() -> None:
    actions = ((1, Expand("stem", (BranchSpec("identity"),))),)
    run = Run(Listed(actions)).go(len(DATA) - 1)
    before, text = copy.deepcopy(run.model.state_dict()), str(run.model)
    groups = [len(group["params"]) for group in run.optimizer.param_groups]
    state = str(run.driver.state_dict())
    assert (run.driver.epoch, run.driver.state_dict()["step"]) == (0, len(DATA) - 1)
    for _ in range(2):  # it can be tried again, and what was observed is still there
        with pytest.raises(repfx.errors.Refused, match="3 channels go in and 8 come out"):
            run.driver.after_epoch()
        assert str(run.driver.state_dict()) == state
    assert str(run.model) == text
    assert same_state(run.model.state_dict(), before)
    assert [len(group["params"]) for group in run.optimizer.param_groups] == groups


def test_what_a_cycle_learnt_is_folded_at_its_end() -> None:
    """The last step of an epoch still belongs to the cycle: λ stays 1 until the fold."""
    run = Run(repfx.schedules.RepAn(cycles=2, epochs=1, warm_up=0.5))
    for _ in range(len(DATA)):
        x = DATA[run.done % len(DATA)]
        run.optimizer.zero_grad()
        run.model.train()(x).square().mean().backward()
        run.driver.after_backward()
        run.optimizer.step()
        run.done += 1
    assert float(run.model.stem.attach_rate) == 1
    trained = copy.deepcopy(run.model).eval()
    assert {action.kind for action in run.driver.after_epoch()} >= {"fuse", "restore", "expand"}
    assert_same_map(copy.deepcopy(run.model).eval(), trained, batch(seed=50))


def test_what_the_user_froze_neither_grows_nor_thaws() -> None:
    for schedule in (SHORT["dyrep"], repfx.schedules.RepAn(cycles=2, epochs=1, warm_up=1, freeze=True)):
        model: Any = small_net()
        model.stem.requires_grad_(False)
        model.norm.bias.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        driver = repfx.Driver(model, optimizer, schedule, calibrate=DATA)
        for _ in range(2):
            model.train()(DATA[0]).square().mean().backward()
            driver.after_backward()
            driver.after_epoch()
        assert isinstance(model.stem, nn.Conv2d)
        assert driver.history
        assert not model.stem.weight.requires_grad


def test_thawing_gives_back_what_was_trained_before() -> None:
    model: Any = repfx.expand(small_net(), {"stem": ["1x1"]})
    model.stem.norm.bias.requires_grad_(False)
    apply(model, [Freeze("stem"), Freeze("stem", frozen=False)], None)
    assert model.stem.conv.weight.requires_grad
    assert not model.stem.norm.bias.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_computes_the_same_after_its_next_update(use_buffers: bool) -> None:
    model: Any = repfx.expand(small_net(), {"stem": "dbb", "depthwise": "repvgg"})
    randomize_batch_norm(model)
    for _ in range(60):
        for x in DATA:
            model.train()(x)
    average: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=use_buffers)
    average.update_parameters(model)
    before = copy.deepcopy(model).eval()
    actions = [Drop("stem", "1x1"), Fuse("depthwise"), Restore("depthwise", measured=True)]
    with repfx.carry(model, average):
        apply(model, actions, DATA)
    average.update_parameters(model)
    assert_same_map(average.eval(), before, batch(seed=50), 1e-3)


def test_a_frozen_batch_norm_is_no_obstacle() -> None:
    frozen = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), frozen, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    data = [x.float() for x in DATA]
    driver = repfx.Driver(model, [], repfx.schedules.DyRep(interval=1, metric="snip"), calibrate=data)
    model(data[0]).square().mean().backward()
    driver.after_backward()
    before = copy.deepcopy(model).eval()
    assert len(driver.after_epoch()) == 1
    assert relative_error(copy.deepcopy(model).eval()(data[0]), before(data[0])) < 1e-5


def test_a_graph_module_has_an_average_too() -> None:
    model = repfx.restore(repfx.fuse(small_net().train()))
    average = AveragedModel(model)
    driver = repfx.Driver(model, [], repfx.schedules.RepAn(), calibrate=DATA, ema=average)
    assert len(driver.history) == 3


def test_momentum_points_where_the_gradient_does_whatever_the_sign_of_gamma() -> None:
    model: Any = small_net().train()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([-1.0, -0.5, 0.5, 1.0] * 2))
    signs = model.norm.weight.detach().sign()
    driver = repfx.Driver(model, [], SHORT["dyrep"], calibrate=DATA)
    model(DATA[0]).square().mean().backward()
    gradient = model.stem.weight.grad.clone()
    with torch.no_grad():
        apply(driver.model, [Expand("stem", (BranchSpec("1xk"),), gamma=0.01)], DATA)
    model.zero_grad()
    model(DATA[0]).square().mean().backward()
    cosine = F.cosine_similarity(model.stem.conv.weight.grad.flatten(1), gradient.flatten(1))
    assert float(cosine.min()) > 0.9
    assert torch.equal(model.stem.norm.weight.sign(), signs)


def test_a_scaler_and_a_rate_scheduler_go_on_over_a_change() -> None:
    # by a BatchNorm behind them: their gradients are rounding alone
    taken_away = {"depthwise.bias", "depthwise.origin.conv.bias", "depthwise.1x1-kxk.norm1.bias"}
    torch.manual_seed(0)
    model: Any = small_net().float()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    rates = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = torch.amp.GradScaler(DATA[0].device.type, init_scale=256.0)
    data = [x.float() for x in DATA]
    driver = repfx.Driver(model, optimizer, SHORT["dyrep"], calibrate=data, scaler=scaler)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(DATA[0].device.type, torch.bfloat16):
            loss = model.train()(data[0]).square().mean()
        scaler.scale(loss).backward()
        driver.after_backward()
        scaler.unscale_(optimizer)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        scaler.step(optimizer)
        scaler.update()
        rates.step()
        same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
        assert same <= taken_away
        driver.after_epoch()
    assert [action.kind for action in repfx.journal(model)].count("expand") == 2
    assert optimizer.param_groups[0]["lr"] == 0.005


# ---- resuming


@functools.cache
def whole_run(name: str) -> Run:
    """An uninterrupted run; tests only read it."""
    return Run(SHORT[name], ema=True).go(21)


@pytest.mark.slow_one_in(3)
@pytest.mark.slow
@pytest.mark.one_in(3)
@pytest.mark.parametrize("killed_after", [0, 5, 6, 13])
@pytest.mark.parametrize("name", SHORT)
def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, name: str, killed_after: int) -> None:
    whole = whole_run(name)
    first = Run(SHORT[name], ema=True).go(killed_after)
    repfx.save(tmp_path / "run.ckpt", first.model, first.optimizer, first.driver)
    resumed = Run(SHORT[name], ema=True, seed=7)
    repfx.load(tmp_path / "run.ckpt", resumed.model, resumed.optimizer, resumed.driver)
    resumed.done = killed_after
    resumed.go(21)
    for ours, theirs in ((resumed.model, whole.model), (resumed.driver.ema, whole.driver.ema)):
        assert same_state(ours.state_dict(), theirs.state_dict())  # type: ignore[union-attr]
    assert repfx.journal(resumed.model) == repfx.journal(whole.model)
    assert resumed.driver.history == whole.driver.history
    assert str(resumed.optimizer.state_dict()) == str(whole.optimizer.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_new_driver_takes_over_from_an_old_one(name: str) -> None:
    """Training frameworks need this: they build the model's structure and the optimizer first and restore everything else later."""
    whole = Run(SHORT[name], ema=True).go(14)
    run = Run(SHORT[name], ema=True).go(8)
    old = run.driver
    run.driver = repfx.Driver(
        run.model,
        run.optimizer,
        SHORT[name],
        calibrate=DATA[:3],
        ema=old.ema,
        steps_per_epoch=len(DATA),
        state=old.state_dict(),
    )
    run.go(14)
    assert same_state(run.model.state_dict(), whole.model.state_dict())
    assert run.driver.history == whole.driver.history


def test_what_conv_remember_of_their_batch_norms_is_saved(tmp_path: Path) -> None:
    """A model that is fused, saved, loaded and restored has the statistics of the run, not those of the base model."""
    model: Any = randomize_batch_norm(small_net(), seed=5)
    fused = repfx.fuse(model)
    repfx.save(tmp_path / "fused.ckpt", fused)
    again = repfx.load(tmp_path / "fused.ckpt", repfx.fuse(small_net(seed=8)))
    assert same_state(repfx.restore(again).state_dict(), repfx.restore(fused).state_dict())


# ---- a compiled model


@pytest.mark.slow
@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", SHORT)
def test_a_compiled_model_follows(name: str) -> None:
    run = Run(SHORT[name])
    compiled: Callable[[Tensor], Tensor] = torch.compile(run.model, backend="eager")
    assert repfx.Driver(compiled, [], Listed()).model is run.model  # type: ignore[arg-type]
    for _ in range(2):
        x = DATA[0]
        run.model.train()
        with torch.no_grad():
            expected = copy.deepcopy(run.model)(x)
            assert relative_error(compiled(x), expected) < 1e-12
        run.go(run.done + len(DATA))
    run.model.eval()
    assert relative_error(compiled(x), copy.deepcopy(run.model)(x)) < 1e-12


@pytest.mark.slow
def test_a_model_that_changes_often_stays_compiled() -> None:
    """`torch.compile` gives up on a function after eight versions and runs it uncompiled."""
    compiled: list[int] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).double()
    run = torch.compile(model, backend=backend)
    changes: list[Action] = [Expand("0", (BranchSpec("1x1"),)), Drop("0", "1x1")]
    driver = repfx.Driver(model, [], Listed(tuple((epoch, changes[epoch % 2 - 1]) for epoch in range(1, 12)), None))
    for epoch in range(12):
        run(DATA[0]).mean().backward()
        assert len(compiled) == epoch + 1
        driver.after_epoch()


@pytest.mark.slow
def test_a_model_compiled_in_place_follows() -> None:
    run = Run(SHORT["dyrep"])
    run.model.compile(backend="eager")
    run.go(2 * len(DATA))
    plain = Run(SHORT["dyrep"]).go(2 * len(DATA))
    assert run.driver.history == plain.driver.history
    assert len(run.driver.history) > 1
    run.model.eval(), plain.model.eval()
    assert relative_error(run.model(DATA[0]), plain.model(DATA[0])) < 1e-9


# ---- real data


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        repfx.schedules.DyRep(interval=1, until=9, deviation=0.0),
        repfx.schedules.RepAn(cycles=2, epochs=2, warm_up=0.5, spec="dbb"),
    ],
    ids=lambda schedule: schedule.name,
)
def test_twenty_steps_on_digits_learn(schedule: Schedule) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    torch.manual_seed(0)
    convs = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    convs += [nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    driver = repfx.Driver(model, optimizer, schedule, calibrate=[x[:128], x[128:256]], steps_per_epoch=5)
    losses = []
    for step in range(20):
        rows = slice(64 * step, 64 * step + 64)
        loss = F.cross_entropy(model.train()(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        driver.after_backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 5 == 4:
            driver.after_epoch()
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert len({epoch for epoch, _ in driver.history}) >= 2
    fused = repfx.fuse(model.eval())
    assert repfx.check_equivalent(model, fused, x[:8]).equivalent
    assert not any(isinstance(module, (nn.BatchNorm2d, AttachRate)) for module in fused.modules())


class ListAverage:
    """As torch_ema: an average of a list of parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.shadow = [parameter.detach().clone() for parameter in parameters]


def test_an_average_that_is_no_module_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    average: Any = ListAverage(model.parameters())
    with pytest.raises(InvalidInput, match="ema is of type ListAverage, no module"):
        repfx.Driver(model, [], repfx.schedules.Fixed("acb"), ema=average)
    with pytest.raises(InvalidInput, match="a ListAverage can't follow"), carry(model, average):
        pass
    assert repfx.journal(model) == ()
