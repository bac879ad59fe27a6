"""`RepBlock`: its sum, its one kernel, and how its origin absorbs a branch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.layers import Layer
from repfx.blocks.block import RepBlock
from repfx.blocks.branch import KINDS, refusal_of_branch
from repfx.blocks.origin import absorb_branch
from repfx.blocks.spec import BranchSpec
from repfx.blocks.stages import Norm
from repfx.errors import InvalidInput, UnknownName
from repfx.passes.gate import gate
from repfx.testing import assert_same_map, randomize_batch_norm

NORMS = ["batch_norm", "scale", "none"]
CONV_FORMS: dict[str, dict[str, object]] = {
    "plain": {"padding": 1},
    "strided": {"padding": 1, "stride": 2},
    "depthwise": {"padding": 1, "groups": 4},
    "reflect": {"padding": 1, "padding_mode": "reflect", "bias": False},
    "same": {"padding": "same", "dilation": 2},
}


def conv_of(form: str) -> Layer:
    return nn.Conv2d(4, 4, 3, **CONV_FORMS[form])  # type: ignore[arg-type]


def example() -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64)


def block_of(conv: Layer, norm: str = "batch_norm", kinds: tuple[str, ...] = tuple(KINDS)) -> RepBlock:
    """A block with all of `kinds` that fit the conv, in float64 and eval mode, its BatchNorms random."""
    site = ConvSpec.of(conv)
    fitting = [kind for kind in kinds if refusal_of_branch(BranchSpec(kind), site) is None]
    branches = {kind: KINDS[kind](site, Norm(norm), conv.weight) for kind in fitting}
    own = nn.BatchNorm2d(conv.out_channels, eps=1e-3) if norm == "batch_norm" else None
    block = RepBlock(conv, own, branches)
    return randomize_batch_norm(block).double().eval()  # type: ignore[return-value]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", CONV_FORMS)
def test_the_equivalent_kernel_is_what_forward_computes(form: str, norm: str) -> None:
    block, x = block_of(conv_of(form), norm), example()
    kernel = block.equivalent_kernel(x)
    assert len(block.branches) > 3
    assert kernel.weight.shape == block.conv.weight.shape
    assert_same_map(kernel, block, x)


@pytest.mark.parametrize("form", CONV_FORMS)
def test_forward_is_the_sum_of_origin_and_branches(form: str) -> None:
    block, x = block_of(conv_of(form)), example()
    conv, norm = block.conv, block.norm
    assert norm is not None
    for mode in (True, False):
        block.train(mode)
        assert_same_map(block, lambda x: norm(conv(x)) + sum(b(x) for b in block.branches.values()), x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", CONV_FORMS)
def test_absorbing_keeps_the_function(form: str, norm: str) -> None:
    block, x = block_of(conv_of(form), norm), example()
    before = copy.deepcopy(block)
    for name in list(block.branches):
        absorb_branch(block, name)
        assert name not in block.branches
        assert_same_map(block, before, x)
    assert [name for name, _ in block.named_children()] == ["origin"]


@pytest.mark.parametrize("gamma", [0.0, -1.5, 1e-12])
@pytest.mark.parametrize("which", ["origin", "branch", "both"])
def test_absorbing_divides_by_no_gamma(which: str, gamma: float) -> None:
    block, x = block_of(conv_of("plain"), kinds=("1x1", "1x1-kxk")), example()
    with torch.no_grad():
        if which in ("origin", "both"):
            block.norm.weight.fill_(gamma)  # type: ignore[union-attr]
        if which in ("branch", "both"):
            for branch in block.branches.values():
                branch.last_norm.weight.fill_(gamma)  # type: ignore[union-attr]
    before = copy.deepcopy(block)
    absorb_branch(block, "1x1")
    absorb_branch(block, "1x1-kxk")
    assert_same_map(block, before, x)
    assert all(bool(torch.isfinite(value).all()) for value in block.state_dict().values())


def test_absorbing_keeps_the_parameters_of_the_origin() -> None:
    """The optimizer must be able to go on with the parameters that it holds."""
    block = block_of(conv_of("plain"))
    before = list(block.origin.parameters())
    buffers = list(block.origin.buffers())
    absorb_branch(block, "1x1")
    assert len(before) == 4
    assert all(now is then for now, then in zip(block.origin.parameters(), before, strict=True))
    assert all(now is then for now, then in zip(block.origin.buffers(), buffers, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absorbing_keeps_the_dtype(dtype: torch.dtype) -> None:
    """The function is kept to a few roundings: conv weight, mean, γ and β are rounded once each."""
    block = block_of(conv_of("plain"), kinds=("1x1", "identity")).to(dtype)
    before = copy.deepcopy(block).double()
    absorb_branch(block, "1x1")
    tensors = [tensor for tensor in block.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} == {dtype}
    assert_same_map(copy.deepcopy(block).double(), before, example(), 8 * torch.finfo(dtype).eps)


def test_moments_of_absorbed_branches_add_up() -> None:
    """The origin's BatchNorm outputs, in training mode, mean Σβ and variance Σγ²·σ² / (σ² + ε)."""
    block = block_of(conv_of("plain"), kinds=("1x1", "identity"))
    norms: list[Layer] = [block.norm, *(branch.last_norm for branch in block.branches.values())]
    beta = sum(norm.bias.detach() for norm in norms)
    shares = [norm.running_var / (norm.running_var + norm.eps) for norm in norms]
    variance = sum(norm.weight.detach().square() * share for norm, share in zip(norms, shares))
    absorb_branch(block, "1x1")
    absorb_branch(block, "identity")
    assert block.norm is not None
    torch.testing.assert_close(block.norm.bias.detach(), beta, rtol=1e-9, atol=1e-9)
    expected = variance + block.norm.eps
    torch.testing.assert_close(block.norm.weight.detach().square(), expected, rtol=1e-9, atol=1e-9)


