"""`fuse` as a verb: what it returns, what it says, what it leaves as it was, for every form of conv, dtype and device."""

from __future__ import annotations

import copy
import io
import operator
import pickle
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import StdConv2d
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

import repfx
from repfx.algebra.layers import Layer, is_batch_norm
from repfx.errors import InvalidInput, Refused
from repfx.testing import assert_same_map, randomize_batch_norm, relative_error
from tests.inline_net import Net, convs, error_of, fused_exactly, image, norms, ready, reasons, same_state
from tests.small_net import batch, small_net

# ---- every form of conv, with the BatchNorm behind it

FORMS: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "rectangular, strided, dilated": (lambda: nn.Conv2d(4, 6, (3, 2), (1, 2), (2, 0), (2, 1)), (2, 4, 9, 10)),
    "even, same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), (2, 4, 9, 10)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid", bias=False), (2, 4, 9, 10)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 9, 10)),
    "circular, same": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 9, 10)),
    "replicate": (lambda: nn.Conv2d(4, 6, 3, padding=3, padding_mode="replicate", stride=2), (2, 4, 9, 10)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 10)),
    "depthwise with multiplier": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 9, 10)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1), (2, 4, 9)),
    "3d": (lambda: nn.Conv3d(4, 3, (1, 2, 3), padding=(0, 1, 1)), (2, 4, 3, 4, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1), (2, 4, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 0)), (2, 4, 4, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=2, bias=False), (2, 4, 4, 5)),
    "transposed, depthwise": (lambda: nn.ConvTranspose2d(4, 8, 2, 2, groups=4), (2, 4, 4, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 2, (1, 2, 3), (1, 2, 2)), (2, 4, 3, 4, 5)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), (2, 4, 9, 10)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3, bias=False)), (2, 4, 9, 10)),
    "transposed, spectral norm": (lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(4, 6, 3)), (2, 4, 4, 5)),
}
_NORM_OF: dict[int, type[nn.Module]] = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def pair_of(form: str, **keywords: Any) -> tuple[nn.Sequential, Tensor]:
    make, shape = FORMS[form]
    conv = make()
    return nn.Sequential(conv, _NORM_OF[len(shape)](conv.out_channels, **keywords)), image(*shape)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_conv_is_folded_and_keeps_its_form(form: str) -> None:
    model, x = pair_of(form, eps=1e-2)
    fused = fused_exactly(model, x)
    (path,) = convs(fused)
    conv, original = fused.get_submodule(path), FORMS[form][0]()
    assert (path, norms(fused)) == ("0", [])
    assert not nn.utils.parametrize.is_parametrized(conv)
    for name in ("kernel_size", "stride", "dilation", "groups", "padding", "padding_mode", "output_padding"):
        assert getattr(conv, name) == getattr(original, name), name
    assert repfx.report(fused).counts == {"fold_batch_norm": 1}


@pytest.mark.parametrize("form", [form for form in FORMS if "norm" not in form])
def test_what_was_folded_is_restored(form: str) -> None:
    model, x = pair_of(form, eps=1e-2)
    restored = repfx.restore(fused_exactly(model, x))
    assert error_of(restored.eval(), model, x) < 1e-9
    assert restored.state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(restored.state_dict(), strict=True)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_missing_gamma_or_beta_is_not_taken_for_the_other(missing: str) -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    setattr(model[1], missing, None)
    assert norms(fused_exactly(model, image())) == []


def test_a_gamma_of_zero_folds_to_the_shift() -> None:
    model: Any = ready(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    with torch.no_grad():
        model[1].weight.zero_()
    fused = repfx.fuse(model)
    assert error_of(fused, model, image()) < 1e-9
    assert not bool(fused.get_submodule("0").weight.any())


# ---- classes that only look like torch's


def resets(norm: Layer) -> Layer:
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


LOOKALIKES: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "BatchNorm that activates": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU)),
        [],
        "",
    ),
    "conv of standardized weights": (lambda: nn.Sequential(StdConv2d(4, 4, 3), nn.BatchNorm2d(4)), [], ""),
    "frozen BatchNorm": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), resets(FrozenBatchNorm2d(4))), [], ""),
    "instance norm": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True)), [], ""),
}


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "in an island"])
@pytest.mark.parametrize("name", LOOKALIKES)
def test_other_packages_layers_are_read_exactly_or_left_with_the_reason(name: str, inside: bool) -> None:
    make, left, reason = LOOKALIKES[name]
    model = Net(lambda m, x: m.block(x) if float(x.sum()) < 1e9 else x, block=make()) if inside else make()
    fused = fused_exactly(model, image())
    assert norms(fused) == [f"block.{path}" if inside else path for path in left]
    assert reason in reasons(fused)


