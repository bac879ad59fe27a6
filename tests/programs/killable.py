"""A training run that saves itself after every step and goes on from where it was killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import repfx

STEPS, PER_EPOCH = 24, 4
SCHEDULES = {
    "dyrep": repfx.schedules.DyRep(interval=1, until=9, deviation=0.0, spec=["1x1", "1xk", "identity"]),
    "repan": repfx.schedules.RepAn(cycles=3, epochs=2, warm_up=1, freeze=True),
    "repnas": repfx.schedules.RepNAS(warm_up=1, epochs=5, learning_rate=0.1),
    "des": repfx.schedules.DES(population=4, warm_up=1, epochs=5, generation=1, nets=2, learning_rate=0.1),
}


def train(schedule: str, folder: Path, tell: Callable[[int], None]) -> None:
    """Resume from what the folder holds and train to the end; `tell` gets the number of each step once it is saved."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(6, 3, 9, 7) for _ in range(3)]
    first = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)]
    model = nn.Sequential(*first, nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(504, 5))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    driver = repfx.Driver(
        model,
        optimizer,
        SCHEDULES[schedule],
        calibrate=data,
        ema=average,
        steps_per_epoch=PER_EPOCH,
        score=lambda net: -float(net(data[0]).square().mean()),
    )
    progress = {"step": 0}
    parts: dict[str, Any] = {"rates": rates, "generator": generator, "progress": progress}
    checkpoint = folder / "run.ckpt"
    if checkpoint.exists():
        repfx.load(checkpoint, model, optimizer, driver, **parts)
    while progress["step"] < STEPS:
        x = torch.randn(6, 3, 9, 7, generator=generator)
        optimizer.zero_grad()
        for share in driver.shares():
            (share * model.train()(x).square().mean()).backward()
        driver.after_backward()
        optimizer.step()
        rates.step()
        average.update_parameters(model)
        progress["step"] += 1
        if progress["step"] % PER_EPOCH == 0:
            driver.after_epoch()
        repfx.save(checkpoint, model, optimizer, driver, **parts)
        tell(progress["step"])
