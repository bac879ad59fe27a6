"""`Recipe`: how a model is trained, as plain values."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from repfx.data.augmentation import Augmentation
from repfx.data.dataset import DataSource
from repfx.errors import InvalidInput, UnknownName
from repfx.records.plain_values import from_plain, to_plain
from repfx.training.learning_rate import SHAPES, TIMM
from repfx.training.models import ModelReference

OF_TIMM = ("optimizer", "rates")  # keys that take timm:NAME, too, which is looked up when the training begins
KEPT = ("last", "best", "both")
PRECISIONS = ("no", "bf16", "fp16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
LEAST = {
    "epochs": 1,
    "batch_size": 2,
    "workers": 0,
    "weight_decay": 0,
    "scored_images": 0,
    "test_every": 1,
    "patience": 0,
    "clip": 0,
    "seed": 0,
    "milestone_factor": 0,
}
_GREATEST = 2**63 - 1  # what TOML and torch's seeds hold


@dataclass(frozen=True)
class Distillation:
    """A teacher that the model learns from beside the labels; see `repfx.distillation_loss`.

    Args:
        teacher: any classifier of the same images.
        weights: file of the teacher's weights, or the folder of the run that trained it.
        alpha: the teacher's share of the loss, from 0 to 1.
        temperature: divisor of the logits of both teacher and model.
    """

    teacher: ModelReference
    weights: str
    alpha: float = 0.9
    temperature: float = 10.0

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and self.temperature > 0):
            found = f"alpha is {self.alpha} and temperature {self.temperature}"
            raise InvalidInput(f"in distillation, {found}; alpha must be from 0 to 1, and temperature positive.")


@dataclass(frozen=True)
class AuxiliaryHead:
    """A second classifier in the middle of the net, as DARTS trains one; see `repfx.training.objective.auxiliary`.

    Args:
        module: path of the module whose output it classifies: maps of at least 8 × 8.
        weight: factor of its loss.
    """

    module: str
    weight: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise InvalidInput(f"in auxiliary, weight is {self.weight}; it must be a positive number.")


@dataclass(frozen=True)
class QuantizationAware:
    """Epochs after all others, in which the fused model has its BatchNorms back and its numbers are rounded to 8 bits.

    Args:
        epochs: passes over the training images with rounding.
        share: highest learning rate with rounding, as a share of the training's.
    """

    epochs: int
    share: float = 0.01

    def __post_init__(self) -> None:
        if not (self.epochs >= 1 and 0 < self.share <= 1):
            found = f"epochs is {self.epochs} and share {self.share}"
            raise InvalidInput(f"in qat, {found}; epochs must be at least 1, and share above 0 and at most 1.")


@dataclass(frozen=True)
class Recipe:
    """The settings of a training.

    Args:
        epochs: passes over the training images.
        batch_size: images in a step, of all processes together.
        optimizer: name of an optimizer class of `torch.optim`, or `timm:` and the name of one of timm's.
        optimizer_options: arguments for the optimizer beside the learning rate and the weight decay, such as momentum.
        learning_rate: highest learning rate of the training.
        layer_decay: factor on the learning rate of each stage, as against the next stage; a stage is a child of the model that has
            parameters. 1 for one rate; 0.7 is usual for pretrained weights.
        freeze: path of a module, such as `layer1`, that keeps its weights and statistics, with all that is registered before it; empty to
            train everything. What is frozen gets no branches. Epochs with rounding train it, too.
        weight_decay: weight decay of the optimizer.
        decay_vectors: whether biases, γ and β decay, too.
        rates: curve by which the learning rate falls: cosine, linear or constant, or `timm:` and the name of one of timm's schedulers. It
            begins anew in each cycle of a schedule with cycles.
        warm_up: epochs over which the learning rate rises; None for a fifth of the training, or of each cycle of a schedule with cycles.
        milestones: epochs after which the learning rate is multiplied by `milestone_factor`, each time.
        milestone_factor: factor on the learning rate after each of the milestones.
        label_smoothing: share of the label that is spread over all classes.
        drop_path: probability with which the branches of blocks leave out an image. It begins at 0 and rises linearly to this, as in DARTS.
        clip: greatest norm of the gradient; 0 leaves gradients as they are.
        average: decay of an exponential moving average of the model. The average is then the model that is fused. 0 for no average.
        augmentation: augmentation of the training images.
        distillation: teacher to learn from; None for none.
        auxiliary: second classifier that is trained with the model and then thrown away; None for none.
        qat: epochs with numbers rounded to 8 bits, after the training; None for none.
        mixed_precision: lower precision in which the model runs where autocast allows it: no, bf16 or fp16.
        channels_last: whether images and kernels are laid out channels last. None does so on CPUs and CUDA GPUs if a trial on two images
            shows that it changes nothing but speed.
        compile: whether `torch.compile` runs the model in training.
        compile_mode: mode of `torch.compile`; reduce-overhead captures CUDA graphs, which squeezed blocks need on a GPU to be fast.
        seed: seed of the weights, the order of the images, the augmentation and everything else that is random. Equal seeds give equal
            weights on one kind of machine; on a GPU, they do so only with `deterministic`.
        deterministic: whether torch uses deterministic algorithms alone, even if they are slower.
        device: device to train on: cpu, cuda, cuda:1, mps, …; auto takes the accelerator if there is one, else the CPU.
        workers: number of processes that load images.
        scored_images: greatest number of training images on which a search scores each candidate, spread over the classes; 0 for every
            tenth of each class. The model isn't trained on them.
        test_every: epochs from one test to the next; the last epoch is always tested.
        keep: epoch whose model is fused: last or best. The best has the highest accuracy on the test images, whose accuracy it therefore
            flatters. both fuses the last, and keeps the best beside it.
        gradients: whether the history records, for each path of the blocks, how large the gradients of its weights are.
        patience: epochs without a better accuracy after which the training ends early; 0 for never.
        log_with: tracker that Accelerate knows, such as tensorboard; empty for none.
    """

    epochs: int = 5
    batch_size: int = 128
    optimizer: str = "AdamW"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-3
    layer_decay: float = 1.0
    freeze: str = ""
    weight_decay: float = 0.01
    decay_vectors: bool = True
    rates: str = "cosine"
    warm_up: float | None = None
    milestones: tuple[int, ...] = ()
    milestone_factor: float = 0.1
    label_smoothing: float = 0.0
    drop_path: float = 0.0
    clip: float = 0.0
    average: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    distillation: Distillation | None = None
    auxiliary: AuxiliaryHead | None = None
    qat: QuantizationAware | None = None
    mixed_precision: str = "no"
    channels_last: bool | None = None
    compile: bool = False
    compile_mode: str = "default"
    seed: int = 0
    deterministic: bool = False
    device: str = "auto"
    workers: int = 0
    scored_images: int = 0
    test_every: int = 1
    keep: str = "last"
    patience: int = 0
    gradients: bool = False
    log_with: str = ""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise InvalidInput(f"{name} is {getattr(self, name)}; it must be at least {least}.")
            if getattr(self, name) > _GREATEST:
                raise InvalidInput(f"{name} is {getattr(self, name)}; it must be at most {_GREATEST}.")
        for name, (what, known) in choices().items():
            value = getattr(self, name)
            if value not in known and not (name in OF_TIMM and value.startswith(TIMM)):
                raise UnknownName(what, value, known)
        if not 0 < self.learning_rate < math.inf:
            raise InvalidInput(f"learning_rate is {self.learning_rate}; it must be a positive number.")
        if not 0 < self.layer_decay <= 1:
            raise InvalidInput(f"layer_decay is {self.layer_decay}; it must be more than 0 and at most 1.")
        for name in ("label_smoothing", "average", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}; it must be from 0 to less than 1.")
        if self.warm_up is not None and not 0 <= self.warm_up <= self.epochs:
            raise InvalidInput(
                f"warm_up is {self.warm_up}; it must be from 0 to the {self.epochs} epochs of the training."
            )
        if self.mixed_precision == "fp16" and not torch.accelerator.is_available():
            raise InvalidInput("mixed_precision is 'fp16', which needs an accelerator; on a CPU, set 'bf16'.")
        if self.compile_mode != "default" and not self.compile:
            raise InvalidInput(f"compile_mode is {self.compile_mode!r}, but compile is false; set compile = true, too.")
        if self.drop_path and self.compile:
            raise InvalidInput(
                "drop_path changes with each epoch, so torch.compile would recompile each time: set compile = false."
            )
        if self.auxiliary is not None and (self.compile or self.mixed_precision == "fp16"):
            wrong = "compile is true" if self.compile else "mixed_precision is 'fp16'"
            raise InvalidInput(f"{wrong}, which an auxiliary head doesn't allow: leave one of them out.")

    def with_rounding(self) -> Recipe:
        """Return the recipe of the epochs in which numbers are rounded to 8 bits.

        They are trained in float32, as the kernels round: without an average, `torch.compile`, another precision, or what needs
        the branches.
        """
        assert self.qat is not None
        return replace(
            self,
            epochs=self.qat.epochs,
            learning_rate=self.learning_rate * self.qat.share,
            warm_up=0.0,
            milestones=(),
            average=0.0,
            mixed_precision="no",
            channels_last=False,
            compile=False,
            compile_mode="default",
            log_with="",
            qat=None,
            auxiliary=None,
            freeze="",
            drop_path=0.0,
            keep="last",
            patience=0,
            gradients=False,
        )


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a run's recipe, with the keys of its data and its training that the version that wrote it didn't know."""
    kinds = {"data": DataSource, "training": Recipe}
    return {**values, **{key: to_plain(from_plain(kind, values.get(key, {}), key)) for key, kind in kinds.items()}}


def choices() -> dict[str, tuple[str, Collection[str]]]:
    """Return what each key of a recipe that is one of several names is called, and these names."""
    return {
        "optimizer": ("optimizer", _optimizers()),
        "rates": ("shape of rates", SHAPES),
        "mixed_precision": ("mixed_precision", PRECISIONS),
        "compile_mode": ("compile_mode", COMPILE_MODES),
        "keep": ("choice of what to keep", KEPT),
    }


def _optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    found = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    return {name: kind for name, kind in found.items() if issubclass(kind, torch.optim.Optimizer)}
