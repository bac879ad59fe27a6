"""Linear layers as sites: every verb on the block of a linear layer, for inputs of two, three and four axes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import repfx
from repfx.blocks.architecture import Architecture
from repfx.blocks.stages import RowNorm
from repfx.change.carry import carry
from repfx.errors import InvalidInput
from repfx.passes.fuse import Fuse
from repfx.passes.gate import gate, ungate
from repfx.records.journal import apply
from repfx.search.scoring import FusedSupernet
from repfx.testing import assert_same_map, randomize_batch_norm, relative_error
from tests.inline_net import Net, reasons
from tests.random_numbers import numbers_from

KINDS = ["kxk", "1x1", "identity", "lora", "1x1-kxk", "1x1-kxk-1x1"]
NORMS: Any = ["batch_norm", "scale", "none"]
SHAPES = {"rows": (7,), "sequence": (3, 5), "picture": (2, 3, 4), "as many positions as channels": (3, 6)}
with_each_norm = pytest.mark.parametrize("norm", NORMS)
for_each_shape = pytest.mark.parametrize("shape", SHAPES)


def net() -> Any:
    return nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4, bias=False)).double()


def features(shape: str = "sequence") -> Tensor:
    return torch.randn(*SHAPES[shape], 6, dtype=torch.float64, generator=numbers_from(0))


def spec(norm: Any = "batch_norm", branches: list[Any] | None = None, **options: Any) -> repfx.Spec:
    return repfx.Spec(branches or KINDS, norm, layers="linear", **options)


def block_net(norm: Any = "batch_norm", **options: Any) -> Any:
    """Return an expanded net, in eval mode, in which nothing is zero or one."""
    expanded = repfx.expand(net(), spec(norm), **options)
    with torch.no_grad():
        for parameter in expanded.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=numbers_from(1))
    return randomize_batch_norm(expanded).eval()


def test_only_a_spec_for_linear_layers_expands_them() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4))
    expanded = repfx.expand(model, ["1x1", "identity"])
    assert type(expanded[2]) is nn.Linear
    assert [site.path for site in repfx.sites(expanded)] == ["0"]
    assert [site.path for site in repfx.sites(model, "lora")] == ["0", "2"]
    assert [site.path for site in repfx.sites(repfx.expand(model, "lora"))] == ["0", "2"]
    table = repfx.sites(repfx.expand(model, spec()))
    assert [(site.path, bool(site.branches)) for site in table] == [("0", False), ("2", True)]
    assert str(table["2"].conv) == "linear 4→4"


@pytest.mark.parametrize(
    ("make", "wanted", "message"),
    [
        (
            net,
            "repvgg",
            'no convs, so there is nothing to expand; the preset "lora", or a repfx.Spec with layers="linear", expands',
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3)), spec(), "no linear layers, so there is nothing to expand"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 3), net()),
            {"1.0": "acb"},
            "fits linear layers alone: .* layers='linear'",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), net()), {"0": spec()}, "fits convs alone: .* layers='conv'"),
    ],
)
def test_layers_that_the_spec_is_not_for_are_named(make: Callable[[], nn.Module], wanted: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        repfx.expand(make(), wanted)


def test_an_unknown_sort_of_layers() -> None:
    with pytest.raises(InvalidInput, match="no sort of layers 'dense'"):
        repfx.Spec(["kxk"], layers="dense")  # type: ignore[arg-type]


@pytest.mark.one_in(5)
@pytest.mark.slow_one_in(8)
@for_each_shape
@with_each_norm
@pytest.mark.parametrize("kind", KINDS)
def test_the_function_stays_the_branches_learn_and_fuse_into_the_layer(kind: str, norm: Any, shape: str) -> None:
    model, x = net(), features(shape)
    expanded: Any = repfx.expand(model, spec(norm, [kind]))
    for training in (True, False):
        assert_same_map(copy.deepcopy(expanded).train(training), model.train(training), x, 1e-12)
    optimizer = torch.optim.SGD(expanded.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        expanded.train()(x).square().sum().backward()
        optimizer.step()
    block = expanded[0]
    learned = [parameter for parameter in block.branches[kind].parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in learned)
    randomize_batch_norm(expanded).eval()
    assert relative_error(expanded(x), model(x)) > 1e-3
    fused = repfx.fuse(expanded)
    assert [type(module) for module in fused.children()] == [nn.Linear, nn.GELU, nn.Linear]
    assert_same_map(fused, expanded, x)


@for_each_shape
def test_statistics_are_those_of_all_positions(shape: str) -> None:
    x = features(shape)
    norm: Any = RowNorm(nn.BatchNorm1d(6, momentum=1.0)).double()
    rows = x.flatten(0, -2)
    assert_same_map(norm.train(), lambda x: (x - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt(), x, 1e-12)
    assert torch.allclose(norm.norm.running_mean, rows.mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"gamma": 0.3}, {"attach_rate": 0.0}, {"preserve": False}], ids=str)
def test_a_linear_layer_begins_as_a_1x1_conv_does(options: dict[str, Any]) -> None:
    """`expand` measures at a linear layer the same as at a conv of one tap."""
    x, branches = features(), ["kxk", "lora"]
    data = {"calibrate": [x]} if "gamma" in options else {}
    linear: Any = nn.Sequential(nn.Linear(6, 4)).double()
    conv: Any = nn.Sequential(nn.Conv1d(6, 4, 1)).double()
    with torch.no_grad():
        conv[0].weight.copy_(linear[0].weight[..., None])
        conv[0].bias.copy_(linear[0].bias)
    torch.manual_seed(1)
    first = repfx.expand(linear, spec("batch_norm", branches), **options, **data)
    torch.manual_seed(1)
    data = {"calibrate": [x.mT]} if data else {}
    second = repfx.expand(conv, branches, **options, **data)
    for training in (True, False):
        first.train(training)
        second.train(training)
        assert_same_map(first, lambda x: second(x.mT).mT, x, 1e-12)


@with_each_norm
def test_squeezed_it_runs_as_one_linear_layer(norm: Any) -> None:
    model, x = block_net(norm), features()
    twin = copy.deepcopy(model)
    repfx.squeeze(model.train(), statistics="frozen")
    assert model[0].is_one_map
    for each in (model, twin):
        each(x).square().sum().backward()
    assert_same_map(model, twin, x, 1e-12)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters()):
        assert relative_error(parameter.grad, other.grad) < 1e-9, name
    assert_same_map(repfx.unsqueeze(model).eval(), twin, x, 1e-12)


@with_each_norm
def test_dropped_branches_go_into_the_layer(norm: Any) -> None:
    model, x = block_net(norm), features()
    twin, own = copy.deepcopy(model), model[0].conv
    for kind in KINDS:
        repfx.drop(model, "0", kind)
        assert_same_map(model, twin, x)
    assert model[0] is own


def test_a_norm_that_was_made_for_the_block_goes_into_the_layer() -> None:
    x = features("picture")
    model = block_net(gamma=0.3, calibrate=[x])
    assert isinstance(model[0].origin.norm, RowNorm)
    twin = copy.deepcopy(model)
    for kind in KINDS:
        repfx.drop(model, "0", kind, calibrate=[x])
    assert type(model[0]) is nn.Linear
    assert_same_map(model, twin, x)


@with_each_norm
@pytest.mark.parametrize("style", ["straight_through", "sigmoid"])
def test_gates(style: str, norm: Any) -> None:
    model, x = gate(gate(block_net(norm), "0", style), "2", style), features()
    twin = copy.deepcopy(model)
    assert_same_map(repfx.fuse(model), twin, x)
    ungate(model, "0")
    assert_same_map(model, twin, x)


def test_a_candidate_of_a_search_is_one_linear_layer() -> None:
    model, x = gate(block_net(), "0"), features()
    supernet = FusedSupernet(model)
    code = tuple(index % 2 == 0 for index in range(len(supernet.space.paths)))
    gates: Any = model.get_submodule("0").gates
    gates.choose([name for (_, name), is_open in zip(supernet.space.paths, code) if is_open])
    plain = supernet.net(code)
    assert plain.get_submodule("0").in_features == 6
    assert_same_map(plain, model, x)


def test_a_checkpoint_rebuilds_the_block(tmp_path: Path) -> None:
    x = features()
    model = block_net(gamma=0.3, calibrate=[x])
    repfx.drop(model, "0", "kxk")
    repfx.save(tmp_path / "model.safetensors", model)
    loaded = net()
    repfx.load(tmp_path / "model.safetensors", loaded)
    assert_same_map(loaded.eval(), model, x, 0)
    assert repfx.journal(loaded) == repfx.journal(model)


def test_an_architecture_builds_the_block_again(tmp_path: Path) -> None:
    model = repfx.drop(repfx.expand(net(), spec()), "0", "kxk")
    Architecture.of(model).save(tmp_path / "architecture.json")
    again: Any = repfx.expand(net(), str(tmp_path / "architecture.json"))
    assert list(again[0].branches) == KINDS[1:]
    with pytest.raises(InvalidInput, match="a conv linear 6→6 at '0', this one has a conv linear 5→6"):
        repfx.expand(nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4)), str(tmp_path / "architecture.json"))


@pytest.mark.slow
def test_an_average_and_an_optimizer_follow() -> None:
    model, x = net(), features()
    average, optimizer = AveragedModel(model), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    before = [copy.deepcopy(each) for each in (model, average)]
    with carry(model, optimizer, average):
        repfx.expand(model, spec(), inplace=True)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    for each, earlier in zip((model, average), before):
        assert_same_map(each, earlier, x, 1e-12)
    randomize_batch_norm(model, 1).eval()
    randomize_batch_norm(average, 2).eval()
    before = [copy.deepcopy(each) for each in (model, average)]
    with carry(model, optimizer, average):
        repfx.drop(model, "0", "1x1")
        apply(model, [Fuse("2")], None)
    for each, earlier in zip((model, average), before):
        assert_same_map(each, earlier, x)
    assert type(average.module[2]) is nn.Linear  # type: ignore[index]


def test_synchronized_norms_still_see_rows() -> None:
    """The input has as many positions as channels, so that no error tells a norm of the wrong axis."""
    model, x = block_net(), features("as many positions as channels")
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in twin.modules())
    assert_same_map(twin, model, x, 1e-12)
    assert_same_map(repfx.fuse(twin), model, x)


def test_branches_can_share_the_weight_of_the_layer() -> None:
    model, x = net(), features()
    expanded: Any = repfx.expand(model, spec(weights="shared"))
    assert expanded[0].branches["kxk"].conv.weight is expanded[0].conv.weight
    assert_same_map(expanded, model, x, 1e-12)
    randomize_batch_norm(expanded).eval()
    twin = copy.deepcopy(expanded)
    assert_same_map(repfx.fuse(expanded), twin, x)
    assert_same_map(repfx.drop(expanded, "0", "1x1"), twin, x)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["rows", "as many positions as channels"])
def test_a_batch_norm_behind_the_layer_stays_behind_the_block(shape: str) -> None:
    """Whether BatchNorm1d counts its channels on the axis of the layer depends on the input."""
    model, x = randomize_batch_norm(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))).double(), features(shape)
    expanded: Any = repfx.expand(model, spec())
    assert type(expanded[1]) is nn.BatchNorm1d
    for training in (True, False):
        assert_same_map(copy.deepcopy(expanded).train(training), copy.deepcopy(model).train(training), x, 1e-12)
    randomize_batch_norm(expanded).eval()
    assert_same_map(repfx.fuse(expanded), expanded, x)
    fused = repfx.fuse(expanded, example=x)
    assert_same_map(fused, expanded, x)
    assert ("BatchNorm1d counts its channels on the second axis" in reasons(fused)) == (shape != "rows")


def test_restore_brings_back_a_norm_of_the_model_but_none_of_a_branch() -> None:
    x = features("rows")
    expanded = randomize_batch_norm(
        repfx.expand(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 4)).double(), spec())
    ).eval()
    fused = repfx.fuse(expanded, example=x)
    restored = repfx.restore(fused, ["0", "3"])
    assert_same_map(restored, expanded, x)
    assert type(restored.get_submodule("1")) is nn.BatchNorm1d
    assert "it is a linear layer that never absorbed a BatchNorm" in reasons(restored)


class Attention(nn.Module):
    """Attention as people write it, with sizes that can't be traced."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 2, channels // 2).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        output: Tensor = self.proj(y.transpose(1, 2).reshape(batch, length, channels))
        return output


