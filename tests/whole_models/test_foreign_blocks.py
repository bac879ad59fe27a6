"""Multi-branch blocks as other people write them, from their public descriptions: each becomes the plain convs that its paper promises.

None of them is prepared for repfx. Each must give the same outputs in float64, with a given number of convs and BatchNorms left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.testing import assert_equivalent, randomize_batch_norm

CHANNELS = 8


def conv_norm(kernel_size: int, *, padding: int = 0, groups: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(CHANNELS, CHANNELS, kernel_size, padding=padding, groups=groups, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(CHANNELS))


class RepVGG(nn.Module):
    """3×3 + 1×1 + identity, each with a BatchNorm (arXiv 2101.03697)."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.pointwise = conv_norm(3, padding=1), conv_norm(1)
        self.identity = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.dense(x) + self.pointwise(x) + self.identity(x))


class QARepVGG(nn.Module):
    """A learned factor on the 1×1, a BatchNorm on the 3×3 alone, and one behind the sum (arXiv 2212.01593)."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.pointwise = conv_norm(3, padding=1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.alpha = nn.Parameter(torch.tensor(0.7))
        self.post = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.post(self.dense(x) + self.alpha * self.pointwise(x) + x))


class ACB(nn.Module):
    """3×3 + 1×3 + 3×1, the bars cropped where the padding is too small for them (arXiv 1908.03930)."""

    def __init__(self) -> None:
        super().__init__()
        self.square = conv_norm(3, padding=1)
        self.row = nn.Conv2d(CHANNELS, CHANNELS, (1, 3), padding=(0, 1), bias=False)
        self.column = nn.Conv2d(CHANNELS, CHANNELS, (3, 1), padding=(1, 0), bias=False)
        self.row_norm, self.column_norm = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return self.square(x) + self.row_norm(self.row(x)) + self.column_norm(self.column(x))


class NormAndPad(nn.Module):
    """DBB's BatchNorm, followed by padding with its output for zero, written strip by strip or as a difference."""

    def __init__(self, pixels: int, *, strips: bool) -> None:
        super().__init__()
        self.norm, self.pixels, self.strips = nn.BatchNorm2d(CHANNELS), pixels, strips

    def forward(self, x: Tensor) -> Any:
        norm: Any = self.norm
        x, pixels = norm(x), self.pixels
        deviation = torch.sqrt(norm.running_var + norm.eps)
        value = norm.bias.detach() - norm.running_mean * norm.weight.detach() / deviation
        value = value.view(1, -1, 1, 1)
        if not self.strips:
            return F.pad(x - value, [pixels] * 4) + value
        x = F.pad(x, [pixels] * 4)
        x[:, :, 0:pixels, :] = value
        x[:, :, -pixels:, :] = value
        x[:, :, :, 0:pixels] = value
        x[:, :, :, -pixels:] = value
        return x


class DBB(nn.Module):
    """k×k + 1×1 + (1×1, k×k) + (1×1, average); behind a first conv, the BatchNorm pads with its output for zero (arXiv 2103.13425)."""

    def __init__(self, *, strips: bool) -> None:
        super().__init__()
        self.dense, self.pointwise = conv_norm(3, padding=1), conv_norm(1)
        self.first, self.first_norm = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), NormAndPad(1, strips=strips)
        self.second = conv_norm(3)
        self.before_average = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.average_norm = NormAndPad(1, strips=strips)
        self.average = nn.Sequential(nn.AvgPool2d(3, 1), nn.BatchNorm2d(CHANNELS))

    def forward(self, x: Tensor) -> Any:
        out = self.dense(x) + self.pointwise(x) + self.second(self.first_norm(self.first(x)))
        return out + self.average(self.average_norm(self.before_average(x)))