def test_a_conv_without_bias_or_norm_gets_a_bias_only_where_one_is_needed() -> None:
    plain = block_of(nn.Conv2d(4, 4, 3, padding=1, bias=False), "none", ("1x1",))
    absorb_branch(plain, "1x1")
    assert plain.conv.bias is None
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    site = ConvSpec.of(conv)
    mixed = RepBlock(conv, None, {"1x1": KINDS["1x1"](site, Norm("batch_norm"), conv.weight)})
    x, mixed = example(), randomize_batch_norm(mixed).double().eval()  # type: ignore[assignment]
    before = copy.deepcopy(mixed)
    absorb_branch(mixed, "1x1")
    assert isinstance(mixed.conv.bias, nn.Parameter)
    assert_same_map(mixed, before, x)


def _norm_without(name: str) -> Layer:
    norm = nn.BatchNorm2d(4, affine=name != "both")
    if name != "both":
        setattr(norm, name, None)
    return norm


@pytest.mark.parametrize("missing", ["both", "weight", "bias"])
def test_an_origin_without_gamma_or_beta_refuses_and_stays(missing: str) -> None:
    conv = conv_of("plain")
    block = RepBlock(conv, _norm_without(missing), {"1x1": KINDS["1x1"](ConvSpec.of(conv), Norm(), conv.weight)})
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(InvalidInput, match="'1x1'"):
        absorb_branch(block, "1x1")
    assert list(block.branches) == ["1x1"]
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_an_unknown_branch_names_the_nearest() -> None:
    block = block_of(conv_of("plain"))
    with pytest.raises(UnknownName, match="did you mean 'identity'"):
        absorb_branch(block, "identiti")
    with pytest.raises(UnknownName, match="no branch 'origin'"):
        absorb_branch(block, "origin")


@pytest.mark.parametrize("form", CONV_FORMS)
def test_the_sizes_of_the_conv_can_be_read(form: str) -> None:
    conv = conv_of(form)
    block = block_of(conv)
    for name in ConvSpec.__dataclass_fields__:
        assert getattr(block, name) == getattr(conv, name)
    assert block.conv is conv
    with pytest.raises(AttributeError, match="no_such_size"):
        _ = block.no_such_size


