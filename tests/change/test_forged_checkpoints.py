"""Forged checkpoints: the checksum is right, and what it covers is anything. One error in one sentence, and nothing has changed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import repfx
from repfx.change.checkpoint import _checksum
from repfx.errors import RepfxError
from tests.inline_net import same_state

DEEP = 2000
Head = dict[str, Any]
Tensors = dict[str, Tensor]
Forge = Callable[[Head, Tensors], object]


class Job:
    """A training with everything that a checkpoint can hold: momentum, observed saliency, an average, a schedule, random numbers."""

    def __init__(self, schedule: repfx.Schedule | None = None) -> None:
        torch.manual_seed(0)
        stem: list[nn.Module] = [nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
        self.model = nn.Sequential(
            *stem, nn.Conv2d(6, 4, (3, 1), bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(84, 3)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01, amsgrad=True)
        self.rates = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 9)
        self.average = AveragedModel(self.model)
        self.progress = {"step": 0}
        self.data = [torch.randn(4, 2, 5, 7)]
        self.driver = repfx.Driver(
            self.model,
            self.optimizer,
            schedule or repfx.schedules.DyRep(interval=1, until=3, deviation=0.0, spec=["1x1", "1xk"]),
            calibrate=self.data,
            ema=self.average,
            score=lambda net: float(net(self.data[0]).sum()),
        )

    def go(self, steps: int, per_epoch: int = 2) -> Job:
        for _ in range(steps):
            self.progress["step"] += 1
            self.optimizer.zero_grad()
            for share in self.driver.shares():
                (share * self.model(self.data[0]).square().mean()).backward()
            self.driver.after_backward()
            self.optimizer.step()
            self.rates.step()
            self.average.update_parameters(self.model)
            if self.progress["step"] % per_epoch == 0:
                self.driver.after_epoch()
        return self

    @property
    def parts(self) -> dict[str, Any]:
        return {"rates": self.rates, "progress": self.progress}

    def state(self) -> tuple[Any, ...]:
        """All that loading could change, and the objects that must stay the same."""
        objects = [id(each) for root in (self.model, self.average) for each in (*root.modules(), *root.parameters())]
        objects += [id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]]
        states = (self.model, self.optimizer, self.average, self.rates, self.driver)
        plain = [str(each.state_dict()) for each in states]
        journals = str(repfx.journal(self.model)), str(repfx.journal(self.average.module))
        return objects, copy.deepcopy(self.model.state_dict()), plain, journals, self.progress.copy(), random.getstate()


def write(path: Path, head: Head, tensors: Tensors) -> None:
    """Write a checkpoint with a right checksum."""
    head = {key: value for key, value in head.items() if key != "checksum"}
    text = json.dumps({**head, "checksum": _checksum(head, tensors)})
    save_file(tensors, path, metadata={"repfx": text})


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Head, Tensors]:
    path = tmp_path_factory.mktemp("genuine") / "run.ckpt"
    job = Job().go(5)
    repfx.save(path, job.model, job.optimizer, job.driver, **job.parts)
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["repfx"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def entries(packed: Any) -> list[list[Any]]:
    """The pairs of a packed dict, which may be changed in place."""
    return packed["dict"]  # type: ignore[no-any-return]


def entry(packed: Any, *keys: Any) -> list[Any]:
    """The pair at a path of keys inside packed dicts and lists."""
    for key in keys[:-1]:
        packed = inside(packed, key)
    (found,) = [pair for pair in entries(packed) if pair[0] == keys[-1]]
    return found


def inside(packed: Any, key: Any) -> Any:
    if isinstance(key, int):
        return packed["list"][key]
    return entry(packed, key)[1]


def trained(head: Head) -> list[str]:
    """The names of the parameters in the optimizer's group."""
    group = inside(inside(head["states"]["optimizer"], "param_groups"), 0)
    return inside(group, "params")["list"]  # type: ignore[no-any-return]


def put(part: str, *keys: Any, value: Any) -> Forge:
    """Replace a value inside the state of a part."""

    def forge(head: Head, tensors: Tensors) -> None:
        entry(head["states"][part], *keys)[1] = value

    return forge


def take(part: str, *keys: Any) -> Forge:
    """Leave out a key inside the state of a part."""

    def forge(head: Head, tensors: Tensors) -> None:
        outer = head["states"][part]
        for key in keys[:-1]:
            outer = inside(outer, key)
        entries(outer).remove(entry(outer, keys[-1]))

    return forge


def on_head(key: str, value: Any) -> Forge:
    return lambda head, tensors: head.__setitem__(key, value)


