"""Peak memory of a call beyond what was allocated before: everything that it allocates for tensors, even if it frees it again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """A counter of the storages that operations make, until each is freed. It doesn't see what an operation needs only while it runs.

    torch's profiler counts them, too, but loses track of calls that make as many small tensors as a rewrite does.

    >>> import torch
    >>> with Allocations() as found:
    ...     x = torch.zeros(4, dtype=torch.float64)
    ...     y = x[1:] + 1
    ...     del y
    >>> found.now, found.peak
    (32, 56)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if _key(tensor) not in given | self._alive and tensor.device.type == "cpu":
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        self._alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _tensors(values: Any) -> Iterable[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def peak_of(call: Callable[[], object]) -> int:
    """Return the bytes of tensors that a call holds at its peak, on the CPU."""
    found = Allocations()
    with found:
        call()
    return found.peak


def peak_on_gpu(call: Callable[[], object]) -> int:
    """Return the bytes of GPU tensors that a call holds at its peak, including the workspaces of libraries."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def bytes_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
