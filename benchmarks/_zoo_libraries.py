"""Nets of libraries beside torchvision and timm for the zoo: how each is built, with random weights, and what input it takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

Inputs = tuple[Any, ...]

IMAGE = (2, 3, 64, 96)
VOLUME = (2, 1, 16, 32, 16)
SIGNAL = (2, 1, 4000)


@dataclass(frozen=True)
class Net:
    """A net of a library, and the shapes of what it takes. A whole number stands for a value instead of a tensor."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self) -> Inputs:
        """Draw an input."""
        return tuple(torch.randn(shape, dtype=torch.float64) for shape in self.shapes)


@dataclass(frozen=True)
class Spoken(Net):
    """A net that takes signals and how long each of them is."""

    def inputs(self) -> Inputs:
        """Draw signals. The last one is shorter than the others."""
        (signal,) = super().inputs()
        steps = signal.shape[1]
        return signal, torch.tensor([steps] * (len(signal) - 1) + [steps - 3])


# ---- transformers: `model_type` → the head, the configuration's options, and the input's shape

_CLASSIFIER = "AutoModelForImageClassification"
_BARE = "AutoModel"
_SMALL = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [2, 2, 1, 1]}
_CONVNEXT = {"hidden_sizes": [16, 24, 32, 40], "depths": [2, 1, 1, 1]}
_SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 24),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "bit": (_CLASSIFIER, {"layer_type": "bottleneck", "num_groups": 4, **_SMALL}, IMAGE),
    "convnext": (_CLASSIFIER, _CONVNEXT, IMAGE),
    "convnextv2": (_CLASSIFIER, _CONVNEXT, IMAGE),
    "cvt": (_CLASSIFIER, {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}, IMAGE),
    "efficientnet": (
        _CLASSIFIER,
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640},
        IMAGE,
    ),
    "focalnet": (_CLASSIFIER, {"image_size": 64, "embed_dim": 24, "depths": [1, 1, 2, 1]}, (2, 3, 64, 64)),
    "hgnet_v2": (_CLASSIFIER, {}, IMAGE),
    "levit": (
        "LevitForImageClassification",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "depths": [1, 1, 1]},
        (2, 3, 64, 64),
    ),
    "mobilenet_v1": (_CLASSIFIER, {"depth_multiplier": 0.25}, IMAGE),
    "mobilenet_v2": (_CLASSIFIER, {"depth_multiplier": 0.35}, IMAGE),
    "mobilevit": (_CLASSIFIER, {"image_size": 64}, IMAGE),
    "mobilevitv2": (_CLASSIFIER, {"image_size": 64, "width_multiplier": 0.5}, IMAGE),
    "poolformer": (_CLASSIFIER, {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}, IMAGE),
    "pp_lcnet": (_CLASSIFIER, {"scale": 0.5}, IMAGE),
    "pvt_v2": (_CLASSIFIER, {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]}, IMAGE),
    "regnet": (_CLASSIFIER, {"groups_width": 8, **_SMALL}, IMAGE),
    "resnet": (_CLASSIFIER, _SMALL, IMAGE),
    "segformer": (_CLASSIFIER, {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]}, IMAGE),
    "swiftformer": (_CLASSIFIER, {"image_size": 64, "depths": [1, 1, 2, 1], "embed_dims": [16, 24, 32, 40]}, IMAGE),
    "textnet": (_CLASSIFIER, {}, IMAGE),
    "timm_wrapper": (_CLASSIFIER, {"architecture": "resnet18"}, IMAGE),
    # by the default range all scores are nearly equal, and rounding decides their order
    "superpoint": ("AutoModelForKeypointDetection", {"initializer_range": 0.1}, IMAGE),
    "encodec": (_BARE, {"num_filters": 4, "hidden_size": 32, "codebook_dim": 32}, SIGNAL),
    "hubert": (_BARE, _SPEECH, (2, 4000)),
    "sew": (_BARE, {"squeeze_factor": 2, **_SPEECH}, (2, 4000)),
    "univnet": ("UnivNetModel", {"model_hidden_channels": 8}, (2, 20, 100)),
    "wav2vec2": (_BARE, {"feat_extract_norm": "group", **_SPEECH}, (2, 4000)),
    "wav2vec2_layer_norm": (_BARE, {"feat_extract_norm": "layer", **_SPEECH}, (2, 4000)),
}


