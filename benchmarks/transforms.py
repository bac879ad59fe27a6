"""Measure how the transforms scale: in time with a net's depth, in memory with its size, and compared with timm's own way to fuse.

    python -m benchmarks.transforms --out benchmarks/results/transforms-cpu.json

- *Scaling*: each transform of residual nets of 100, 500 and 2,000 convs, per conv of the plain net. `restore` takes the output of `fuse`,
  `fuse` and `squeeze` that of `expand`. Each turn builds its nets anew and keeps none, all sizes in turns. Time is processor time. The
  smallest and the largest size are measured once more with Python's garbage collector off.
- *Memory*: the peak of `fuse`'s allocations, less one copy of the model that it is given. The unit is a layer: the largest weight of the
  fused model in float64.
- *timm*: `repfx.fuse` beside `timm.utils.reparameterize_model`, which both copy the model first, in turns.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import repfx
from benchmarks._comparison import Ratio, compare
from benchmarks._memory import bytes_of, peak_of
from benchmarks._record import Row, machine, write
from repfx.algebra.layers import is_batch_norm
from repfx.measuring.cost import measure_times
from repfx.recipes.nets import resnet18, vgg16

SIZES = (100, 500, 2000)
SPEC = "acb"
CHANNELS = 8
TIMM, OURS = "timm", "repfx"
MODELS = (
    "repvgg_a0",
    "mobileone_s0",
    "fastvit_t8",
    "repvit_m1_1",
    "levit_128s",
    "efficientvit_m0",
    "tiny_vit_5m_224",
    "ghostnetv3_100",
    "repghostnet_100",
)


class Unit(nn.Module):
    """Two convs with BatchNorm, and the input added to their output."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)``."""
        inner = self.relu(self.norm1(self.conv1(x)))
        y: Tensor = self.relu(self.norm2(self.conv2(inner)) + x)
        return y


