"""Measure how much a model's output moves when DyRep grows it: at once, and later through passes in training mode alone.

    python -m benchmarks.drift

Every site that DyRep's branches fit is expanded at once, in float64: in repfx's way, and with the own BatchNorm, which then stands inside
the block, reset as the public code resets its new one. At first both keep the eval output. Then come five forward passes in training mode without an optimizer's
step, on other data than those of the statistics.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
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
from repfx.testing import relative_error

OUT = Path(__file__).parent / "results" / "drift.json"
SEEN, PASSES, GAMMA = 10, 5, 0.01
WAYS = ("untouched", "repfx", "reset")


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
            nn.init.constant_(
                block.norm.weight, (1 + block.norm.eps) ** 0.5
            )  # so that the eval output is kept to the last digit
            nn.init.zeros_(block.norm.bias)
    return changed


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs in both modes; the model is left as it was."""
    return {mode: copy.deepcopy(model).train(mode == "train")(x) for mode in ("eval", "train")}


@torch.no_grad()
def drift(model: nn.Module, data: list[Tensor]) -> float:
    """How far the eval output moves, relatively, in one pass over each batch in training mode."""
    moving = copy.deepcopy(model)
    before = moving.eval()(data[0])
    for x in data:
        moving.train()(x)
    return relative_error(moving.eval()(data[0]), before)


def measure(name: str, count: int) -> list[Row]:
    """Return a row for each way to expand."""
    model, seen, fresh = subject(name, count)
    ours = repfx.expand(model, "dyrep", gamma=GAMMA, calibrate=seen)
    before = outputs(model, fresh[0])
    rows: list[Row] = []
    for way, changed in zip(WAYS, (model, ours, reset(ours))):
        after = outputs(changed, fresh[0])
        moved = {mode: relative_error(after[mode], before[mode]) for mode in before}
        rows.append({"model": name, "way": way, **moved, "drift": drift(changed, fresh)})
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="images in each batch")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--smoke", action="store_true", help="two small models, nothing written")
    arguments = parser.parse_args()
    names = ["dilated", "reflect-padded"] if arguments.smoke else list(MODELS)
    rows = [row for name in names for row in measure(name, 4 if arguments.smoke else arguments.images)]
    table = Table("model", "way", "eval, at once", "training mode, at once", "eval, after five passes", box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(
            str(row["model"]), str(row["way"]), *(f"{float(row[key]):.2g}" for key in ("eval", "train", "drift"))
        )
    Console().print(table)
    if not arguments.smoke:
        write(arguments.out, {**machine("cpu"), "input": f"{arguments.images} × 3 × 32 × 24", "gamma": GAMMA}, rows)


if __name__ == "__main__":
    main()
