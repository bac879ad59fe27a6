"""Models that are fused by methods of their own classes, or by tools that ask each module to fuse itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_conv
from repfx.blocks.block import RepBlock
from repfx.blocks.own_fusing import NAMES, BlocksFirst
from repfx.errors import InvalidInput, NotAConv
from repfx.passes.gate import gate
from repfx.passes.recompute import recompute
from repfx.testing import assert_same_map, randomize_batch_norm

PRESETS = ["repvgg", "dbb", "orepa", "acb"]


class ConvNorm(nn.Module):
    """Reads weights and statistics as timm's and RepVGG's own code do, and knows no bias of the conv."""

    def __init__(self, channels: int, dimensions: int = 2) -> None:
        super().__init__()
        conv, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[
            dimensions
        ]
        self.conv: Any = conv(channels, channels, 3, padding=1, bias=False)
        self.bn: Any = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))

    @torch.no_grad()
    def folded(self) -> nn.Module:
        conv, norm = self.conv, self.bn
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        made: Any = type(conv)(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        made = made.to(conv.weight)
        made.weight.copy_(conv.weight * factor.reshape(-1, *[1] * (conv.weight.ndim - 1)))
        made.bias.copy_(norm.bias - norm.running_mean * factor)
        folded: nn.Module = made
        return folded


class Returns(ConvNorm):
    """Gives its parent what is to take its place, as LeViT's layers do."""

    def fuse(self) -> nn.Module:
        return nn.Sequential(self.folded(), nn.ReLU())


class Changes(ConvNorm):
    """Changes itself, as MobileOne's layers do."""

    def reparameterize(self) -> None:
        if not isinstance(self.bn, nn.Identity):
            self.conv, self.bn = self.folded(), nn.Identity()


class Deploys(Changes):
    def switch_to_deploy(self) -> None:
        self.reparameterize()


class Net(nn.Module):
    """Has all of them, and layers that can't fuse themselves."""

    def __init__(self, channels: int = 4, dimensions: int = 2) -> None:
        super().__init__()
        self.first, self.second = Returns(channels, dimensions), Changes(channels, dimensions)
        self.third, self.plain = Deploys(channels, dimensions), ConvNorm(channels, dimensions)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.plain(self.third(self.second(self.first(x))))
        return out


def net(preset: Any = "repvgg", dimensions: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = randomize_batch_norm(Net(4, dimensions).double())
    return randomize_batch_norm(repfx.expand(model, preset), seed=1).eval()


def image(dimensions: int = 2) -> Tensor:
    return torch.randn(2, 4, *(7, 5, 6)[:dimensions], dtype=torch.float64)


def fuse_as_timm_does(model: nn.Module) -> None:
    """Ask each child, from the outside in, by the first of the methods that it has."""
    child: Any
    for name, child in model.named_children():
        if hasattr(child, "fuse"):
            setattr(model, name, child.fuse())
        elif hasattr(child, "reparameterize"):
            child.reparameterize()
        elif hasattr(child, "switch_to_deploy"):
            child.switch_to_deploy()
        fuse_as_timm_does(child)


def deploy_all(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        if hasattr(module, "switch_to_deploy"):
            module.switch_to_deploy()


def reparameterize_all(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()


TOOLS: list[Callable[[nn.Module], None]] = [fuse_as_timm_does, deploy_all, reparameterize_all]


def blocks_of(model: nn.Module) -> list[RepBlock]:
    return [module for module in model.modules() if isinstance(module, RepBlock)]


@pytest.mark.one_in(4)
@pytest.mark.slow_one_in(3)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_tool_gives_what_fuse_gives(preset: str, tool: Callable[[nn.Module], None]) -> None:
    model, x = net(preset), image()
    expected = model(x)
    fused = copy.deepcopy(model)
    tool(fused)
    assert sum(map(is_conv, fused.modules())) == 4
    assert_same_map(fused, lambda _: expected, x)
    assert_same_map(fused, repfx.fuse(model), x)
    assert torch.equal(model(x), expected)  # the copy's methods change the copy alone


@pytest.mark.parametrize("dimensions", [1, 3])
def test_a_tool_fuses_nets_of_other_dimensions(dimensions: int) -> None:
    model, x = net("repvgg", dimensions), image(dimensions)
    expected = model(x)
    fuse_as_timm_does(model)
    assert not blocks_of(model)
    assert_same_map(model, lambda _: expected, x)


def test_a_model_in_training_mode_becomes_what_it_is_in_eval_mode() -> None:
    model, x = net().eval(), image()
    expected = model(x)
    fuse_as_timm_does(model.train())
    assert all(module.training for module in model.modules())
    assert_same_map(model.eval(), lambda _: expected, x)


def test_a_block_that_is_fused_in_inference_mode_can_be_trained() -> None:
    block, x = net().get_submodule("plain.conv"), image()
    with torch.inference_mode():
        conv = block.fuse()  # type: ignore[operator]
    conv(x).sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize("tool", TOOLS)
def test_a_second_call_changes_nothing(tool: Callable[[nn.Module], None]) -> None:
    model, x = net(), image()
    tool(model)
    expected, state = model(x), {name: id(tensor) for name, tensor in model.named_parameters() if "plain" in name}
    deploy_all(model)
    assert torch.equal(model(x), expected)
    assert state == {name: id(tensor) for name, tensor in model.named_parameters() if "plain" in name}


def _gated(model: nn.Module) -> None:
    gate(model, "plain.conv", origin=True)
    gate(model, "second.conv", "sigmoid")
    for site in ("plain.conv", "second.conv"):
        block: Any = model.get_submodule(site)
        block.gates.choose(["1x1"]) if site == "plain.conv" else None


def _squeezed(model: nn.Module) -> None:
    repfx.squeeze(model, statistics="frozen")


def _recomputed(model: nn.Module) -> None:
    recompute(model)


@pytest.mark.parametrize("state", [_gated, _squeezed, _recomputed])
def test_blocks_of_every_state_are_fused(state: Callable[[nn.Module], None]) -> None:
    model, x = net(), image()
    state(model)
    expected = model(x)
    fuse_as_timm_does(model)
    assert_same_map(model, lambda _: expected, x)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "options",
    [{"attach_rate": 0.5, "preserve": False}, {"preserve": False}],
    ids=["attach rate", "as in the paper"],
)
@pytest.mark.parametrize(
    "spec", ["repvgg", repfx.Spec(("1x1", "1xk"), weights="shared"), repfx.Spec(("kxk",), origin=False)]
)
def test_blocks_of_every_spec_are_fused(spec: Any, options: dict[str, Any]) -> None:
    model = randomize_batch_norm(repfx.expand(Net().double(), spec, **options)).eval()
    x = image()
    expected = model(x)
    fuse_as_timm_does(model)
    assert all(weight.requires_grad for weight in model.parameters())
    assert_same_map(model, lambda _: expected, x)


def test_a_block_without_other_code_around_it_takes_the_form_of_a_conv() -> None:
    model = randomize_batch_norm(repfx.expand(nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5)), "acb"))
    block: Any = model.double().eval().get_submodule("0")
    x = torch.randn(2, 3, 9, 6, dtype=torch.float64)
    expected = model(x)
    conv = block.fuse()
    assert type(conv) is nn.Conv2d
    assert block.conv is conv
    assert_same_map(block, conv, x)
    assert_same_map(model, lambda _: expected, x)