def test_a_block_has_the_mode_of_its_conv() -> None:
    for training in (True, False):
        assert RepBlock(conv_of("plain").train(training), None, {}).training is training


def test_a_name_that_the_block_has_is_no_name_of_a_branch() -> None:
    conv = conv_of("plain")
    branch = KINDS["1x1"](ConvSpec.of(conv), Norm(), conv.weight)
    for name in ("origin", "site", "forward", "stride", "norm"):
        with pytest.raises(InvalidInput, match=name):
            RepBlock(conv, None, {name: branch})


def test_a_copy_and_its_state_are_the_same_block() -> None:
    block, x = block_of(conv_of("plain")), example()
    twin = copy.deepcopy(block)
    assert_same_map(twin, block, x)
    other = block_of(conv_of("plain"))
    other.load_state_dict(block.state_dict(), strict=True)
    assert_same_map(other, block, x)


def nested() -> tuple[nn.Module, RepBlock, RepBlock]:
    """A model whose block has another block inside a branch."""
    outer = repfx.expand(nn.Sequential(conv_of("plain"), nn.BatchNorm2d(4)), ["1x1-kxk", "1x1"])
    model = repfx.expand(outer, {"0.1x1-kxk.conv2": ["1x1", "kxk", "1x1-avg"]})
    randomize_batch_norm(model).double().eval()
    blocks = [module for module in model.modules() if isinstance(module, RepBlock)]
    return model, blocks[0], blocks[1]


def test_a_block_inside_a_block_is_part_of_its_kernel() -> None:
    model, outer, inner = nested()
    x = example()
    assert inner in outer.branches["1x1-kxk"].modules()
    assert_same_map(outer.equivalent_kernel(x), model, x)


@pytest.mark.parametrize("order", [["inner", "outer"], ["outer"]], ids=["inner first", "outer alone"])
def test_nested_blocks_are_absorbed(order: list[str]) -> None:
    model, outer, inner = nested()
    before, x = copy.deepcopy(model), example()
    if "inner" in order:
        for name in list(inner.branches):
            absorb_branch(inner, name)
            assert_same_map(model, before, x)
    absorb_branch(outer, "1x1-kxk")
    assert_same_map(model, before, x)
    assert list(outer.branches) == ["1x1"]


@pytest.mark.parametrize("name", ["keys", "gate", "attach", "conv", "kernel_size", "origin", "a.b"])
def test_a_branch_cannot_take_a_name_that_is_in_use(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    before = dict(model.named_modules())
    spec = repfx.Spec([repfx.BranchSpec("1x1", name=name)])
    with pytest.raises(InvalidInput, match=f"a branch can't be named '{name}'"):
        repfx.expand(model, spec, inplace=True)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("size", [1, 3], ids=["itself", "a view"])
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_handed_on_is_not_the_input_itself(size: int, gated: bool) -> None:
    """Code behind the block may write into the block's output."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1 if size == 1 else 0, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu_(self.conv(x))

    model: Any = repfx.expand(InPlace(), repfx.Spec(["identity"], norm="none", origin=False)).double().eval()
    if gated:
        gate(model, "conv")
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    for each in (model, repfx.fuse(model)):
        given = x.clone()
        expected = x.relu() if size == 1 else x[..., 1:-1, 1:-1].relu()
        assert torch.equal(each(given), expected)
        assert torch.equal(given, x)


def test_an_origin_that_wakes_is_trained_where_it_was() -> None:
    block = block_of(conv_of("plain"))
    block.conv.bias.requires_grad_(False)
    before = {name: each.requires_grad for name, each in block.named_parameters()}
    block.rest()
    assert not any(each.requires_grad for each in block.origin.parameters())
    block.wake()
    assert {name: each.requires_grad for name, each in block.named_parameters()} == before
