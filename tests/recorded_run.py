"""Runs as the training loop leaves them, for tests of what is made of their files: real short ones, and a long one that is made up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import repfx
from repfx.branch import Chain
from repfx.cost import count_macs, count_parameters
from repfx.data import load_data
from repfx.dataset import DataSource, Images, InputForm
from repfx.experiment import Cost, Metrics
from repfx.history import Epoch, History
from repfx.journaling import Action
from repfx.models import ModelReference
from repfx.notes import copy_of
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.run_folder import HISTORY, RunFolder, Structure
from repfx.schedule import Schedule
from repfx.spec import BranchSpec
from repfx.training import predict

TINY = f"{Path(__file__).with_name('tiny.py')}:net"


def record(out: Path, schedule: Schedule, epochs: int, model: str = TINY, size: int = 8, images: int = 1500) -> None:
    """Train on the digits with a schedule and leave the files of the run, but for the ONNX file."""
    torch.manual_seed(0)
    reference = ModelReference(model, 10)
    plain = reference.build()
    data = load_data(DataSource("digits"), InputForm.of(plain, size))
    training = TensorDataset(*(tensor[:images] for tensor in data.train.tensors))  # type: ignore[attr-defined]
    loader = DataLoader(training, 128, shuffle=True, generator=torch.Generator().manual_seed(0))
    trained, x = copy_of(plain), data.test[0][0][None]
    optimizer = torch.optim.AdamW(trained.parameters(), 2e-3)
    accuracy, size_of_epoch = predict(plain.eval(), data.test, 64).accuracy, _size(plain, x)
    driver = repfx.Driver(
        trained, optimizer, schedule, calibrate=loader, steps_per_epoch=len(loader), score=_score(loader)
    )
    done = tuple(action for _, action in driver.history)
    found = [Epoch(0, None, accuracy, None, None, None, *size_of_epoch, done, gammas(trained))]
    for epoch in range(1, epochs + 1):
        began, losses, size_of_epoch = time.perf_counter(), [], _size(trained, x)
        trained.train()
        for images_of_step, labels in loader:
            optimizer.zero_grad()
            for share in driver.shares():
                loss = share * F.cross_entropy(trained(images_of_step), labels)
                loss.backward()
            driver.after_backward()
            optimizer.step()
            losses.append(loss.item())
        seconds, blocks = time.perf_counter() - began, gammas(trained)
        accuracy = predict(trained.eval(), data.test, 64).accuracy
        trained.train()
        loss_of_epoch = sum(losses) / len(losses)
        actions = driver.after_epoch()
        found.append(Epoch(epoch, loss_of_epoch, accuracy, None, 2e-3, seconds, *size_of_epoch, actions, blocks))
    folder = RunFolder(out)
    out.mkdir(parents=True, exist_ok=True)
    folder.write(HISTORY, lambda path: _write(path, History(tuple(found)).to_json()))
    if driver.search is not None:
        folder.write_architecture(driver.search.architecture)
    how = {"name": schedule.name, **asdict(schedule)}
    folder.write_checkpoint(trained.eval(), Structure(reference, None, how, data.preparation))
    folder.write_metrics(_metrics(plain, trained, data.test, found).as_dict())


def gammas(model: nn.Module) -> dict[str, dict[str, float | None]]:
    """Mean |γ| of the last BatchNorm of each path of each block."""
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, repfx.RepBlock)}
    return {
        path: {name: _gamma(chain) for name, chain in {"origin": block.origin, **block.branches}.items()}
        for path, block in blocks.items()
    }


def long_history(sites: int = 100, epochs: int = 600) -> History:
    """What DyRep may do to a large net, made up: every 15 epochs two sites grow and some branches leave."""
    kinds = tuple(map(BranchSpec, ("1x1", "1x1-kxk", "1x1-avg", "1xk", "kx1", "identity")))
    order = [f"layer{index % 4 + 1}.{index // 4}.conv2" for index in range(sites)]
    born: dict[str, dict[str, int]] = {}
    found = []
    for epoch in range(epochs + 1):
        blocks: Mapping[str, Mapping[str, float | None]] = {
            site: {"origin": 1.0, **{name: _grown(name, epoch - since) for name, since in branches.items()}}
            for site, branches in born.items()
        }
        actions: list[Action] = []
        if epoch and epoch % 15 == 0 and epoch < epochs:
            for site, branches in list(born.items()):
                weak = [name for name, since in branches.items() if epoch - since >= 30 and _grown(name, 99) < 0.04]
                actions += [Drop(site, name) for name in weak]
                born[site] = {name: since for name, since in branches.items() if name not in weak}
            for site in order[epoch // 15 * 5 % sites :][:5]:
                if site not in born:
                    actions.append(Expand(site, kinds, gamma=0.01))
                    born[site] = {kind.kind: epoch for kind in kinds}
        loss = None if not epoch else 2.3 * math.exp(-epoch / 150) + 0.05
        accuracy = 1 - 0.9 * math.exp(-epoch / 120)
        macs = 1_800_000_000 + 30_000_000 * sum(map(len, born.values()))
        seconds = None if not epoch else macs / 4e7
        rate = None if not epoch else 0.05 * (1 + math.cos(math.pi * epoch / epochs))
        ema = accuracy * 0.99 if epoch else None
        found.append(Epoch(epoch, loss, accuracy, ema, rate, seconds, macs // 150, macs, tuple(actions), blocks))
    return History(tuple(found))


def _grown(name: str, age: int) -> float:
    end = 0.9 if name.startswith("1x1") else 0.02 if name == "identity" else 0.25
    return end + (0.01 - end) * math.exp(-max(age, 0) / 40)


def _gamma(chain: Chain) -> float | None:
    norm = chain.last_norm
    return None if norm is None or norm.weight is None else norm.weight.detach().abs().mean().item()


def _size(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    return count_parameters(model), count_macs(model, x)


def _score(loader: DataLoader[Any]) -> Callable[[nn.Module], float]:
    x, y = next(iter(loader))
    return lambda net: -F.cross_entropy(net(x), y).item()


def _metrics(plain: nn.Module, trained: nn.Module, test: Images, found: list[Epoch]) -> Metrics:
    x = test[0][0][None]
    fused = repfx.fuse(trained)
    error = repfx.check_equivalent(trained, fused, x).max_error
    before, after = (predict(model, test, 64) for model in (trained, fused))
    forms = {"plain": plain, "expanded": trained, "fused": fused}
    cost = {
        name: Cost(*_size(model, x), latency=(1 + index) * 1e-3) for index, (name, model) in enumerate(forms.items())
    }
    return Metrics(
        [epoch.loss for epoch in found if epoch.loss is not None],
        len(before.labels),
        {"expanded": before.accuracy, "fused": after.accuracy, "onnxruntime": after.accuracy},
        {"fused": before.flips(after), "onnxruntime": before.flips(after)},
        {"fused": error, "onnxruntime": 2.5e-7},
        cost,
        8e-4,
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