def test_a_conv_that_pads_by_the_input_s_size_stays_in_a_sequence_that_code_around_may_index() -> None:
    block = nn.Sequential(Conv2dSame(4, 4, 3, 2), nn.BatchNorm2d(4))
    model = Net(lambda m, x: m.block[1](m.block[0](x)) if float(x.sum()) < 1e9 else x, block=block)
    fused = fused_exactly(model, image())
    assert norms(fused) == ["block.1"]
    model = Net(lambda m, x: m.block(x) if float(x.sum()) < 1e9 else x, block=block)
    assert "Conv2dSame runs code of its own" in reasons(fused_exactly(model, image()))


@pytest.mark.parametrize("training", [False, True])
def test_an_activating_batch_norm_measures_only_in_training_mode(training: bool) -> None:
    """A trace through it would fix the mode, and the fused model would overwrite statistics even in eval mode."""
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), BatchNormAct2d(4)))
    fused = repfx.fuse(model.train()).train(training)
    before = copy.deepcopy(fused.state_dict())
    fused(image())
    assert same_state(before, fused.state_dict()) is not training


def test_a_batch_norm_that_belongs_to_no_conv_is_not_lost() -> None:
    """A BatchNorm stays if it stands at the input, behind a sum, or behind a pooling without a conv before it."""
    model = Net(
        lambda m, x: m.after(m.conv(m.of_input(x).relu()).relu() + x) + m.pooled(F.max_pool2d(x, 3, 1, 1)),
        conv=nn.Conv2d(4, 4, 3, padding=1),
        of_input=nn.BatchNorm2d(4),
        after=nn.BatchNorm2d(4),
        pooled=nn.BatchNorm2d(4),
    )
    fused = fused_exactly(model, image())
    assert norms(fused) == ["of_input", "after", "pooled"]
    assert {skip.path for skip in repfx.report(fused).skipped} == {"of_input", "after", "pooled"}


# ---- what comes back


class Choosing(nn.Sequential):
    """A sequence whose code can't be traced."""

    def forward(self, x: Tensor) -> Any:
        for layer in self if x.sum() > 0 else reversed(self):
            x = layer(x)
        return x


