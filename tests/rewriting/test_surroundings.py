"""Steps around a site are taken out of a merged kernel, or the reason is given why they can't be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.meaning import kernel_of
from repfx.rewriting.surroundings import CONV, NORM, Steps, Surroundings, with_steps
from repfx.rewriting.view import META


def pooled(factor: float = 3.0) -> tuple[Surroundings, Kernel, Kernel]:
    """Return the surroundings of ``norm(factor · conv(x)) + average_pool(x)``, and the kernels of a conv of 1×1 and of the whole."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    scaled = graph.call_function(torch.mul, (graph.call_module(CONV, (x,)), factor))
    pool = graph.call_function(F.avg_pool2d, (x, 3, 1, 1))
    graph.output(graph.call_function(torch.add, (graph.call_module(NORM, (scaled,)), pool)))
    conv = kernel_of(nn.Conv2d(4, 4, 1, groups=2).double(), torch.empty(0, dtype=torch.float64), 4, 2)
    scale = torch.full((4,), factor, dtype=torch.float64)
    average = Kernel.average_pool(scale, channels=4, kernel_size=(3, 3), padding=((1, 1), (1, 1)))
    whole = replace(conv, bias=None).fold_affine(scale, conv.bias).add(average)
    around = Surroundings("conv", True, conv.to(META), torch.float64)
    return with_steps(around, graph, nn.Module(), ""), conv, whole


def steps_of(around: Surroundings) -> Any:
    return Steps(around, nn.Conv2d(4, 4, 3, padding=1, groups=2).double(), nn.Module(), lambda path: path)


def test_a_conv_with_a_smaller_window_than_what_is_beside_it() -> None:
    around, conv, whole = pooled()
    found = steps_of(around).site_kernel(whole, torch.float64)
    torch.testing.assert_close(found.weight, conv.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.bias, conv.bias, rtol=1e-12, atol=1e-12)


def test_weights_that_changed_beside_those_of_the_conv() -> None:
    around, _, whole = pooled()
    changed = whole.weight.clone()
    changed[0, 0, 0, 2] += 1e-3
    with pytest.raises(NoKernel, match="where its own conv has none"):
        steps_of(around).site_kernel(replace(whole, weight=changed), torch.float64)
    steps_of(around).site_kernel(replace(whole, weight=whole.weight.float().double()), torch.float32)


def test_a_factor_of_zero() -> None:
    around, _, whole = pooled(0.0)
    with pytest.raises(NoKernel, match="a factor of zero"):
        steps_of(around).site_kernel(whole, torch.float64)


def test_sizes_that_are_others_now() -> None:
    around, _, whole = pooled()
    for other in (replace(whole, stride=(2, 1)), replace(whole, weight=whole.weight[..., :2])):
        with pytest.raises(NoKernel, match="sizes"):
            steps_of(around).site_kernel(other, torch.float64)


def test_steps_that_are_not_known() -> None:
    around, _, _ = pooled()
    with pytest.raises(NoKernel, match="for a reason"):
        steps_of(replace(around, steps=None, reason="for a reason"))