def on_states(part: str, value: Any) -> Forge:
    return lambda head, tensors: head["states"].__setitem__(part, value)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Forge:
    return lambda head, tensors: tensors.__setitem__(name, change(tensors[name]).contiguous())


def journal(change: Callable[[list[dict[str, Any]]], object], part: str = "model", path: str = "") -> Forge:
    """Change the journal of a module, as the list of its actions."""

    def forge(head: Head, tensors: Tensors) -> None:
        actions = json.loads(head["journals"][part][path])
        change(actions)
        head["journals"][part][path] = json.dumps(actions)

    return forge


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"list": [value]}
    return value


ODD: dict[str, Any] = {
    "none": None,
    "text": "x",
    "list": [1],
    "number": 7,
    "huge": 10**400,
    "true": True,
    "nested": [[[[]]]],
}
FORMATS: dict[str, Any] = {
    "none": None,
    "text": "1",
    "list": [1],
    "huge": 10**400,
    "true": True,
    "nested": [[[[]]]],
    "newer": 2,
    "zero": 0,
    "half": 1.5,
}
TENSORS = (
    "model.0.origin.conv.weight",
    "model.0.1xk.norm.running_var",
    "ema.module.6.weight",
    "model.0.origin.norm.num_batches_tracked",
)
STATE = "optimizer.state.6.weight.exp_avg"
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda value: torch.cat([value.reshape(-1), value.new_zeros(1)]),
    "transposed": lambda value: value[None],
    "empty": lambda value: value.new_zeros(0),
    "complex": lambda value: value.to(torch.complex64),
    "bool": lambda value: value != 0,
    "bytes": lambda value: (value != 0).to(torch.uint8),
}