class Deeper(nn.Module):
    """An encoder that runs one stage as a leaf, and has another one for other code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.leaf = Choosing(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        return self.leaf(self.stem(x))


def test_blocks_that_a_traced_forward_does_not_run_are_folded_too() -> None:
    model = ready(nn.Sequential(Deeper()))
    expanded = ready(repfx.expand(model, "dbb"), seed=1)
    fused = repfx.fuse(expanded)
    assert convs(fused) == convs(repfx.fuse(model)) == ["0.stem.0", "0.leaf.0", "0.stage.0"]
    assert_same_map(fused.get_submodule("0.stage"), expanded.get_submodule("0.stage"), image(2, 4, 7, 9))


def test_strict_raises_with_every_reason_and_leaves_the_model() -> None:
    model = ready(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4)))
    before, text = copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(
        Refused, match=r"(?s)strict=True left 3 alone:.*'0'.*'1'.*zero padding.*'3'.*ReLU comes before it"
    ):
        repfx.fuse(model, strict=True)
    assert same_state(before, model.state_dict())
    assert (str(model), repfx.report(model).name) == (text, "nothing done yet")
    assert repfx.fuse(small_net(), strict=True)(batch()).shape == (6, 4)


def test_what_costs_more_when_merged_is_no_refusal() -> None:
    model = nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1))
    fused = repfx.fuse(model, strict=True)
    assert repfx.report(fused).skipped == ()
    assert "weights" in reasons(fused)


def test_a_failure_leaves_the_model() -> None:
    model: Any = ready(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    )
    model[4].weight.data[1] = float("nan")
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.train().modules()]
    with pytest.raises(InvalidInput, match=r"merged weight of '3' is not finite in torch\.float64"):
        repfx.fuse(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert modes == [module.training for module in model.modules()]
    with pytest.raises(InvalidInput, match="ReLU has no conv or linear layer"):
        repfx.fuse(nn.ReLU())


def test_weights_that_only_float16_can_t_hold_are_named() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).half()
    model[1].running_var.fill_(1e-7)
    model[1].weight.data.fill_(6e4)
    with pytest.raises(InvalidInput, match=r"not finite in torch\.float16"):
        repfx.fuse(model)


def test_the_report_says_what_was_made_from_what() -> None:
    report = repfx.report(repfx.fuse(small_net()))
    assert [(edit.rule, edit.path, edit.sources) for edit in report.applied] == [
        ("fold_batch_norm", "stem", ("stem", "norm")),
        ("fold_batch_norm", "depthwise", ("depthwise", "norm2")),
    ]
    assert str(report) == "fuse: 2 changes, 0 left alone"


def test_the_result_is_one_graph_that_trains() -> None:
    fused = repfx.fuse(small_net().train())
    assert isinstance(fused, fx.GraphModule)
    assert all(module.training for module in fused.modules())
    fused(batch()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_frozen_weights_stay_frozen() -> None:
    model = small_net()
    model.stem.requires_grad_(False)
    fused = repfx.fuse(model)
    assert {name for name, parameter in fused.named_parameters() if not parameter.requires_grad} == {
        "stem.weight",
        "stem.bias",
    }


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def island_net() -> nn.Module:
    return Net(decides, net=small_net(), tail=nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


def decides(m: Any, x: Any) -> Any:
    return m.tail(m.net(x)) if float(x.sum()) < 1e9 else x


@pytest.mark.parametrize("make", [small_net, island_net])
@pytest.mark.parametrize("twin_of", [copy.deepcopy, through_pickle, through_torch_save])
def test_the_result_can_be_copied_and_saved(twin_of: Any, make: Any) -> None:
    model = ready(make())
    fused = repfx.fuse(model)
    twin = twin_of(fused)
    assert error_of(twin, model, batch()) < 1e-9
    assert same_state(fused.state_dict(), twin.state_dict())
    assert not set(map(id, fused.parameters())) & set(map(id, twin.parameters()))
    assert error_of(twin_of(repfx.fuse(twin)), model, batch()) < 1e-9
    assert repfx.restore(twin).state_dict().keys() == model.state_dict().keys()


def test_fusing_twice_changes_nothing_more() -> None:
    fused = repfx.fuse(ready(repfx.expand(small_net(), "dbb")))
    again = repfx.fuse(fused)
    assert repfx.report(again).applied == ()
    assert same_state(fused.state_dict(), again.state_dict())


# ---- dtypes and devices


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_float64_and_rounded_once(dtype: torch.dtype) -> None:
    model = ready(repfx.expand(small_net(), "dbb")).to(dtype)
    exact = repfx.fuse(copy.deepcopy(model).double()).state_dict()
    fused = repfx.fuse(model).state_dict()
    assert {tensor.dtype for tensor in fused.values()} == {dtype}
    assert same_state(fused, {name: tensor.to(dtype) for name, tensor in exact.items()})


def test_parts_of_several_dtypes_keep_each_its_own() -> None:
    model: Any = Net(
        lambda m, x: m.second(m.first(x).to(torch.bfloat16)),
        first=nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
        second=nn.Sequential(nn.Conv2d(6, 2, 3), nn.BatchNorm2d(2)).to(torch.bfloat16),
    )
    randomize_batch_norm(model).eval()
    fused = repfx.fuse(model)
    assert [parameter.dtype for parameter in fused.parameters()] == [torch.float32] * 2 + [torch.bfloat16] * 2
    x = image().float()
    assert_same_map(lambda x: fused(x).double(), lambda x: model(x).double(), x, 0.05)


def test_a_batch_norm_in_float32_behind_a_conv_in_bfloat16_gives_the_conv_s_dtype() -> None:
    """Mixed precision leaves such models."""
    model: Any = nn.Sequential(nn.Conv2d(4, 6, 3).to(torch.bfloat16), nn.BatchNorm2d(6))
    randomize_batch_norm(model).eval()
    fused = repfx.fuse(model)
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.bfloat16}
    assert_same_map(copy.deepcopy(fused).double(), copy.deepcopy(model).double(), image(), 0.02)


@pytest.mark.parametrize(
    "device", ["meta", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_new_convs_are_where_the_old_ones_were(device: str) -> None:
    model = repfx.expand(small_net(), "dbb").to(device)
    fused = repfx.fuse(model)
    assert {tensor.device.type for tensor in fused.state_dict().values()} == {device}
    assert fused(batch().to(device)).shape == (6, 4)
    if device != "meta":
        assert error_of(fused.eval(), model.eval(), batch().to(device)) < 1e-9


def test_a_merged_1x1_lies_in_memory_as_torch_lays_it() -> None:
    """Odd strides on axes of size one make torch take the conv's output for channels last; exporters then write pools as gathers."""
    fused = repfx.fuse(ready(nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 5, 1))))
    assert repfx.report(fused).counts == {"merge_sequential": 1}
    assert all(weight.stride() == torch.empty(weight.shape).stride() for weight in fused.parameters())


