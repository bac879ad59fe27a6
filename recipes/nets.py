"""The plain nets of the papers that torchvision doesn't have: those for images of 32 × 32, MobileNet of 2017, and RepVGG.

A recipe names one as ``repfx.recipes.nets:vgg16``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from repfx.errors import UnknownName

_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convs of each stage
_PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
_DEPTHS = {"A": (1, 2, 4, 14, 1), "B": (1, 4, 6, 16, 1)}
_WIDTHS = {
    "A0": (0.75, 2.5),
    "A1": (1, 2.5),
    "A2": (1.5, 2.75),
    "B0": (1, 2.5),
    "B1": (2, 4),
    "B2": (2.5, 5),
    "B3": (3, 5),
}
_STRIDES, _STRIDES_OF_SMALL = (2, 2, 2, 2, 2), (1, 1, 2, 2, 1)


def vgg16(num_classes: int = 10) -> nn.Sequential:
    """VGG-16 with BatchNorm and one linear layer, for images of 32 × 32.

    >>> import torch
    >>> vgg16(num_classes=100)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in _VGG16:
        for _ in range(depth):
            layers += _layer(channels, width).children()
            channels = width
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, num_classes))


def resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18 that begins with a 3×3 conv and doesn't pool, for images of 32 × 32."""
    from torchvision import models

    return _for_small_images(models.resnet18, num_classes)


def resnet101(num_classes: int = 10) -> nn.Module:
    """ResNet-101 that begins with a 3×3 conv and doesn't pool, for images of 32 × 32."""
    from torchvision import models

    return _for_small_images(models.resnet101, num_classes)


def _for_small_images(build: Callable[..., nn.Module], num_classes: int) -> nn.Module:
    model = build(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def mobilenet(num_classes: int = 1000) -> nn.Sequential:
    """MobileNet of 2017: a 3×3 conv, then 13 pairs of a depthwise 3×3 and a 1×1 conv.

    >>> import torch
    >>> mobilenet(10)(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict(first=_layer(3, 32, 2))
    channels = 32
    for number, (out, stride) in enumerate(_PAIRS):
        depthwise = _layer(channels, channels, stride, groups=channels)
        stages[f"pair{number}"] = nn.Sequential(
            OrderedDict(depthwise=depthwise, pointwise=_layer(channels, out, kernel_size=1))
        )
        channels = out
    stages |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(channels, num_classes)}
    return nn.Sequential(stages)


def repvgg(num_classes: int = 1000, size: str = "A0", width: float = 1.0, small_images: bool = False) -> nn.Sequential:
    """RepVGG in its fused form: 3×3 convs alone, beside which `expand` puts the branches.

    Args:
        size: size of the net: A0 to A2, or B0 to B3.
        width: factor on all numbers of channels.
        small_images: whether the net has two strides instead of five, for images of 32 × 32.

    Raises:
        UnknownName: no such size.

    >>> [stage[0].conv.out_channels for stage in repvgg(size="A1", width=0.25)[:5]]
    [16, 16, 32, 64, 320]
    """
    if size not in _WIDTHS:
        raise UnknownName("size of RepVGG", size, _WIDTHS)
    factor, last = _WIDTHS[size]
    widths = (min(64, 64 * factor), 64 * factor, 128 * factor, 256 * factor, 512 * last)
    strides = _STRIDES_OF_SMALL if small_images else _STRIDES
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number, (depth, each, stride) in enumerate(zip(_DEPTHS[size[0]], widths, strides)):
        out = int(each * width)
        first = _layer(channels, out, stride)
        stages[f"stage{number}"] = nn.Sequential(first, *(_layer(out, out) for _ in range(depth - 1)))
        channels = out
    stages |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(channels, num_classes)}
    return nn.Sequential(stages)


def _layer(
    in_channels: int, out_channels: int, stride: int = 1, *, kernel_size: int = 3, groups: int = 1
) -> nn.Sequential:
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    parts = {"conv": conv, "norm": nn.BatchNorm2d(out_channels), "activation": nn.ReLU(inplace=True)}
    return nn.Sequential(OrderedDict(parts))