def _transformer(name: str) -> Net:
    head, options, shape = TRANSFORMERS[name]

    def build() -> nn.Module:
        transformers: Any = importlib.import_module("transformers")
        config = transformers.AutoConfig.for_model(name.removesuffix("_layer_norm"), **options)
        kind = getattr(transformers, head)
        model: nn.Module = kind.from_config(config) if head.startswith("Auto") else kind(config)
        return model

    return Net(build, (shape,))


# ---- segmentation_models_pytorch: each decoder with each encoder

DECODERS = (
    "DeepLabV3",
    "DeepLabV3Plus",
    "FPN",
    "Linknet",
    "MAnet",
    "PAN",
    "PSPNet",
    "Segformer",
    "UPerNet",
    "Unet",
    "UnetPlusPlus",
)
ENCODERS = ("resnet18", "mobilenet_v2", "efficientnet-b0")


def _segmentation(name: str) -> Net:
    decoder, _, encoder = name.partition("-")

    def build() -> nn.Module:
        library: Any = importlib.import_module("segmentation_models_pytorch")
        model: nn.Module = getattr(library, decoder)(encoder, encoder_weights=None, classes=3)
        return model

    return Net(build, ((2, 3, 128, 256) if decoder == "PAN" else IMAGE,))


# ---- monai: the class, its options, and the input's shape

