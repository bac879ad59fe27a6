"""One plain net stands for every candidate of a supernet, and scores them all, on one process or several."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.models.resnet import BasicBlock

import repfx
from repfx.algebra.layers import Layer, is_batch_norm, is_conv
from repfx.blocks.block import ORIGIN
from repfx.blocks.gates import gates_in
from repfx.errors import InvalidInput, UnknownName
from repfx.passes.gate import gate, ungate
from repfx.search.scoring import FusedSupernet, SummedConv, scores
from repfx.search.space import Code, Space
from repfx.testing import randomize_batch_norm, relative_error
from tests.two_ranks import run_on_two_ranks

GATES: dict[str, dict[str, Any]] = {
    "straight_through": {"style": "straight_through"},
    "straight_through, own convs too": {"style": "straight_through", "origin": True},
    "sigmoid": {"style": "sigmoid"},
}


def stem() -> list[nn.Module]:
    """A site that gets no gates."""
    return [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]


def two(dimensions: int = 2, **options: Any) -> nn.Sequential:
    """Two convs of one form, the second one behind its BatchNorm and an activation."""
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    first = conv(3, 8, 3, padding=1, bias=False)
    second = conv(8, 8, **{"kernel_size": 3, "padding": 1, "bias": False, **options})
    return nn.Sequential(first, norm(8), nn.ReLU(), second, norm(8))


class Residual(nn.Module):
    """A small ResNet like torchvision's: a block with an identity shortcut, and a strided one with a 1×1 conv as shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*stem())
        down = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.layer = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 12, 2, down))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 3, height, width)`` to ``(batch, 5)``."""
        output: Tensor = self.head(self.layer(self.stem(x)).mean((2, 3)))
        return output


SIDES = {1: (11,), 2: (7, 9), 3: (5, 4, 6)}
NETS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "plain": (2, two),
    "strided": (2, partial(two, stride=2)),
    "dilated": (2, partial(two, dilation=2, padding=2)),
    "depthwise": (2, partial(two, groups=8)),
    "depthwise 5×5": (2, partial(two, groups=8, kernel_size=5, padding=2)),
    "grouped": (2, partial(two, groups=2)),
    "reflect-padded": (2, partial(two, padding_mode="reflect")),
    "not square": (2, partial(two, kernel_size=(3, 5), padding=(1, 2))),
    "padded on one side": (2, partial(two, kernel_size=4, padding="same")),
    "with a bias": (2, partial(two, bias=True)),
    "1d": (1, partial(two, 1)),
    "3d": (3, partial(two, 3)),
    "residual": (2, Residual),
}


def images(dimensions: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 3, *SIDES[dimensions], dtype=dtype)


def supernet(
    build: Callable[[], nn.Module],
    spec: Any = "odbb",
    gates: str = "sigmoid",
    *,
    sites: Callable[[str], bool] = lambda path: True,
    **options: Any,
) -> nn.Module:
    """A supernet in float64 and eval mode, whose gates and BatchNorms are random."""
    torch.manual_seed(0)
    model: nn.Module = repfx.expand(build().double(), spec, preserve=False, **options)
    for path, block in list(model.named_modules()):
        if isinstance(block, repfx.RepBlock) and sites(path):
            gate(model, path, **GATES[gates])
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            parameter.detach().normal_()
    return randomize_batch_norm(model).eval()


def codes(model: nn.Module, count: int = 4) -> list[Code]:
    """Codes with all paths open, with all closed, and random ones."""
    size = len(Space.of(model).paths)
    drawn = [tuple((torch.rand(size) < 0.5).tolist()) for _ in range(count)]
    return [(True,) * size, (False,) * size, *drawn]


def choose(model: nn.Module, code: Code) -> nn.Module:
    """A copy of the supernet in which these paths are open."""
    chosen = copy.deepcopy(model)
    Space.of(chosen).choose(chosen, code)
    return chosen


@torch.no_grad()
def assert_candidates_are_right(model: nn.Module, x: Tensor, *, tolerance: float = 1e-9) -> None:
    fast = FusedSupernet(model)
    for code in codes(model):
        assert relative_error(fast.net(code)(x), choose(model, code)(x)) < tolerance
    fused = repfx.fuse(choose(model, code))
    assert relative_error(fast.net(code)(x), fused(x)) < tolerance


# ---- the one net


@pytest.mark.slow_one_in(4)
@pytest.mark.slow
@pytest.mark.one_in(5)
@pytest.mark.parametrize("gates", ["straight_through, own convs too", "sigmoid"])
@pytest.mark.parametrize("name", NETS)
def test_a_candidate_is_what_its_branches_compute(name: str, gates: str) -> None:
    dimensions, build = NETS[name]
    assert_candidates_are_right(supernet(build, "odbb", gates), images(dimensions))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("norm", ["batch_norm", "none"])
def test_so_it_is_with_transposed_convs(norm: Any, gates: str) -> None:
    def upsampler() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, output_padding=1), nn.BatchNorm2d(4), nn.ReLU())

    assert_candidates_are_right(supernet(upsampler, repfx.Spec(["kxk", "kxk"], norm), gates), images())


@pytest.mark.slow_one_in(4)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(
    "spec",
    [
        "ireps",
        "qarepvgg",
        "ecbsr",
        repfx.Spec(["1x1", "1xk"], norm="scale"),
        repfx.Spec(["1x1", "kx1"], weights="shared"),
        ["lora", repfx.BranchSpec("1x1-laplacian", {"bias": True})],
    ],
)
def test_so_it_is_with_all_kinds_of_branches(spec: Any, gates: str) -> None:
    assert_candidates_are_right(supernet(two, spec, gates), images())


def test_lambda_is_part_of_the_kernels() -> None:
    model = supernet(two, "dbb", attach_rate=0.4)
    assert_candidates_are_right(model, images())


def test_own_convs_that_rest_add_nothing() -> None:
    model = supernet(two, repfx.Spec(["1x1", "1xk", "kx1"], origin=False), "straight_through")
    assert_candidates_are_right(model, images())


def test_with_nothing_open_nothing_is_left() -> None:
    model = supernet(two, "acb", "straight_through, own convs too")
    net = FusedSupernet(model).net((False,) * 6)
    assert not any(bool(conv.weight.any()) or bool(conv.bias.any()) for conv in summed_convs(net).values())


@pytest.mark.slow
def test_in_float32_a_candidate_is_right_to_six_digits() -> None:
    model = supernet(Residual, "ireps").float()
    assert_candidates_are_right(model, images(dtype=torch.float32), tolerance=1e-6)


def test_in_half_precision_sums_are_rounded_once() -> None:
    model = supernet(two, "ireps").to(torch.bfloat16)
    code = codes(model)[2]
    found = summed_convs(FusedSupernet(model).net(code))
    exact = summed_convs(FusedSupernet(model.double()).net(code))
    for path, conv in found.items():
        assert conv.weight.dtype == torch.bfloat16
        assert relative_error(conv.weight.double(), exact[path].weight) < 2**-8


def test_weights_lie_as_the_models_do() -> None:
    model = supernet(two).to(memory_format=torch.channels_last)
    conv = summed_convs(FusedSupernet(model).net(codes(model)[2]))["3"]
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def summed_convs(net: nn.Module) -> dict[str, SummedConv]:
    return {path: module for path, module in net.named_modules() if isinstance(module, SummedConv)}


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["odbb", "qarepvgg"])
def test_everything_else_is_fused(spec: Any) -> None:
    """The rest is fused, also a BatchNorm behind a block whose branches have none, even if an activation is part of it."""

    def build() -> nn.Module:
        tail = [nn.Conv2d(8, 8, 3, padding=1, bias=False), BatchNormAct2d(8)]
        return nn.Sequential(*stem(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *tail)

    model = supernet(build, spec, sites=lambda path: path != "0")
    net = FusedSupernet(model).net(codes(model)[2])
    assert list(summed_convs(net)) == ["3", "6"]
    assert [path for path, module in net.named_modules() if is_conv(module)] == ["0"]
    assert not any(is_batch_norm(module) for module in net.modules())
    assert_candidates_are_right(model, images())


class Linear(nn.Module):
    """A gated site with linear neighbours on all sides, which `fuse` would merge with any conv at the site."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 3, 1, bias=False)
        self.site = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.beside = nn.Conv2d(3, 3, 3, padding=1)
        self.after = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 3, height, width)`` to the same."""
        x = self.before(x)
        output: Tensor = self.after(2 * self.norm(self.site(x)) + self.beside(x) + x)
        return output


@pytest.mark.parametrize("spec", ["acb", "qarepvgg"])
def test_fuse_merges_nothing_with_what_is_refilled(spec: str) -> None:
    model = supernet(Linear, {"site": spec}, "straight_through, own convs too")
    whole = [path for path, module in repfx.fuse(model).named_modules() if is_conv(module)]
    assert len(whole) == 1  # with `fuse`, all of it is one conv
    assert list(summed_convs(FusedSupernet(model).net(codes(model)[0]))) == ["site"]
    assert_candidates_are_right(model, images())


def test_without_any_other_conv_there_is_nothing_to_fuse() -> None:
    model = supernet(lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()), "acb")
    assert_candidates_are_right(model, images())


@pytest.mark.slow
def test_a_model_that_cannot_be_traced_whole_is_right_too() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Residual()

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.inside(x if float(x.sum()) > 0 else -x)
            return output

    assert_candidates_are_right(supernet(Picky), images())


@pytest.mark.slow
def test_a_block_inside_another_ones_branch_can_have_gates() -> None:
    model = supernet(two, "dbb", sites=lambda path: False)
    repfx.expand(model, {"3.1x1-kxk.conv2": "acb"}, preserve=False, inplace=True)
    gate(model, "3.1x1-kxk.conv2")
    assert_candidates_are_right(randomize_batch_norm(model), images())


def test_code_around_can_read_the_sizes_of_a_site() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.conv(x) * self.conv.stride[0]
            return output

    assert_candidates_are_right(supernet(Reading, "acb"), images())


# ---- refilling


@pytest.mark.slow
def test_the_same_code_gives_the_same_bits_whatever_came_between() -> None:
    model = supernet(Residual)
    fast = FusedSupernet(model)
    x = images()
    wanted = codes(model)
    first = [fast.net(code)(x) for code in wanted]
    for code, output in reversed(list(zip(wanted, first))):
        assert torch.equal(fast.net(code)(x), output)
        assert torch.equal(fast.net(code)(x), output)
        assert torch.equal(FusedSupernet(model).net(code)(x), output)


def test_one_net_serves_all_codes_and_only_what_changed_is_refilled() -> None:
    model = supernet(two)
    fast = FusedSupernet(model)
    code = codes(model)[2]
    net = fast.net(code)
    versions = {path: conv.weight._version for path, conv in summed_convs(net).items()}
    last = (*code[:-1], not code[-1])
    assert fast.net(last) is net
    assert [path for path, conv in summed_convs(net).items() if conv.weight._version != versions[path]] == ["3"]
    assert summed_convs(net)["3"].open == Space.of(model).open_at(last)["3"]


def test_a_copy_of_the_net_keeps_its_candidate() -> None:
    model = supernet(two)
    fast = FusedSupernet(model)
    first, second = codes(model)[2:4]
    kept = copy.deepcopy(fast.net(first))
    x = images()
    expected = kept(x)
    assert not torch.equal(fast.net(second)(x), expected)
    assert torch.equal(kept(x), expected)


def test_the_net_comes_in_eval_mode_and_without_gradients() -> None:
    model = supernet(Residual).train()
    fast = FusedSupernet(model)
    code = codes(model)[2]
    fast.net(code).train()
    net = fast.net(code)
    assert not any(module.training for module in net.modules())
    assert not net(images()).requires_grad


def test_it_can_be_made_and_used_in_inference_mode() -> None:
    model = supernet(two)
    with torch.inference_mode():
        fast = FusedSupernet(model)
        fast.net(codes(model)[2])
    x, code = images(), codes(model)[3]
    assert relative_error(fast.net(code)(x), choose(model, code)(x)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["running", "measured"])
def test_the_model_is_untouched(statistics: str) -> None:
    model = supernet(Residual, gates="straight_through, own convs too").train()
    model.get_submodule("layer.0").eval()
    chosen, other = codes(model)[2:4]
    Space.of(model).choose(model, chosen, (True,))
    Space.of(model).choose(model, other, (False,))
    before = copy.deepcopy(model)
    calibrate = [images()] if statistics == "measured" else None
    scores(model, codes(model), lambda net: float(net(images()).sum()), statistics=statistics, calibrate=calibrate)
    state = model.state_dict()
    for name, value in before.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    for site, gates in gates_in(model).items():
        assert [gates.open_in(mode) for mode in (True, False)] == [
            gates_in(before)[site].open_in(mode) for mode in (True, False)
        ]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_net_is_that_of_the_state_when_it_was_made() -> None:
    model = supernet(two)
    fast = FusedSupernet(model)
    x, (first, second) = images(), codes(model)[2:4]
    expected = choose(model, first)(x)
    fast.net(second)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    assert relative_error(fast.net(first)(x), expected) < 1e-9


# ---- statistics


@pytest.mark.slow
def test_measured_statistics_are_those_of_the_candidate_alone() -> None:
    model = supernet(Residual, gates="straight_through, own convs too")
    data = [images() * 3 + 1 for _ in range(3)]
    fast = FusedSupernet(model, statistics="measured", calibrate=iter(data))
    x = images()
    for code in codes(model)[2:]:
        by_hand = choose(model, code)
        update_bn(data, by_hand)
        assert relative_error(fast.net(code)(x), by_hand.eval()(x)) < 1e-9
        assert relative_error(fast.net(code)(x), choose(model, code)(x)) > 1e-3


def test_each_measured_net_is_its_own() -> None:
    model = supernet(two)
    fast = FusedSupernet(model, statistics="measured", calibrate=[images()])
    x, (first, second) = images(), codes(model)[2:4]
    net = fast.net(first)
    expected = net(x)
    assert fast.net(second) is not net
    assert torch.equal(net(x), expected)


def test_batch_norms_without_statistics_are_left_alone() -> None:
    def build() -> nn.Module:
        return nn.Sequential(*two(), nn.ReLU(), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())

    model = supernet(build)
    data, x = images(), images()
    fast = FusedSupernet(model, statistics="measured", calibrate=[data])
    code = codes(model)[2]
    by_hand = choose(model, code)
    norms: list[Layer] = [norm for norm in by_hand.modules() if is_batch_norm(norm) and norm.running_mean is not None]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    by_hand(data)
    assert relative_error(fast.net(code)(x), by_hand.eval()(x)) < 1e-9


# ---- scores


def test_scores_come_in_the_order_of_the_codes() -> None:
    model = supernet(two)
    x = images()
    wanted = codes(model)

    def score(net: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        return float(net(x).mean())

    found = scores(model, wanted, score)
    with torch.no_grad():
        by_hand = [float(choose(model, code)(x).mean()) for code in wanted]
    assert found == pytest.approx(by_hand, abs=1e-9)
    assert len(set(found)) == len(wanted)
    assert scores(model, [], score) == []


def test_a_score_may_be_a_tensor() -> None:
    model = supernet(two)
    assert scores(model, codes(model)[:1], lambda net: net(images()).new_ones(1).sum()) == [1.0]


def test_nan_is_the_lowest_score_unless_all_are() -> None:
    model = supernet(two)
    given = iter([1.0, math.nan, -1e30, -math.inf, math.nan, 2.0])
    found = scores(model, codes(model), lambda net: next(given))
    assert found == [1.0, -math.inf, -1e30, -math.inf, -math.inf, 2.0]
    with pytest.raises(InvalidInput, match="NaN for all 6 codes"):
        scores(model, codes(model), lambda net: math.nan)


def test_a_branch_that_overflowed_spoils_only_candidates_with_it() -> None:
    model = supernet(two)
    names = list(Space.of(model).paths)
    block: Any = model.get_submodule("3")
    block.branches["1x1"].conv.weight.detach().fill_(math.nan)
    x, wanted = images(), codes(model, 6)
    found = scores(model, wanted, lambda net: float(net(x).sum()))
    assert [math.isinf(each) for each in found] == [code[names.index(("3", "1x1"))] for code in wanted]


@pytest.mark.parametrize("given", [None, "high", torch.ones(2), {"accuracy": 1.0}])
def test_a_score_is_one_number(given: Any) -> None:
    model = supernet(two)
    with pytest.raises(InvalidInput, match=f"one number for a net; it returned a {type(given).__name__}"):
        scores(model, codes(model), lambda net: given)


# ---- refusals


def test_it_refuses() -> None:
    model = supernet(two)
    with pytest.raises(UnknownName, match="no source of statistics 'runing'; did you mean 'running'"):
        FusedSupernet(model, statistics="runing")
    with pytest.raises(InvalidInput, match="needs calibrate"):
        FusedSupernet(model, statistics="measured")
    with pytest.raises(InvalidInput, match="calibrate is used only with statistics='measured'"):
        FusedSupernet(model, calibrate=[images()])
    with pytest.raises(InvalidInput, match="calibrate gave no batch"):
        FusedSupernet(model, statistics="measured", calibrate=[])
    with pytest.raises(InvalidInput, match="doesn't fit Sequential"):
        FusedSupernet(model, statistics="measured", calibrate=[torch.ones(1, 2)]).net(codes(model)[0])
    with pytest.raises(InvalidInput, match="a code of 2 entries can't say which of 11 paths"):
        FusedSupernet(model).net((True, False))
    with pytest.raises(InvalidInput, match="has no gates"):
        FusedSupernet(two())
    with pytest.raises(InvalidInput, match=r"not a torch\.nn\.Module"):
        FusedSupernet(None)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="is the model itself"):
        FusedSupernet(model.get_submodule("3"))


def test_it_refuses_blocks_whose_kernel_is_no_sum() -> None:
    model = supernet(two, "dbb", "straight_through")
    repfx.expand(model, {"3.1x1-kxk.conv2": "acb"}, inplace=True)
    gate(model, "3.1x1-kxk.conv2")
    with pytest.raises(InvalidInput, match=r"'3\.1x1-kxk\.conv2' has gates inside '3'"):
        FusedSupernet(model)


@pytest.mark.parametrize("inside", ["", ".origin", ".origin.conv", ".gate"])
def test_it_refuses_blocks_that_run_more_than_their_paths(inside: str) -> None:
    model = supernet(two)
    model.get_submodule(f"3{inside}").register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(InvalidInput, match="'3' has hooks"):
        FusedSupernet(model)


def test_it_refuses_what_is_not_finite_in_all_candidates() -> None:
    model = supernet(two)
    block: Any = model.get_submodule("3")
    block.conv.weight.detach().fill_(math.inf)
    with pytest.raises(InvalidInput, match="the merged weight of '3' is not finite"):
        FusedSupernet(model)


# ---- several processes


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_ranks_share_the_work_and_get_the_same_scores() -> None:
    assert run_on_two_ranks("score_on_two_ranks").count("as on one process") == 2


def test_origin_is_a_path_of_the_space() -> None:
    model = supernet(two, "acb", "straight_through, own convs too")
    assert ("3", ORIGIN) in FusedSupernet(model).space.paths
    ungate(model, "3")
    assert FusedSupernet(model).space.sites == ("0",)


@pytest.mark.skipif(torch.cuda.is_available(), reason="not on a GPU")
@pytest.mark.parametrize("flatten", ["module", "view"])
def test_on_a_cpu_the_net_has_channels_last_unless_code_could_mind(flatten: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, 8, 3)
            self.flatten = nn.Flatten()
            self.head = nn.Linear(8 * 5 * 7, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv2(torch.relu(self.norm(self.conv(x)))))
            output: Tensor = self.head(self.flatten(x) if flatten == "module" else x.view(x.shape[0], -1))
            return output

    model = repfx.expand(Net(), {"conv": "acb"}, preserve=False)
    randomize_batch_norm(model)
    model = gate(model, "conv", "sigmoid").eval()
    x = torch.randn(2, 3, 7, 9)
    Space.of(model).choose(model, (True, False))
    net = FusedSupernet(model).net((True, False))
    torch.testing.assert_close(net(x), model(x), rtol=1e-5, atol=1e-5)
    last = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (net.conv.weight, net.conv2.weight)]  # type: ignore[union-attr, operator]
    assert last == [flatten == "module"] * 2