def test_weights_lie_in_memory_as_they_did() -> None:
    model: Any = ready(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).to(memory_format=torch.channels_last)
    fused = repfx.fuse(model)
    assert fused.get_submodule("0").weight.is_contiguous(memory_format=torch.channels_last)
    assert error_of(fused, model, image()) < 1e-9


class ReadingTheShape(nn.Module):
    """Code that asks for sizes between conv and BatchNorm, as attention layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, channels, height, width = x.shape
        x = self.norm(x)
        return x.reshape(batch, channels, height * width)


def test_asking_for_the_shape_in_between_is_no_second_use() -> None:
    model = randomize_batch_norm(ReadingTheShape().double()).eval()
    fused = repfx.fuse(model)
    assert not any(map(is_batch_norm, fused.modules())), str(repfx.report(fused))
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    assert relative_error(fused(x), model(x)) < 1e-12


@pytest.mark.parametrize("out_channels", [2, 4, 6])
def test_a_scale_and_a_shift_of_each_channel_follow_a_conv(out_channels: int) -> None:
    scale, shift = torch.randn(2, out_channels, 1, 1)
    net = Net(lambda m, x: m.a(x) * m.scale + m.shift, a=nn.Conv2d(4, out_channels, 3))
    net.scale, net.shift = nn.Parameter(scale), nn.Parameter(shift)
    fused = fused_exactly(net, image())
    assert convs(fused) == ["a"]
    assert not [node for node in fused.graph.nodes if node.op == "call_function"]


def test_shifts_that_cancel_leave_no_bias() -> None:
    """Shifts cancel after restore(fuse(…)) of a conv without bias; what rounding leaves of them is no bias."""
    net = Net(lambda m, x: (m.a(x) + m.shift / 3) - m.shift / 3, a=nn.Conv2d(4, 6, 3, bias=False))
    net.shift = nn.Parameter(torch.randn(6, 1, 1))
    assert fused_exactly(net, image()).a.bias is None


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: 2 * [m.one(x)],
        lambda m, x: [m.one(x), *(2 * [m.two(x)])],
        lambda m, x: [m.alone(x), m.one(x), x, m.two(x)],
        lambda m, x: [m.one(x), m.two(x), m.alone(x)],
    ],
)
def test_sums_are_written_over_nothing_that_is_read_again(code: Any) -> None:
    parts = {
        "one": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
        "two": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        "alone": nn.Conv2d(4, 4, 3, padding=1),
    }
    net = randomize_batch_norm(Net(lambda m, x: reduce(operator.add, code(m, x)), **parts)).double().eval()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    fused = repfx.fuse(net)
    assert "fold_batch_norm" in repfx.report(fused).counts
    assert_same_map(fused, net, x)
    assert same_state(net.state_dict(), before)