class MobileOne(nn.Module):
    """k depthwise 3×3 in parallel, a 1×1 "scale" and the BatchNorm of the skip (arXiv 2206.04040)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv_norm(3, padding=1, groups=CHANNELS) for _ in range(4))
        self.scale, self.skip = conv_norm(1, groups=CHANNELS), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        out = self.scale(x) + self.skip(x)
        for branch in self.convs:
            out = out + branch(x)
        return F.gelu(out)


class RepMixer(nn.Module):
    """x + γ ⊙ (mixer(x) - norm(x)), where the mixer is a MobileOne block without its activation (arXiv 2303.14189)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer, self.scale = (
            nn.BatchNorm2d(CHANNELS),
            MobileOne(),
            nn.Parameter(torch.rand(CHANNELS, 1, 1)),
        )

    def forward(self, x: Tensor) -> Any:
        mixed = self.mixer.scale(x) + self.mixer.skip(x)
        for branch in self.mixer.convs:
            mixed += branch(x)
        return x + self.scale * (mixed - self.norm(x))


class RepViT(nn.Module):
    """BatchNorm behind the sum of a depthwise 3×3 with BatchNorm, a depthwise 1×1 and the skip (arXiv 2307.09283)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_norm(3, padding=1, groups=CHANNELS)
        self.pointwise = nn.Conv2d(CHANNELS, CHANNELS, 1, groups=CHANNELS)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x) + self.pointwise(x) + x)


class UniRepLKNet(nn.Module):
    """A large depthwise kernel beside small dilated ones, each with a BatchNorm (arXiv 2311.15599)."""

    def __init__(self) -> None:
        super().__init__()
        self.large = conv_norm(9, padding=4, groups=CHANNELS)
        sizes = ((5, 1), (5, 2), (3, 3), (3, 4))
        self.dilated = nn.ModuleList(
            conv_norm(k, padding=d * (k - 1) // 2, groups=CHANNELS, dilation=d) for k, d in sizes
        )

    def forward(self, x: Tensor) -> Any:
        out = self.large(x)
        for branch in self.dilated:
            out = out + branch(x)
        return out


class Conv3XC(nn.Module):
    """SPAN's block: pad first, then 1×1, 3×3, 1×1 without padding, and a 1×1 beside them (arXiv 2311.12770)."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.chain = nn.Sequential(
            nn.Conv2d(CHANNELS, 2 * CHANNELS, 1),
            nn.Conv2d(2 * CHANNELS, 2 * CHANNELS, 3),
            nn.Conv2d(2 * CHANNELS, CHANNELS, 1),
        )

    def forward(self, x: Tensor) -> Any:
        return F.leaky_relu(self.chain(F.pad(x, (1, 1, 1, 1))) + self.beside(x), 0.05)


class FixedEdge(nn.Module):
    """ECBSR's edge branch: a 1×1, padded with its bias, then a depthwise conv of a fixed mask with a learned scale (ACM MM 2021)."""

    def __init__(self, mask: list[list[float]]) -> None:
        super().__init__()
        conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.weight, self.bias = conv.weight, conv.bias
        self.scale = nn.Parameter(torch.randn(CHANNELS, 1, 1, 1))
        self.shift = nn.Parameter(torch.randn(CHANNELS))
        self.mask: Tensor
        self.register_buffer("mask", torch.tensor(mask).expand(CHANNELS, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Any:
        y = F.conv2d(input=x, weight=self.weight, bias=self.bias)
        y = F.pad(y, (1, 1, 1, 1), "constant", 0)
        border: Any = self.bias
        border = border.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        return F.conv2d(input=y, weight=self.scale * self.mask, bias=self.shift, groups=CHANNELS)


class ECBSR(nn.Module):
    """3×3 + (1×1, 3×3) + Sobel in both directions + Laplacian."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.squeeze, self.expand = (
            nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        )
        self.edges = nn.ModuleList(
            FixedEdge(mask)
            for mask in (
                [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]],
                [[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]],
                [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]],
            )
        )

    def forward(self, x: Tensor) -> Any:
        y = self.dense(x) + self.expand(self.squeeze(x))
        for edge in self.edges:
            y = y + edge(x)
        return F.relu(y)


class OREPA(nn.Module):
    """One conv whose weight is computed from the weights of its branches (arXiv 2204.00826)."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3))
        self.inner = nn.Parameter(torch.randn(CHANNELS, CHANNELS))
        self.outer = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3))
        self.average = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 1, 1))
        self.scales = nn.Parameter(torch.rand(3, CHANNELS))
        self.norm = nn.BatchNorm2d(CHANNELS)

    def weight(self) -> Tensor:
        branches = (
            self.dense,
            torch.einsum("ti,othw->oihw", self.inner, self.outer),
            F.pad(self.average, (1, 1, 1, 1)) + self.average.expand(-1, -1, 3, 3) / 9,
        )
        return sum(torch.einsum("oihw,o->oihw", w, s) for w, s in zip(branches, self.scales))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.norm(F.conv2d(x, self.weight(), padding=1)))