def heads() -> Iterator[tuple[str, Forge]]:
    for name, value in ODD.items():
        for key in ("journals", "states", "folded"):
            yield f"{key} is {name}", on_head(key, value)
        for part in ("model", "optimizer", "driver", "ema", "rates", "random_state", "progress"):
            yield f"state of {part} is {name}", on_states(part, value)
    for name, value in FORMATS.items():
        yield f"format is {name}", on_head("format", value)
    for key in ("format", "journals", "states", "folded"):
        yield f"no {key}", lambda head, _, key=key: head.pop(key)  # type: ignore[misc]
    for part in ("model", "optimizer", "driver", "ema", "rates", "random_state"):
        yield f"no state of {part}", lambda head, _, part=part: head["states"].pop(part)  # type: ignore[misc]
    for part in ("model", "ema"):
        yield f"no journals of {part}", lambda head, _, part=part: head["journals"].pop(part)  # type: ignore[misc]
        yield f"no moments of {part}", lambda head, _, part=part: head["folded"].pop(part)  # type: ignore[misc]
    # ---- tensors
    for name in TENSORS:
        for change, function in CHANGES.items():
            yield f"{name} is {change}", tensor(name, function)
        yield f"{name} is missing", lambda head, tensors, name=name: tensors.pop(name)  # type: ignore[misc]
    for change in ("longer", "transposed", "empty", "complex", "bool", "bytes"):
        yield f"{STATE} is {change}", tensor(STATE, CHANGES[change])
    yield "whole numbers are floats", tensor("model.0.origin.norm.num_batches_tracked", lambda value: value.float())
    yield "floats are whole numbers", tensor("model.6.weight", lambda value: value.long())
    # ---- the model's state
    yield "a weight is a number", put("model", "6.weight", value=3)
    yield "a weight is a list", put("model", "6.weight", value={"list": [1.0]})
    yield "a weight is missing", take("model", "6.bias")
    yield "a key is a number", lambda head, _: entries(head["states"]["model"]).append([4, {"tensor": TENSORS[0]}])
    yield "a key is a list", lambda head, _: entries(head["states"]["model"]).append([[4], {"tensor": TENSORS[0]}])
    yield "a reference leads nowhere", put("model", "6.weight", value={"tensor": "nowhere"})
    yield "a reference is a list", put("model", "6.weight", value={"tensor": [1]})
    yield "an unknown container", put("progress", "step", value={"set": [1, 2]})
    yield "two containers at once", put("progress", "step", value={"list": [], "tuple": []})
    yield "a pair of three", lambda head, _: entries(head["states"]["progress"]).append([1, 2, 3])
    yield "a state nested too deep", put("progress", "step", value=nested(300))
    # ---- journals
    yield "no journal but text", lambda head, _: head["journals"]["model"].__setitem__("", "grow")
    yield (
        "a journal cut off",
        lambda head, _: head["journals"]["model"].__setitem__("", head["journals"]["model"][""][:-9]),
    )
    yield (
        "a journal nested too deep",
        lambda head, _: head["journals"]["model"].__setitem__("", "[" * DEEP + "]" * DEEP),
    )
    yield "a journal that is a number", lambda head, _: head["journals"]["model"].__setitem__("", 3)
    yield "a journal of a module that isn't there", lambda head, _: head["journals"]["model"].__setitem__("9.9", "[]")
    yield "an unknown action", journal(lambda actions: actions[0].update(action="grow"))
    yield "an action that is a list", journal(lambda actions: actions[0].update(action=["expand"]))
    yield "an action of the class", journal(lambda actions: actions[0].update(kind="drop"))
    yield "an action twice", journal(lambda actions: actions.append(actions[0]))
    yield "an action of another conv", journal(lambda actions: actions[0].update(site="1"))
    yield "an action nowhere", journal(lambda actions: actions[0].update(site="9.conv"))
    yield "an action at a number", journal(lambda actions: actions[0].update(site=0))
    yield "one branch less", journal(lambda actions: actions[0]["branches"].pop())
    yield "no branches", journal(lambda actions: actions[0].pop("branches"))
    yield "branches that are text", journal(lambda actions: actions[0].update(branches="1x1"))
    yield "an unknown branch", journal(lambda actions: actions[0]["branches"][0].update(kind="2x2"))
    yield "options that no branch takes", journal(lambda actions: actions[0]["branches"][0].update(options={"size": 1}))
    yield "a branch named twice", journal(lambda actions: actions[1]["branches"][1].update(name="1x1"))
    yield "γ is text", journal(lambda actions: actions[0].update(gamma="much"))
    yield "γ is huge", journal(lambda actions: actions[0].update(gamma=10**400))
    yield "an unknown norm", journal(lambda actions: actions[0].update(norm="layer"))
    yield "another norm", journal(lambda actions: actions[0].update(norm="scale"))
    yield "an unknown field", journal(lambda actions: actions[0].update(speed=2))
    yield (
        "a drop of what isn't there",
        journal(lambda actions: actions.append({"action": "drop", "site": "0", "branch": "kx1"})),
    )
    yield "a fuse that never was", journal(lambda actions: actions.append({"action": "fuse", "site": "0"}))
    yield "another journal of the average", journal(lambda actions: actions.clear(), "ema", "module")
    # ---- the optimizer
    for name, value in (
        ("text", "fast"),
        ("none", None),
        ("a list", {"list": [1]}),
        ("endless", float("inf")),
        ("huge", 10**300),
        ("no number", float("nan")),
    ):
        yield f"the rate is {name}", put("optimizer", "param_groups", 0, "lr", value=value)
        yield f"the decay is {name}", put("optimizer", "param_groups", 0, "weight_decay", value=value)
    for option in ("lr", "betas", "eps", "params"):
        yield f"a group without {option}", take("optimizer", "param_groups", 0, option)
    for name, value in (("three", {"tuple": [0.9, 0.9, 0.9]}), ("a number", 0.9), ("text", {"tuple": ["a", "b"]})):
        yield f"betas are {name}", put("optimizer", "param_groups", 0, "betas", value=value)
    yield "amsgrad is text", put("optimizer", "param_groups", 0, "amsgrad", value="yes")
    yield "foreach is text", put("optimizer", "param_groups", 0, "foreach", value="yes")
    yield "no groups", put("optimizer", "param_groups", value={"list": []})
    yield "groups are a number", put("optimizer", "param_groups", value=2)
    yield "a group is a number", put("optimizer", "param_groups", value={"list": [2]})
    yield "parameters are numbers", put("optimizer", "param_groups", 0, "params", value={"list": [0, 1]})
    yield "parameters are text", put("optimizer", "param_groups", 0, "params", value="0.conv.weight")
    yield "a parameter twice", lambda head, _: trained(head).append("6.weight")
    yield "a parameter of nobody", lambda head, _: trained(head).append("7.weight")
    yield (
        "a state of nobody",
        lambda head, _: entries(inside(head["states"]["optimizer"], "state")).append(["7.weight", {"dict": []}]),
    )
    yield "a state that is a number", put("optimizer", "state", "6.weight", value=3)
    yield "states are a list", put("optimizer", "state", value={"list": []})
    yield "no states", take("optimizer", "state")
    for key in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        yield f"a state without {key}", take("optimizer", "state", "6.weight", key)
        yield f"{key} is text", put("optimizer", "state", "6.weight", key, value="x")
        yield f"{key} is of another parameter", put("optimizer", "state", "6.weight", key, value={"tensor": TENSORS[0]})
    # ---- the driver
    for key in ("epoch", "step", "saliency", "history", "search"):
        yield f"a driver without {key}", take("driver", key)
    for name, value in (
        ("text", "3"),
        ("negative", -1),
        ("half", 1.5),
        ("huge", 10**400),
        ("true", True),
        ("none", None),
    ):
        yield f"the epoch is {name}", put("driver", "epoch", value=value)
        yield f"the step is {name}", put("driver", "step", value=value)
    yield "a history of actions alone", take("driver", "history", "epochs")
    yield "a history without actions", take("driver", "history", "actions")
    yield "more epochs than actions", put("driver", "history", "epochs", value={"list": [0] * 9})
    yield "epochs that are text", put("driver", "history", "epochs", value={"list": ["a", "b"]})
    yield "actions that are no journal", put("driver", "history", "actions", value="[3]")
    yield "saliency is a number", put("driver", "saliency", value=3)
    yield "saliency without sums", take("driver", "saliency", "sums")
    yield "sums that are a number", put("driver", "saliency", "sums", value=3.0)
    yield "sums of another number of convs", put("driver", "saliency", "sites", value={"list": ["0"]})
    yield "saliency of nobody", put("driver", "saliency", "sites", value={"list": ["7", "8"]})
    yield "a search that never was", put("driver", "saliency", value={"dict": []})
    # ---- other parts
    for key, value in (
        ("last_epoch", "x"),
        ("base_lrs", 0.1),
        ("base_lrs", {"list": ["x"]}),
        ("T_max", None),
        ("eta_min", {"list": []}),
    ):
        yield f"{key} of the rates is {value}", put("rates", key, value=value)
    yield "rates without their epoch", take("rates", "last_epoch")
    yield "progress is a list", lambda head, _: head["states"].__setitem__("progress", {"list": [1, 2]})
    for key, value in (
        ("python", 3),
        ("python", {"tuple": [3, {"tuple": [1, 2]}, None]}),
        ("torch", 3),
        ("torch", {"tensor": TENSORS[0]}),
    ):
        yield f"{key} numbers are {value}", put("random_state", key, value=value)
    yield "no torch numbers", take("random_state", "torch")


