"""Count the convs that `fuse` leaves of chains without activations, by weights and by measured latency, and measure which form is quicker.

    python -m benchmarks.merging --out benchmarks/results/merging-cpu.json

In each net some nonlinearities are left out, as methods that make nets shallower do, or each conv is written as several smaller ones. Then
convs follow one another directly, and merging them may cost less or more. *By weights* is what `fuse` does by default; *by latency* asks
`repfx.measuring.latency.Latency`. All forms of a net run in turns in one process, and the one by weights is the baseline.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

import repfx
from benchmarks._comparison import compare
from benchmarks._record import Row, machine, write
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.cost import weights
from repfx.algebra.layers import is_conv
from repfx.measuring.cost import measure_times
from repfx.measuring.latency import Latency
from repfx.records.module_tree import set_submodule
from repfx.testing import randomize_batch_norm, relative_error

APART, BY_WEIGHTS, BY_LATENCY = "BatchNorms folded", "by weights", "by latency"


def _without(model: nn.Module, block: type[nn.Module], *parts: type[nn.Module]) -> nn.Module:
    """Replace all parts of these classes inside blocks of one class by identities."""
    for inner in [each for each in model.modules() if isinstance(each, block)]:
        for path, part in list(inner.named_modules()):
            if isinstance(part, parts):
                set_submodule(inner, path, nn.Identity())
    return model


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 whose inverted residual blocks have no activations."""
    return _without(torchvision.models.mobilenet_v2(), torchvision.models.mobilenetv2.InvertedResidual, nn.ReLU6)


def efficientnet_b0() -> nn.Module:
    """EfficientNet-B0 whose blocks have no activations, and no squeeze and excitation."""
    excitation = torchvision.ops.SqueezeExcitation
    block = torchvision.models.efficientnet.MBConv
    return _without(torchvision.models.efficientnet_b0(), block, nn.SiLU, excitation)


def resnet50() -> nn.Module:
    """ResNet-50 whose blocks have their last ReLU alone, behind the sum."""
    model = torchvision.models.resnet50()
    for block in [each for each in model.modules() if isinstance(each, torchvision.models.resnet.Bottleneck)]:
        block.__class__ = _LinearBottleneck
    result: nn.Module = model
    return result


class _LinearBottleneck(torchvision.models.resnet.Bottleneck):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x))))))
        sum_: torch.Tensor = y + (x if self.downsample is None else self.downsample(x))
        return sum_.relu()


def _factored(make: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    """VGG-11 with BatchNorms, each 3×3 conv but the first of which is made into several."""

    def build() -> nn.Module:
        model: Any = torchvision.models.vgg11_bn()
        model.classifier = nn.Linear(512 * 7 * 7, 10)
        for path, conv in list(model.named_modules()):
            if isinstance(conv, nn.Conv2d) and conv.in_channels > 3:
                set_submodule(model, path, make(conv))
        result: nn.Module = model
        return result

    return build


def tucker(conv: Any) -> nn.Module:
    """Three convs in place of one, in the shape of a Tucker decomposition: 1×1, 3×3 and 1×1, with nine tenths of the channels inside."""
    inner, outer = conv.in_channels * 9 // 10, conv.out_channels * 9 // 10
    return nn.Sequential(
        nn.Conv2d(conv.in_channels, inner, 1, bias=False),
        nn.Conv2d(inner, outer, 3, padding=1),
        nn.Conv2d(outer, conv.out_channels, 1),
    )


def separated(conv: Any) -> nn.Module:
    """A 3×1 and a 1×3 conv in place of one, with half as many channels again between them."""
    inner = conv.out_channels * 3 // 2
    return nn.Sequential(
        nn.Conv2d(conv.in_channels, inner, (3, 1), padding=(1, 0), bias=False),
        nn.Conv2d(inner, conv.out_channels, (1, 3), padding=(0, 1)),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV2, linear blocks": mobilenet_v2,
    "EfficientNet-B0, linear blocks": efficientnet_b0,
    "ResNet-50, linear blocks": resnet50,
    "VGG-11, Tucker": _factored(tucker),
    "VGG-11, 3×1 and 1×3": _factored(separated),
}


def convs_of(model: nn.Module) -> list[ConvSpec]:
    """Return the sizes of all convs of a model."""
    return [ConvSpec.of(module) for module in model.modules() if is_conv(module)]


def measure(net: str, shape: tuple[int, ...], rounds: int) -> list[Row]:
    """Fuse a net in all ways, check that the forms are equal, and compare their latency."""
    torch.manual_seed(0)
    model, x = randomize_batch_norm(NETS[net]()).eval(), torch.randn(shape)
    forms = {
        APART: repfx.fuse(model, example=x, cost=lambda conv, shape: -1.0),
        BY_WEIGHTS: repfx.fuse(model, example=x),
        BY_LATENCY: repfx.fuse(model, example=x, cost=Latency()),
    }
    with torch.no_grad():
        expected = model.double()(x.double())
        for form in forms.values():
            assert relative_error(form(x).double(), expected) < 1e-3
        calls: dict[str, Callable[[], object]] = {name: partial(form, x) for name, form in forms.items()}
        times = measure_times(calls, rounds=rounds, warm_up=3)
    rows: list[Row] = []
    for found in compare(times, BY_WEIGHTS):
        convs = convs_of(forms[found.candidate])
        row: dict[str, str | float] = {"net": net, "form": found.candidate, "convs": len(convs)}
        row |= {"weights": sum(map(weights, convs)), "milliseconds": round(found.seconds * 1e3, 3)}
        row |= {
            key: round(getattr(found.ratio, name), 3)
            for key, name in (("ratio", "median"), ("low", "low"), ("high", "high"))
        }
        rows.append(row)
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NET")
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one net on a small image, three turns")
    arguments = parser.parse_args()
    nets, shape, rounds = arguments.nets, (1, 3, 224, 192), arguments.rounds
    if arguments.smoke:
        nets, shape, rounds = nets[:1], (1, 3, 32, 48), 3
    rows = [row for net in nets for row in measure(net, shape, rounds)]
    table = Table("net", "form", "convs", "weights", "ms", "ratio", "95 %", box=SIMPLE_HEAD)
    for row in rows:
        interval = f"{row['low']:.2f}–{row['high']:.2f}"
        cells = (row["net"], row["form"], row["convs"], row["weights"], row["milliseconds"], row["ratio"], interval)
        table.add_row(*map(str, cells))
    Console(width=120).print(table)
    if arguments.out is not None and not arguments.smoke:
        write(arguments.out, {**machine("cpu"), "input": " × ".join(map(str, shape))}, rows)


if __name__ == "__main__":
    main()
