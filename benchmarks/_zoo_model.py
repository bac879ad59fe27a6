"""Measure one model for the zoo: `python -m benchmarks._zoo_model torchvision/resnet18` prints a line of JSON."""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.utils.model import reparameterize_model
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse as torch_fuse
from torch.utils._pytree import tree_leaves

import repfx
from benchmarks._zoo_libraries import LIBRARIES, net
from benchmarks._zoo_page import LOADS, STRUCTURE
from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.errors import EquivalenceError, ExportError, InvalidInput, Refused, first_line
from repfx.measuring.in_float64 import map_tensors, run_double
from repfx.rewriting.pipeline import rewrite
from repfx.testing import randomize_batch_norm, relative_error
from repfx.tracing.trace import trace

PRESETS = ("dbb", "repvgg")
STRUCTURE_ONLY = 150e6  # models with more parameters are only examined on the meta device
NUMERIC_ANYWAY = {"torchvision/vit_l_32"}

Inputs = tuple[Any, ...]
Counts = tuple[int, int]


@dataclass
class Findings:
    """One row of the table.

    Args:
        parameters: in millions.
        convs, batch_norms: of the model.
        reached: convs called by a graph, among those that the model calls at all.
        missed: convs that the model calls but no graph does, with the reason.
        sites: convs that each preset expanded.
        refused: why each preset left convs as they are, with how often.
        fused, timm, torch: convs and BatchNorms that stay after each library's own way, or why there is no result; for the nets of
            torchvision and timm.
        errors: relative errors in float64 by what was compared, also for other libraries.
        onnx: error of the fused model in onnxruntime, in float32, or why there is no file; not for timm's models.
        restored: `LOADS` if the fused and restored weights load strictly into the model's own class, or why they don't; neither for
            torchvision's models nor for timm's.
        norms_that_stay: why BatchNorms stay, with how often.
        untraced: modules whose code no graph holds, with the reason.
        problem: the failure, if anything failed.
        seconds: time for fusing, for expanding by each preset, and for everything.
    """

    name: str
    parameters: float = 0.0
    input: str = ""
    convs: int = 0
    batch_norms: int = 0
    reached: int = 0
    missed: dict[str, str] = field(default_factory=dict)
    sites: dict[str, int] = field(default_factory=dict)
    refused: dict[str, dict[str, int]] = field(default_factory=dict)
    fused: Counts | str = ""
    timm: Counts | str = ""
    torch: Counts | str = ""
    errors: dict[str, float] = field(default_factory=dict)
    onnx: float | str = ""
    restored: str = ""
    norms_that_stay: dict[str, int] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Record how long the body takes."""
        began = time.perf_counter()
        yield
        self.seconds[what] = round(time.perf_counter() - began, 2)


def examine(name: str) -> Findings:
    """Put one model through tracing, fusing and expanding, and compare."""
    torch.manual_seed(0)
    model = build(name)
    found = Findings(name, round(sum(p.numel() for p in model.parameters()) / 1e6, 2))
    found.convs, found.batch_norms = counts(model)
    if not found.convs:
        return found
    try:
        with found.timed("all"):
            if found.parameters * 1e6 > STRUCTURE_ONLY and name not in NUMERIC_ANYWAY:
                _structure(model.to("meta"), found)
            else:
                _numbers(randomize_batch_norm(model.double()), found)
    except Exception as error:
        found.problem = f"{type(error).__name__}: {first_line(error)}"
    return found


def build(name: str) -> nn.Module:
    """Build a model by ``library/name`` with random weights, in eval mode."""
    library, _, model = name.partition("/")
    built: nn.Module
    if library in LIBRARIES:
        return net(name).build().eval()
    if library == "timm":
        built = timm.create_model(model)
        return built.eval()
    options: dict[str, Any] = {"weights": None}
    kind = torchvision.models.get_model_builder(model).__module__
    if ".detection." in kind or ".segmentation." in kind:
        options["weights_backbone"] = None
    detector = ".detection." in kind
    if detector:
        one_stage = model.startswith(("retinanet", "fcos", "ssd"))
        options |= {"score_thresh": 0.0, "topk_candidates": 100} if one_stage else {"box_score_thresh": 0.0}
        options |= {} if model.startswith("ssd") else {"min_size": 96, "max_size": 128}
    built = torchvision.models.get_model(model, **options)
    if detector:
        _tell_scores_apart(built)
    return built.eval()


@torch.no_grad()
def _tell_scores_apart(detector: nn.Module) -> None:
    """Draw the weights of the heads anew: with torchvision's weights the scores are nearly equal, and rounding decides their order."""
    for name, part in detector.named_children():
        layers = part.modules() if name != "backbone" else ()
        for layer in layers:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)


