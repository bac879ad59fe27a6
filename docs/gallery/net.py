"""The net of the gallery: six convs, for grey images of 8×8 pixels."""

from __future__ import annotations

from torch import Tensor, nn


class Net(nn.Module):
    """A stem and two residual stages; the second one halves the image."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = Unit(1, 16)
        self.stage1 = nn.ModuleDict({"a": Unit(16, 16), "b": Unit(16, 16)})
        self.stage2 = nn.ModuleDict(
            {"a": Unit(16, 32, 2), "b": Unit(32, 32), "shortcut": Unit(16, 32, 2, kernel_size=1)}
        )
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, `(images, num_classes)`, of images `(images, 1, height, width)`."""
        x = self.stem(x).relu()
        x = (x + self.stage1["b"](self.stage1["a"](x).relu())).relu()
        x = (self.stage2["shortcut"](x) + self.stage2["b"](self.stage2["a"](x).relu())).relu()
        return self.head(x.mean((2, 3)))


class Unit(nn.Sequential):
    """A conv and its BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
