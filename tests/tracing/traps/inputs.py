"""Models that check what they were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.tracing.traps.parts import Block


class Unpacks(Block):
    def forward(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            x = x[0]
        return super().forward(x)


class Lists(Block):
    def forward(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            x = x[0]
        return super().forward(x)


class IsTensor(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(x if torch.is_tensor(x) else x[0])


class WritesText(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x * 2 if str(x.dtype) == "torch.float64" else x)


class FormatsText(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x * 2 if f"{x.device}" == "cpu" else x)


class Catches(Block):
    def forward(self, x: Tensor) -> Any:
        try:
            if x.shape[0] > 1:
                x = x * 2
        except Exception:
            pass
        return super().forward(x)


class Sizes(Block):
    """A model that checks the type of sizes, which are no tensors."""

    def forward(self, x: Tensor) -> Any:
        height = x.shape[2]
        return super().forward(x * (2 if isinstance(height, int) and isinstance(x.shape, tuple) else 3))


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        inside: Tensor = x.abs() <= 1
        return gradient * inside


class Binarized(Block):
    """A model that calls a C++ function, which checks that it got a tensor."""

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(Sign.apply(x)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=True)


class CopiesItsInput(Block):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(torch.as_tensor(x)))


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "isinstance, tensor": Unpacks,
    "isinstance, list": Lists,
    "is_tensor": IsTensor,
    "dtype as text": WritesText,
    "device as text": FormatsText,
    "error caught": Catches,
    "types of sizes": Sizes,
    "an autograd function": Binarized,
    "checkpointed": Checkpointed,
    "as_tensor": CopiesItsInput,
}