_UNET = {"in_channels": 1, "out_channels": 2, "channels": (4, 8, 16), "strides": (2, 2)}
_DYNAMIC = {
    "in_channels": 1,
    "out_channels": 2,
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [8, 12, 16],
}
_CLASSES = {"n_input_channels": 1, "num_classes": 3}
MONAI: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "AttentionUnet": ("AttentionUnet", {"spatial_dims": 3, **_UNET}, VOLUME),
    "AutoEncoder": ("AutoEncoder", {"spatial_dims": 3, "norm": "batch", **_UNET, "channels": (4, 8)}, VOLUME),
    "BasicUNet": ("BasicUNet", {"features": (4, 4, 8, 12, 16, 4), "norm": "batch"}, VOLUME),
    "BasicUNet, instance norm": ("BasicUNet", {"features": (4, 4, 8, 12, 16, 4)}, VOLUME),
    "BasicUNet, 1d": ("BasicUNet", {"spatial_dims": 1, "features": (4, 4, 8, 12, 16, 4), "norm": "batch"}, (2, 1, 96)),
    "BasicUNetPlusPlus": ("BasicUNetPlusPlus", {"features": (4, 4, 8, 12, 16, 4), "norm": "batch"}, (2, 1, 16, 32, 16)),
    "DAF3D": ("DAF3D", {"in_channels": 1, "out_channels": 1}, (1, 1, 16, 32, 16)),
    "DenseNet121": ("DenseNet121", {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}, (1, 1, 64, 48, 32)),
    "DenseNet121, 1d": ("DenseNet121", {"spatial_dims": 1, "in_channels": 1, "out_channels": 3}, (2, 1, 96)),
    "DiscriminatorPatch": (
        "PatchDiscriminator",
        {"spatial_dims": 3, "num_layers_d": 2, "channels": 8, "in_channels": 1},
        VOLUME,
    ),
    "DynUNet": ("DynUNet", {"spatial_dims": 3, **_DYNAMIC}, VOLUME),
    "DynUNet, BatchNorm": ("DynUNet", {"spatial_dims": 3, "norm_name": "batch", "res_block": True, **_DYNAMIC}, VOLUME),
    "DynUNet, deep supervision": (
        "DynUNet",
        {"spatial_dims": 3, "norm_name": "batch", "deep_supervision": True, **_DYNAMIC},
        VOLUME,
    ),
    "EfficientNet": (
        "EfficientNetBN",
        {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 3, "in_channels": 1, "num_classes": 3},
        (1, 1, 64, 72, 64),
    ),
    "EfficientNet, 1d": (
        "EfficientNetBN",
        {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 1, "in_channels": 1, "num_classes": 3},
        (2, 1, 96),
    ),
    "FlexibleUNet": (
        "FlexibleUNet",
        {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"},
        IMAGE,
    ),
    "HighResNet": ("HighResNet", {}, (1, 1, 16, 24, 16)),
    "MedNeXtS": ("MedNeXtS", {"in_channels": 1, "out_channels": 2, "spatial_dims": 3}, (1, 1, 16, 32, 16)),
    "Quicknat": ("Quicknat", {"num_channels": 3, "num_filters": 8}, IMAGE),
    "RegUNet": (
        "RegUNet",
        {"spatial_dims": 3, "in_channels": 1, "num_channel_initial": 4, "depth": 2, "out_channels": 3},
        VOLUME,
    ),
    "ResNet18": ("resnet18", {"spatial_dims": 3, **_CLASSES}, VOLUME),
    "ResNet50, shortcut A": ("resnet50", {"spatial_dims": 3, "shortcut_type": "A", **_CLASSES}, (1, 1, 16, 24, 16)),
    "ResNet18, 1d": ("resnet18", {"spatial_dims": 1, **_CLASSES}, (2, 1, 96)),
    "SEResNet50": ("SEResNet50", {"spatial_dims": 3, "in_channels": 1, "num_classes": 3}, VOLUME),
    "SegResNet": ("SegResNet", {}, VOLUME),
    "SegResNet, BatchNorm": ("SegResNet", {"norm": ("batch", {}), "upsample_mode": "deconv"}, VOLUME),
    "SegResNetDS": ("SegResNetDS", {"init_filters": 8, "norm": "batch", "dsdepth": 2}, VOLUME),
    "SegResNetVAE": ("SegResNetVAE", {"input_image_size": VOLUME[2:], "vae_nz": 16}, VOLUME),
    "UNet": ("UNet", {"spatial_dims": 3, "norm": "batch", "num_res_units": 2, **_UNET}, VOLUME),
    "UNet, instance norm": ("UNet", {"spatial_dims": 3, **_UNET}, VOLUME),
    "UNet, 1d": ("UNet", {"spatial_dims": 1, "norm": "batch", "num_res_units": 2, **_UNET}, (2, 1, 96)),
    "UNet, without activations": (
        "UNet",
        {"spatial_dims": 3, "norm": "batch", "act": None, "num_res_units": 2, **_UNET},
        VOLUME,
    ),
    "VNet": ("VNet", {}, (1, 1, 16, 32, 16)),
    "VoxelMorphUNet": (
        "VoxelMorphUNet",
        {
            "spatial_dims": 3,
            "in_channels": 2,
            "unet_out_channels": 8,
            "channels": (8, 8, 8, 8, 8, 8),
            "final_conv_channels": (8, 8),
        },
        (1, 2, 16, 24, 16),
    ),
}


def _medical(name: str) -> Net:
    kind, options, shape = MONAI[name.replace("_", " ").replace("-", ", ")]

    def build() -> nn.Module:
        library: Any = importlib.import_module("monai.networks.nets")
        model: nn.Module = getattr(library, kind)(**options)
        return model

    return Net(build, (shape,))


# ---- torchaudio


def _audio(kind: str, shapes: Iterable[tuple[int, ...]], form: type[Net] = Net, **options: Any) -> Net:
    def build() -> nn.Module:
        library: Any = importlib.import_module("torchaudio.models")
        model: nn.Module = getattr(library, kind)(**options)
        return model

    return form(build, tuple(shapes))