class ResidualPointwise(nn.Conv2d):
    """DBB's 1×1 beside the identity: its weight plus the identity's, which is a plain attribute that is moved to the weight's device."""

    def __init__(self, groups: int) -> None:
        super().__init__(CHANNELS, CHANNELS, 1, groups=groups, bias=False)
        per_group = CHANNELS // groups
        unit = torch.zeros(CHANNELS, per_group, 1, 1)
        unit[range(CHANNELS), [index % per_group for index in range(CHANNELS)]] = 1
        self.unit = unit.type_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight + self.unit.to(self.weight.device).type_as(self.weight)
        return F.conv2d(x, kernel, None, stride=1, padding=0, dilation=self.dilation, groups=self.groups)


class DBBWithResidual(nn.Module):
    """k×k + 1×1 + (1×1 beside the identity, k×k), in groups (arXiv 2103.13425)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.dense, self.pointwise = conv_norm(3, padding=1, groups=groups), conv_norm(1, groups=groups)
        self.chain = nn.Sequential(ResidualPointwise(groups), NormAndPad(1, strips=True), *conv_norm(3, groups=groups))

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.dense(x) + self.pointwise(x) + self.chain(x))


class OREPAInGroups(nn.Module):
    """OREPA in groups: the weight's parts are viewed group by group, by sizes of what was computed (arXiv 2204.00826)."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.groups, per_group = groups, CHANNELS // groups
        self.origin = nn.Parameter(torch.randn(CHANNELS, per_group, 3, 3))
        self.pointwise = nn.Parameter(torch.randn(CHANNELS, per_group, 1, 1))
        self.unit: Tensor
        self.register_buffer("unit", torch.eye(per_group).repeat(groups, 1)[:, :, None, None])
        self.inner, self.outer = (
            nn.Parameter(torch.randn(CHANNELS, per_group, 1, 1)),
            nn.Parameter(self.origin.detach() / 2),
        )
        self.prior: Tensor
        self.register_buffer("prior", torch.rand(per_group, 3, 3))
        self.scales = nn.Parameter(torch.rand(4, CHANNELS))
        self.norm = nn.BatchNorm2d(CHANNELS)

    def in_groups(self) -> Tensor:
        inner = (self.inner + self.unit).squeeze(3).squeeze(2)
        through, per_group = inner.size()
        out, between, height, width = self.outer.size()
        inner = inner.view(self.groups, int(through / self.groups), per_group)
        outer = self.outer.view(self.groups, int(out / self.groups), between, height, width)
        return torch.einsum("gti,gothw->goihw", inner, outer).reshape(out, per_group, height, width)

    def weight(self) -> Any:
        padded = F.pad(self.pointwise, (1, 1, 1, 1))
        filtered = torch.einsum("oi,ihw->oihw", self.pointwise.squeeze(3).squeeze(2), self.prior)
        parts = (self.origin, padded, filtered, self.in_groups())
        total: Any = 0
        for index, part in enumerate(parts):
            total = total + torch.einsum("oihw,o->oihw", part, self.scales[index, :])
        return total

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.norm(F.conv2d(x, self.weight(), padding=1, groups=self.groups)))


