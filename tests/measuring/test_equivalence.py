from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

import repfx
from repfx.errors import EquivalenceError, InvalidInput
from repfx.measuring.difference import Difference, differences, worst
from repfx.measuring.equivalence import ModuleDifference, check_equivalent, default_tolerance
from repfx.records.provenance import Provenance, attach, provenance_of

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Net(nn.Module):
    """Two convs with BatchNorm, an in-place ReLU (it overwrites the BatchNorm's output) and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3)
        self.bn2 = nn.BatchNorm2d(5, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        output: Tensor = self.head(x.mean((2, 3)))
        return output


def randomize(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"))
            nn.init.uniform_(module.get_buffer("running_var"), 0.3, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def fuse_by_hand(net: Any, eps: float | None = None) -> Any:
    """Fold both BatchNorms in float64, with provenance; `eps`, if given, replaces the right one."""
    fused = copy.deepcopy(net).eval()
    for index in "12":
        conv = copy.deepcopy(fused.get_submodule(f"conv{index}")).double()
        norm = copy.deepcopy(fused.get_submodule(f"bn{index}")).double()
        norm.eps = norm.eps if eps is None else eps
        folded = nn.utils.fuse_conv_bn_eval(conv, norm).to(net.head.weight.dtype)
        sources = (f"conv{index}", f"bn{index}")
        attach(folded, Provenance(("fold_batch_norm",), sources, sources[1]))
        setattr(fused, f"conv{index}", folded)
        setattr(fused, f"bn{index}", nn.Identity())
    return fused


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 5e-1)])
def test_a_right_fusion_is_equivalent_in_each_dtype(dtype: torch.dtype, bound: float) -> None:
    net = randomize(Net()).to(dtype)
    report = check_equivalent(net, fuse_by_hand(net), X)
    assert report.equivalent
    assert 0 < report.max_error < report.tolerance == bound
    assert 0 < report.max_absolute_error < bound
    assert report.first_difference is None
    assert report.output == "output 0"
    assert str(report).startswith("outputs agree: ")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_forgotten_eps_is_found_and_located(dtype: torch.dtype) -> None:
    net = randomize(Net()).to(dtype)
    with pytest.raises(EquivalenceError) as caught:
        check_equivalent(net, fuse_by_hand(net, eps=0.0), X)
    message = str(caught.value)
    assert "(allowed 1e-0" in message
    assert "at output 0. First module that differs: 'conv1'" in message
    assert message.endswith("(rules fold_batch_norm, from 'conv1', 'bn1').")
    first = caught.value.report.first_difference
    assert (first.path, first.reference_path) == ("conv1", "bn1")
    assert first.difference.error > default_tolerance(net)


def wrong_weight(net: Any) -> None:
    with torch.no_grad():
        net.head.weight[0, 0] += 1e-3


def wrong_second_fold(net: Any) -> None:
    with torch.no_grad():
        net.conv2.bias[:] += 1e-2


def wrong_activation(net: Any) -> None:
    net.relu = nn.ReLU6()
    net.relu.__class__ = nn.ReLU
    net.relu.forward = lambda x: x.clamp(-0.1)


@pytest.mark.parametrize(
    ("mutate", "path"), [(wrong_weight, "head"), (wrong_second_fold, "conv2"), (wrong_activation, "relu")]
)
def test_the_first_module_that_differs_is_named(mutate: Callable[[Any], None], path: str) -> None:
    net = randomize(Net()).double()
    fused = fuse_by_hand(net)
    mutate(fused)
    report = check_equivalent(net, fused, X, raises=False)
    assert not report.equivalent
    assert report.max_error > 1e-6
    assert report.first_difference is not None
    assert report.first_difference.path == path
    assert f"First module that differs: '{path}'" in str(report)


class Twice(nn.Module):
    def __init__(self, second: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv(self.conv(x) * self.second)
        return output


def test_a_module_called_twice_is_compared_call_by_call() -> None:
    net = Twice()
    wrong = copy.deepcopy(net)
    wrong.second = 1.5
    report = check_equivalent(net, wrong, X, raises=False)
    assert report.first_difference is not None
    assert report.first_difference.path == "conv"
    assert check_equivalent(net, copy.deepcopy(net), X).max_error == 0


def test_modules_that_may_differ_are_not_blamed() -> None:
    # conv1's output differs because a restored BatchNorm scales it back, and conv2's provenance refers to another model.
    net = randomize(Net()).double()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.conv1.weight *= 2
        other.bn1.running_mean *= 2
        other.bn1.running_var.copy_(other.bn1.running_var * 4 + 3 * other.bn1.eps)
        other.head.bias += 1
    attach(other.conv1, Provenance(("restore",), ("conv1",)))
    attach(other.bn1, Provenance(("restore",), ("conv1",), "conv1"))
    attach(other.conv2, Provenance(("fold",), ("conv2.origin.conv",), "bn1"))
    report = check_equivalent(net, other, X, raises=False)
    assert report.first_difference is not None
    assert report.first_difference.path == "head"
    assert not report.first_difference.suspects


def test_a_rewritten_module_without_counterpart_is_suspected() -> None:
    net = randomize(Net()).double()
    fused = fuse_by_hand(net)
    attach(fused.conv2, Provenance(("fold",), tuple(f"conv2.{branch}" for branch in "abcdef"), "conv2"))
    with torch.no_grad():
        fused.conv2.bias += 1
    report = check_equivalent(net, fused, X, raises=False)
    assert report.first_difference is not None
    assert (report.first_difference.path, report.first_difference.suspects) == ("relu", ("conv2",))
    assert str(report).endswith("First module that differs: 'relu' (after rewriting 'conv2').")


def test_many_sources_are_cut_short() -> None:
    first = ModuleDifference("a", "b", Difference("output 0", 1.0, 1.0), Provenance(("fold",), tuple("abcdef"), "b"))
    assert str(first) == "'a' (rules fold, from 'a', 'b', 'c', 'd' and 2 more)"


def test_models_input_modes_and_random_state_stay_untouched() -> None:
    net = randomize(nn.Sequential(Net(), nn.Dropout())).train()
    fused = copy.deepcopy(net)
    x = X.clone().requires_grad_()
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (net, fused)]
    random_state = torch.get_rng_state()
    assert check_equivalent(net, fused, x).equivalent
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, X)
    for model, state in zip((net, fused), states, strict=True):
        assert all(module.training for module in model.modules())
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())


class Functional(nn.Module):
    """A module of one function, for outputs of any kind."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def check_functions(a: Callable[..., Any], b: Callable[..., Any], x: Any = X, **options: Any) -> Any:
    return check_equivalent(Functional(a), Functional(b), x, raises=False, **options)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_nested_outputs_are_compared_leaf_by_leaf() -> None:
    def outputs(x: Tensor, shift: float) -> Any:
        return OrderedDict(out=x, aux=[x.sum(), (Pair(x, x + shift), None, "name", 3)], mask=x > 0)

    assert check_functions(lambda x: outputs(x, 0), lambda x: dict(outputs(x, 0))).equivalent
    report = check_functions(lambda x: outputs(x, 0), lambda x: outputs(x, 1e-3))
    assert report.output == "output 'aux'[1][0][1]"
    assert report.max_error == pytest.approx(1e-3)


