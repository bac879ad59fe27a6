"""Convs whose gradients torch computes wrongly, or with writes outside its memory.

On x86 CPUs, torch takes oneDNN's kernels. For the weights' gradient of a strided 1×1 conv in channels last, oneDNN makes room for the
channels of the input alone, but then writes blocks of 8 channels (AVX2) or 16 (AVX-512). This happens in float32, without padding and
without groups, where the sizes of the input are multiples of the stride. A transposed conv does the same with the channels of its output.
The process aborts, hangs, or goes on with wrong gradients. torch 2.8 and 2.15 were measured, and both do so.
"""

from __future__ import annotations

from collections.abc import Iterable

_BLOCK = 16  # channels that oneDNN writes at once with AVX-512


def may_corrupt_memory(
    in_channels: int, kernel_size: Iterable[int], stride: Iterable[int], padding: Iterable[int]
) -> bool:
    """Whether torch may write outside its memory in the backward pass of such a conv, if it runs in channels last on a CPU.

    >>> may_corrupt_memory(3, (1, 1), (2, 2), (0, 0))
    True
    >>> may_corrupt_memory(16, (1, 1), (2, 2), (0, 0)), may_corrupt_memory(3, (1, 1), (1, 1), (0, 0))
    (False, False)
    """
    pointwise, strided = all(size == 1 for size in kernel_size), any(step > 1 for step in stride)
    return pointwise and strided and not any(padding) and in_channels < _BLOCK
