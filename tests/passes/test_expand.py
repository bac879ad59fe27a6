"""`expand` keeps the function in both modes, for every form of `spec`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.blocks.architecture import Architecture
from repfx.blocks.presets import PRESETS
from repfx.blocks.stages import AttachRate
from repfx.errors import InvalidInput, Refused, UnknownName
from repfx.passes.calibrate import calibrate
from repfx.testing import assert_same_map, randomize_batch_norm, relative_error
from tests.small_net import SmallNet, batch, small_net


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_function_is_kept_in_both_modes(preset: str, training: bool) -> None:
    model = small_net()
    expanded = repfx.expand(model, preset)
    assert repfx.report(expanded).applied
    assert_same_map(expanded.train(training), copy.deepcopy(model).train(training), batch(), 1e-12)


@pytest.mark.slow_one_in(4)
@pytest.mark.one_in(4)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_new_branch_learns_and_is_fused_exactly(preset: str) -> None:
    model = repfx.expand(small_net(), preset)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):  # with γ = 0, only γ gets a gradient in the first step
        optimizer.zero_grad()
        model(batch(seed=step)).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert "norm1" in name or bool(parameter.grad.any()), name
    randomize_batch_norm(model, seed=5)
    assert_same_map(repfx.fuse(model.eval()), model, batch())


SUPER_RESOLUTION = ["1x1-kxk-1x1", "1x1-sobel-x", "1x1-laplacian", "lora"]
AXES: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM_OF: dict[int, Callable[..., nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.slow_one_in(5)
@pytest.mark.one_in(4)
@pytest.mark.parametrize("normalised", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("norm", ["batch_norm", "scale", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_branches_with_biases_and_fixed_filters_keep_the_function_learn_and_are_fused(
    dimensions: int, bias: bool, norm: Any, normalised: bool
) -> None:
    torch.manual_seed(dimensions)
    conv = AXES[dimensions](4, 6, 3, stride=2, padding=1, groups=2, bias=bias)
    norms = [NORM_OF[dimensions](6)] * normalised
    model = randomize_batch_norm(nn.Sequential(conv, *norms, nn.ReLU())).double()
    x = torch.randn(3, 4, *(7, 8, 9)[:dimensions], dtype=torch.float64)
    spec = repfx.Spec(
        [repfx.BranchSpec(kind, {} if kind == "lora" else {"bias": True}) for kind in SUPER_RESOLUTION], norm
    )
    tuned = repfx.expand(model, spec, strict=True)
    for training in (True, False):
        assert_same_map(copy.deepcopy(tuned).train(training), copy.deepcopy(model).train(training), x, 1e-12)
    optimizer = torch.optim.SGD(tuned.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        tuned.train()(x).square().sum().backward()
        optimizer.step()
    assert tuned.get_submodule("0.lora.up").weight.any()
    fused = repfx.fuse(tuned.eval())
    assert_same_map(fused, tuned, x)
    assert [type(module) for module in fused.children()] == [type(conv), nn.ReLU]


TRANSPOSED: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
    "2d": lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=2, padding=(0, 1), groups=2, bias=False),
    "3d": lambda: nn.ConvTranspose3d(4, 6, 2, dilation=2),
}


def upsampler(name: str, *, normalised: bool) -> tuple[nn.Module, Tensor]:
    conv = TRANSPOSED[name]()
    dimensions = int(name[0])
    norms = [NORM_OF[dimensions](6)] * normalised
    model = randomize_batch_norm(nn.Sequential(conv, *norms, nn.ReLU())).double()
    return model, torch.randn(3, 4, *(5, 6, 7)[:dimensions], dtype=torch.float64)


@pytest.mark.parametrize("normalised", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("norm", ["batch_norm", "scale", "none"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convs_get_further_ones(name: str, norm: Any, normalised: bool) -> None:
    """The kernels of transposed convs of equal sizes add up."""
    model, x = upsampler(name, normalised=normalised)
    expanded: Any = repfx.expand(model, repfx.Spec(["kxk", "kxk"], norm), strict=True)
    for training in (True, False):
        assert_same_map(copy.deepcopy(expanded).train(training), copy.deepcopy(model).train(training), x, 1e-12)
    randomize_batch_norm(expanded, seed=5)
    fused = repfx.fuse(expanded.eval())
    assert_same_map(fused, expanded, x)
    assert [type(module) for module in fused.children()] == [type(model[0]), nn.ReLU]  # type: ignore[index]
    squeezed = repfx.squeeze(copy.deepcopy(expanded))
    assert squeezed.get_submodule("0").squeezed
    assert_same_map(squeezed, expanded, x)
    reference = copy.deepcopy(expanded)
    for branch in ("kxk", "kxk-2"):
        assert_same_map(repfx.drop(expanded, "0", branch), reference, x)
    assert type(expanded[0]) is type(model[0])  # type: ignore[index]


def test_a_transposed_conv_begins_gently_and_is_remembered_as_any_other(tmp_path: Path) -> None:
    model, x = upsampler("2d", normalised=True)
    calibrate(model, [x])
    expanded: Any = repfx.expand(model, ["kxk", "1x1"], gamma=0.1, calibrate=[x])
    assert_same_map(copy.deepcopy(expanded).eval(), model.eval(), x)
    assert_same_map(copy.deepcopy(expanded).train(), copy.deepcopy(model).train(), x, 1e-2)
    repfx.save(tmp_path / "model.safetensors", expanded)
    assert_same_map(repfx.load(tmp_path / "model.safetensors", upsampler("2d", normalised=True)[0]), expanded, x)
    found = Architecture.of(expanded)
    assert found.sites["0"].conv == "2×3 4→6 stride 2×2 groups 2 transposed"
    again: Any = repfx.expand(model, Architecture.from_json(found.to_json()))
    assert list(again[0].branches) == ["kxk"]
    shared: Any = repfx.expand(model, repfx.Spec(["kxk"], weights="shared"))
    assert isinstance(shared[0].branches["kxk"].conv, nn.ConvTranspose2d)


class AsksForSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.up(x, output_size=[2 * x.shape[2] + 2, 2 * x.shape[3] + 1])
        return found


class AsksForSizeUntraced(AsksForSize):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else self.up(x)


@pytest.mark.parametrize(
    ("model", "reason"), [(AsksForSize(), "asks it for an output size"), (AsksForSizeUntraced(), "may ask it for")]
)
def test_a_transposed_conv_that_is_asked_for_a_size_stays(model: nn.Module, reason: str) -> None:
    assert reason in str(repfx.sites(model, ["kxk"])["up"].refusal)
    expanded = repfx.expand(model, ["kxk"])
    assert [skip.path for skip in repfx.report(expanded).skipped] == ["up"]
    assert type(expanded.get_submodule("up")) is nn.ConvTranspose2d
    assert_same_map(expanded, model, torch.randn(2, 4, 5, 6))


def test_a_conv_without_bias_gains_one_by_a_branch_that_has_one_and_keeps_it_when_saved(tmp_path: Path) -> None:
    branch = repfx.BranchSpec("1x1-kxk-1x1", {"bias": True})
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False)).double()
    model = repfx.expand(plain, repfx.Spec([branch, repfx.BranchSpec("1x1-laplacian", {"bias": True})], "none"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    reference, x = copy.deepcopy(model), torch.randn(2, 4, 7, 8, dtype=torch.float64)
    for step in (None, "1x1-kxk-1x1", "1x1-laplacian"):
        if step is not None:
            repfx.drop(model, "0", step)
        repfx.save(tmp_path / "model.safetensors", model)
        loaded = repfx.load(tmp_path / "model.safetensors", copy.deepcopy(plain))
        assert_same_map(model, reference, x)
        assert_same_map(loaded, model, x, 1e-15)


def test_class_attributes_and_input_stay() -> None:
    model = small_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expanded = repfx.expand(model, "dbb")
    assert type(expanded) is SmallNet
    assert isinstance(model.stem, nn.Conv2d)
    assert isinstance(expanded.norm, nn.Identity)
    assert expanded.stem.kernel_size == (3, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_in_place_keeps_the_parameters_the_same_objects() -> None:
    model = small_net()
    parameters = set(map(id, model.parameters()))
    assert repfx.expand(model, "dyrep", inplace=True) is model
    assert parameters <= set(map(id, model.parameters()))


def test_calibrate_measures_the_new_statistics_and_nothing_else() -> None:
    model = small_net()
    data = [batch(seed=seed) for seed in range(3)]
    expanded: Any = repfx.expand(model, "dbb", calibrate=data)
    seen = torch.cat(data)
    with torch.no_grad():
        mixed = expanded.stem.get_submodule("1x1").conv(seen)
    norm = expanded.stem.get_submodule("1x1").norm
    assert relative_error(norm.running_mean, mixed.mean((0, 2, 3))) < 1e-9
    assert norm.momentum == 0.2
    assert all(torch.equal(*pair) for pair in zip(expanded.stem.norm.buffers(), model.norm.buffers()))
    assert_same_map(expanded.eval(), copy.deepcopy(model).eval(), batch(), 1e-12)


def test_calibrate_takes_what_a_loader_gives() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batch(), torch.zeros(6)), batch_size=3)
    assert repfx.report(repfx.expand(small_net(), "acb", calibrate=loader)).applied


@pytest.mark.parametrize("bad", [[], [torch.zeros(1, 5, 9, 11).double()]])
@pytest.mark.parametrize("preset", ["dbb", "qarepvgg"])
def test_a_failure_on_the_way_leaves_the_model_as_it_was(preset: str, bad: list[Tensor]) -> None:
    model = small_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text, modes = str(model), [module.training for module in model.modules()]
    with pytest.raises(InvalidInput, match="calibrate"):
        repfx.expand(model, preset, inplace=True, calibrate=bad)
    assert str(model) == text
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_without_preserve_each_paper_s_own_beginning() -> None:
    dyrep: Any = repfx.expand(small_net(), "dyrep", preserve=False)
    assert bool((dyrep.stem.get_submodule("1xk").norm.weight == 0.01).all())
    dbb: Any = repfx.expand(small_net(), "dbb", preserve=False)
    assert bool((dbb.stem.get_submodule("1x1-kxk").norm.weight == 1).all())
    mixed = dbb.stem.get_submodule("1x1-kxk").conv1.weight.flatten(1)
    assert torch.equal(mixed, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("attach_rate", [None, 0.0])
def test_where_a_residual_block_begins_as_the_identity_it_does_with_branches(attach_rate: float | None) -> None:
    model = small_net()
    norm: Any = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    nn.init.zeros_(norm.weight)
    expanded = repfx.expand(model, "repvgg", preserve=False, attach_rate=attach_rate)
    blocks: dict[str, Any] = {
        path: block for path, block in expanded.named_modules() if isinstance(block, repfx.RepBlock)
    }
    first, *others = blocks.values()
    assert all(not branch.last_gamma.any() for branch in first.branches.values())
    assert others
    assert all(bool((branch.last_gamma == 1).all()) for block in others for branch in block.branches.values())
    x = batch()
    for block in (first.train(), first.eval()):
        assert not (block(x) - block.norm.bias.view(1, -1, 1, 1)).any()


def test_a_dict_chooses_by_pattern_and_the_first_that_fits_counts() -> None:
    model = repfx.expand(small_net(), {"st*": "acb", "stem": "dbb", "depthwise": ["1x1", "identity"]})
    table = repfx.sites(model)
    assert table["stem"].branches == ("1xk", "kx1")
    assert table["depthwise"].branches == ("1x1", "identity")
    assert "no pattern" in table["plain"].note


def test_expanding_twice_leaves_finished_sites_alone() -> None:
    once = repfx.expand(small_net(), {"stem": "acb"})
    twice = repfx.expand(once, "repvgg")
    table = repfx.sites(twice)
    assert table["stem"].branches == ("1xk", "kx1")
    assert table["plain"].branches == ("1x1", "identity")
    assert "block already" in str(repfx.report(twice))


@pytest.mark.slow
def test_inside_a_block_only_what_is_named_exactly() -> None:
    model = small_net()
    expanded = repfx.expand(model, "dbb")
    nested: Any = repfx.expand(expanded, {"stem.1x1-kxk.conv2": "acb"})
    assert isinstance(nested.stem.get_submodule("1x1-kxk.conv2"), repfx.RepBlock)
    with pytest.raises(InvalidInput, match="fits no site"):
        repfx.expand(expanded, {"stem.1x1-kxk.*": "acb"})
    randomize_batch_norm(nested, seed=4)
    assert_same_map(repfx.fuse(nested.eval()), nested, batch())


def test_a_spec_of_one_s_own() -> None:
    spec = repfx.Spec([repfx.BranchSpec("dilated", {"kernel_size": 3, "dilation": 3}), "kxk", "kxk"], norm="scale")
    model = small_net()
    expanded = repfx.expand(model, {"depthwise": spec})
    assert repfx.sites(expanded)["depthwise"].branches == ("dilated", "kxk", "kxk-2")
    assert_same_map(expanded.eval(), model.eval(), batch(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_branches_take_dtype_and_mode_of_their_conv(dtype: torch.dtype) -> None:
    model = small_net().to(dtype).eval()
    expanded = repfx.expand(model, "ireps")
    assert {parameter.dtype for parameter in expanded.parameters()} == {dtype}
    assert not any(module.training for module in expanded.modules())


BAD: list[tuple[Any, type[Exception], str]] = [
    ("dbbb", UnknownName, "did you mean 'dbb'"),
    (["1x2"], UnknownName, "branch kind '1x2'"),
    ({"zz*": "dbb"}, InvalidInput, "fits no site; there are 3"),
    ({}, InvalidInput, "empty dict"),
    ([3], InvalidInput, "named by its kind"),
    (5, InvalidInput, "not int"),
    ([repfx.BranchSpec("dilated", {"size": 3})], InvalidInput, "doesn't take the options"),
]


@pytest.mark.parametrize(("spec", "error", "message"), BAD)
def test_bad_specs(spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        repfx.expand(small_net(), spec)


def test_a_model_without_convs() -> None:
    with pytest.raises(InvalidInput, match=r"Linear has no convs.*\"lora\""):
        repfx.expand(nn.Linear(2, 2), "dbb")


def shared_weight() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    return model


class Hooked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 3))
        self[0].register_forward_hook(lambda module, inputs, output: output)


class OwnCode(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv(x) + self.conv.weight.sum()
        return output


def two_names() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 3))
    model.add_module("again", model[0])
    return model


REFUSED: list[tuple[Any, str]] = [
    (lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 3)), "transposed"),
    (shared_weight, "shared with"),
    (Hooked, "hooks"),
    (lambda: nn.Sequential(OwnCode(3, 3, 3)), "code of its own"),
    (ReadsWeight, "read elsewhere"),
    (two_names, "registered under 2 names"),
    (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3))), "parametrization"),
    (lambda: nn.Sequential(nn.LazyConv2d(3, 3)), "lazy"),
]


@pytest.mark.parametrize(("build", "reason"), REFUSED)
def test_what_can_t_be_expanded_says_why_and_strict_raises(build: Any, reason: str) -> None:
    model = build()
    expanded = repfx.expand(model, "repvgg")
    assert reason in str(repfx.report(expanded))
    assert reason in str(repfx.sites(expanded))
    assert not any(isinstance(module, repfx.RepBlock) for module in expanded.modules())
    with pytest.raises(Refused, match=reason):
        repfx.expand(model, "repvgg", strict=True)


def test_a_conv_that_is_called_twice_is_expanded_without_its_batch_norm() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.norm(self.conv(self.conv(x)))
            return output

    model = randomize_batch_norm(Twice().double())
    expanded: Any = repfx.expand(model, "dbb")
    assert isinstance(expanded.norm, nn.BatchNorm2d)
    assert_same_map(expanded.eval(), model.eval(), batch(), 1e-12)
    randomize_batch_norm(expanded, seed=6)
    fused = repfx.fuse(expanded)
    assert_same_map(fused, expanded, batch())


def test_a_refused_branch_is_named_and_the_others_come() -> None:
    expanded = repfx.expand(small_net(), {"stem": "repvgg"})
    assert repfx.sites(expanded)["stem"].branches == ("1x1",)
    assert "identity: 3 channels go in and 8 come out" in str(repfx.report(expanded))


def test_a_model_that_is_one_conv_has_no_place_for_a_block() -> None:
    conv = nn.Conv2d(3, 3, 3)
    assert "put it into an nn.Sequential" in str(repfx.report(repfx.expand(conv, "acb")))
    assert_same_map(repfx.fuse(conv), conv, torch.randn(2, 3, 5, 7), 1e-6)


# ---- branches that add something at once


@pytest.mark.parametrize("preset", ["dyrep", "dbb", "acb", "repvgg", "mobileone"])
def test_with_gamma_branches_add_something_and_the_function_stays(preset: str) -> None:
    model = small_net()
    expanded: Any = repfx.expand(model, preset, gamma=0.01, calibrate=[batch(), batch(seed=1)])
    assert_same_map(expanded.eval(), model.eval(), batch(seed=2))
    for block in (module for module in expanded.modules() if isinstance(module, repfx.RepBlock)):
        x = torch.randn(2, block.in_channels, 9, 9, dtype=torch.float64)
        assert all(bool(branch(x).any()) for branch in block.branches.values())
    expanded(batch()).square().sum().backward()
    convs = [module for module in expanded.modules() if isinstance(module, nn.Conv2d)]
    grads = [conv.weight.grad for conv in convs]
    assert all(grad is not None and bool(grad.any()) for grad in grads), (
        "the first step reaches the convs of the branches too"
    )


def test_with_gamma_a_conv_alone_gets_a_batch_norm_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)).double()
    batches = [batch(seed=seed) for seed in range(3)]
    expanded: Any = repfx.expand(model, "acb", gamma=0.01, calibrate=batches)
    assert_same_map(expanded.eval(), model, batch(seed=9))
    assert_same_map(copy.deepcopy(expanded).train(), model, torch.cat(batches), 5e-3)
    assert [name for name, _ in expanded[0].origin.named_children()] == ["conv", "norm"]
    for site in ("0", "2"):
        for branch in ("1xk", "kx1"):
            repfx.drop(expanded, site, branch)
    assert_same_map(expanded, model, batch(seed=9))
    assert [type(module) for module in expanded] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert expanded[0].bias is not None, "there is no other place for what the BatchNorm learnt"


def test_gamma_is_relative_to_the_site_s_own() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([30.0, -3.0, 0.3, 0.03, 1.0, 0.0]))
    expanded: Any = repfx.expand(model, ["1x1"], gamma=0.1, calibrate=[batch()])
    assert torch.allclose(expanded[0].branches["1x1"].last_norm.weight, 0.1 * model[1].weight.abs())
    assert_same_map(expanded.eval(), model.eval(), batch(seed=9))


# ---- branches that are attached by a rate


def attached(rate: float) -> Any:
    model: Any = repfx.expand(small_net(), repfx.Spec(["1x1", "identity", "1x1-kxk"], weights="small"), attach_rate=0)
    randomize_batch_norm(model)
    for module in model.modules():
        if isinstance(module, AttachRate):
            module.rate.fill_(rate)
    return model.eval()


@pytest.mark.parametrize("training", [True, False])
def test_at_rate_zero_the_function_stays_though_branches_begin_as_in_their_papers(training: bool) -> None:
    model = small_net()
    expanded: Any = repfx.expand(model, "dbb", attach_rate=0.0)
    assert_same_map(copy.deepcopy(expanded).train(training), copy.deepcopy(model).train(training), batch())
    norms = [branch.last_norm for branch in expanded.stem.branches.values()]
    assert norms
    assert all(bool((norm.weight == 1).all()) for norm in norms)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_rate_is_part_of_the_kernel(rate: float) -> None:
    model = attached(rate)
    reference, x = copy.deepcopy(model), batch()
    block = model.stem
    fused = repfx.fuse(model)
    assert_same_map(fused, reference, x)
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 3
    assert_same_map(repfx.restore(fused), reference, x)
    kernel = block.equivalent_kernel(block.conv.weight)
    assert_same_map(lambda x: kernel(x), block, x)
    for branch in list(block.branches):
        repfx.drop(model, "stem", branch)
        assert_same_map(model, reference, x)
    assert isinstance(model.stem, nn.Conv2d)


def test_a_rate_that_differs_from_zero_makes_itself_felt() -> None:
    assert relative_error(attached(0.5)(batch()), attached(0.0)(batch())) > 0.01


def test_small_first_weights() -> None:
    torch.manual_seed(0)
    model: Any = repfx.expand(nn.Sequential(nn.Conv2d(8, 64, 3)), repfx.Spec(["1x1"], weights="small"))
    weight = model[0].branches["1x1"].conv.weight
    assert 0.9 * 0.1 / 8 < float(weight.detach().abs().max()) <= 0.1 / 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attach_rate": 0.5}, r"attach_rate=0\.5 changes the function"),
        ({"attach_rate": 0.0, "gamma": 0.1, "calibrate": [batch()]}, "each let branches begin gently: give only one"),
    ],
)
def test_rates_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        repfx.expand(small_net(), "acb", **options)


def test_gamma_needs_data_and_a_norm_that_can_be_set() -> None:
    with pytest.raises(InvalidInput, match=r"gamma=0\.1 needs preserve and calibrate"):
        repfx.expand(small_net(), "acb", gamma=0.1)
    with pytest.raises(InvalidInput, match=r"gamma=0\.1 needs preserve and calibrate"):
        repfx.expand(small_net(), "acb", gamma=0.1, preserve=False, calibrate=[batch()])
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)).double()
    before = str(model)
    with pytest.raises(InvalidInput, match="has no γ"):
        repfx.expand(model, "acb", gamma=0.1, calibrate=[batch()], inplace=True)
    assert str(model) == before


class RunsOut:
    """Data that can be read so many times, and then hold no batch."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __iter__(self) -> Iterator[Tensor]:
        self.left -= 1
        return iter([batch()] if self.left >= 0 else [])