def test_an_integer_must_be_equal_and_keeps_its_dtype() -> None:
    index = torch.tensor([100_000, 7])
    assert check_functions(lambda i: i, lambda i: i.clone(), index).equivalent
    report = check_functions(lambda i: i, lambda i: i + torch.tensor([0, 1]), index)
    assert report.max_error == 1
    assert check_functions(lambda i: i.dtype == torch.int64, lambda i: True, index).equivalent


def test_the_error_is_relative_and_absolute_where_the_reference_is_zero() -> None:
    report = check_functions(lambda x: 100 * x, lambda x: 100 * x + 1e-3)
    assert (report.max_error, report.max_absolute_error) == (pytest.approx(1e-5), pytest.approx(1e-3))
    zero = check_functions(lambda x: 0 * x, lambda x: 0 * x + 1e-3)
    assert zero.max_error == zero.max_absolute_error == pytest.approx(1e-3)
    assert check_functions(lambda x: x, lambda x: 0 * x).max_error == pytest.approx(1)


@pytest.mark.parametrize(
    ("a", "b", "problem"),
    [
        (lambda x: (x, x), lambda x: x, "only the reference gives output 1"),
        (lambda x: x, lambda x: {"out": x}, "only the reference gives output 0"),
        (lambda x: x, lambda x: (x, x), "only the model gives output 1"),
        (lambda x: x, lambda x: x[:, :1], "output 0 has shape [2, 3, 8, 8] in the reference and [2, 1, 8, 8]"),
        (lambda x: x, lambda x: None, "output 0 is of type Tensor in the reference and NoneType in the model"),
        (lambda x: x, lambda x: x > 0, "output 0 is of torch.float64 in the reference and of torch.bool"),
        (lambda x: (x, "a"), lambda x: (x, "b"), "output 1 is 'a' in the reference and 'b' in the model"),
        (lambda x: x, lambda x: x / 0 * 0, "output 0 holds NaN in the model"),
        (lambda x: x / 0 * 0, lambda x: x / 0 * 0, "output 0 holds NaN in the reference and the model"),
        (lambda x: x, lambda x: x / 0, "output 0 holds an infinity in the model"),
        (lambda x: x / 0, lambda x: -x / 0, "output 0 holds an infinity in the reference"),
    ],
)
def test_outputs_that_no_number_tells_apart(a: Callable[..., Any], b: Callable[..., Any], problem: str) -> None:
    report = check_functions(a, b)
    assert not report.equivalent
    assert report.max_error == report.max_absolute_error == float("inf")
    assert problem in str(report)


