"""Small nets for tests of quantization-aware training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import repfx
from repfx.testing import randomize_batch_norm

X = torch.rand(6, 3, 12, 10, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """Two convs with BatchNorm, of which the second can have an identity beside it, and a linear layer."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps)
        self.two, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.one(x)))
        x = torch.relu(self.norm2(self.two(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Doubting(nn.Module):
    """A module that draws in training mode which images it leaves out, as stochastic depth does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x[:, :1, :1, :1], 0.5)) if self.training else x


class Joined(nn.Module):
    """A residual around two convs, which training leaves out at times, a concatenation, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        self.one, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(8)
        self.three, self.norm3 = nn.Conv2d(8, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.pool, self.head = nn.MaxPool2d(2), nn.Sequential(nn.Dropout(0.3), nn.Linear(13, 4))
        self.doubt = Doubting()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm0(self.stem(x))))
        x = torch.relu(x + self.doubt(self.norm2(self.two(torch.relu(self.norm1(self.one(x)))))))
        x = torch.cat([x, torch.relu(self.norm3(self.three(x)))], 1)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def trained(model: nn.Module, spec: str | None = "repvgg") -> nn.Module:
    """A model as it is after a training: with branches, and BatchNorms whose numbers are far from those of new ones."""
    torch.manual_seed(0)
    model = model if spec is None else repfx.expand(model, spec)
    randomize_batch_norm(model)
    return model.eval()
