"""`recomputed`: activation checkpointing of a module that runs again just as it was, and whose BatchNorms count a batch once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repfx.errors import InvalidInput


def recomputed(forward: Callable[[Tensor], Tensor], block: nn.Module, input: Tensor) -> Tensor:
    """Run `forward` of a block and keep only the input; the backward pass runs it again. BatchNorms' statistics count the batch once."""
    output: Tensor = checkpoint(forward, input, use_reentrant=False, context_fn=partial(_contexts, block))
    return output


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _AsItWas(block)


class _AsItWas:
    """A context in which a block has the modes, parameters and buffers it had when this object was created.

    Writes into buffers inside it are discarded. Entering it raises `InvalidInput` if a parameter was written into since,
    because torch, too, refuses to go back through changed tensors.
    """

    def __init__(self, block: nn.Module) -> None:
        self._then = [_State.of(module).with_buffers_of_its_own() for module in block.modules()]
        self._versions = [(name, each, each._version) for name, each in block.named_parameters()]
        self._now: list[_State] = []

    def __enter__(self) -> None:
        changed = next((name for name, each, version in self._versions if each._version != version), None)
        if changed is not None:
            raise InvalidInput(
                f"{changed!r} of a block that recomputes was written into between forward and backward pass, so the block can't run "
                "again as it was: write into parameters after the backward pass."
            )
        self._now = [_State.of(state.module) for state in self._then]
        for state in self._then:
            state.with_buffers_of_its_own().restore()

    def __exit__(self, *_: object) -> None:
        for state in self._now:
            state.restore()


@dataclass(frozen=True)
class _State:
    """The mode, parameters and buffers that a module itself, without its children, had at some time."""

    module: nn.Module
    training: bool
    parameters: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor | None]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        return cls(module, module.training, dict(module._parameters), dict(module._buffers))

    def with_buffers_of_its_own(self) -> _State:
        return replace(
            self, buffers={name: None if each is None else each.clone() for name, each in self.buffers.items()}
        )

    def restore(self) -> None:
        self.module.training = self.training
        self.module._parameters.update(self.parameters)  # type: ignore[arg-type]
        self.module._buffers.update(self.buffers)
