"""Proofs of verbs: on an example input, a verb's result must compute what the model computed before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from repfx.errors import EquivalenceError, first_line
from repfx.measuring.difference import differences, worst
from repfx.measuring.equivalence import EquivalenceReport, check_equivalent, default_tolerance
from repfx.measuring.in_float64 import Inputs, double_copy, run_double
from repfx.records.notes import copy_of
from repfx.records.snapshot import Snapshot


def prove(verb: str, before: nn.Module, after: nn.Module, example: Inputs | None, *, in_training: bool = False) -> None:
    """Compare what a verb made with the model as it was, in float64 and in eval mode; nothing without an example.

    Args:
        verb: name of the verb, for the error.
        before: the model as it was.
        after: the model that the verb made.
        example: input of the model, as `check_equivalent` takes it.
        in_training: whether the outputs in training mode must stay, too. They are compared unless the model draws random numbers itself.

    Raises:
        EquivalenceError: an output differs; the first module that differs is named.
        InvalidInput: the model can't run on the example.
    """
    if example is None:
        return
    report = check_equivalent(before, after, example, raises=False)
    _require(verb, report, before, "")
    if in_training:
        _require(verb, _compare_training(before, after, example), before, " in training mode")


@contextmanager
def proven(verb: str, model: nn.Module, example: Inputs | None, *, in_training: bool = False) -> Iterator[None]:
    """Prove what happens to a model inside the block, in place. After any error the model is as it was before.

    Args:
        verb, example, in_training: as in `prove`.
    """
    if example is None:
        yield
        return
    before, snapshot = copy_of(model), Snapshot(model)
    try:
        yield
        prove(verb, before, model, example, in_training=in_training)
    except BaseException:
        snapshot.put_back()
        raise


def _require(verb: str, report: EquivalenceReport, before: nn.Module, when: str) -> None:
    if report.equivalent:
        return
    where = report.first_difference
    place = (
        f"The first module that differs is {where}"
        if where
        else f"No module inside differs, so code of {type(before).__name__} does"
    )
    what = str(replace(report, first_difference=None)).removeprefix("outputs differ: ").rstrip(".")
    error = EquivalenceError(
        f"{verb!r} would change the model's output{when}: {what}. {place}. The model is as it was."
    )
    error.report = report
    raise error


def _compare_training(before: nn.Module, after: nn.Module, example: Inputs) -> EquivalenceReport:
    """Compare two models in training mode, with the same random numbers in each run."""
    bound = default_tolerance(before, after)
    try:
        expected, again = (run_double(double_copy(before).train(), example) for _ in range(2))
    except Exception:  # it may need a larger batch, or targets, to train
        return _nothing_to_compare(bound)
    if worst(differences(expected, again)).error > 0:  # it draws numbers that can't be seeded
        return _nothing_to_compare(bound)
    try:
        found = worst(differences(expected, run_double(double_copy(after).train(), example)))
    except Exception as error:
        problem = f"the model fails where it ran before: {first_line(error)}"
        return EquivalenceReport(False, math.inf, math.inf, bound, "output 0", problem)
    return EquivalenceReport(found.error <= bound, found.error, found.absolute, bound, found.where, found.problem)


def _nothing_to_compare(bound: float) -> EquivalenceReport:
    return EquivalenceReport(True, 0.0, 0.0, bound, "output 0")
