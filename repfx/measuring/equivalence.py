"""The proof that two models compute the same function on an example; if they don't, the first module at which they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repfx.errors import EquivalenceError, InvalidInput, first_line
from repfx.measuring.difference import Difference, count_numbers, differences, worst
from repfx.measuring.in_float64 import Inputs, describe, double_copy, map_tensors, run_double
from repfx.records.provenance import Provenance, provenance_of

# Chosen by the coarsest parameter, because a rewritten weight was rounded to its dtype.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-1, torch.bfloat16: 5e-1}

_MAGNIFIED = 100  # how far a bound may rise for a net that magnifies rounding
_DECIDED_BY_ROUNDING = (
    "Rounding alone changes the outputs of the model as it was by as much, so this example proves nothing: take model.double(), "
    "or another example."
)


@dataclass(frozen=True)
class ModuleDifference:
    """The first module at which two models differ.

    Args:
        path: path of the module in the model.
        reference_path: path of the module in the reference whose output it should have.
        difference: distance of its output from that one.
        provenance: origin of the module, if it was rewritten.
        suspects: rewritten modules without a counterpart that ran after the last untouched module that agreed.
    """

    path: str
    reference_path: str
    difference: Difference
    provenance: Provenance | None = None
    suspects: tuple[str, ...] = ()

    def __str__(self) -> str:
        origin = []
        if self.provenance and self.provenance.rules:
            origin.append(f"rules {', '.join(self.provenance.rules)}")
        if self.provenance and self.provenance.sources:
            origin.append(f"from {_some(self.provenance.sources)}")
        if self.suspects and not origin:
            origin.append(f"after rewriting {_some(self.suspects)}")
        return f"{self.path!r}" + (f" ({', '.join(origin)})" if origin else "")


@dataclass(frozen=True)
class EquivalenceReport:
    """The findings of `check_equivalent`.

    Args:
        equivalent: whether every output is within the tolerance.
        max_error: ``max |a - b| / max |a|`` of the worst output; infinite if there is no number (see `problem`).
        max_absolute_error: largest ``max |a - b|`` of any output.
        tolerance: the bound for `max_error`.
        output: name of the worst output, such as ``output 0`` or ``output 'out'``.
        problem: another structure or shape, NaN, an infinity, or what the model raised; None if numbers show the difference.
        first_difference: first module, in the order of execution, at which the models differ; None if they don't,
            or if no module has a counterpart to be compared with.
        decided_by_rounding: whether rounding alone changes the reference's outputs as much. So it is where an output depends on which
            of two nearly equal numbers is larger, as the order of a detector's boxes does.
    """

    equivalent: bool
    max_error: float
    max_absolute_error: float
    tolerance: float
    output: str
    problem: str | None = None
    first_difference: ModuleDifference | None = None
    decided_by_rounding: bool = False

    def __str__(self) -> str:
        numbers = f"worst relative difference {self.max_error:.1e} (allowed {self.tolerance:.0e}) at {self.output}"
        if self.equivalent:
            return f"outputs agree: {numbers}."
        found = f"outputs differ: {self.problem or numbers}."
        if self.first_difference:
            found += f" First module that differs: {self.first_difference}."
        return found + (f" {_DECIDED_BY_ROUNDING}" if self.decided_by_rounding else "")


def check_equivalent(
    reference: nn.Module, model: nn.Module, x: Inputs, *, tolerance: float | None = None, raises: bool = True
) -> EquivalenceReport:
    """Check that two models give the same outputs on x. Copies of them run in eval mode and in float64.

    Models, inputs, modes, buffers and random number generators stay as they are. Inputs are moved to each model's
    device; inputs that are no floats keep their dtype.

    Args:
        reference: the model that is right.
        model: the model to check.
        x: a tensor, a tuple of positional inputs, a dict of keyword inputs, or a list that is one input, such as a detector's images.
        tolerance: allowed ``max |a - b| / max |a|`` of each output a of the reference (``max |a - b|`` for integers,
            and where a is zero). None takes it from the coarsest floating parameter of both models, since weights that
            were rewritten have been rounded once to that dtype:

            - float64, 1e-9: rounding shows as 1e-15 to 1e-12, any mistake in a formula as more than 1e-7.
            - float32, 1e-5: rounding shows as 2e-7 to 3e-6 (ResNet, VGG, MobileNet, DenseNet, RegNet with random
              statistics); a BatchNorm's eps forgotten shows as 3e-5 in one layer and more in a net.
            - float16, 1e-1, and bfloat16, 5e-1: rounding shows as up to 3e-2 and 2e-1 in the same nets. These bounds
              reveal a wrong structure, not a forgotten eps: check in float32 before you convert.

            A net in which large numbers cancel magnifies rounding. Where the outputs differ by more than this, the weights of
            the reference are moved by half a unit in their last place. Four times what that changes is allowed, too, up to 100
            times the bound.
        raises: whether to raise an error if the outputs differ; False returns the report instead.

    Raises:
        EquivalenceError: an output differs, in structure, shape or number, or holds NaN; its ``report`` is the report.
        InvalidInput: the reference can't run on x, or there is nothing to compare.

    >>> conv, norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
    >>> fused = nn.utils.fuse_conv_bn_eval(conv.eval(), norm.eval())
    >>> print(check_equivalent(nn.Sequential(conv, norm), fused, torch.ones(1, 1, 4, 4)))
    outputs agree: worst relative difference ... (allowed 1e-05) at output 0.
    """
    bound = _bound(reference, model, tolerance)
    right, checked = double_copy(reference), double_copy(model)
    found = _compare(_run_reference(right, x), checked, x)
    worst_output = worst(found)
    decided_by_rounding = False
    if tolerance is None and worst_output.error > bound:
        allowed = 4 * _effect_of_rounding(reference, x)
        decided_by_rounding = worst_output.error <= allowed
        if allowed < math.inf:
            bound = max(bound, min(allowed, _MAGNIFIED * bound))
    equivalent = worst_output.error <= bound
    report = EquivalenceReport(
        equivalent,
        worst_output.error,
        max(difference.absolute for difference in found),
        bound,
        worst_output.where,
        worst_output.problem,
        None if equivalent else _first_difference(right, checked, x, bound),
        decided_by_rounding and not equivalent,
    )
    if raises and not equivalent:
        error = EquivalenceError(str(report))
        error.report = report
        raise error
    return report


def default_tolerance(*models: nn.Module) -> float:
    """Return the tolerance of `check_equivalent` for models of these dtypes.

    >>> default_tolerance(nn.Linear(1, 1), nn.Linear(1, 1).double())
    1e-05
    """
    dtypes = {parameter.dtype for model in models for parameter in model.parameters() if parameter.is_floating_point()}
    return max((TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in dtypes), default=TOLERANCES[torch.float64])


def _bound(reference: nn.Module, model: nn.Module, tolerance: float | None) -> float:
    for name, given in (("reference", reference), ("model", model)):
        if not isinstance(given, nn.Module):
            raise InvalidInput(f"{name} is of type {type(given).__name__}, not a torch.nn.Module.")
    if reference is model:
        raise InvalidInput(
            "reference and model are one object, so they are always equal: keep a copy.deepcopy() of the model as it was."
        )
    if tolerance is None:
        return default_tolerance(reference, model)
    if not 0 <= tolerance < math.inf:
        raise InvalidInput(f"tolerance is {tolerance}: it must be finite and at least 0.")
    return tolerance


def _effect_of_rounding(model: nn.Module, x: Inputs) -> float:
    """Return the relative change of a model's outputs if each of its numbers moves by half a unit in its last place, up or down.

    It is infinite if the outputs get another shape or structure, and 0 if the outputs hold NaN, which differs from itself.
    """
    exact, moved = double_copy(model), double_copy(model)
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own, wide in zip(_floating(model), _floating(moved), strict=True):
            signs = torch.randint(0, 2, wide.shape, generator=chance, dtype=torch.float64, device="cpu") * 2 - 1
            wide += wide.abs() * signs.to(wide.device, wide.dtype) * (torch.finfo(own.dtype).eps / 2)
    outputs = run_double(exact, x)
    known = worst(differences(outputs, outputs)).error == 0
    return worst(differences(outputs, run_double(moved, x))).error if known else 0.0


def _floating(model: nn.Module) -> list[Tensor]:
    return [each for each in (*model.parameters(), *model.buffers()) if each.is_floating_point()]


def _run_reference(reference: nn.Module, x: Inputs) -> Any:
    try:
        outputs = run_double(reference, x)
    except InvalidInput:
        raise
    except Exception as error:
        name = type(reference).__name__
        raise InvalidInput(f"the reference, {name}, can't run on x = {describe(x)}: {first_line(error)}.") from error
    if not count_numbers(outputs):
        raise InvalidInput(f"the reference gives no numbers for x = {describe(x)}, so there is nothing to compare.")
    return outputs


def _compare(expected: Any, model: nn.Module, x: Inputs) -> list[Difference]:
    try:
        outputs = run_double(model, x)
    except InvalidInput:
        raise
    except Exception as error:
        problem = f"the model fails on x = {describe(x)}, where the reference runs: {first_line(error)}"
        return [Difference("output 0", math.inf, math.inf, problem)]
    return differences(expected, outputs)


def _first_difference(reference: nn.Module, model: nn.Module, x: Inputs, bound: float) -> ModuleDifference | None:
    """Run both models once more, and compare the outputs of the model's modules with those of the reference's modules, call by call."""
    twins = counterparts(reference, model)
    comparison = _Comparison(_outputs_by_path(reference, set(twins.values()), x), bound)
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if path in twins:
                hook = comparison.checker(path, twins[path])
            elif provenance_of(module) is not None:
                hook = comparison.suspicion(path)
            else:
                continue
            hooks.enter_context(module.register_forward_hook(hook))
        with suppress(Exception):  # what the model raised is in the report already
            run_double(model, x)
    return comparison.first


def counterparts(reference: nn.Module, model: nn.Module) -> dict[str, str]:
    """Return the path of each module whose outputs must equal those of a module of the reference, with the path of that module."""
    known = dict(reference.named_modules(remove_duplicate=False))
    pairs = {}
    for path, module in model.named_modules():
        provenance = provenance_of(module)
        twin = known.get(path)
        if provenance is not None and provenance.equals in known and _speaks_of(provenance, path, known):
            pairs[path] = provenance.equals
        elif twin is not None and type(twin) is type(module) and provenance_of(twin) == provenance:
            pairs[path] = path
    return {path: twin for path, twin in pairs.items() if path and twin}


def _speaks_of(provenance: Provenance, path: str, known: Mapping[str, nn.Module]) -> bool:
    """Whether the model that a provenance was written for can be the reference, and is not one before or after it.

    That model had all the sources. At the path of a new module it had nothing, unless the new module was made from that.
    """
    made_from = {*provenance.sources, provenance.equals}
    is_new = not any(source == path or str(source).startswith(f"{path}.") for source in made_from)
    return known.keys() >= set(provenance.sources) and not (is_new and path in known)


def _outputs_by_path(reference: nn.Module, paths: set[str], x: Inputs) -> dict[str, list[Any]]:
    outputs: dict[str, list[Any]] = {path: [] for path in paths}
    with ExitStack() as hooks:
        for path in paths:
            module = reference.get_submodule(path)
            hooks.enter_context(module.register_forward_hook(_recorder(outputs[path])))
        run_double(reference, x)
    return outputs


def _recorder(outputs: list[Any]) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(map_tensors(torch.clone, output))  # a ReLU in place would write over it

    return record


class _Comparison:
    """Hooks that compare the outputs of a model's modules with those of the reference's modules, up to the first difference."""

    def __init__(self, expected: dict[str, list[Any]], bound: float) -> None:
        self.expected = expected
        self.bound = bound
        self.suspects: list[str] = []
        self.first: ModuleDifference | None = None

    def checker(self, path: str, reference_path: str) -> Callable[..., None]:
        calls = iter(self.expected[reference_path])

        def check(module: nn.Module, args: Any, output: Any) -> None:
            wanted = next(calls, None)
            if self.first or wanted is None:
                return
            with suppress(InvalidInput):  # a type that can't be compared
                self._hold(path, reference_path, differences(wanted, output), provenance_of(module))

        return check

    def suspicion(self, path: str) -> Callable[..., None]:
        return lambda module, args, output: self.suspects.append(path)

    def _hold(self, path: str, reference_path: str, found: list[Difference], origin: Provenance | None) -> None:
        if found and worst(found).error > self.bound:
            self.first = ModuleDifference(path, reference_path, worst(found), origin, tuple(self.suspects))
        elif found and origin is None:
            self.suspects.clear()


def _some(paths: Sequence[str]) -> str:
    shown = ", ".join(map(repr, paths[:4]))
    return shown if len(paths) <= 4 else f"{shown} and {len(paths) - 4} more"
