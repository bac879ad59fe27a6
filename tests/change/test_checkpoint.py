"""Checkpoints: a run resumes bit for bit, and a file that is damaged or doesn't fit is refused before anything changes."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import repfx
from repfx.errors import InvalidInput
from repfx.records.journal import from_json, replay, to_json
from tests.inline_net import same_state
from tests.random_numbers import numbers_from

STEPS = 9


class Plain(nn.Module):
    """A net of a dilated, a depthwise and a reflect-padded conv, with dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.dilated, self.norm1 = nn.Conv2d(3, 6, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.reflected, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.norm1(self.dilated(x)))
        x = torch.relu(self.norm2(self.reflected(self.depthwise(x))))
        return self.head(self.drop(x.mean((2, 3))))


class Run:
    """A training run whose model changes its structure on the way."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Plain()
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = optimizer(groups, lr=0.05, weight_decay=0.01, **options)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [4, 7], 0.5)
        self.generator = numbers_from(1)
        self.progress = {"step": 0}

    def parts(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "generator": self.generator, "progress": self.progress}

    def go(self, until: int) -> Run:
        while self.progress["step"] < until:
            self.progress["step"] += 1
            with repfx.carry(self.model, self.optimizer):
                self.change(self.progress["step"])
            x = torch.randn(4, 3, 7, 8, generator=self.generator) + random.random()
            self.optimizer.zero_grad()
            self.model.train()(x).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
        return self

    def change(self, step: int) -> None:
        if step == 2:
            repfx.expand(self.model, {"dilated": ["1x1", "1xk"], "depthwise": ["identity"]}, inplace=True)
        if step == 4:
            repfx.expand(self.model, {"reflected": repfx.Spec(["1x1-kxk", "1x1"], norm="scale")}, inplace=True)
        if step == 5:
            repfx.expand(self.model, {"reflected.1x1-kxk.conv2": ["1xk"]}, inplace=True)
            repfx.drop(self.model, "dilated", "1xk")
        if step == 7:
            repfx.drop(self.model, "depthwise", "identity")

    def save(self, path: Path) -> None:
        repfx.save(path, self.model, self.optimizer, **self.parts())

    def load(self, path: Path) -> Run:
        assert repfx.load(path, self.model, self.optimizer, **self.parts()) is self.model
        return self


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "AdamW": (torch.optim.AdamW, {"amsgrad": True}),
    "Adam, fused": (torch.optim.Adam, {"fused": True}),
    "Adadelta": (torch.optim.Adadelta, {}),
}


@functools.cache
def whole_run(name: str) -> Run:
    """An uninterrupted run; tests only read it."""
    optimizer, options = OPTIMIZERS[name]
    random.seed(0)
    return Run(optimizer, **options).go(STEPS)


# around each change of the structure with one optimizer; before two of the changes with the others
STOPS = [*(("SGD", step) for step in (0, 1, 3, 4, 5, 6, 8)), *((name, step) for name in OPTIMIZERS for step in (3, 6))]


@pytest.mark.slow_one_in(4)
@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "killed_after"), dict.fromkeys(STOPS))
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path, name: str, killed_after: int) -> None:
    optimizer, options = OPTIMIZERS[name]
    whole = whole_run(name)
    random.seed(0)
    Run(optimizer, **options).go(killed_after).save(tmp_path / "run.ckpt")
    random.seed(99)
    torch.manual_seed(99)
    resumed = Run(optimizer, **options).load(tmp_path / "run.ckpt")
    assert resumed.progress == {"step": killed_after}
    resumed.go(STEPS)
    assert same_state(whole.model.state_dict(), resumed.model.state_dict())
    assert repfx.journal(whole.model) == repfx.journal(resumed.model)
    ours, theirs = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    assert str(ours["param_groups"]) == str(theirs["param_groups"])
    assert [name for name, _ in resumed.model.named_parameters()] == [
        name for name, _ in whole.model.named_parameters()
    ]
    assert all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][index][key]))
        for index, state in ours["state"].items()
        for key, value in state.items()
        if value is not None
    )


def test_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    Run(momentum=0.9).go(5).save(tmp_path / "run.ckpt")
    run = Run(momentum=0.9)
    weight = run.model.dilated.weight
    run.load(tmp_path / "run.ckpt")
    assert run.model.dilated.conv.weight is weight  # type: ignore[union-attr]
    assert any(weight is parameter for parameter in run.optimizer.param_groups[0]["params"])


def test_a_model_on_the_way_takes_what_is_missing(tmp_path: Path) -> None:
    Run(momentum=0.9).go(8).save(tmp_path / "run.ckpt")
    run = Run(momentum=0.9).go(3)
    run.load(tmp_path / "run.ckpt")
    assert repfx.journal(run.model) == repfx.journal(Run(momentum=0.9).go(8).model)


def test_weights_alone_for_a_model_that_is_only_used(tmp_path: Path) -> None:
    run = Run(momentum=0.9).go(6)
    run.save(tmp_path / "run.ckpt")
    state = torch.get_rng_state()
    model = repfx.load(tmp_path / "run.ckpt", Plain(), random_state=False)
    x = torch.randn(2, 3, 7, 8)
    assert torch.equal(model.eval()(x), run.model.eval()(x))
    torch.set_rng_state(state)


def test_an_averaged_model_comes_back(tmp_path: Path) -> None:
    model = repfx.expand(Plain(), "acb")
    average = AveragedModel(model)
    model(torch.randn(4, 3, 7, 8))
    average.update_parameters(model)
    average.update_parameters(repfx.expand(Plain(), "acb"))
    repfx.save(tmp_path / "run.ckpt", model, average=average)
    base = Plain()
    again = AveragedModel(base)
    repfx.load(tmp_path / "run.ckpt", base, average=again)
    assert same_state(average.state_dict(), again.state_dict())
    assert int(again.n_averaged) == 2


def test_a_fused_model_is_a_base_of_its_own(tmp_path: Path) -> None:
    fused = repfx.fuse(repfx.expand(Plain(), "acb"))
    assert repfx.journal(fused) == ()
    assert repfx.journal(repfx.restore(fused)) == ()
    again = repfx.expand(fused, ["1x1"])
    repfx.save(tmp_path / "run.ckpt", again)
    loaded = repfx.load(tmp_path / "run.ckpt", repfx.fuse(Plain()))
    assert same_state(again.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = repfx.expand(Plain().to(dtype), "acb")
    repfx.save(tmp_path / "run.ckpt", model)
    assert same_state(repfx.load(tmp_path / "run.ckpt", Plain().to(dtype)).state_dict(), model.state_dict())


# ---- the file


def test_the_file_is_plain_safetensors_without_pickled_code(tmp_path: Path) -> None:
    run = Run(momentum=0.9).go(3)
    run.save(tmp_path / "run.ckpt")
    tensors = load_file(tmp_path / "run.ckpt")
    assert torch.equal(tensors["model.head.weight"], run.model.head.weight.cpu())
    assert "optimizer.state.head.weight.momentum_buffer" in tensors
    with safe_open(tmp_path / "run.ckpt", "pt") as file:
        head = json.loads(file.metadata()["repfx"])
    assert [action["action"] for action in json.loads(head["journals"]["model"][""])] == ["expand", "expand"]
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]


def untouched(run: Run, path: Path, message: str) -> None:
    """Check that loading is refused with this message and has changed nothing."""
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), run.progress)), repfx.journal(run.model)
    rng = torch.get_rng_state()
    with pytest.raises(InvalidInput, match=message):
        run.load(path)
    (model, optimizer, progress), journal = before
    assert same_state(model, run.model.state_dict())
    assert (str(optimizer), progress, journal) == (
        str(run.optimizer.state_dict()),
        run.progress,
        repfx.journal(run.model),
    )
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("length", [0, 7, 100, -1, -1000])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    Run(momentum=0.9).go(3).save(tmp_path / "run.ckpt")
    content = (tmp_path / "run.ckpt").read_bytes()
    (tmp_path / "run.ckpt").write_bytes(content[:length])
    untouched(Run(momentum=0.9), tmp_path / "run.ckpt", "damaged or no checkpoint")


@pytest.mark.parametrize("place", [-1, -5000, "head"])
def test_a_file_that_was_tampered_with_is_refused(tmp_path: Path, place: int | str) -> None:
    Run(momentum=0.9).go(3).save(tmp_path / "run.ckpt")
    content = bytearray((tmp_path / "run.ckpt").read_bytes())
    if place == "head":
        content = content.replace(b"nesterov", b"nestorev", 1)
    else:
        content[int(place)] ^= 1
    (tmp_path / "run.ckpt").write_bytes(content)
    untouched(Run(momentum=0.9), tmp_path / "run.ckpt", "is damaged: its content doesn't fit its checksum")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.ckpt")
    torch.save({"a": torch.ones(2)}, tmp_path / "pickled.ckpt")
    save_file({"a": torch.ones(2)}, tmp_path / "other.ckpt", metadata={"repfx": json.dumps({"format": 1})})
    run = Run()
    untouched(run, tmp_path / "foreign.ckpt", "no checkpoint that repfx.save wrote")
    untouched(run, tmp_path / "other.ckpt", "no checkpoint that repfx.save wrote")
    untouched(run, tmp_path / "pickled.ckpt", "damaged or no checkpoint")
    with pytest.raises(FileNotFoundError):
        run.load(tmp_path / "none.ckpt")
    with pytest.raises(InvalidInput, match="path is of type int"):
        repfx.load(3, run.model)  # type: ignore[arg-type]


def saved(path: Path, **changes: Any) -> Path:
    model = Plain()
    for name, layer in changes.items():
        setattr(model, name, layer)
    repfx.expand(model, "acb", inplace=True)
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.ndim == d]} for d in (4, 2, 1)]
    optimizer = torch.optim.SGD(groups, 0.1)
    repfx.save(path, model, optimizer, scheduler={"a": 1}, generator=torch.Generator(), progress={})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"head": nn.Linear(6, 5)},
            r"'head.bias' is \(5,\) in the file and \(4,\) in the model; 'head.weight' is \(5, 6\)",
        ),
        ({"head": nn.Linear(6, 4, bias=False)}, "'head.bias' is missing in the file"),
        ({"drop": nn.BatchNorm1d(6)}, "'drop.bias' is only in the file; .*; …"),
        ({"dilated": nn.Identity(), "norm1": nn.Conv2d(3, 6, 1)}, "'dilated.weight' is missing in the file; .*; …"),
        ({}, "has 3 groups of parameters and the SGD has 2"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, nn.Module], message: str) -> None:
    untouched(Run(), saved(tmp_path / "run.ckpt", **changes), message)


def test_a_structure_that_went_another_way_is_refused(tmp_path: Path) -> None:
    Run(momentum=0.9).go(3).save(tmp_path / "run.ckpt")
    run = Run(momentum=0.9)
    repfx.expand(run.model, {"reflected": ["1x1"]}, inplace=True)
    groups: list[dict[str, Any]] = [{"params": list(run.model.parameters())}, {"params": []}]
    run.optimizer = torch.optim.SGD(groups, 0.1)
    untouched(run, tmp_path / "run.ckpt", "has been through other changes")


def test_parts_that_refuse_leave_the_others_as_they_were(tmp_path: Path) -> None:
    class Picky:
        def state_dict(self) -> dict[str, int]:
            return {"size": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise ValueError("my size is 2")

    model, progress = Plain(), {"epoch": 1}
    repfx.save(tmp_path / "run.ckpt", model, progress=progress, picky=Picky())
    progress["epoch"] = 7
    with pytest.raises(InvalidInput, match="doesn't fit 'picky': my size is 2"):
        repfx.load(tmp_path / "run.ckpt", model, progress=progress, picky=Picky())
    assert progress == {"epoch": 7}


def test_a_part_that_was_not_saved_is_named(tmp_path: Path) -> None:
    repfx.save(tmp_path / "run.ckpt", Plain(), progress={})
    with pytest.raises(InvalidInput, match="holds no 'scheduler'; it holds 'model', 'progress'"):
        repfx.load(tmp_path / "run.ckpt", Plain(), scheduler={})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"progress": 3}, "progress is of type int, which has no state_dict"),
        ({"progress": {"net": nn.ReLU()}}, r"progress.net is of type ReLU, which can't be saved"),
        ({"progress": {"z": torch.ones(2, dtype=torch.complex64)}}, r"progress.z is a torch.complex64 tensor"),
    ],
)
def test_what_can_t_be_saved_is_named_and_nothing_written(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        repfx.save(tmp_path / "run.ckpt", Plain(), **parts)
    assert not list(tmp_path.iterdir())


def test_a_driver_s_average_is_saved_under_its_own_name(tmp_path: Path) -> None:
    model = Plain()
    driver = repfx.Driver(model, [], repfx.schedules.RepAn(), ema=AveragedModel(model))
    with pytest.raises(InvalidInput, match="a part can't be named ema: the checkpoint uses that name itself"):
        repfx.save(tmp_path / "run.ckpt", model, driver=driver, ema={})
    repfx.save(tmp_path / "run.ckpt", model, driver=driver)
    assert "ema.module.head.weight" in load_file(tmp_path / "run.ckpt")


def test_two_optimizers_come_back(tmp_path: Path) -> None:
    def start() -> tuple[Plain, list[torch.optim.Optimizer]]:
        model = Plain()
        rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("head")]
        return model, [
            torch.optim.SGD(rest, 0.1, momentum=0.9),
            torch.optim.SGD(model.head.parameters(), 0.1, momentum=0.9),
        ]

    model, optimizers = start()
    with repfx.carry(model, *optimizers):
        repfx.expand(model, "acb", inplace=True)
    model(torch.randn(2, 3, 7, 8)).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    repfx.save(tmp_path / "run.ckpt", model, optimizers[1], body=optimizers[0])
    again, fresh = start()
    repfx.load(tmp_path / "run.ckpt", again, fresh[1], body=fresh[0])
    for ours, theirs in zip(fresh, optimizers):
        assert str(ours.state_dict()) == str(theirs.state_dict())


def test_random_numbers_can_be_left_out(tmp_path: Path) -> None:
    repfx.save(tmp_path / "run.ckpt", Plain(), random_state=False)
    with pytest.raises(InvalidInput, match="holds no 'random_state'"):
        repfx.load(tmp_path / "run.ckpt", Plain())
    model = Plain()
    state = torch.get_rng_state()
    repfx.load(tmp_path / "run.ckpt", model, random_state=False)
    assert torch.equal(state, torch.get_rng_state())


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    model = repfx.expand(Plain(), "acb")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    repfx.drop(model, "dilated", "1xk")
    with pytest.raises(InvalidInput, match=r"group 0 of the optimizer has 3 parameters that aren't the model's"):
        repfx.save(tmp_path / "run.ckpt", model, optimizer)


def test_nested_state_comes_back_in_kind(tmp_path: Path) -> None:
    state = {
        "tuple": (1, [2.5, None], "text", True),
        1: {"1": torch.tensor(3, device="cpu"), 1: torch.arange(3, device="cpu")},
        "counter": Counter({3: 1}),
        "not finite": float("inf"),
        "empty": torch.ones(0, 2, device="cpu"),
    }
    repfx.save(tmp_path / "run.ckpt", Plain(), state=state)
    found: dict[Any, Any] = {}
    repfx.load(tmp_path / "run.ckpt", Plain(), state=found)
    assert str(found) == str(state)
    assert type(found["counter"]) is Counter


# ---- the journal


def test_a_journal_is_json_and_back() -> None:
    run = Run().go(STEPS)
    actions = repfx.journal(run.model)
    assert [action.kind for action in actions] == ["expand", "expand", "expand", "expand", "drop", "drop"]
    assert from_json(to_json(actions)) == actions
    base = Plain()
    replay(base, actions)
    assert base.state_dict().keys() == run.model.state_dict().keys()
    assert repfx.journal(base) == actions


def test_copies_carry_their_journal_and_go_their_own_way() -> None:
    model = repfx.expand(Plain(), {"dilated": ["1x1"]})
    twin = copy.deepcopy(model)
    repfx.drop(twin, "dilated", "1x1")
    assert [len(repfx.journal(each)) for each in (model, twin)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no journal"),
        ("[3]", "no journal"),
        ('[{"action": "grow", "site": "a"}]', "doesn't know: grow"),
        ('[{"action": "drop", "site": "a"}]', "can't read the journal .*'branch'"),
        ('[{"action": "fuse", "site": "a", "tempo": 2}]', "can't read the journal .* no key 'tempo'"),
    ],
)
def test_what_is_no_journal_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        from_json(text)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_state_of_a_fused_optimizer_lies_as_its_weights_do(kind: Any, tmp_path: Path) -> None:
    """Fused kernels run over memory in order, so a state that lies otherwise than its weight would belong to other numbers."""

    def begun() -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 5, (3, 2)), nn.Conv2d(5, 4, (1, 3))).to(memory_format=torch.channels_last)
        return model, kind(model.parameters(), lr=0.1, fused=True)

    def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 7, generator=numbers_from(seed))).square().sum().backward()
        optimizer.step()

    model, optimizer = begun()
    step(model, optimizer, 1)
    repfx.save(tmp_path / "run.safetensors", model, optimizer)
    again, other = begun()
    repfx.load(tmp_path / "run.safetensors", again, other)
    states = [
        (each, value) for each, state in other.state.items() for value in state.values() if value.shape == each.shape
    ]
    assert len(states) == 8
    assert all(value.stride() == each.stride() for each, value in states)
    for net, its in ((model, optimizer), (again, other)):
        step(net, its, 2)
    assert same_state(model.state_dict(), again.state_dict())


def test_a_model_whose_layers_have_no_size_yet_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"'0\.weight' has no size yet: run the model once"):
        repfx.save(tmp_path / "run.ckpt", nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU()))
    assert not any(tmp_path.iterdir())