class OREPALargeConv(nn.Module):
    """Weights of 3×3 convolved with one another: a chain of convs as one of a larger window (arXiv 2204.00826)."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = layers
        for index in range(layers):
            setattr(self, f"layer{index}", nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False))
        self.norm = nn.BatchNorm2d(CHANNELS)

    def weight(self) -> Any:
        weight: Any = None
        for index in range(self.layers):
            own = getattr(self, f"layer{index}").weight
            weight = own.transpose(0, 1) if weight is None else F.conv2d(weight, own, padding=2)
        return weight.transpose(0, 1)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.norm(F.conv2d(x, self.weight(), stride=2, padding=self.layers)))


class EdgeOrChain(nn.Module):
    """One of ECBSR's branches: a 1×1 and a 3×3 in training mode, in eval mode it only gives its weight."""

    def __init__(self, mask: list[list[float]] | None) -> None:
        super().__init__()
        conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.k0, self.b0 = conv.weight, conv.bias
        if mask is None:
            conv = nn.Conv2d(CHANNELS, CHANNELS, 3)
            self.k1, self.b1 = conv.weight, conv.bias
        else:
            self.scale, self.b1 = nn.Parameter(torch.randn(CHANNELS, 1, 1, 1)), nn.Parameter(torch.randn(CHANNELS))
            self.mask = nn.Parameter(torch.tensor(mask).expand(CHANNELS, 1, 3, 3).clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        y = F.pad(F.conv2d(input=x, weight=self.k0, bias=self.b0), (1, 1, 1, 1), "constant", 0)
        border: Any = self.b0
        border = border.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        if hasattr(self, "k1"):
            return F.conv2d(input=y, weight=self.k1, bias=self.b1)
        return F.conv2d(input=y, weight=self.scale * self.mask, bias=self.b1, groups=CHANNELS)

    def kernel(self) -> tuple[Tensor, Tensor]:
        full = (
            self.k1
            if hasattr(self, "k1")
            else torch.diag_embed((self.scale * self.mask)[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1)
        )
        weight = F.conv2d(input=full, weight=self.k0.permute(1, 0, 2, 3))
        bias: Any = self.b0
        own: Any = self.b1
        spread = torch.ones(1, CHANNELS, 3, 3, device=self.k0.device) * bias.view(1, -1, 1, 1)
        return weight, F.conv2d(input=spread.type_as(self.k0), weight=full).view(-1) + own


class ECBSRInItsOwnWords(nn.Module):
    """Branches in training mode, one conv of the weight that they add up to in eval mode (ACM MM 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        sobel, laplace = (
            [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]],
            [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]],
        )
        self.chain, self.sobel, self.laplace = EdgeOrChain(None), EdgeOrChain(sobel), EdgeOrChain(laplace)
        self.act = nn.PReLU(num_parameters=CHANNELS)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            y = self.dense(x) + self.chain(x) + self.sobel(x) + self.laplace(x)
        else:
            weight, bias = self.rep_params()
            y = F.conv2d(input=x, weight=weight, bias=bias, stride=1, padding=1)
        return self.act(y)

    def rep_params(self) -> tuple[Tensor, Any]:
        parts = [branch.kernel() for branch in (self.chain, self.sobel, self.laplace)]
        weights, biases = zip(*parts)
        return self.dense.weight + sum(weights), self.dense.bias + sum(biases)


class LayerScale(nn.Module):
    """x + γ ⊙ conv(x), γ one number per channel (arXiv 2103.17239)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Parameter(torch.rand(1, CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return x + self.gamma * self.conv(x)


class PartialConv(nn.Module):
    """A conv on the first quarter of the channels, then 1×1 on all (FasterNet, arXiv 2303.03667)."""

    def __init__(self, *, sliced: bool) -> None:
        super().__init__()
        self.quarter = CHANNELS // 4
        self.partial = nn.Conv2d(self.quarter, self.quarter, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(self.quarter)
        self.pointwise, self.after = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.sliced = sliced

    def forward(self, x: Tensor) -> Any:
        if self.sliced:
            x = x.clone()
            x[:, : self.quarter] = self.norm(self.partial(x[:, : self.quarter]))
            return F.relu(self.after(self.pointwise(x)))
        first, rest = torch.split(x, [self.quarter, CHANNELS - self.quarter], dim=1)
        return F.relu(self.after(self.pointwise(torch.cat((self.norm(self.partial(first)), rest), 1))))


class Concatenated(nn.Module):
    """Branches side by side, then 1×1 over all of them (Inception, arXiv 1409.4842)."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.branches = nn.ModuleList((conv_norm(3, padding=1), conv_norm(1), conv_norm(5, padding=2)))
        self.mix, self.norm = nn.Conv2d(3 * CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.norm(self.mix(torch.cat([self.activation(branch(x)) for branch in self.branches], 1))))


# the block, and how many convs and BatchNorms are left of it
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "RepVGG": (RepVGG, 1, 0),
    "QARepVGG": (QARepVGG, 1, 0),
    "ACB": (ACB, 1, 0),
    "DBB": (lambda: DBB(strips=True), 1, 0),
    "DBB, by difference": (lambda: DBB(strips=False), 1, 0),
    "MobileOne": (MobileOne, 1, 0),
    "RepMixer": (RepMixer, 1, 0),
    "RepViT": (RepViT, 1, 0),
    "UniRepLKNet": (UniRepLKNet, 1, 0),
    "Conv3XC": (Conv3XC, 1, 0),
    "ECBSR": (ECBSR, 1, 0),
    "OREPA": (OREPA, 1, 0),
    "DBB with a residual": (lambda: DBBWithResidual(1), 1, 0),
    "DBB with a residual, in groups": (lambda: DBBWithResidual(4), 1, 0),
    "OREPA, in groups": (OREPAInGroups, 1, 0),
    "OREPA, large": (OREPALargeConv, 1, 0),
    "ECBSR, in its own words": (ECBSRInItsOwnWords, 1, 0),
    "LayerScale": (LayerScale, 1, 0),
    "PartialConv, split": (lambda: PartialConv(sliced=False), 2, 0),
    "PartialConv, sliced": (lambda: PartialConv(sliced=True), 2, 0),
    "Concatenated": (lambda: Concatenated(nn.Identity()), 1, 0),
    "Concatenated, activated": (lambda: Concatenated(nn.ReLU()), 4, 0),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_becomes_what_it_promises(name: str) -> None:
    build, convs, norms = BLOCKS[name]
    torch.manual_seed(0)
    model = randomize_batch_norm(nn.Sequential(build(), nn.Conv2d(CHANNELS, 4, 1)).double()).eval()
    x = torch.randn(2, CHANNELS, 9, 12, dtype=torch.float64)
    fused = repfx.fuse(model)
    assert_equivalent(fused, model, x)
    left = [sum(map(kind, fused.modules())) for kind in (is_conv, is_batch_norm)]
    # a block without an activation at its end also absorbs the conv that follows
    assert left in ([convs + 1, norms], [convs, norms]), str(repfx.report(fused))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_expanded_and_fused_again(name: str) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(nn.Sequential(BLOCKS[name][0](), nn.Conv2d(CHANNELS, 4, 3)).double()).eval()
    x = torch.randn(2, CHANNELS, 9, 12, dtype=torch.float64)
    expanded = repfx.expand(model, "repvgg")
    assert_equivalent(expanded, model, x)
    randomize_batch_norm(expanded, seed=1)
    fused = repfx.fuse(expanded)
    assert_equivalent(fused, expanded, x)