def deep_net(convs: int, channels: int = CHANNELS) -> nn.Module:
    """A net of `convs` convs, an even number."""
    return nn.Sequential(*(Unit(channels) for _ in range(convs // 2))).eval()


# ---- scaling


def times_of(convs: int) -> dict[str, float]:
    """Seconds that each transform of one net takes. Earlier garbage is collected first; collecting the transform's own garbage counts."""
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        gc.collect()
        started = time.process_time()
        result = call()
        seconds[name] = time.process_time() - started
        return result

    model = deep_net(convs)
    timed("sites", partial(repfx.sites, model))
    expanded = timed("expand", partial(repfx.expand, model, SPEC))
    fused = timed("fuse", partial(repfx.fuse, expanded))
    timed("restore", partial(repfx.restore, fused))
    timed("squeeze", partial(repfx.squeeze, expanded))
    return seconds


def scaling(sizes: tuple[int, ...], turns: int) -> list[Row]:
    """Measure the scaling with the garbage collector on, then with it off."""
    times_of(sizes[0])
    rows = scaling_rows(sizes, turns, "on")
    gc.disable()
    try:
        return rows + scaling_rows((sizes[0], sizes[-1]), 1, "off")
    finally:
        gc.enable()


def scaling_rows(sizes: tuple[int, ...], turns: int, collector: str) -> list[Row]:
    """One row for each transform and size; the time per conv is compared with that of the first size."""
    found = [{convs: times_of(convs) for convs in sizes} for _ in range(turns)]
    per_conv = {
        name: {convs: [turn[convs][name] / convs for turn in found] for convs in sizes} for name in found[0][sizes[0]]
    }
    return [
        {**scaling_row(name, convs, times[convs], times[sizes[0]]), "collector": collector}
        for name, times in per_conv.items()
        for convs in sizes
    ]


def scaling_row(transform: str, convs: int, times: list[float], first: list[float]) -> Row:
    """The row of one size, from its seconds per conv and those of the first size, turn by turn."""
    return {
        "asks": "scaling",
        "transform": transform,
        "convs": convs,
        "milliseconds": round(median(times) * 1e3, 3),
        **Ratio.of(times, first).rounded(3),
    }


# ---- memory

NETS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "VGG-16": vgg16,
    "100 convs of 64 channels": partial(deep_net, 100, 64),
}


def memory(net: str, spec: str | None) -> Row:
    """The row of a net: bytes that `fuse` allocates at its peak, and the sizes that they are compared with."""
    model = NETS[net]()
    model = (model if spec is None else repfx.expand(model, spec)).eval()
    peak = peak_of(partial(repfx.fuse, model))
    return memory_row(net, spec or "plain", peak, model, repfx.fuse(model))


def memory_row(net: str, form: str, peak: int, model: nn.Module, fused: nn.Module) -> Row:
    """The row of a peak, less one copy of `model`, in layers of `fused`."""
    layer = 8 * max(parameter.numel() for parameter in fused.parameters())
    copy = bytes_of(model)
    sizes = {"peak": peak, "copy": copy, "fused": bytes_of(fused), "layer": layer}
    return {"asks": "memory", "net": net, "form": form, **sizes, "layers_beyond": round((peak - copy) / layer, 2)}


# ---- timm


def beside_timm(name: str, turns: int) -> Row:
    """Compare both ways to fuse one model, and how many BatchNorms each leaves."""
    model = timm.create_model(name).eval()
    ways: dict[str, Callable[[], nn.Module]] = {
        TIMM: partial(reparameterize_model, model),
        OURS: partial(repfx.fuse, model),
    }
    left = {f"norms_of_{way}": count_norms(call()) for way, call in ways.items()}
    found = {each.candidate: each for each in compare(measure_times(ways, rounds=turns, warm_up=1), TIMM)}
    return {
        "asks": "timm",
        "model": name,
        "timm": round(found[TIMM].seconds, 4),
        "repfx": round(found[OURS].seconds, 4),
        **found[OURS].ratio.rounded(2),
        "norms": count_norms(model),
        **left,
    }


def count_norms(model: nn.Module) -> int:
    """Count BatchNorms of any kind."""
    return sum(is_batch_norm(module) for module in model.modules())


# ---- all of it


@dataclass(frozen=True)
class Plan:
    """Questions to measure, each with its nets and its number of turns."""

    sizes: tuple[int, ...] = SIZES
    turns: int = 3
    nets: tuple[str, ...] = tuple(NETS)
    forms: tuple[str | None, ...] = ("dbb", SPEC, None)
    models: tuple[str, ...] = MODELS
    timm_turns: int = 5


SMOKE = Plan((2, 4), 1, ("ResNet-18",), ("dbb",), ("repvgg_a0",), 1)


def show(rows: list[Row]) -> None:
    """Print a table for each question."""
    for asks in dict.fromkeys(row["asks"] for row in rows):
        own = [row for row in rows if row["asks"] == asks]
        table = Table(*(key for key in own[0] if key != "asks"), title=str(asks), box=SIMPLE_HEAD)
        for row in own:
            table.add_row(*(str(value) for key, value in row.items() if key != "asks"))
        Console(width=120).print(table)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--turns", type=int, default=Plan.turns, help="turns over the nets of all sizes")
    parser.add_argument(
        "--timm-turns", type=int, default=Plan.timm_turns, help="turns of both ways to fuse a model of timm"
    )
    parser.add_argument("--smoke", action="store_true", help="small nets, one turn: does it run?")
    options = parser.parse_args()
    plan = SMOKE if options.smoke else Plan(turns=options.turns, timm_turns=options.timm_turns)

    torch.manual_seed(0)
    rows = [
        *scaling(plan.sizes, plan.turns),
        *(memory(net, form) for net in plan.nets for form in plan.forms),
        *(beside_timm(name, plan.timm_turns) for name in plan.models),
    ]
    show(rows)
    if options.out:
        write(options.out, {**machine("cpu"), "timm": version("timm"), "spec": SPEC}, rows)


if __name__ == "__main__":
    main()