@pytest.mark.parametrize(("preset", "times"), [("acb", 0), ("acb", 1), ("acb", 2), ("qarepvgg", 0), ("qarepvgg", 1)])
def test_data_that_is_used_up_leaves_the_model_as_it_was(preset: str, times: int) -> None:
    """The branches are measured, then the convs without a BatchNorm, then what stays of each sum."""
    model = small_net()
    model.plain.bias.requires_grad_(False)  # type: ignore[union-attr]
    before, text, output = copy.deepcopy(model.state_dict()), str(model), model.eval()(batch())
    trained = {name: each.requires_grad for name, each in model.named_parameters()}
    with pytest.raises(InvalidInput, match="calibrate gave no batch"):
        repfx.expand(model, preset, gamma=0.01, calibrate=RunsOut(times), inplace=True)
    assert str(model) == text
    assert {name: each.requires_grad for name, each in model.named_parameters()} == trained
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(batch()), output)


@pytest.mark.parametrize("trained", [True, False])
def test_a_batch_norm_that_a_conv_alone_gets_is_trained_where_the_conv_is(trained: bool) -> None:
    model = small_net()
    model.plain.requires_grad_(trained)
    expanded: Any = repfx.expand(model, "acb", gamma=0.1, calibrate=[batch()])
    assert {each.requires_grad for each in expanded.plain.norm.parameters()} == {trained}
    assert_same_map(expanded.eval(), model.eval(), batch())


