"""Gates: one learned factor on each path of a block, by which a search decides what runs; a path whose gate is closed doesn't run at all.

Two styles. ``straight_through`` (RepNAS, eq. 11 to 13): an open gate multiplies by exactly 1, with the gradient of σ(α + ζ), where ζ is the
noise of the step. ``sigmoid`` (IRepNAS, eq. 6 and 7): a gate multiplies by σ(α), and what all branches add by σ(β).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer
from repfx.algebra.meaning import Meaning, reads
from repfx.errors import InvalidInput, UnknownName

GATES: dict[str, type[Gate]] = {}


class Gate(nn.Module):
    """One learned factor for all channels of ``(batch, channels, *axes)``; a subclass says what α makes of it.

    Args:
        like: gives the device of α, a parameter without axes that begins with 0, and its dtype, float32 at least.
    """

    style: ClassVar[str]
    meaning: ClassVar[Literal["affine", "identity"]] = "affine"  # what an open one is in a kernel

    def __init_subclass__(cls) -> None:
        GATES[cls.style] = cls
        reads(cls)(_read_gate)

    def __init__(self, channels: int, dimensions: int, like: Tensor) -> None:
        super().__init__()
        wide = torch.promote_types(like.dtype, torch.float32)  # else Adam's small steps vanish
        self.alpha = nn.Parameter(like.new_zeros((), dtype=wide))
        self.channels = channels
        self.dimensions = dimensions

    def factor(self) -> Tensor:
        """What the gate multiplies by if it is open; differentiable."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor()

    def kernel(self, like: Tensor) -> Kernel:
        """As a linear map, differentiable."""
        return Kernel.diagonal(self.factor().to(like).expand(self.channels), None, self.dimensions)


def _read_gate(gate: Layer) -> Meaning:
    return Meaning(gate.meaning, gate.dimensions, gate.channels, lambda like, channels, dimensions: gate.kernel(like))


class StraightThrough(Gate):
    """1, with the gradient of σ(α + ζ); ζ is a buffer that is set for each step (RepNAS)."""

    style = "straight_through"
    meaning = "identity"
    noise: Tensor

    def __init__(self, channels: int, dimensions: int, like: Tensor) -> None:
        super().__init__(channels, dimensions, like)
        self.register_buffer("noise", torch.zeros_like(self.alpha.detach()))

    def factor(self) -> Tensor:
        slope = torch.sigmoid(self.alpha + self.noise)
        return 1 + (slope - slope.detach())


class Sigmoid(Gate):
    """σ(α) (IRepNAS)."""

    style = "sigmoid"

    def factor(self) -> Tensor:
        return torch.sigmoid(self.alpha)


class Gates(nn.Module):
    """The gates of a block, by the names of its paths, and which of them are open.

    What is open isn't learned but chosen, for training and for eval mode apart: a search draws other paths for each step of the
    training, and evaluates the ones that it holds for the best. At first all are open.

    Args:
        names: of the paths that get a gate; the others always run.
        style: of the gates, from `GATES`.
        channels, dimensions: of the block's output.
        like: gives dtype and device.
    """

    def __init__(self, names: Iterable[str], style: str, channels: int, dimensions: int, like: Tensor) -> None:
        super().__init__()
        if style not in GATES:
            raise UnknownName("style of gates", style, GATES)
        self.style = style
        self.of = nn.ModuleDict({name: GATES[style](channels, dimensions, like) for name in names})
        if style == Sigmoid.style:
            self.block = Sigmoid(channels, dimensions, like)
        self._open = dict.fromkeys((True, False), tuple(self.of))

    @property
    def multiplies(self) -> bool:
        """Whether an open gate multiplies by something else than 1."""
        return GATES[self.style].meaning == "affine"

    @property
    def names(self) -> tuple[str, ...]:
        """The paths that have a gate."""
        return tuple(self.of.keys())  # not tuple(self.of): torch.compile of torch 2.8 can't iterate over a ModuleDict

    @property
    def open(self) -> tuple[str, ...]:
        """The paths whose gates are open in the mode that the module is in."""
        return self._open[self.training]

    def open_in(self, training: bool) -> tuple[str, ...]:
        """The paths whose gates are open in one mode."""
        return self._open[training]

    def choose(self, names: Collection[str], modes: Sequence[bool] = (True, False)) -> None:
        """Open these gates and close the others.

        Args:
            modes: for which modes; True is training.

        Raises:
            UnknownName: there is no gate of that name.
        """
        for name in names:
            if name not in self.of:
                raise UnknownName("gate", name, self.of)
        self._open |= dict.fromkeys(modes, tuple(name for name in self.of if name in names))

    def factors(self, name: str) -> list[Gate]:
        """The gates that the output of a path goes through, its own first; none for a path that always runs."""
        if name not in self.of:
            return []
        return [self.of[name], *([self.block] if "block" in self._modules else [])]  # type: ignore[list-item]

    def factor_of(self, name: str) -> Tensor:
        """What the output of a path is multiplied by if it runs, in float64."""
        factors = [gate.factor().detach().double() for gate in self.factors(name)]
        return (
            math.prod(factors[1:], start=factors[0]) if factors else torch.ones((), dtype=torch.float64, device="cpu")
        )

    def importance_of(self, name: str) -> float | None:
        """What has been learned of a path: α, or σ(α) · σ(β) where gates multiply by it; None for a path without a gate."""
        if name not in self.of:
            return None
        return (
            float(self.factor_of(name)) if self.style == Sigmoid.style else float(self.factors(name)[0].alpha.detach())
        )

    def remove(self, name: str) -> None:
        """Take the gate of a path away, which leaves."""
        if name in self.of:
            del self.of[name]
            self._open = {mode: tuple(each for each in names if each != name) for mode, names in self._open.items()}

    def get_extra_state(self) -> Tensor:
        """Which gates are open, for `state_dict`: one row for training mode, one for eval mode."""
        rows = [[name in self._open[mode] for name in self.of] for mode in (True, False)]
        return torch.tensor(rows, dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The reverse of `get_extra_state`."""
        if tuple(state.shape) != (2, len(self.of)):
            raise InvalidInput(f"the state of {len(self.of)} gates can't be taken from a tensor {tuple(state.shape)}.")
        for mode, row in zip((True, False), state.tolist()):
            self.choose([name for name, is_open in zip(self.of, row) if is_open], (mode,))

    def extra_repr(self) -> str:
        return f"open: {', '.join(self.open) or 'none'}"


def gates_in(model: nn.Module) -> dict[str, Gates]:
    """The `Gates` of a model by the paths of their blocks."""
    return {path.rpartition(".")[0]: found for path, found in model.named_modules() if isinstance(found, Gates)}
