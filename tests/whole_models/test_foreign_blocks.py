"""Multi-branch blocks as other people write them, from their public descriptions: each becomes the plain convs that its paper promises.

None of them is prepared for repfx. Each must give the same outputs in float64, with a given number of convs and BatchNorms left.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import repfx
from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.testing import assert_equivalent, randomize_batch_norm
from tests.foreign_blocks.parts import CHANNELS
from tests.foreign_blocks.table import BLOCKS


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_becomes_what_it_promises(name: str) -> None:
    build, convs, norms = BLOCKS[name]
    torch.manual_seed(0)
    model = randomize_batch_norm(nn.Sequential(build(), nn.Conv2d(CHANNELS, 4, 1)).double()).eval()
    x = torch.randn(2, CHANNELS, 9, 12, dtype=torch.float64)
    fused = repfx.fuse(model)
    assert_equivalent(fused, model, x)
    left = [sum(map(kind, fused.modules())) for kind in (is_conv, is_batch_norm)]
    # a block without an activation at its end also absorbs the conv that follows
    assert left in ([convs + 1, norms], [convs, norms]), str(repfx.report(fused))


@pytest.mark.slow_one_in(5)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_expanded_and_fused_again(name: str) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(nn.Sequential(BLOCKS[name][0](), nn.Conv2d(CHANNELS, 4, 3)).double()).eval()
    x = torch.randn(2, CHANNELS, 9, 12, dtype=torch.float64)
    expanded = repfx.expand(model, "repvgg")
    assert_equivalent(expanded, model, x)
    randomize_batch_norm(expanded, seed=1)
    fused = repfx.fuse(expanded)
    assert_equivalent(fused, expanded, x)