FORGED = list(heads())
TEXTS = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "a number": "3",
    "nested too deep": "[" * 100_000,
    "endless": '{"format": 1' + "0" * 9000 + "}",
    "cut off": '{"format": 1, "journals": {"model": {"": "[',
    "no checksum": '{"format": 1, "journals": {}, "states": {}, "folded": {}}',
    "null": "null",
}


def refused(job: Job, path: Path) -> str:
    """Check that a file is refused in one sentence and has changed nothing; return the sentence."""
    before, numbers = job.state(), torch.get_rng_state()
    with pytest.raises(RepfxError) as error:
        repfx.load(path, job.model, job.optimizer, job.driver, **job.parts)
    after = job.state()
    assert same_state(before[1], after[1])
    assert before[0] == after[0]
    assert before[2:] == after[2:]
    assert torch.equal(numbers, torch.get_rng_state())
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 1000
    return message


def test_the_genuine_file_loads(genuine: tuple[Head, Tensors], tmp_path: Path) -> None:
    write(tmp_path / "run.ckpt", *genuine)
    job, whole = Job(), Job().go(7)
    repfx.load(tmp_path / "run.ckpt", job.model, job.optimizer, job.driver, **job.parts)
    assert same_state(job.go(2).model.state_dict(), whole.model.state_dict())


@pytest.mark.slow_one_in(12)
@pytest.mark.one_in(6)
@pytest.mark.parametrize(("name", "forge"), FORGED, ids=[name for name, _ in FORGED])
def test_a_forged_head_is_one_error_and_changes_nothing(
    name: str, forge: Forge, genuine: tuple[Head, Tensors], tmp_path: Path
) -> None:
    head, tensors = copy.deepcopy(genuine[0]), dict(genuine[1])
    forge(head, tensors)
    write(tmp_path / "run.ckpt", head, tensors)
    assert "run.ckpt" in refused(Job().go(1), tmp_path / "run.ckpt")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_head_that_is_no_head_is_one_error(text: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "run.ckpt", metadata={"repfx": text})
    assert "no checkpoint that repfx.save wrote" in refused(Job().go(1), tmp_path / "run.ckpt")
