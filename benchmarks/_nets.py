"""The nets of the field's papers for small images: ten classes, 32 × 32."""

from __future__ import annotations

import torchvision
from torch import nn


def vgg16() -> nn.Module:
    """VGG-16 with BatchNorm and one linear layer."""
    features = torchvision.models.vgg16_bn().features
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512, 10))


def resnet18() -> nn.Module:
    """ResNet-18 that begins with a 3×3 conv and doesn't pool."""
    model: nn.Module = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
