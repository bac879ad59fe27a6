"""A training run on two processes, each of which sees its own data: torchrun … -m tests.programs.on_two_ranks SCHEDULE."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import repfx

SCHEDULES = {
    "dyrep": repfx.schedules.DyRep(interval=1, until=9, deviation=0.0, metric="random", spec=["1x1", "1xk"]),
    "repan": repfx.schedules.RepAn(cycles=3, epochs=1, warm_up=0.5),
    "repnas": repfx.schedules.RepNAS(warm_up=1, epochs=2, learning_rate=0.1),
    "des": repfx.schedules.DES(population=5, warm_up=1, epochs=3, generation=1, nets=2, learning_rate=0.1),
}


def main(name: str) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 8, 8, 8, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(504, 5))
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    average = AveragedModel(net)
    torch.manual_seed(rank)  # from here on, all that is random differs
    data = [torch.randn(4, 3, 9, 7) + rank for _ in range(3)]
    images = torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(5))  # the same on all ranks
    driver = repfx.Driver(
        net,
        optimizer,
        SCHEDULES[name],
        calibrate=data,
        ema=average,
        steps_per_epoch=3,
        score=lambda candidate: -float(candidate(images).square().mean()),
    )
    searches = driver.search is not None  # in a search some branches don't run
    model = DistributedDataParallel(net, find_unused_parameters=searches)
    for _ in range(3):
        for x in data:
            optimizer.zero_grad()
            for share in driver.shares():
                (share * model(x).square().mean()).backward()
            driver.after_backward()
            optimizer.step()
            average.update_parameters(net)
        if driver.after_epoch():
            model = DistributedDataParallel(net, find_unused_parameters=searches)
    mine = [tensor.detach().double().flatten() for each in (net, average) for tensor in each.parameters()]
    numbers, journals = [torch.cat(mine)] * 2, [""] * 2
    gathered = [torch.empty_like(numbers[0]) for _ in range(2)]
    distributed.all_gather(gathered, numbers[0])
    distributed.all_gather_object(journals, str(repfx.journal(net)))
    assert journals[0] == journals[1], journals
    assert bool(gathered[0].isfinite().all())
    assert torch.equal(gathered[0], gathered[1]), float((gathered[0] - gathered[1]).abs().max())
    assert len(driver.history) > 2
    sharded: Any = fully_shard(nn.Sequential(nn.Conv2d(3, 8, 3)), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(repfx.errors.InvalidInput, match=r"0\.weight is sharded"):
        repfx.Driver(sharded, [], SCHEDULES["repan"])
    if rank == 0:
        print(*(action for _, action in driver.history), sep="\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