def test_a_model_that_fails_where_the_reference_runs_differs() -> None:
    report = check_functions(lambda x: x, lambda x: x @ torch.ones(3))
    assert not report.equivalent
    assert str(report).startswith(
        "outputs differ: the model fails on x = float32 [2, 3, 8, 8], where the reference runs: "
    )


def test_equal_infinities_are_equal() -> None:
    def mask(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, -torch.inf)

    assert check_functions(mask, mask).max_error == 0
    assert check_functions(mask, lambda x: mask(x) + 1e-3).max_error == pytest.approx(1e-3)


@pytest.mark.parametrize("x", [(X, X), {"a": X, "b": X}], ids=["positional", "keyword"])
def test_several_inputs(x: Any) -> None:
    assert check_functions(lambda a, b: a + b, lambda a, b: b + a, x).equivalent
    assert not check_functions(lambda a, b: a + 2 * b, lambda a, b: 2 * b + b, (X, X + 1)).equivalent


def test_what_a_model_creates_or_casts_is_float64_too() -> None:
    def narrow(x: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, 8) + torch.zeros(8, dtype=torch.float32)
        return x.float() @ torch.ones(8, 3) + x.to(torch.bfloat16).half().sum(-1, keepdim=True) + grid.sum()

    assert check_functions(lambda x: (narrow(x),), lambda x: (narrow(x) * (1 + 1e-12),), tolerance=1e-11).equivalent
    assert not check_functions(narrow, lambda x: narrow(x) * (1 + 1e-12), tolerance=1e-13).equivalent
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("cast", [Tensor.float, Tensor.half, Tensor.bfloat16])
def test_a_cast_inside_a_model_rounds_nothing(cast: Any) -> None:
    assert check_functions(lambda x: x / 3, lambda x: cast(x / 3)).max_error == 0


def test_random_models_draw_the_same_numbers() -> None:
    assert check_functions(lambda x: x + torch.rand_like(x), lambda x: torch.rand_like(x) + x).equivalent


