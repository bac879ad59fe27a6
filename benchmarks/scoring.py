"""Measure the time saved by scoring a search's candidates on one refilled plain net, in the form of IRepNAS, table 1.

    python -m benchmarks.scoring --out benchmarks/results/scoring-cpu.json

The nets are VGG-16 and ResNet-18 at 32 px with the `ireps` branches and sigmoid gates, two thirds of which are open. A few random
candidates are scored in turns: with their branches, and as the plain net that `FusedSupernet` makes of each; both with torch's usual
memory format and with channels last. The time of a whole population is its size times the median of the candidates; for plain nets,
the time to make the first one is added once.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import repfx
from benchmarks._comparison import Ratio
from benchmarks._record import Row, machine, write
from benchmarks.drift import settle
from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.presets import resolve_spec
from repfx.blocks.spec import BranchSpec
from repfx.measuring.cost import measure_times
from repfx.passes.gate import gate
from repfx.recipes.nets import resnet18, vgg16
from repfx.search.scoring import FusedSupernet
from repfx.search.space import Code, Space

BRANCHES, FUSED = "multi-branch", "fused"
LAYOUTS = {"": torch.contiguous_format, ", channels last": torch.channels_last}
POPULATIONS = (64, 128, 256)
BUDGET = 2 / 3


MODELS: dict[str, Callable[[], nn.Module]] = {"VGG-16": vgg16, "ResNet-18": resnet18}


def on_3x3(site: ConvSpec) -> Sequence[BranchSpec]:
    """The branches of the IREPS space, for 3×3 convs only."""
    return resolve_spec("ireps").branches_for(site) if site.kernel_size == (3, 3) else ()


def supernet(name: str, images: Tensor) -> nn.Module:
    """A supernet in eval mode, with random α and β and the statistics of these images."""
    torch.manual_seed(0)
    model: nn.Module = repfx.expand(MODELS[name](), repfx.Spec(on_3x3), preserve=False)
    for path, block in list(model.named_modules()):
        if isinstance(block, repfx.RepBlock):
            gate(model, path, "sigmoid")
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("alpha"):
            nn.init.normal_(parameter)
    model.to(images.device)
    settle(model, [images])
    return model.eval()


def random_codes(space: Space) -> Iterator[Code]:
    """Yield random codes without end, each with as many open paths as the budget allows."""
    while True:
        yield space.best(torch.rand(len(space.paths)).tolist(), space.budget(BUDGET))


@torch.no_grad()
def log_likelihood(net: nn.Module, images: Tensor, labels: Tensor, batch: int) -> float:
    """The mean log-likelihood of the labels."""
    batches = zip(images.split(batch), labels.split(batch))
    losses = [F.cross_entropy(net(x).double(), y, reduction="sum") for x, y in batches]
    return -float(torch.stack(losses).sum()) / len(images)


def measure(name: str, images: Tensor, labels: Tensor, batch: int, candidates: int) -> list[Row]:
    """Return a row for each form and each size of a population."""
    model = supernet(name, images[:batch])
    space = Space.of(model)
    codes = [code for _, code in zip(range(candidates + 1), random_codes(space))]
    found: dict[str, list[float]] = {}
    once: dict[str, float] = {}

    def turns(form: str, layout: torch.memory_format, net: Callable[[Code], nn.Module]) -> Callable[[], None]:
        x, left, scores = images.contiguous(memory_format=layout), iter(codes), found.setdefault(form, [])
        log_likelihood(net(next(left)), x[:batch], labels[:batch], batch)  # the first call is slower
        return lambda: scores.append(log_likelihood(net(next(left)), x, labels, batch))

    forms: dict[str, Callable[[], None]] = {}
    for words, layout in LAYOUTS.items():
        laid_out: nn.Module = copy.deepcopy(model).to(memory_format=layout)
        began = time.perf_counter()
        fast = FusedSupernet(laid_out)
        once[FUSED + words] = time.perf_counter() - began
        forms[BRANCHES + words] = turns(BRANCHES + words, layout, partial(with_open, laid_out, space))
        forms[FUSED + words] = turns(FUSED + words, layout, fast.net)
    times = measure_times(forms, rounds=candidates, warm_up=0)
    rows: list[Row] = []
    for form, seconds in times.items():
        difference = max(abs(a - b) for a, b in zip(found[form], found[BRANCHES], strict=True))
        about: Row = {"model": name, "form": form, "difference": difference}
        each = [population_row(size, seconds, times[BRANCHES], once.get(form, 0.0)) for size in POPULATIONS]
        rows += [{**about, **row} for row in each]
    return rows


def with_open(model: nn.Module, space: Space, code: Code) -> nn.Module:
    """Open these paths of the model, in place, and return it."""
    space.choose(model, code)
    return model


def population_row(size: int, seconds: Sequence[float], baseline: Sequence[float], once: float) -> dict[str, float]:
    """The seconds for a whole population, and the share of the baseline's seconds that is saved, with its interval.

    Args:
        seconds, baseline: time of each candidate, turn by turn.
        once: seconds spent before the first candidate.

    >>> row = population_row(10, [0.5, 0.5], [2.0, 2.0], once=1.0)
    >>> row["seconds"], row["saved"]
    (6.0, 0.7)
    """
    ratio = Ratio.of(seconds, baseline)
    share = once / (size * statistics.median(baseline))
    saved = {"saved": ratio.median, "low": ratio.high, "high": ratio.low}
    shares = {name: round(1 - each - share, 4) for name, each in saved.items()}
    total = once + size * statistics.median(seconds)
    return {"population": size, "seconds": round(total, 2), "once": round(once, 2), **shares}


def show(rows: Sequence[Row], candidates: int, images: int) -> None:
    """Print the rows as a table."""
    table = Table(
        "model", "form", "population", "s", "of it once", "saved", "95 %", "scores differ by", box=SIMPLE_HEAD
    )
    for row in rows:
        number = {name: float(value) for name, value in row.items() if not isinstance(value, str)}
        interval = f"{number['low']:.1%}–{number['high']:.1%}"
        cells = (f"{number['seconds']:.1f}", f"{number['once']:.1f}", f"{number['saved']:.1%}", interval)
        names = (str(row["model"]), str(row["form"]), str(row["population"]))
        table.add_row(*names, *cells, f"{number['difference']:.1e}")
    Console(width=110).print(table)
    print(
        f"Scaled from {candidates} candidates of each model, scored on {images} images; no population was scored whole."
    )


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--images", type=int, default=256, help="images on which a candidate is scored")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=5, help="candidates that are scored in both forms")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--smoke", action="store_true", help="one candidate of one model, on four images")
    options = parser.parse_args()
    names = list(MODELS)
    if options.smoke:
        names, options.images, options.candidates = names[:1], 4, 1
    torch.manual_seed(0)
    images = torch.randn(options.images, 3, 32, 32, device=options.device)
    labels = torch.randint(10, (options.images,), device=options.device)
    rows = [row for name in names for row in measure(name, images, labels, options.batch, options.candidates)]
    show(rows, options.candidates, options.images)
    if options.out is not None and not options.smoke:
        shape = {"input": f"{options.batch} × 3 × 32 × 32", "images": options.images, "candidates": options.candidates}
        write(options.out, {**machine(options.device), **shape}, rows)


if __name__ == "__main__":
    main()
