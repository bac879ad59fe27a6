"""`write_model_page`: one HTML page about a model, with its sites, its fused form, and the check that both are equivalent."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import repfx
from repfx.blocks.block import RepBlock
from repfx.blocks.presets import SpecLike
from repfx.errors import RepfxError, first_line
from repfx.measuring.equivalence import EquivalenceReport
from repfx.pages.diagram import parts_of
from repfx.pages.forms import form_of_model
from repfx.pages.rendering import write_page
from repfx.records.notes import copy_of
from repfx.testing import randomize_batch_norm


@dataclass(frozen=True)
class Check:
    """The result of comparing a model with its fused form.

    Args:
        report: the comparison; None if the model couldn't be run.
        problem: the reason why it couldn't be run; None if there is a report.
        randomized: whether the BatchNorms held random numbers during the comparison.
    """

    report: EquivalenceReport | None = None
    problem: str | None = None
    randomized: bool = False


def write_model_page(
    model: nn.Module,
    path: str | os.PathLike[str],
    x: Tensor,
    *,
    name: str,
    spec: SpecLike | None = None,
    trained: bool = False,
    timed: bool = False,
) -> Check:
    """Write the page of a model. The model itself stays as it is.

    Args:
        model: the model, in its plain or its training form.
        path: the HTML file to write.
        x: a batch of inputs. The model and its fused form are compared on it, and multiply-adds are counted on its first image.
        name: name of the model on the page.
        spec: branches with which the page first expands a copy of the model; None shows the model as it is.
        trained: whether the model has trained weights. If not, the BatchNorms of a copy get random numbers for the comparison,
            because fresh BatchNorms do nothing and would hide a mistake.
        timed: whether each layer is measured on the first image of x, before and after fusing, in torch on the device of the model.

    Returns:
        The result of the comparison.

    Raises:
        InvalidInput: there is nothing to fuse, jinja2 is missing, or the page can't be written.
    """
    training = copy_of(model) if spec is None else repfx.expand(model, spec)
    if not trained:
        randomize_batch_norm(training)
    fused = repfx.fuse(training)
    check = _check(training, fused, x, randomized=not trained)
    is_expanded = any(isinstance(module, RepBlock) for module in training.modules())
    forms = {"training": form_of_model("training form" if is_expanded else "model", training, x)}
    if spec is not None:
        forms = {"plain": form_of_model("plain model", model, x), **forms}
    write_page(
        "model.html",
        path,
        name=name,
        spec=spec if spec is None or isinstance(spec, str) else json.dumps(spec, default=str),
        shape="×".join(map(str, x.shape[1:])),
        expanded=is_expanded,
        sites=repfx.sites(training),
        parts=parts_of(training, fused),
        forms={**forms, "fused": form_of_model("fused", fused, x)},
        check=check,
        times=repfx.profile(training, x[:1]) if timed and check.report is not None else None,
        threads=torch.get_num_threads(),
        stays=repfx.report(fused).stays,
        skipped=repfx.report(fused).skipped,
    )
    return check


def _check(training: nn.Module, fused: nn.Module, x: Tensor, *, randomized: bool) -> Check:
    try:
        return Check(repfx.check_equivalent(training, fused, x, raises=False), randomized=randomized)
    except RepfxError as error:
        return Check(problem=first_line(error))