class Cancels(nn.Module):
    """A conv of an image with a large mean, which the BatchNorm behind it takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, (3, 2)), nn.BatchNorm2d(4)
        with torch.no_grad():
            self.norm.running_mean = self.conv(torch.full((1, 3, 3, 2), 300.0)).flatten()
            nn.init.constant_(self.norm.running_var, 0.01)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y


def test_a_net_that_magnifies_rounding_may_differ_by_as_much_and_no_more() -> None:
    model, x = Cancels().eval(), X + 300
    fused: Any = nn.utils.fuse_conv_bn_eval(model.conv, model.norm)
    report = check_equivalent(model, fused, x)
    assert 1e-5 < report.max_error <= report.tolerance <= 1e-3
    with torch.no_grad():
        fused.bias += 0.1
    with pytest.raises(EquivalenceError, match="outputs differ"):
        check_equivalent(model, fused, x)
    assert check_equivalent(model.double(), copy.deepcopy(model), x.double()).tolerance == 1e-9


class Chooses(nn.Module):
    """A conv whose outputs come in pairs that are equal but for rounding, and which of a pair is larger, or where it is."""

    def __init__(self, *, counted: bool) -> None:
        super().__init__()
        self.conv, self.counted = nn.Conv2d(3, 2, (3, 2), bias=False), counted
        self.norm: Any = nn.BatchNorm2d(2)
        with torch.no_grad():
            self.conv.weight[1] = self.conv.weight[0] / 3
            self.norm.running_var = torch.tensor([1.3, 1.3 / 9])
        self.norm.eps = 0.0

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.norm(self.conv(x)).unbind(1)
        larger: Tensor = first > second
        return larger.nonzero() if self.counted else larger.to(x.dtype)


@pytest.mark.parametrize("counted", [False, True])
def test_outputs_that_rounding_decides_are_told_apart_from_wrong_ones(counted: bool) -> None:
    torch.manual_seed(0)
    model = Chooses(counted=counted).eval()
    with pytest.raises(EquivalenceError, match=r"Rounding alone changes .*model\.double\(\)") as caught:
        repfx.fuse(model, example=X)
    assert caught.value.report.decided_by_rounding
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        model.norm.bias += torch.tensor([1.0, -1.0])  # far apart now
        wrong.norm.bias -= torch.tensor([1.0, -1.0])
    report = check_equivalent(model, wrong, X, raises=False)
    assert not report.equivalent
    assert not report.decided_by_rounding
    assert "Rounding" not in str(report)
    model.norm.running_var.neg_()
    norms = nn.Sequential(model.conv, model.norm)
    assert not check_equivalent(norms, copy.deepcopy(norms), X, raises=False).decided_by_rounding  # all are NaN


def test_a_traced_copy_is_equivalent_and_keeps_its_error_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    net = randomize(Net())
    assert check_equivalent(net, fx.symbolic_trace(net), X).max_error == 0
    with pytest.raises(InvalidInput, match="expected input"):
        check_equivalent(fx.symbolic_trace(net), net, X[:, :2])
    assert capsys.readouterr().err == ""


def test_a_model_with_weight_norm_can_be_checked() -> None:
    with pytest.warns(FutureWarning):
        net: Any = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    plain = nn.Conv2d(3, 4, 3)
    plain.load_state_dict({"weight": net.weight.detach(), "bias": net.bias.detach()})
    assert check_equivalent(nn.Sequential(net), nn.Sequential(plain), X).equivalent


def test_a_list_is_one_input() -> None:
    """Detectors take a list of images of different sizes, and return a list of as many dicts."""
    images = [X[0], X[1, :, 2:]]
    double = Functional(lambda images: [{"sums": image.sum((1, 2)) * 2} for image in images])
    twice = Functional(lambda images: [{"sums": image.add(image).sum((1, 2))} for image in images])
    assert check_equivalent(double, twice, images).equivalent


@pytest.mark.parametrize(
    ("reference", "x", "message"),
    [
        (Net(), X[:, :2], r"the reference, Net, can't run on x = float32 \[2, 2, 8, 8\]: Given groups=1, .* channels"),
        (
            Net(),
            {X},
            "x is of type set: give a tensor, a tuple of positional inputs, a dict of keyword inputs or a list",
        ),
        (Net(), [X], r"the reference, Net, can't run on x = \[float32 \[2, 3, 8, 8\]\]"),
        (Functional(lambda x: None), X, "gives no numbers for x = "),
        (Functional(lambda x: x[:0]), X, "gives no numbers for x = "),
        (Functional(lambda x: object()), X, "gives no numbers for x = "),
        (Functional(lambda x: (x, object())), X, "output 1 is of type object, which can't be compared"),
        (nn.Sequential(nn.LazyConv2d(3, 1)), X, "'0.weight' has no values yet"),
        (nn.Conv2d(3, 3, 1, device="meta"), X, "'weight' has no values yet"),
        ("resnet18", X, "reference is of type str, not a torch.nn.Module"),
    ],
)
def test_what_can_not_be_checked_is_an_invalid_input(reference: Any, x: Any, message: str) -> None:
    model = copy.deepcopy(reference) if isinstance(reference, nn.Module) else Net()
    with pytest.raises(InvalidInput, match=message):
        check_equivalent(reference, model, x)


def test_a_model_is_not_compared_with_itself() -> None:
    net = Net()
    with pytest.raises(InvalidInput, match="one object"):
        check_equivalent(net, net, X)


@pytest.mark.parametrize("tolerance", [-1e-9, float("nan"), float("inf")])
def test_a_tolerance_that_means_nothing_is_refused(tolerance: float) -> None:
    with pytest.raises(InvalidInput, match="tolerance is"):
        check_equivalent(Net(), Net(), X, tolerance=tolerance)


def test_large_integers_are_compared_exactly() -> None:
    assert worst(differences(torch.tensor([2**53]), torch.tensor([2**53 + 1]))).error == 1


def test_provenance_survives_copies_of_a_graph() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1)))
    provenance = Provenance(("rule",), ("a", "b"), "b")
    attach(traced, provenance)
    attach(traced.get_submodule("0"), provenance)
    copied = copy.deepcopy(copy.deepcopy(traced))
    assert provenance_of(copied) == provenance_of(copied.get_submodule("0")) == provenance
    assert provenance_of(nn.Conv2d(3, 3, 1)) is None