def test_orepa_begins_as_in_its_paper() -> None:
    site = nn.Conv2d(6, 8, 3, padding=1, bias=False)
    weight = site.weight.detach().clone()
    block: Any = repfx.expand(nn.Sequential(site, nn.BatchNorm2d(8)), "orepa", preserve=False)[0]
    scales = {name: float(path.scale.weight.unique()) for name, path in block.paths.items()}
    assert scales == {
        "origin": 0.25,
        "1x1-avg": 0.25,
        "frequency-prior": 0.0,
        "1x1-kxk": 0.5,
        "1x1": 1.0,
        "separable": 0.5,
    }
    assert torch.equal(block.conv.weight, weight)
    inner = block.branches["1x1-kxk"].conv1
    assert type(inner).__name__ == "Residual"
    assert not inner.conv.weight.any()
    assert torch.equal(inner.equivalent_kernel(weight).weight.squeeze(), torch.eye(6))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_scaled_origin_with_a_bias_keeps_the_function_until_nothing_is_left(groups: int) -> None:
    model: Any = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.BatchNorm2d(8)).double()
    reference, x = randomize_batch_norm(copy.deepcopy(model)), torch.randn(2, 8, 7, 9).double()
    model = repfx.expand(reference, "orepa")
    assert_same_map(model, reference, x)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    before = copy.deepcopy(model)
    for branch in list(model[0].branches):
        repfx.drop(model, "0", branch)
        assert_same_map(model, before, x)
    assert type(model[0]) is nn.Conv2d


