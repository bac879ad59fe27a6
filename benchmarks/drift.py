"""Measure how much a model's output moves when DyRep grows it: at once, and later through passes in training mode alone.

    python -m benchmarks.drift
    python -m benchmarks.drift --structures

Every site that DyRep's branches fit is expanded at once, in float64. The own BatchNorm moves into the block, or it stays behind the sum and
a new one stands inside (`--structures`). In either structure, the BatchNorm inside has measured statistics, or it is reset. The code of
DyRep's authors has the BatchNorm behind the sum and resets the new one. At first all keep the eval output. Then come forward passes in
training mode without an optimizer's step, on other data than those of the statistics.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import repfx
from benchmarks._record import Row, machine, write
from repfx.algebra.layers import Layer, is_batch_norm
from repfx.algebra.moments import set_kernel
from repfx.blocks.origin import origin_kernel
from repfx.blocks.presets import resolve_spec
from repfx.testing import relative_error

OUT = Path(__file__).parent / "results" / "drift.json"
OUT_STRUCTURES = OUT.with_name("drift-structures.json")
SEEN, PASSES, LONG, GAMMA = 10, 5, 60, 0.01
WAYS = ("untouched", "repfx", "reset")
STRUCTURES = (*WAYS, "behind", "behind, reset")


def small(**options: object) -> nn.Module:
    """Four convs of one form with BatchNorms."""
    layers: list[nn.Module] = []
    for channels in (3, 16, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, bias=False, **options), nn.BatchNorm2d(16), nn.ReLU()]  # type: ignore[arg-type]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def torchvision_model(name: str) -> nn.Module:
    """One of torchvision's models, for ten classes."""
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, num_classes=10)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision_model("resnet18"),
    "mobilenet_v2": lambda: torchvision_model("mobilenet_v2"),
    "dilated": lambda: small(padding=2, dilation=2),
    "reflect-padded": lambda: small(padding=1, padding_mode="reflect"),
}


def subject(name: str, count: int) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A model in float64 with γ and β as after training and statistics of some data; those data; and other data for the passes."""
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    data = [torch.randn(count, 3, 32, 24, dtype=torch.float64) for _ in range(SEEN + PASSES)]
    seen, fresh = data[:SEEN], data[SEEN:]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for norm in batch_norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    settle(model, seen)
    return model, seen, fresh


def batch_norms(model: nn.Module) -> list[Layer]:
    """All BatchNorms of a model."""
    return [module for module in model.modules() if is_batch_norm(module)]


@torch.no_grad()
def settle(model: nn.Module, data: list[Tensor]) -> None:
    """Give BatchNorms the statistics that training on the data would leave, without training."""
    momenta = {norm: norm.momentum for norm in batch_norms(model)}
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None  # torch's sign for a cumulative average
    for x in data:
        model.train()(x)
    for norm, momentum in momenta.items():
        norm.momentum = momentum


@torch.no_grad()
def reset(expanded: nn.Module) -> nn.Module:
    """A copy in which origins' BatchNorms have mean 0, variance 1, γ 1 and β 0; the convs hold the rest."""
    changed = copy.deepcopy(expanded)
    for block in [module for module in changed.modules() if isinstance(module, repfx.RepBlock)]:
        if block.norm is not None:
            kernel = origin_kernel(block)
            block.conv.bias = nn.Parameter(torch.zeros_like(block.norm.running_mean))
            set_kernel(block.conv, None, kernel, None)
            block.norm.reset_running_stats()
            # so that the eval output is kept to the last digit
            nn.init.constant_(block.norm.weight, (1 + block.norm.eps) ** 0.5)
            nn.init.zeros_(block.norm.bias)
    return changed


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs in both modes; the model is left as it was."""
    return {mode: copy.deepcopy(model).train(mode == "train")(x) for mode in ("eval", "train")}


@torch.no_grad()
def drift(model: nn.Module, data: list[Tensor], passes: int = PASSES) -> float:
    """How far the eval output moves, relatively, in so many passes in training mode over the batches, one after another."""
    moving = copy.deepcopy(model)
    before = moving.eval()(data[0])
    for number in range(passes):
        moving.train()(data[number % len(data)])
    return relative_error(moving.eval()(data[0]), before)


def measure(name: str, count: int, ways: Sequence[str] = WAYS, passes: Sequence[int] = (PASSES,)) -> list[Row]:
    """Return a row for each way to expand, with the drift after so many passes."""
    model, seen, fresh = subject(name, count)
    ours = repfx.expand(model, "dyrep", gamma=GAMMA, calibrate=seen)
    changed = {"untouched": model, "repfx": ours, "reset": reset(ours)}
    if "behind" in ways:
        spec = replace(resolve_spec("dyrep"), norm_behind=True)
        behind = repfx.expand(model, spec, gamma=GAMMA, calibrate=seen)
        changed |= {"behind": behind, "behind, reset": reset(behind)}
    before = outputs(model, fresh[0])
    rows: list[Row] = []
    for way in ways:
        after = outputs(changed[way], fresh[0])
        moved = {mode: relative_error(after[mode], before[mode]) for mode in before}
        later = {f"drift {number}": drift(changed[way], fresh, number) for number in passes}
        rows.append({"model": name, "way": way, **moved, **later})
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=None, help="images in each batch")
    parser.add_argument(
        "--structures", action="store_true", help="both structures and more passes, for two small models"
    )
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true", help="two small models, nothing written")
    arguments = parser.parse_args()
    small_ones = arguments.smoke or arguments.structures
    names = ["dilated", "reflect-padded"] if small_ones else list(MODELS)
    count = arguments.images or (4 if small_ones else 32)
    how = (STRUCTURES, (PASSES, LONG)) if arguments.structures else (WAYS, (PASSES,))
    rows = [row for name in names for row in measure(name, count, *how)]
    later = [key for key in rows[0] if key.startswith("drift")]
    table = Table("model", "way", "eval, at once", "training mode, at once", *later, box=SIMPLE_HEAD)
    for row in rows:
        numbers = (f"{float(row[key]):.2g}" for key in ("eval", "train", *later))
        table.add_row(str(row["model"]), str(row["way"]), *numbers)
    Console().print(table)
    if not arguments.smoke:
        out = arguments.out or (OUT_STRUCTURES if arguments.structures else OUT)
        write(out, {**machine("cpu"), "input": f"{count} × 3 × 32 × 24", "gamma": GAMMA}, rows)


if __name__ == "__main__":
    main()
