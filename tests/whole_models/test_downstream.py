"""Detectors and segmentation nets: their backbones get branches, train with the nets' own losses, and find the same when fused.

What a detector finds is no continuous function of its scores. So the nets here output scores that are far enough apart, for pictures that
differ. Thresholds are 0, so that there is something to compare.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone

import repfx
from repfx.testing import relative_error
from tests.detectors import (
    CLASSES,
    SMALL,
    SMALL_SEGMENTATION,
    STOCK,
    STOCK_SEGMENTATION,
    made_sure,
    pictures,
    settled,
    targets,
)
from tests.inline_net import norms, reasons, same_state

DETECTORS = SMALL | STOCK
SEGMENTATION = SMALL_SEGMENTATION | STOCK_SEGMENTATION
# no BatchNorms in heads: a head runs on all levels of a pyramid, and its BatchNorms would average over levels
SPEC = {"backbone.*": "dbb", "*": repfx.Spec(["1xk", "kx1"], norm="none")}
LOADER = [(pictures(), targets())]
SCENES = nn.functional.interpolate(torch.stack([image[:, :48, :48] for image in pictures()]), (48, 64))
CLASS_MAP = (SCENES.sum(1) * CLASSES / 3).long()


def losses_of(model: Any) -> dict[str, Tensor]:
    """A detector's own losses, from one seed, because proposals are sampled at random."""
    torch.manual_seed(0)
    losses: dict[str, Tensor] = model.train()(pictures(), targets())
    return losses


def map_losses_of(model: Any) -> dict[str, Tensor]:
    """Losses of each output of a segmentation net, from one seed for its dropout."""
    torch.manual_seed(0)
    return {name: nn.functional.cross_entropy(output, CLASS_MAP) for name, output in model.train()(SCENES).items()}


def train_two_steps(model: Any, losses: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        sum(losses(model).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def assert_same_losses(model: Any, reference: Any, losses: Any) -> None:
    found, expected = (losses(copy.deepcopy(each)) for each in (model, reference))
    assert found.keys() == expected.keys()
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-9, (found, expected)


@torch.no_grad()
def findings(model: Any) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = model.eval()(pictures())
    return found


def assert_found(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """Compare detections: as many boxes, of the same classes, at the same places."""
    assert all(len(each["boxes"]) > 0 for each in expected)
    assert [len(each["boxes"]) for each in found] == [len(each["boxes"]) for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours["labels"], theirs["labels"])
        assert max(relative_error(ours[name], theirs[name]) for name in theirs.keys() - {"labels"}) < 1e-9


@torch.no_grad()
def sees_a_difference(model: Any) -> bool:
    """Whether a backbone's output depends on the picture."""
    return all(relative_error(level[0], level[1]) > 1e-3 for level in model.backbone(SCENES).values())


QUICK = ["RetinaNet", "SSD", "Mask R-CNN", "DeepLabV3"]


def slow_but_some(names: Any) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.slow_one_in(5)
@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", slow_but_some(DETECTORS))
def test_a_detector_trains_with_branches_and_finds_the_same_without(name: str) -> None:
    model = settled(made_sure(DETECTORS[name]()), LOADER)
    expanded = repfx.expand(model, SPEC)
    blocks = [path for path, module in expanded.named_modules() if isinstance(module, repfx.RepBlock)]
    assert {path.startswith("backbone.") for path in blocks} == {True, False}
    assert_same_losses(expanded, model, losses_of)

    train_two_steps(expanded, losses_of)
    settled(expanded, LOADER, seed=2)
    expected = findings(expanded)
    assert sees_a_difference(expanded)
    fused = repfx.fuse(expanded)
    assert type(fused) is type(model)
    assert norms(fused) == [], reasons(fused)
    assert_found(findings(fused), expected)

    plain = DETECTORS[name]().double()
    plain.load_state_dict(repfx.restore(fused).state_dict(), strict=True)
    assert repfx.check_equivalent(expanded, plain, pictures()).equivalent


@pytest.mark.slow_one_in(4)
@pytest.mark.parametrize("name", slow_but_some(SEGMENTATION))
def test_a_segmentation_net_trains_with_branches_and_gives_the_same_maps_without(name: str) -> None:
    model = settled(made_sure(SEGMENTATION[name]()), [SCENES])
    expanded = repfx.expand(model, SPEC)
    assert_same_losses(expanded, model, map_losses_of)

    train_two_steps(expanded, map_losses_of)
    settled(expanded, [SCENES], seed=2)
    fused = repfx.fuse(expanded)
    plain = SEGMENTATION[name]().double()
    plain.load_state_dict(repfx.restore(fused).state_dict(), strict=True)
    with torch.no_grad():
        expected, found, loaded = (each.eval()(SCENES) for each in (expanded, fused, plain))
    assert norms(fused) == [], reasons(fused)
    assert expected.keys() == found.keys() == loaded.keys()
    for maps in (found, loaded):
        assert max(relative_error(maps[key], expected[key]) for key in expected) < 1e-9
    assert sees_a_difference(expanded)


@pytest.mark.slow
def test_the_backbone_alone_is_a_model_like_any_other() -> None:
    """A backbone, a dict of layers that runs itself, is expanded and fused alone. With it put back, the detector finds the same."""
    model = settled(made_sure(SMALL["SSD"]()), LOADER)
    expected = findings(model)
    model.backbone = repfx.expand(model.backbone, "dbb")
    assert_found(findings(model), expected)
    settled(model, LOADER, seed=2)
    expected = findings(model)
    backbone = model.backbone
    model.backbone = repfx.fuse(backbone)
    assert norms(model) == [], reasons(model.backbone)
    assert_found(findings(model), expected)
    assert repfx.check_equivalent(backbone, repfx.restore(model.backbone), SCENES).equivalent


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("Mask R-CNN", ""), ("RetinaNet", "backbone")])
def test_a_driver_changes_a_detector_while_it_trains(name: str, part: str, tmp_path: Path) -> None:
    """The driver has the whole detector and calibrates on a loader of pictures and targets, or has the backbone and its batches."""
    model = settled(made_sure(SMALL[name]()), LOADER)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def driver_of(model: Any, optimizer: torch.optim.Optimizer) -> repfx.Driver:
        batches = [model.transform(images)[0].tensors for images, _ in LOADER]
        data: Any = batches if part else LOADER
        schedule = repfx.schedules.DyRep(interval=1, metric="snip")
        return repfx.Driver(model.get_submodule(part), optimizer, schedule, calibrate=data)

    driver = driver_of(model, optimizer)
    torch.stack(list(losses_of(model).values())).sum().backward()
    driver.after_backward()
    optimizer.step()
    expected = findings(model)
    assert [action.kind for action in driver.after_epoch()] == ["expand"]
    assert_found(findings(model), expected)
    train_two_steps(model, losses_of, optimizer)

    repfx.save(tmp_path / "run.ckpt", model, optimizer, driver)
    again = SMALL[name]().double()
    steps = torch.optim.SGD(again.parameters(), 1e-3, momentum=0.9)
    resumed = driver_of(again, steps)
    repfx.load(tmp_path / "run.ckpt", again, steps, resumed)
    assert resumed.history == driver.history
    for each, its_steps in ((model, optimizer), (again, steps)):
        train_two_steps(each, losses_of, its_steps)
    assert same_state(again.state_dict(), model.state_dict())
    assert_found(findings(repfx.fuse(again)), findings(model))


def test_boxes_that_nobody_found_measure_nothing() -> None:
    """A mask head runs on the boxes found. Without boxes its statistics stay or the change is refused; they never become NaN."""
    model = SMALL["Mask R-CNN"]().double()
    model.roi_heads.score_thresh = 1.0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(repfx.errors.InvalidInput, match=r"never reached 'roi_heads.mask_head.0.0'"):
        repfx.expand(model, {"roi_heads.mask_head.*": "acb"}, gamma=0.01, calibrate=LOADER, inplace=True)
    assert same_state(model.state_dict(), before)


# ---- transfer: from a classifier to a detector


LEVELS = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}