def test_a_block_names_fuse_where_a_conv_would_have_weights() -> None:
    block: Any = repfx.expand(nn.Sequential(nn.Conv2d(3, 4, 3)), "acb")[0]
    assert not hasattr(block, "weight")
    assert (block.in_channels, block.out_channels, block.kernel_size, block.stride) == (3, 4, (3, 3), (1, 1))
    with pytest.raises(NotAConv, match=r"the block 3×3 3→4 has no 'weight', because .* repfx\.fuse\(model\)"):
        _ = block.weight
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        _ = block.wait


class Loses(ConvNorm):
    """Holds a conv whose BatchNorm stands elsewhere."""

    def __init__(self) -> None:
        super().__init__(4)
        self.bn = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]

    def fuse(self) -> nn.Module:
        made: Any = nn.Conv2d(4, 4, 3, padding=1, bias=False).double()
        made.weight.data = self.conv.weight.data
        return made  # type: ignore[no-any-return]


def test_a_bias_that_the_method_would_lose_is_refused() -> None:
    model = randomize_batch_norm(repfx.expand(nn.Sequential(Loses(), nn.BatchNorm2d(4)).double(), "repvgg")).eval()
    x = image()
    expected = model(x)
    with pytest.raises(InvalidInput, match=r"'0\.conv' would become a conv with a bias.*repfx\.fuse\(model\)"):
        fuse_as_timm_does(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("where", ["plain.conv.1x1", "second.conv.origin.conv"])
def test_hooks_inside_a_block_are_not_lost(where: str) -> None:
    model, x = net(), image()
    model.get_submodule(where).register_forward_hook(lambda module, args, output: 2 * output)
    expected = model(x)
    with pytest.raises(InvalidInput, match="has hooks"):
        fuse_as_timm_does(model)
    assert_same_map(model, lambda _: expected, x)


def test_a_pickled_model_fuses_itself() -> None:
    model, x = net(), image()
    expected = model(x)
    again = pickle.loads(pickle.dumps(model))
    fuse_as_timm_does(again)
    assert_same_map(again, lambda _: expected, x)
    assert len(blocks_of(model)) == 4


def test_a_fused_model_and_one_that_could_not_be_expanded_have_their_own_methods() -> None:
    model = Net()
    with pytest.raises(InvalidInput, match="calibrate"):
        repfx.expand(model, "repvgg", inplace=True, calibrate=[torch.zeros(0)])
    for each in (model, repfx.fuse(net())):
        assert not any(isinstance(vars(module).get(name), BlocksFirst) for module in each.modules() for name in NAMES)


class TestHistory:
    """The journal doesn't tell of a tool, so nothing builds on it."""

    @pytest.mark.parametrize("tool", [*TOOLS, lambda model: model.second.reparameterize()])
    def test_the_model_is_not_saved_with_a_journal_that_is_wrong(self, tool: Any, tmp_path: Path) -> None:
        model = net()
        tool(model)
        with pytest.raises(InvalidInput, match=r"fused by its own method .* repfx\.fuse\(model\)"):
            repfx.save(tmp_path / "run.ckpt", model)
        assert not list(tmp_path.iterdir())
        repfx.save(tmp_path / "run.ckpt", repfx.fuse(model))

    def test_it_is_not_changed_further(self) -> None:
        model, x = net(), image()
        model.get_submodule("second").reparameterize()  # type: ignore[operator]
        expected = model(x)
        changes: tuple[Callable[[], object], ...] = (
            lambda: repfx.drop(model, "plain.conv", "1x1"),
            lambda: repfx.expand(model, "acb", inplace=True),
        )
        for change in changes:
            with pytest.raises(InvalidInput, match="'second' was fused by its own method"):
                change()
        assert torch.equal(model(x), expected)

    def test_without_blocks_it_is_a_base(self) -> None:
        model, x = net(), image()
        fuse_as_timm_does(model)
        expected = model(x)
        again = repfx.expand(model, "acb")
        assert [action.kind for action in repfx.journal(again)] == ["expand"] * 4
        assert_same_map(again, lambda _: expected, x)
        repfx.drop(again, "plain.conv", "1xk")
