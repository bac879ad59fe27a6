"""The nets, recipes and methods that `benchmarks/accuracy.py` compares, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks._evidence_page import AS_LONG, FIVE_TIMES, LONGER, PLAIN
from repfx.data.augmentation import Augmentation
from repfx.training.models import ModelReference
from repfx.training.recipe import Recipe

TEACHER = "teacher"
DEAREST = "dearest"


@dataclass(frozen=True)
class Method:
    """A method: what is done besides training the net.

    Args:
        spec: branches that the net is expanded with; an empty list for none.
        schedule: name and options of a schedule, which then takes `spec`.
        distilled: whether the net learns from the teacher.
        clip: greatest norm of the gradient; 0 leaves gradients as they are.
        found_by: the method whose search has found the architecture. It is trained from the beginning, and both trainings count as cost.
        drawn: share of the paths of RepNAS's space that are drawn at random, as an architecture to train; None for none.
        length: of the training, as a multiple of the recipe's epochs; or the method that takes as many multiply-adds, where `DEAREST` is
            the most expensive one.
        seeds: number of seeds.
        listed: whether the method has rows of its own. Others run only if a listed method needs them.
    """

    spec: Any = None
    schedule: Mapping[str, Any] | None = None
    distilled: bool = False
    clip: float = 0.0
    found_by: str | None = None
    drawn: float | None = None
    length: float | str = 1.0
    seeds: int = 3
    listed: bool = True


def _schedule(name: str, **options: Any) -> Method:
    return Method(schedule={"name": name, **options})


_SEARCH_OF_DES = "search of DES"
_SEARCH_AT_RANDOM = "search of random search"
_OREPA = Method("orepa", {"name": "fixed", "squeeze_from": 0})
METHODS: dict[str, Method] = {
    TEACHER: Method([], listed=False),
    PLAIN: Method([]),
    "ACB": Method("acb"),
    "DBB": Method("dbb"),
    "RepVGG": Method("repvgg"),
    "OREPA": _OREPA,
    "DyRep, Rep": _schedule("dyrep", drop=False),
    "DyRep, Rep + Dep": _schedule("dyrep"),
    "DyRep by snip": _schedule("dyrep", metric="snip"),
    "RepNAS": _schedule("repnas"),
    "RepNAS, retrained": Method(found_by="RepNAS"),
    # in RepNAS's space and at its budget: 3.5 of a site's seven paths, one of which is its own conv
    _SEARCH_AT_RANDOM: Method(
        schedule={"name": "random_search", "spec": "odbb", "weights": "shared", "budget": 2.5 / 6}, listed=False
    ),
    "random search": Method(found_by=_SEARCH_AT_RANDOM),
    _SEARCH_OF_DES: Method(schedule={"name": "des"}, listed=False),
    "DES": Method(found_by=_SEARCH_OF_DES),
    "RepAn": _schedule("repan"),
    "RepAn, distilled": Method(schedule={"name": "repan"}, distilled=True),
    "distilled": Method([], distilled=True),
    AS_LONG: Method([], length=2.5),
    LONGER: Method([], length=DEAREST),
}

# docs/evidence-plan.md says why each of them is as it is
_DYREP = {"name": "dyrep", "interval": 4, "until": 75}
_REPAN = {"name": "repan", "cycles": 5, "epochs": 18, "warm_up": 3}
_REPNAS = {"name": "repnas", "budget": 0.5, "warm_up": 9, "epochs": 30}
_DES = {"name": "des", "warm_up": 9, "epochs": 45, "generation": 4, "population": 32, "nets": 1}
_CLIP = 1.0
LONG_METHODS: dict[str, Method] = {
    PLAIN: Method([], seeds=5),
    TEACHER: Method([], seeds=1),
    "RepVGG": Method("repvgg", seeds=5),
    "DBB": Method("dbb", seeds=5),
    "DyRep": Method(schedule=_DYREP, seeds=5),
    "RepAn": Method(schedule=_REPAN, seeds=5),
    "odbb": Method("odbb"),
    "odbb, at DyRep's cost": Method("odbb", length="DyRep", seeds=5),
    "ACB": Method("acb"),
    "OREPA": _OREPA,
    "ireps": Method("ireps"),
    "RepNAS": Method(schedule=_REPNAS, clip=_CLIP),
    "RepNAS, retrained": Method(found_by="RepNAS"),
    "random architecture": Method(drawn=0.5),
    _SEARCH_OF_DES: Method(schedule=_DES, clip=_CLIP, length=0.5, listed=False),
    "DES": Method(found_by=_SEARCH_OF_DES),
    "RepVGG, distilled": Method("repvgg", distilled=True),
    "RepAn, distilled": Method(schedule=_REPAN, distilled=True),
    "DyRep by snip": Method(schedule={**_DYREP, "metric": "snip"}),
    "DyRep at random": Method(schedule={**_DYREP, "metric": "random"}),
    "plain, clipped": Method([], clip=_CLIP),
    AS_LONG: Method([], length=2.5),
    FIVE_TIMES: Method([], length=5.0),
}


@dataclass(frozen=True)
class Scale:
    """One net and its training, which are the same for all methods.

    Args:
        net, teacher: the net that is trained, and the one that it can learn from.
        training: the recipe, without a seed.
        gate_rate: learning rate of the gates in searches. It is the papers' 1e-4 times 300 epochs of 391 steps, divided by the number of
            steps of a search here. The papers search longer still, for 600 epochs (RepNAS) and 500 (IRepNAS). With 1e-4 a short search
            would decide by the noise alone.
        images: number of training images; None for all.
        methods: the methods, in the order in which they run.
    """

    net: ModelReference
    teacher: ModelReference
    training: Recipe
    gate_rate: float
    images: int | None = None
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)

    @property
    def listed(self) -> list[str]:
        """The methods that have rows of their own."""
        return [name for name, method in self.methods.items() if method.listed]


_SGD = Recipe(
    epochs=10,
    batch_size=128,
    optimizer="SGD",
    optimizer_options={"momentum": 0.9},
    learning_rate=0.1,
    weight_decay=5e-4,
    warm_up=1.0,
    augmentation=Augmentation(crop_padding=4, flip=0.5),
    channels_last=True,
)
_PAPERS = replace(_SGD, epochs=100, weight_decay=1e-4, workers=4, test_every=5)
_SMALL = "benchmarks.accuracy:small_vgg"
_LARGE = ModelReference("repfx.recipes.nets:resnet101")
SCALES: dict[str, Scale] = {
    "cpu": Scale(
        ModelReference(_SMALL, options={"width": 8}),
        ModelReference(_SMALL, options={"width": 16}),
        _SGD,
        gate_rate=0.03,
        images=10000,
    ),
    "long": Scale(
        ModelReference(_SMALL, options={"width": 8}),
        ModelReference(_SMALL, options={"width": 16}),
        replace(_SGD, epochs=90, test_every=5),
        gate_rate=1e-3,
        methods=LONG_METHODS,
    ),
    "vgg16": Scale(ModelReference("repfx.recipes.nets:vgg16"), _LARGE, _PAPERS, gate_rate=6e-4),
    "resnet18": Scale(ModelReference("repfx.recipes.nets:resnet18"), _LARGE, _PAPERS, gate_rate=6e-4),
    "smoke": Scale(
        ModelReference(_SMALL, options={"width": 4}),
        ModelReference(_SMALL, options={"width": 4}),
        replace(_SGD, epochs=4, batch_size=64),
        gate_rate=0.03,
        images=256,
    ),
}