def counts(model: nn.Module) -> Counts:
    """Count convs and BatchNorms of a model. Calls of the functions count, too, because torch's `fuse` leaves such calls."""
    modules = list(model.modules())
    graphs = [module.graph for module in modules if isinstance(module, fx.GraphModule)]
    called = sum(node.target is F.batch_norm for graph in graphs for node in graph.nodes)
    return sum(map(is_conv, modules)), sum(map(is_batch_norm, modules)) + called


def _structure(model: nn.Module, found: Findings) -> None:
    """Record which convs are reached, expanded and fused, without running numbers."""
    found.input = STRUCTURE
    _fuse(model, found)
    for preset in PRESETS:
        expanded = _expand(model, preset, found)
        if expanded is not None:
            _same_counts(repfx.fuse(expanded), found)


def _numbers(model: nn.Module, found: Findings) -> None:
    """Record which convs are reached, expanded and fused, and compare every output with that of the model itself in float64."""
    inputs = fitting_inputs(model, found)
    settle(model, inputs)
    expected = outputs(model, inputs)
    before = fingerprint(model)

    beyond = found.name.partition("/")[0] in LIBRARIES
    if not beyond:
        traced = rewrite(model, (), "trace").model
        found.errors["traced"] = error(outputs(traced, inputs), expected)
        found.errors["traced, training"] = _training_error(traced, model, inputs)

    fused = _fuse(model, found)
    found.errors["fused"] = error(outputs(fused, inputs), expected)
    if beyond:
        found.restored = _restore(fused, model, inputs, expected, found)

    for preset in PRESETS:
        expanded = _expand(model, preset, found)
        if expanded is None:
            continue
        found.errors[f"{preset}, expanded"] = error(outputs(expanded, inputs), expected)
        if not beyond:
            found.errors[f"{preset}, expanded, training"] = _training_error(expanded, model, inputs)
        _stir(expanded, inputs)
        fused = repfx.fuse(expanded)
        _same_counts(fused, found)
        found.errors[f"{preset}, fused"] = error(outputs(fused, inputs), outputs(expanded, inputs))
    if not beyond:
        _other_ways(model, inputs, expected, found)
    if fingerprint(model) != before:
        found.problem = "the model was changed"
    if beyond or found.name.startswith("torchvision/"):
        # some nets keep values for eval mode in float64 until they are trained again
        renewed = model.float().train().eval()
        found.onnx = _exported(renewed, inputs)
    wrong = {key: value for key, value in found.errors.items() if key not in ("timm", "torch") and not value <= 1e-9}
    if wrong:
        found.problem = f"wrong output: {wrong}"


def _other_ways(model: nn.Module, inputs: Inputs, expected: list[Tensor], found: Findings) -> None:
    """Record what timm's and torch's own ways to fuse leave."""
    found.timm = _elsewhere(lambda: reparameterize_model(copy.deepcopy(model)), "timm", inputs, expected, found)
    if isinstance(found.timm, str):  # timm's own layers are float32, whatever dtype the model has
        found.timm = counts(reparameterize_model(copy.deepcopy(model).float()))
    found.torch = _elsewhere(lambda: torch_fuse(copy.deepcopy(model)), "torch", inputs, expected, found)


def _fuse(model: nn.Module, found: Findings) -> nn.Module:
    with found.timed("fuse"):
        fused: nn.Module = repfx.fuse(model)
    found.fused = counts(fused)
    traces = trace(model)
    found.untraced = traces.untraced
    stays = {skip.path: skip.reason for skip in repfx.report(fused).stays}
    found.norms_that_stay = _counted(stays[path] for path, module in fused.named_modules() if is_batch_norm(module))
    convs = {path for path, module in model.named_modules() if is_conv(module)}
    expandable = {site.path for site in repfx.sites(model) if site.refusal is None}
    reached = {
        path for path in convs if path in expandable or any(_lies_in(path, each.path) for each in traces.islands)
    }
    found.reached = len(reached)
    found.missed = {path: stays.get(path, "") for path in sorted(convs - reached)}
    return fused