TORCHAUDIO = {
    "Conformer": _audio(
        "Conformer",
        [(2, 40, 16)],
        Spoken,
        input_dim=16,
        num_heads=2,
        ffn_dim=24,
        num_layers=2,
        depthwise_conv_kernel_size=7,
    ),
    "ConvTasNet": _audio(
        "ConvTasNet",
        [(2, 1, 400)],
        enc_num_feats=16,
        msk_num_feats=8,
        msk_num_hidden_feats=16,
        msk_num_layers=3,
        msk_num_stacks=2,
    ),
    "HDemucs": _audio("HDemucs", [(1, 2, 8000)], sources=["drums", "rest"], channels=8, nfft=1024, depth=5),
    "SquimObjective": _audio("squim_objective_base", [(2, 4000)]),
    "Wav2Letter": _audio("Wav2Letter", [(2, 1, 4000)], num_classes=10),
    "WaveRNN": _audio(
        "WaveRNN",
        [(2, 1, 6 * 8), (2, 1, 16, 10)],
        upsample_scales=[2, 2, 2],
        n_classes=16,
        hop_length=8,
        n_res_block=3,
        n_rnn=16,
        n_fc=16,
        n_freq=16,
        n_hidden=16,
        n_output=16,
    ),
}


# ---- ultralytics: its own yaml files, of which `n` chooses the smallest scale

ULTRALYTICS = (
    "yolov3-tiny",
    "yolov5n",
    "yolov6n",
    "yolov8n",
    "yolov8n-cls",
    "yolov8n-ghost",
    "yolov8n-obb",
    "yolov8n-pose",
    "yolov8n-seg",
    "yolov9t",
    "yolov10n",
    "yolo11n",
    "yolo11n-cls",
    "yolo11n-obb",
    "yolo11n-pose",
    "yolo11n-seg",
    "yolo12n",
    "yolo26n",
    "yolo26n-pose",
    "yolo26n-seg",
    "rtdetr-resnet50",
)


def _detector(name: str) -> Net:
    task = name.rpartition("-")[2]

    def build() -> nn.Module:
        tasks: Any = importlib.import_module("ultralytics.nn.tasks")
        kinds = {
            "cls": "ClassificationModel",
            "obb": "OBBModel",
            "pose": "PoseModel",
            "seg": "SegmentationModel",
            "resnet50": "RTDETRDetectionModel",
        }
        model: nn.Module = getattr(tasks, kinds.get(task, "DetectionModel"))(f"{name}.yaml", verbose=False)
        if (
            task == "resnet50"
        ):  # by its own weights all queries score nearly alike, and rounding decides which are taken
            nn.init.normal_(model.get_parameter("model.23.enc_score_head.weight"))
        return model

    return Net(build, (IMAGE,))


# ---- all of them

LIBRARIES: dict[str, tuple[Iterable[str], Callable[[str], Net]]] = {
    "transformers": (TRANSFORMERS, _transformer),
    "segmentation_models_pytorch": ([f"{d}-{e}" for d in DECODERS for e in ENCODERS], _segmentation),
    "monai": ([name.replace(", ", "-").replace(" ", "_") for name in MONAI], _medical),
    "torchaudio": (TORCHAUDIO, TORCHAUDIO.__getitem__),
    "ultralytics": (ULTRALYTICS, _detector),
}


def names() -> list[str]:
    """Return all nets as ``library/name``."""
    return [f"{library}/{name}" for library, (known, _) in LIBRARIES.items() for name in known]


def net(name: str) -> Net:
    """Return a net by ``library/name``."""
    library, _, own = name.partition("/")
    return LIBRARIES[library][1](own)


def installed(name: str) -> bool:
    """Tell whether the library of ``library/name`` can be imported."""
    return find_spec(name.partition("/")[0]) is not None
