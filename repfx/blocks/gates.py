"""Gates: one learned factor on each path of a block, by which a search decides what runs. A path whose gate is closed doesn't run at all.

There are two styles. ``straight_through`` (RepNAS, eq. 11 to 13): an open gate multiplies by exactly 1, with the gradient of σ(α + ζ),
where ζ is the noise of the step. ``sigmoid`` (IRepNAS, eq. 6 and 7): a gate multiplies its branch by σ(α), and one more gate multiplies
the sum of the branches by σ(β).
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
    """One learned factor for all channels of ``(batch, channels, *axes)``. A subclass computes the factor from α.

    The parameter α has no axes and begins with 0.

    Args:
        channels, dimensions: channels and number of axes of the input.
        like: tensor that gives α its device and its dtype, at least float32.
    """

    style: ClassVar[str]
    meaning: ClassVar[Literal["affine", "identity"]] = "affine"  # how a kernel reads an open gate

    def __init_subclass__(cls) -> None:
        GATES[cls.style] = cls
        reads(cls)(_read_gate)

    def __init__(self, channels: int, dimensions: int, like: Tensor) -> None:
        super().__init__()
        wide = torch.promote_types(like.dtype, torch.float32)  # else Adam's small steps would vanish
        self.alpha = nn.Parameter(like.new_zeros((), dtype=wide))
        self.channels = channels
        self.dimensions = dimensions

    def factor(self) -> Tensor:
        """Return the factor of an open gate; differentiable."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor()

    def kernel(self, like: Tensor) -> Kernel:
        """Return the open gate as a kernel; differentiable."""
        return Kernel.diagonal(self.factor().to(like).expand(self.channels), None, self.dimensions)


def _read_gate(gate: Layer) -> Meaning:
    return Meaning(gate.meaning, gate.dimensions, gate.channels, lambda like, channels, dimensions: gate.kernel(like))


class StraightThrough(Gate):
    """A gate of factor 1 with the gradient of σ(α + ζ) (RepNAS). The buffer ζ is set for each step."""

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
    """A gate of factor σ(α) (IRepNAS)."""

    style = "sigmoid"

    def factor(self) -> Tensor:
        return torch.sigmoid(self.alpha)


class Gates(nn.Module):
    """The gates of a block, by the names of its paths, and which of them are open.

    Open gates aren't learned but chosen, separately for training and eval mode. A search draws other paths for each step of the training,
    and evaluates the paths that it thinks best. At first all gates are open.

    Args:
        names: names of the paths that get a gate; the others always run.
        style: style of the gates, from `GATES`.
        channels, dimensions: channels and number of axes of the block's output.
        like: tensor that gives dtype and device.
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
        """Whether an open gate multiplies by another factor than 1."""
        return GATES[self.style].meaning == "affine"

    @property
    def names(self) -> tuple[str, ...]:
        """The paths that have a gate."""
        return tuple(self.of.keys())  # not tuple(self.of): torch.compile of torch 2.8 can't iterate over a ModuleDict

    @property
    def open(self) -> tuple[str, ...]:
        """The paths whose gates are open in the module's present mode."""
        return self._open[self.training]

    def open_in(self, training: bool) -> tuple[str, ...]:
        """Return the names of the paths whose gates are open in one mode."""
        return self._open[training]

    def choose(self, names: Collection[str], modes: Sequence[bool] = (True, False)) -> None:
        """Open these gates and close the others.

        Args:
            names: paths whose gates are opened.
            modes: modes that the choice holds for; True is training.

        Raises:
            UnknownName: a path has no gate.
        """
        for name in names:
            if name not in self.of:
                raise UnknownName("gate", name, self.of)
        self._open |= dict.fromkeys(modes, tuple(name for name in self.of if name in names))

    def factors(self, name: str) -> list[Gate]:
        """Return the gates that the output of a path goes through, its own first; none for a path that always runs."""
        if name not in self.of:
            return []
        return [self.of[name], *([self.block] if "block" in self._modules else [])]  # type: ignore[list-item]

    def factor_of(self, name: str) -> Tensor:
        """Return the product of a path's gates, the factor of its output if it runs, in float64."""
        factors = [gate.factor().detach().double() for gate in self.factors(name)]
        return (
            math.prod(factors[1:], start=factors[0]) if factors else torch.ones((), dtype=torch.float64, device="cpu")
        )

    def importance_of(self, name: str) -> float | None:
        """Return the learned importance of a path: α, or σ(α) · σ(β) in the style ``sigmoid``; None for a path without a gate."""
        if name not in self.of:
            return None
        return (
            float(self.factor_of(name)) if self.style == Sigmoid.style else float(self.factors(name)[0].alpha.detach())
        )

    def remove(self, name: str) -> None:
        """Remove the gate of a path that is being removed."""
        if name in self.of:
            del self.of[name]
            self._open = {mode: tuple(each for each in names if each != name) for mode, names in self._open.items()}

    def get_extra_state(self) -> Tensor:
        """Return which gates are open, for `state_dict`: one row for training mode, one for eval mode."""
        rows = [[name in self._open[mode] for name in self.of] for mode in (True, False)]
        return torch.tensor(rows, dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Open and close gates as `get_extra_state` found them."""
        if tuple(state.shape) != (2, len(self.of)):
            raise InvalidInput(
                f"the state of {len(self.of)} gates needs a tensor {(2, len(self.of))}, not {tuple(state.shape)}."
            )
        for mode, row in zip((True, False), state.tolist()):
            self.choose([name for name, is_open in zip(self.of, row) if is_open], (mode,))

    def extra_repr(self) -> str:
        return f"open: {', '.join(self.open) or 'none'}"


def gates_in(model: nn.Module) -> dict[str, Gates]:
    """Return the `Gates` of a model by the paths of their blocks."""
    return {path.rpartition(".")[0]: found for path, found in model.named_modules() if isinstance(found, Gates)}
