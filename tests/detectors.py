"""torchvision's detectors and segmentation nets, on a small backbone and as they are, with images and targets for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d, MultiScaleRoIAlign

from repfx.passes.calibrate import calibrate
from repfx.testing import randomize_batch_norm
from tests.random_numbers import numbers_from

CLASSES = 4
SIZES: dict[str, Any] = {"min_size": 64, "max_size": 96}
FEW_BOXES: dict[str, Any] = {
    "rpn_post_nms_top_n_train": 40,
    "rpn_post_nms_top_n_test": 40,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 10,
    "rpn_score_thresh": 0.0,
    "box_score_thresh": 0.0,
}


# ---- on a small backbone


def body(norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """A small ResNet body: a stem and three stages of 8 to 16 channels."""

    def down(channels: int) -> BasicBlock:
        short = Conv2dNormActivation(channels, 16, 1, 2, norm_layer=norm, activation_layer=None)
        return BasicBlock(channels, 16, 2, short, norm_layer=norm)

    stem = {"conv1": nn.Conv2d(3, 8, 3, 2, 1, bias=False), "bn1": norm(8), "relu": nn.ReLU(inplace=True)}
    return nn.Sequential(OrderedDict(**stem, layer1=down(8), layer2=down(16), layer3=down(16)))


def pyramid(norm: Callable[..., nn.Module] = nn.BatchNorm2d, channels: int = 16) -> BackboneWithFPN:
    """A feature pyramid on the small body: levels 0, 1 and one pooled from level 1."""
    return BackboneWithFPN(body(norm), {"layer1": "0", "layer2": "1"}, [16, 16], channels)


def anchors(*shapes: float) -> AnchorGenerator:
    return AnchorGenerator(((12,), (24,), (48,)), (shapes,) * 3)


def features(layers: dict[str, str]) -> Any:
    """The small body as a dict of layers that runs itself."""
    return IntermediateLayerGetter(body(), layers)


def ssd() -> Any:
    backbone = features({"layer1": "0", "layer2": "1", "layer3": "2"})
    return detection.ssd.SSD(backbone, DefaultBoxGenerator([[2]] * 3), (64, 64), CLASSES, score_thresh=0.0)


def rcnn(kind: Callable[..., Any], **heads: Any) -> Any:
    """A two-stage detector with small heads."""
    names = ["0", "1"]
    boxes = {
        "rpn_anchor_generator": anchors(0.5, 1.0),
        "box_roi_pool": MultiScaleRoIAlign(names, 3, 2),
        "box_head": TwoMLPHead(16 * 9, 32),
        "box_predictor": FastRCNNPredictor(32, CLASSES),
    }
    return kind(pyramid(), **boxes, **heads, **SIZES, **FEW_BOXES)


SMALL: dict[str, Callable[[], Any]] = {
    "RetinaNet": lambda: detection.RetinaNet(
        pyramid(FrozenBatchNorm2d), CLASSES, anchor_generator=anchors(0.5, 1.0, 2.0), score_thresh=0.0, **SIZES
    ),
    "FCOS": lambda: detection.FCOS(
        pyramid(channels=32), CLASSES, anchor_generator=anchors(1.0), score_thresh=0.0, **SIZES
    ),
    "SSD": ssd,
    "Faster R-CNN": lambda: rcnn(detection.FasterRCNN),
    "Mask R-CNN": lambda: rcnn(
        detection.MaskRCNN,
        mask_roi_pool=MultiScaleRoIAlign(["0", "1"], 6, 2),
        mask_head=MaskRCNNHeads(16, [16], 1, norm_layer=nn.BatchNorm2d),
        mask_predictor=MaskRCNNPredictor(16, 16, CLASSES),
    ),
}
SMALL_SEGMENTATION: dict[str, Callable[[], Any]] = {
    "DeepLabV3": lambda: segmentation.DeepLabV3(
        features({"layer2": "aux", "layer3": "out"}),
        segmentation.deeplabv3.DeepLabHead(16, CLASSES, (2, 3)),
        segmentation.fcn.FCNHead(16, CLASSES),
    ),
    "LR-ASPP": lambda: segmentation.LRASPP(
        features({"layer1": "low", "layer3": "high"}), 16, 16, CLASSES, inter_channels=16
    ),
}


# ---- torchvision's own


def stock(name: str) -> Callable[[], Any]:
    """Return a function that builds a model by its name without weights; detectors take small images and keep all boxes."""
    options: dict[str, Any] = {}
    if "ssd" in name:
        options = {"score_thresh": 0.0}
    elif "rcnn" in name:
        options = SIZES | FEW_BOXES
    elif "retinanet" in name or "fcos" in name:
        options = SIZES | {"score_thresh": 0.0}
    classes = 2 if "keypoint" in name else CLASSES
    return partial(get_model, name, weights=None, weights_backbone=None, num_classes=classes, **options)


STOCK = {
    name: stock(name)
    for name in (
        "retinanet_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "maskrcnn_resnet50_fpn",
        "keypointrcnn_resnet50_fpn",
        "ssdlite320_mobilenet_v3_large",
    )
}
STOCK_SEGMENTATION = {
    name: stock(name)
    for name in ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
}


# ---- data


def pictures() -> list[Tensor]:
    """Two very different images of different sizes."""
    generator = numbers_from(1)
    smooth = torch.rand(3, 7, 9, generator=generator, dtype=torch.float64)
    rough = torch.rand(3, 64, 50, generator=generator, dtype=torch.float64)
    return [nn.functional.interpolate(smooth[None], (56, 72))[0], rough]


def targets() -> list[dict[str, Tensor]]:
    """Two boxes in each picture, with masks and keypoints."""
    found = []
    for image in pictures():
        corners = torch.tensor([[5, 7, 30, 40], [10, 2, 45, 33]])
        masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, corners.tolist()):
            mask[top:bottom, left:right] = 1
        points = torch.tensor([[[10.0, 12.0, 1.0]] * 17, [[20.0, 20.0, 1.0]] * 17])
        found.append({"boxes": corners.double(), "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": points})
    return found


def made_sure(model: Any) -> Any:
    """Put a detector into float64, in place, with weights so large that what it finds depends on the picture, but boxes stay inside."""
    for path, module in model.double().named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            module.weight.data *= 0.1 if path.endswith("bbox_pred") else 1.0
    return model


def settled(model: Any, data: Any, seed: int = 1) -> Any:
    """Give BatchNorms random γ and β and the data's statistics, in place. Otherwise a deep net's outputs are the same for any input."""
    randomize_batch_norm(model, seed)
    learns = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return calibrate(model, data) if learns else model
