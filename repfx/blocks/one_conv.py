"""`become_one_conv`: a block that is fused in place, for tools that ask each module to fuse itself."""

from __future__ import annotations

import torch

from repfx.algebra.baking import conv_from_kernel
from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer, has_hooks
from repfx.blocks.branch import Chain
from repfx.errors import InvalidInput
from repfx.records.journal import mark_as_rebuilt


def kernel_in_eval_mode(block: Layer, what: str) -> Kernel:
    """Return the kernel of a block in eval mode, in float64, from which it can become a plain conv.

    Args:
        what: names the block in an error.

    Raises:
        InvalidInput: a hook listens to something in the block, and would never be called again.
    """
    listening = next(
        (path for path, module in block.named_modules() if module is not block and has_hooks(module)), None
    )
    if listening is not None:
        raise InvalidInput(f"{what} can't become a plain conv: {listening!r} in it has hooks. Remove them first.")
    with torch.no_grad():
        kernel: Kernel = block.equivalent_kernel(block.conv.weight.detach().double())
    return kernel


@torch.inference_mode(False)
def become_one_conv(block: Layer) -> None:
    """Leave nothing in a block but one plain conv, which computes what the block computes in eval mode.

    The conv is a new one. The BatchNorm of the site is folded into it. The journal of the model that holds the block ends here.

    Raises:
        InvalidInput: as `kernel_in_eval_mode`, or a merged weight isn't finite. The block is as it was.
    """
    if list(block._modules) == ["origin"] and list(block.origin._modules) == ["conv"]:
        return
    what = f"the block {block.site}"
    conv = conv_from_kernel(kernel_in_eval_mode(block, what), block.conv, what).train(block.training)
    block.wake()
    conv.requires_grad_(block.conv.weight.requires_grad)
    block._modules.clear()
    block.origin = Chain(iter({"conv": conv}.items()), block.site).train(block.training)
    block.norm_path = block.norm_behind = block.origin_scale = None
    block.squeezed = block.holds_statistics = block.recomputes = False
    mark_as_rebuilt(block)
    mark_as_rebuilt(conv)