def test_a_scaled_origin_keeps_the_function_under_a_rate_too() -> None:
    reference: Any = randomize_batch_norm(small_net())
    model = repfx.expand(reference, "orepa", attach_rate=0.0)
    assert_same_map(model.eval(), reference.eval(), batch())


@pytest.mark.parametrize(("norm", "scale"), [("none", 0.5), ("scale", 0.0), ("scale", math.nan)])
def test_a_scale_of_the_origin_that_can_t_be(norm: Any, scale: float) -> None:
    with pytest.raises(InvalidInput, match='needs norm="scale", and to be a finite number'):
        repfx.Spec(["1x1"], norm, origin_scale=scale)


def test_a_frozen_conv_gets_a_frozen_scale() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 3))
    model[0].weight.requires_grad_(False)
    assert not repfx.expand(model, "orepa")[0].scale.weight.requires_grad


def test_an_architecture_knows_what_scales_begin_with() -> None:
    model = repfx.expand(nn.Sequential(nn.Conv2d(4, 4, 3)), "orepa")
    again: Any = repfx.expand(
        nn.Sequential(nn.Conv2d(4, 4, 3)), Architecture.from_json(Architecture.of(model).to_json())
    )
    scales = [float(path.scale.weight[0]) for path in again[0].paths.values()]
    assert scales == [0.25, 0.25, 0.0, 0.5, 1.0, 0.5]