def _lies_in(path: str, island: str) -> bool:
    return not island or f"{path}.".startswith(f"{island}.")


def _expand(model: nn.Module, preset: str, found: Findings) -> nn.Module | None:
    try:
        with found.timed(preset):
            expanded: nn.Module = repfx.expand(model, preset)
    except Refused as refused:  # no conv of the model fits
        found.sites[preset] = 0
        found.refused[preset] = {first_line(refused): 1}
        return None
    report = repfx.report(expanded)
    found.sites[preset] = len(report.applied)
    expanded_paths = {edit.path for edit in report.applied}
    found.refused[preset] = _counted(
        re.sub(r"\d+ channels go in and \d+ come out", "other channels go in than come out", skip.reason)
        for skip in report.skipped
        if skip.path not in expanded_paths
    )
    return expanded


def _restore(fused: nn.Module, model: nn.Module, inputs: Inputs, expected: list[Tensor], found: Findings) -> str:
    """Restore the fused model and load it into the model's own class, if it loads strictly. Both are compared with the model."""
    try:
        restored: nn.Module = repfx.restore(fused)
    except InvalidInput as refused:  # nothing was folded
        return first_line(refused)
    found.errors["restored"] = error(outputs(restored, inputs), expected)
    plain = copy.deepcopy(model)
    for value in plain.state_dict().values():
        value.zero_()
    try:
        plain.load_state_dict(restored.state_dict())
    except RuntimeError:
        reasons = dict.fromkeys(skip.reason for skip in repfx.report(restored).skipped)
        return "; ".join(reasons) or _other_keys(restored.state_dict(), plain.state_dict())
    found.errors["loaded"] = error(outputs(plain, inputs), expected)
    return LOADS


def _other_keys(found: Iterable[str], expected: Iterable[str]) -> str:
    more, fewer = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    lists = [f"{what} {', '.join(keys[:4])}" for what, keys in (("has", more), ("lacks", fewer)) if keys]
    return f"the state dict {' and '.join(lists)}"


def _same_counts(fused: nn.Module, found: Findings) -> None:
    if counts(fused) != found.fused:
        found.problem = f"expanded and fused, {counts(fused)} convs and BatchNorms stay, not {found.fused}"


def _elsewhere(
    convert: Callable[[], nn.Module], library: str, inputs: Inputs, expected: list[Tensor], found: Findings
) -> Counts | str:
    """Convs and BatchNorms that are left by another library's way to fuse, or the error's name."""
    try:
        converted = convert()
        found.errors[library] = error(outputs(converted.eval(), inputs), expected)
    except Exception as refused:
        return type(refused).__name__
    return counts(converted)


def _export(model: nn.Module, file: Path, inputs: Inputs) -> float:
    """Export a model, with the batch of its input if the model allows no other. Return the error of onnxruntime.

    Raises:
        ExportError: the model can't be exported.
    """
    try:
        return repfx.export_onnx(model, file, inputs).max_error
    except ExportError as refused:
        if "pass dynamic_batch=False" not in str(refused):
            raise
    return repfx.export_onnx(model, file, inputs, dynamic_batch=False).max_error


def _exported(model: nn.Module, inputs: Inputs) -> float | str:
    """The error of onnxruntime relative to torch. For a detector, the refusal and the error of its backbone."""
    narrow: Any = map_tensors(lambda tensor: tensor.float(), inputs)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        try:
            return _export(model, file, narrow)
        except (ExportError, EquivalenceError) as refused:
            backbone = getattr(model, "backbone", None)
            if "something else than torch" in str(refused) or (isinstance(refused, EquivalenceError) and not backbone):
                raise
            if not isinstance(backbone, nn.Module):
                return first_line(refused)
            # the size to which the detector scales its images
            fixed: Any = getattr(getattr(model, "transform", None), "fixed_size", None)
            image = torch.randn(2, 3, *(fixed or (96, 128)))
            reason = first_line(refused)
            if isinstance(refused, EquivalenceError):  # in float64 the same detections were equal
                reason = "in float32, rounding decides in what order detections of nearly equal scores come"
            return f"{reason} Its backbone: {repfx.export_onnx(backbone, file, image).max_error:.1e}"


def _counted(reasons: Iterable[str]) -> dict[str, int]:
    return dict(Counter(reasons).most_common())