@pytest.mark.slow
@with_each_norm
def test_layers_of_code_that_isnt_traced(norm: Any) -> None:
    model, x = nn.Sequential(nn.LayerNorm(6), Attention(6), nn.Linear(6, 3)).double(), features()
    expanded = repfx.expand(model, spec(norm))
    assert [site.path for site in repfx.sites(expanded) if site.branches] == ["1.qkv", "1.proj", "2"]
    assert_same_map(expanded, model, x, 1e-12)
    randomize_batch_norm(expanded).eval()
    fused = repfx.fuse(expanded)
    assert_same_map(fused, expanded, x)
    attention = fused.get_submodule("1")
    assert (type(attention), type(attention.qkv), type(attention.proj)) == (Attention, nn.Linear, nn.Linear)


def test_a_layer_that_is_called_twice_is_one_layer_again() -> None:
    model = Net(lambda m, x: m.fc(m.fc(x).relu()), fc=nn.Linear(6, 6)).double()
    expanded = repfx.expand(nn.Sequential(model, nn.Linear(6, 2).double()), spec())
    randomize_batch_norm(expanded).eval()
    fused = repfx.fuse(expanded)
    assert_same_map(fused, expanded, features())
    assert type(fused.get_submodule("0.fc")) is nn.Linear


def tied() -> nn.Module:
    net = Net(lambda m, x: m.head(m.table(x.long())), table=nn.Embedding(6, 6), head=nn.Linear(6, 6, bias=False))
    net.head.weight = net.table.weight  # type: ignore[union-attr]
    return net