def trained_classifier() -> Any:
    """A ResNet-18 with branches, as if trained."""
    classifier = repfx.expand(torchvision.models.resnet18(num_classes=CLASSES), {"layer1.*": "dbb", "layer2.*": "acb"})
    return settled(classifier.double(), [SCENES])


def levels_of(body: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        found: dict[str, Tensor] = IntermediateLayerGetter(body, LEVELS).eval()(SCENES)
    return found


@pytest.mark.slow
def test_a_fused_classifier_is_the_backbone_of_a_plain_detector() -> None:
    """The detector's BatchNorms are frozen ones, which take the classifier's numbers."""
    classifier = trained_classifier()
    weights = repfx.restore(repfx.fuse(classifier)).state_dict()
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None).double()
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    backbone.body.load_state_dict(body, strict=True)
    expected = levels_of(classifier)
    with torch.no_grad():
        found = backbone.body(SCENES)  # in training mode: frozen
    assert found.keys() == expected.keys()
    assert max(relative_error(found[level], expected[level]) for level in expected) < 1e-9


@pytest.mark.slow
def test_a_classifier_goes_on_to_learn_with_its_branches_in_a_detector() -> None:
    classifier = trained_classifier()
    expected = levels_of(classifier)
    backbone = BackboneWithFPN(classifier, LEVELS, [64, 128, 256, 512], 16).double().eval()
    with torch.no_grad():
        found = backbone.body(SCENES)
    assert all(torch.equal(found[level], expected[level]) for level in expected)
    fused = repfx.fuse(backbone)
    assert norms(fused) == [], reasons(fused)
    with torch.no_grad():
        both = [net(SCENES) for net in (fused, backbone)]
    assert max(relative_error(both[0][level], both[1][level]) for level in both[1]) < 1e-9


# ---- export


@pytest.mark.slow
def test_the_backbone_is_exported_and_the_whole_says_why_not(tmp_path: Path) -> None:
    model = settled(made_sure(SMALL["RetinaNet"]()), LOADER).float()
    expanded = repfx.expand(model, SPEC)
    batch = model.transform([image.float() for image in pictures()])[0].tensors
    report = repfx.export_onnx(expanded.backbone, tmp_path / "backbone.onnx", batch)
    assert [value.name for value in report.outputs] == ["output_0", "output_1", "output_pool"]
    with pytest.raises(repfx.errors.ExportError, match="such as its backbone"):
        repfx.export_onnx(expanded, tmp_path / "detector.onnx", [image.float() for image in pictures()])
    assert [file.name for file in tmp_path.iterdir()] == ["backbone.onnx"]
