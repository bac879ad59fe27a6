"""A net small enough to train in a test; the command line takes it as `tests/tiny.py:net`."""

from __future__ import annotations

from torch import nn


def net(num_classes: int = 10, width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes),
    )


def fixed() -> nn.Module:
    """A net of two classes, whatever number is asked for."""
    return net(2)


def no_model() -> str:
    return "a string"


def broken() -> nn.Module:
    raise RuntimeError("this net is broken")