# ---- running models


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that a model returns, from one seed. Tensors that it creates or casts on its way are float64, too."""
    found = run_double(model, inputs)
    if isinstance(found, list):
        found = [_ordered(item) if isinstance(item, dict) and "scores" in item else item for item in found]
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _ordered(detections: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detections sorted by score, and those of equal score by label and box, because their order is arbitrary."""
    keys = [
        (-round(score, 9), label, *(round(side, 6) for side in box))
        for score, label, box in zip(*(detections[key].tolist() for key in ("scores", "labels", "boxes")))
    ]
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.long)
    return {key: value[order] for key, value in detections.items()}


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of any tensor."""
    if len(found) != len(expected):
        return float("inf")
    return max((relative_error(*pair) for pair in zip(found, expected)), default=0.0)


def _training_error(model: nn.Module, reference: nn.Module, inputs: Inputs) -> float:
    """The difference in training mode. Copies are run, because a run changes the statistics of BatchNorms."""
    results = []
    for module in (model, reference):
        twin = copy.deepcopy(module).train()
        try:
            results.append(outputs(twin, inputs))
        except Exception as refused:  # a detector needs targets; feature maps may be too small for batch statistics
            results.append([torch.tensor(float(len(first_line(refused))))])
    return error(*results)


def fitting_inputs(model: nn.Module, found: Findings) -> Inputs:
    """The first of several inputs that the model takes."""
    known = found.name.partition("/")[0] in LIBRARIES
    for inputs in [net(found.name).inputs()] if known else _inputs(model):
        try:
            outputs(model, inputs)
        except Exception:
            continue
        found.input = "×".join(map(str, tree_leaves(inputs)[0].shape))
        return inputs
    raise ValueError("no input fits")


def _inputs(model: nn.Module) -> Iterator[Inputs]:
    own = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))
    channels = own[0]
    kind = type(model).__module__
    if ".detection." in kind:
        yield ([torch.rand(3, 96, 128).double(), torch.rand(3, 128, 96).double()],)
    elif ".optical_flow." in kind:
        yield tuple(torch.rand(2, 2, 3, 128, 136).double() * 2 - 1)
    elif ".video." in kind:
        for clip in ((8, 64, 80), (16, 112, 112), (16, 224, 224)):
            yield (torch.randn(2, 3, *clip).double(),)
    else:
        for axes in ((64, 96), (96, 128), own[1:], (299, 299)):
            yield (torch.randn(2, channels, *axes).double(),)


def settle(model: nn.Module, inputs: Inputs) -> None:
    """Give BatchNorms the statistics of their inputs; with other statistics the signal of a deep random net vanishes or overflows.

    The variance is at least a hundredth of the squared mean, because a channel may see nearly the same value for two pooled images.
    """
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    outputs(model, inputs)
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var.copy_(torch.maximum(norm.running_var, norm.running_mean.square() / 100))
        norm.eval()


@torch.no_grad()
def _stir(model: nn.Module, inputs: Inputs) -> None:
    """Move γ and β of all BatchNorms, so that branches are no longer fresh, and settle the statistics anew.

    Any mistake in folding then shows, but rounding doesn't: even nets of hundreds of convs stay well-conditioned.
    """
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    generator = torch.Generator().manual_seed(1)
    for norm in norms:
        for tensor in (norm.weight, norm.bias):
            if tensor is not None:
                tensor.add_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.4 - 0.2)
    settle(model, inputs)


def fingerprint(model: nn.Module) -> list[tuple[str, ...]]:
    """Everything that a module holds, as text: classes, attributes, and the identity and version of each tensor."""

    def text(value: object) -> str:
        return f"{id(value)} {value._version}" if isinstance(value, Tensor) else repr(value)[:1000]

    return [
        (path, repr(type(module)), *(f"{key}={text(value)}" for key, value in _attributes(module)))
        for path, module in model.named_modules()
    ]


def _attributes(module: nn.Module) -> list[tuple[str, object]]:
    own = [(key, value) for key, value in vars(module).items() if key not in ("_modules", "_parameters", "_buffers")]
    return own + list(module._parameters.items()) + list(module._buffers.items())


def main() -> None:
    """Examine the named model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = examine(parser.parse_args().name)
    print(json.dumps(vars(found), ensure_ascii=False))


if __name__ == "__main__":
    main()
