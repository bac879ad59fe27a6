"""Blocks with tracked norms trained on two processes: torchrun … tests/programs/track_on_two_ranks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import repfx


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    spec = repfx.Spec(["1x1", "1x1-kxk", "1x1-avg"], norm="tracked")
    model: Any = repfx.squeeze(repfx.expand(net.double(), spec, preserve=False))
    windows = model[0].windows
    windows.every, windows.momentum, windows.share, windows.fewest = 1, 1.0, 1.0, 1 << 40
    alone = type(windows)(windows.site, windows.covariance)
    alone.share, alone.fewest = 1.0, 1 << 40
    xs = torch.randn(2, 4, 3, 7, 9, dtype=torch.float64) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    expected = sum(alone._measured(x)["covariance"] for x in xs) / 2
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    for _ in range(2):
        parallel(xs[rank]).square().sum().backward()
        torch.testing.assert_close(windows.covariance, expected, rtol=1e-12, atol=1e-12)
    nothing = xs[rank][: 0 if rank else 4]  # the second process has no image in this step
    windows.see(nothing, model[0]._own_kernel)
    torch.testing.assert_close(windows.covariance, alone._measured(xs[0])["covariance"], rtol=1e-12, atol=1e-12)
    print(f"rank {rank}: one covariance")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
