"""Candidates scored on two processes: torchrun … tests/programs/score_on_two_ranks.py."""

from __future__ import annotations

import math

import torch
from torch import distributed, nn

import repfx
from repfx.passes.gate import gate
from repfx.search.scoring import FusedSupernet, scores
from repfx.search.space import Space
from repfx.testing import randomize_batch_norm


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model = repfx.expand(net.double(), "odbb", preserve=False)
    for site in ("0", "3"):
        gate(model, site, "sigmoid")
    first = randomize_batch_norm(model).eval()
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    codes = [tuple((torch.rand(len(Space.of(model).paths)) < 0.5).tolist()) for _ in range(7)]
    supernet = FusedSupernet(first)
    with torch.no_grad():
        alone = [float(supernet.net(code)(x).mean()) for code in codes]
    randomize_batch_norm(model, seed=rank)  # running statistics differ between ranks; rank 0 keeps its own
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = 0

    def score(candidate: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return float(candidate(x).mean())

    found = scores(model, codes, score)
    assert found == alone, (rank, found, alone)
    assert calls == (4, 3)[rank], calls
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    given = iter([1.0, math.nan, 2.0, 3.0] if rank == 0 else [math.nan, 4.0, 5.0])
    assert scores(model, codes, lambda candidate: next(given)) == [1.0, -math.inf, -math.inf, 4.0, 2.0, 5.0, 3.0]
    try:
        scores(model, codes, lambda candidate: math.nan)
    except repfx.errors.InvalidInput as error:
        print(f"rank {rank}: {len(found)} scores as on one process; {error}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
