"""Measure the cost of a training step with branches, compared with the plain net's.

    python -m benchmarks.training --out benchmarks/results/training-cpu.json

ResNet-18 and VGG-16 for images of 32 × 32, channels last, are trained by SGD with momentum, all candidates in turns. *Frozen* means that
BatchNorms keep their statistics; such candidates are compared with the plain net with frozen statistics. *Textbook DBB* is the block as
its paper describes it: branches are written out and padded with the BatchNorm's output for zero. Memory is the peak of a step's
allocations, plus parameters, buffers and momentum. On a GPU it includes the workspaces of libraries.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import repfx
from benchmarks._memory import peak_on_gpu
from benchmarks._record import Row, machine, write
from repfx.measuring.cost import measure_times
from repfx.passes.recompute import recompute
from repfx.recipes.nets import resnet18, vgg16
from repfx.records.module_tree import set_submodule

NETS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "vgg16": vgg16}
PRECISIONS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("default", "reduce-overhead")  # the second one captures CUDA graphs
PLAIN, FROZEN, TEXTBOOK = "plain", "plain, frozen", "textbook DBB"


class NormAndPad(nn.Module):
    """A BatchNorm that adds a border of its output for zero."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)``."""
        y: Tensor = self.norm(x)
        norm: Any = self.norm
        border = norm.bias - norm.running_mean * norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        p, border = self.padding, border.detach().reshape(1, -1, 1, 1)
        wide = F.pad(y, [p] * 4)
        for axis in (2, 3):
            for start in (0, wide.shape[axis] - p):
                wide.narrow(axis, start, p).copy_(border)
        return wide


class TextbookBlock(nn.Module):
    """A Diverse Branch Block for a 3×3 conv with padding 1."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        inputs, outputs, stride = conv.in_channels, conv.out_channels, conv.stride
        self.branches = nn.ModuleList(
            [
                nn.Sequential(conv, nn.BatchNorm2d(outputs)),
                nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)),
                nn.Sequential(
                    nn.Conv2d(inputs, inputs, 1, bias=False),
                    NormAndPad(inputs, 1),
                    nn.Conv2d(inputs, outputs, 3, stride, bias=False),
                    nn.BatchNorm2d(outputs),
                ),
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, bias=False),
                    NormAndPad(outputs, 1),
                    nn.AvgPool2d(3, stride),
                    nn.BatchNorm2d(outputs),
                ),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)``."""
        total: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


def textbook(model: nn.Module) -> nn.Module:
    """Replace each 3×3 conv and the BatchNorm behind it by a textbook block, in place."""
    for site in repfx.sites(model):
        conv: Any = model.get_submodule(site.path)
        if conv.kernel_size == (3, 3):
            conv.bias = None
            set_submodule(model, str(site.norm), nn.Identity())
            set_submodule(model, site.path, TextbookBlock(conv))
    return model


def expanded(spec: str, *, frozen: bool = False, squeezed: bool = False) -> Callable[[nn.Module], nn.Module]:
    """A function that puts branches beside every conv that takes some."""

    def build(model: nn.Module) -> nn.Module:
        model = repfx.expand(model, spec, preserve=False)
        return squeezed_of(model, frozen=frozen) if squeezed else model

    return build


def squeezed_of(model: nn.Module, *, frozen: bool) -> nn.Module:
    """The model in its squeezed form, in which linear parts run as one conv."""
    squeezed: nn.Module = repfx.squeeze(model, statistics="frozen" if frozen else None)
    return squeezed


CANDIDATES: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {  # with the candidate that each is compared with
    PLAIN: (PLAIN, lambda model: model),
    TEXTBOOK: (PLAIN, textbook),
    "dbb": (PLAIN, expanded("dbb")),
    "dbb, recomputed": (PLAIN, lambda model: recompute(expanded("dbb")(model))),
    "orepa": (PLAIN, expanded("orepa")),
    "orepa, squeezed": (PLAIN, expanded("orepa", squeezed=True)),
    FROZEN: (FROZEN, lambda model: model),
    "plain, frozen, squeezed": (FROZEN, lambda model: squeezed_of(model, frozen=True)),
    "repvgg, frozen, squeezed": (FROZEN, expanded("repvgg", frozen=True, squeezed=True)),
    "dbb, frozen, squeezed": (FROZEN, expanded("dbb", frozen=True, squeezed=True)),
    "dyrep, frozen, squeezed": (FROZEN, expanded("dyrep", frozen=True, squeezed=True)),
}