def hooked() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda *_: None)
    return nn.Sequential(layer)


class ReadsWeights(Attention):
    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.linear(x, self.qkv.weight)
        return nn.functional.linear(wide[..., : x.shape[-1]], self.proj.weight)


class Sums(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return x * sum(parameter.sum() for parameter in self.parameters())


FUNCTIONS: dict[str, Callable[..., Tensor]] = {"plain": lambda module, x: x * module.qkv.weight.sum()}


class GivesAway(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS["plain"](self, self.qkv(x))


class Asks(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x) if isinstance(self.qkv, nn.Linear) else x  # type: ignore[no-any-return]


STAY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tied": (tied, "its weights are shared with 'table'"),
    "hooks": (hooked, "Linear has hooks"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), "LazyLinear is lazy"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
        "a parametrization",
    ),
    "the root": (lambda: nn.Linear(6, 6), "it is the model itself"),
    "its weights are read": (lambda: nn.Sequential(ReadsWeights(6)), "reads its weights"),
    "its numbers are summed": (lambda: nn.Sequential(Sums(6)), "in a way that repfx doesn't know: self.parameters"),
    "given away": (lambda: nn.Sequential(GivesAway(6)), "in a way that repfx doesn't know: FUNCTIONS['plain'](self"),
    "its class is asked for": (lambda: nn.Sequential(Asks(6)), "asks whether it is a Linear"),
    "torch's attention": (lambda: nn.Sequential(nn.MultiheadAttention(6, 2)), "which isn't traced, reads its weights"),
    "torch's transformer": (lambda: nn.TransformerEncoderLayer(6, 2, 8), "reads its weights"),
}


@pytest.mark.parametrize("case", STAY)
def test_what_stays_a_linear_layer(case: str) -> None:
    make, reason = STAY[case]
    expanded = repfx.expand(make(), spec())
    assert reason in reasons(expanded)
    assert not any(site.branches for site in repfx.sites(expanded))


class ReadsOneWeight(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x.to(self.proj.weight.dtype))  # type: ignore[no-any-return]


def test_a_weight_that_is_read_by_its_path_closes_that_layer_alone() -> None:
    expanded = repfx.expand(nn.Sequential(ReadsOneWeight(6)), spec())
    assert [site.path for site in repfx.sites(expanded) if site.branches] == ["0.qkv"]
    assert "Skip '0.proj': code around it, which isn't traced, reads its weights" in reasons(expanded)
    assert_same_map(expanded.double(), lambda x: expanded.get_submodule("0.qkv")(x), features(), 0)


def test_code_around_can_read_the_sizes() -> None:
    block: Any = block_net()[0]
    assert (block.in_features, block.out_features) == (6, 6)
    with pytest.raises(AttributeError):
        _ = block.weight