@dataclass(frozen=True)
class Setting:
    """Settings that all candidates share.

    Args:
        batch: images of 32 × 32 in a step.
        precision: of activations, by autocast.
        compiled: inductor's mode for forward and backward pass; None for eager.
    """

    batch: int = 128
    device: str = "cpu"
    precision: str = "float32"
    compiled: str | None = None

    def __str__(self) -> str:
        return f"{self.batch} × 3 × 32 × 32, {self.precision}{f', compiled: {self.compiled}' if self.compiled else ''}"


class Step:
    """A training loop; each call is one step."""

    def __init__(self, net: str, candidate: str, setting: Setting) -> None:
        torch.manual_seed(0)
        device, batch = setting.device, setting.batch
        self.precision = PRECISIONS[setting.precision]
        against, build = CANDIDATES[candidate]
        model: Any = build(NETS[net]())
        self.model = model.to(device, memory_format=torch.channels_last).train()
        if against == FROZEN:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        self.run = torch.compile(self.model, fullgraph=True, mode=setting.compiled) if setting.compiled else self.model
        x = torch.randn(batch, 3, 32, 32, device=device)
        self.x, self.y = x.contiguous(memory_format=torch.channels_last), torch.randint(10, (batch,), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.x.device.type, self.precision, enabled=self.precision != torch.float32):
            loss = F.cross_entropy(self.run(self.x), self.y)
        loss.backward()
        self.optimizer.step()

    def memory(self) -> int:
        """Bytes of memory at the peak of a step."""
        self.optimizer.zero_grad()
        state: list[Tensor] = [each["momentum_buffer"] for each in self.optimizer.state.values()]
        held: int = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers(), *state))
        if self.x.is_cuda:
            return held + peak_on_gpu(self)
        found: Any
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self()
        events = sorted(
            (event.start_ns(), event.nbytes())
            for event in found.profiler.kineto_results.events()
            if event.name() == "[memory]"
        )
        now = peak = 0
        for _, change in events:
            now += change
            peak = max(peak, now)
        return held + peak


def measure(net: str, candidates: Collection[str], turns: int, setting: Setting) -> list[Row]:
    """Return one row for each candidate and for the ones that it is compared with."""
    wanted = {*candidates, *(CANDIDATES[name][0] for name in candidates)}
    steps = {name: Step(net, name, setting) for name in CANDIDATES if name in wanted}
    calls: dict[str, Callable[[], object]] = dict(steps)
    times = measure_times(calls, rounds=turns, warm_up=1)
    measurable = setting.compiled != "reduce-overhead"  # a CUDA graph keeps its memory from step to step
    memories = {name: step.memory() for name, step in steps.items()} if measurable else {}

    def ratio(name: str, base: str) -> float:
        return median(a / b for a, b in zip(times[name], times[base]))

    def row(name: str, against: str) -> Row:
        bases = {"step_ratio": against, "step_to_textbook": TEXTBOOK}
        return {
            "net": net,
            "candidate": name,
            "against": against,
            "step": median(times[name]),
            **{key: ratio(name, base) for key, base in bases.items() if base in steps},
            **({"memory": memories[name], "memory_ratio": memories[name] / memories[against]} if memories else {}),
        }

    return [row(name, CANDIDATES[name][0]) for name in steps]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="dtype of activations, by autocast")
    parser.add_argument(
        "--compile", choices=MODES, help="let inductor run forward and backward pass, in one of its modes"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one turn of two images")
    arguments = parser.parse_args()
    turns, batch = (1, 2) if arguments.smoke else (arguments.turns, arguments.batch)
    setting = Setting(batch, arguments.device, arguments.precision, arguments.compile)
    rows = [row for net in arguments.nets for row in measure(net, arguments.candidates, turns, setting)]
    table = Table("net", "candidate", "step", "ratio", "against", "to textbook", "memory", "ratio", box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(
            str(row["net"]),
            str(row["candidate"]),
            f"{float(row['step']):.3g} s",
            f"{float(row['step_ratio']):.2f}",
            str(row["against"]),
            f"{float(row['step_to_textbook']):.2f}" if "step_to_textbook" in row else "",
            f"{float(row['memory']) / 2**20:.0f} MiB" if "memory" in row else "",
            f"{float(row['memory_ratio']):.2f}" if "memory" in row else "",
        )
    Console().print(table)
    if arguments.out is not None and not arguments.smoke:
        write(arguments.out, {**machine(arguments.device), "setting": str(setting)}, rows)


if __name__ == "__main__":
    main()
