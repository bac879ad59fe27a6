"""`parts_of`: the layers that each conv of a deployed model was made from, as values that a page can draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.layers import CONVS, TRANSPOSED_CONVS, Layer, is_batch_norm, is_conv
from repfx.algebra.meaning import torch_class
from repfx.blocks.block import ORIGIN, RepBlock
from repfx.blocks.branch import Chain
from repfx.blocks.cropped_conv import CroppedConv
from repfx.blocks.stages import Pad, RowNorm, Subsample
from repfx.measuring.cost import LayerCount, count_layers
from repfx.passes.rules.merge_parallel import MERGE_PARALLEL
from repfx.records.provenance import provenance_of

_FEW_PARTS = 2


@dataclass(frozen=True)
class Chip:
    """One layer.

    Args:
        text: the layer in a few words.
        sort: ``conv``, ``norm`` or ``other``; ``block`` for a block, which has lanes of its own.
        lanes: the paths of a block; empty for any other layer.
    """

    text: str
    sort: str
    lanes: tuple[Lane, ...] = ()


@dataclass(frozen=True)
class Lane:
    """Layers one after another.

    Args:
        name: text beside the lane, empty for none.
        chips: the layers in order.
        note: the reason why the lane doesn't run in eval mode; empty if it runs.
    """

    name: str
    chips: tuple[Chip, ...]
    note: str = ""


@dataclass(frozen=True)
class Unit:
    """Lanes, and the one layer that they become when fused.

    Args:
        lanes: the layers before fusing.
        result: the layer after fusing; None for a block that `fuse` left alone.
        rules: names of the rules that fused the lanes; empty if the layer is unchanged.
        factor: the attach rate λ that multiplies the branches, as text; empty if there is none.
    """

    lanes: tuple[Lane, ...]
    result: Chip | None
    rules: tuple[str, ...] = ()
    factor: str = ""

    @property
    def is_sum(self) -> bool:
        """Whether the outputs of the lanes were added. In a model that repfx didn't expand, lanes may also follow one another."""
        return MERGE_PARALLEL.name in self.rules


@dataclass(frozen=True)
class Group:
    """A unit, and the paths in the deployed model of all its copies."""

    unit: Unit
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A part of a model, such as ``layer1``.

    Args:
        name: the path of the part; ``""`` for the whole model, or for the units at its top.
        groups: the units of the part; equal ones are grouped.
        before, after: how many convs and BatchNorms the part has before and after fusing.
    """

    name: str
    groups: tuple[Group, ...]
    before: LayerCount
    after: LayerCount

    @property
    def size(self) -> int:
        """The number of units in the part."""
        return sum(len(group.paths) for group in self.groups)


def parts_of(before: nn.Module, fused: nn.Module) -> tuple[Part, ...]:
    """Compare a model with what `repfx.fuse` made of it, part by part. Equal units of a part are grouped."""
    units = units_of(before, fused)
    name_of = _names_of_parts(list(units))
    found: dict[str, dict[Unit, list[str]]] = {}
    for path, unit in units.items():
        found.setdefault(name_of[path], {}).setdefault(unit, []).append(path)
    parts = []
    for name, units_of_part in found.items():
        groups = tuple(Group(unit, tuple(paths)) for unit, paths in units_of_part.items())
        others = [
            other for other in found if other and other != name and f"{other}.".startswith(f"{name}.".lstrip("."))
        ]
        parts.append(Part(name, groups, *(count_layers(model, name, others) for model in (before, fused))))
    return tuple(parts)


def units_of(before: nn.Module, fused: nn.Module) -> dict[str, Unit]:
    """Return the units by path in the deployed model: convs, other layers with sources in the model before, and blocks left alone."""
    modules = dict(before.named_modules(remove_duplicate=False))
    found: dict[str, Unit] = {}
    for path, module in fused.named_modules():
        if path.startswith(tuple(f"{block}." for block, unit in found.items() if unit.result is None)):
            continue
        provenance = provenance_of(module)
        if isinstance(module, RepBlock):
            found[path] = Unit(_lanes(module), None, (), _factor(module))
        elif provenance is not None and provenance.sources:
            known = [source for source in provenance.sources if source in modules]
            found[path] = _unit(known, modules, chip_of(module), provenance.rules)
        elif is_conv(module):
            found[path] = Unit((Lane("", (chip_of(module),)),), chip_of(module))
    return found


def chip_of(module: nn.Module) -> Chip:
    """Describe a layer in a few words."""
    if isinstance(module, RepBlock):
        return Chip(f"block {module.site}", "block", _lanes(module))
    if isinstance(module, RowNorm):
        return chip_of(module.norm)
    if isinstance(module, CroppedConv):
        return Chip(f"{module.site}, shared weights", "conv")
    if is_conv(module):
        return Chip(_conv(module), "conv")
    if is_batch_norm(module):
        return Chip("BN", "norm")
    if isinstance(module, nn.Linear):
        return Chip(str(ConvSpec.of(module)), "conv")
    if isinstance(module, Pad):
        return Chip("pad", "other")
    if isinstance(module, Subsample):
        return Chip(f"stride {'×'.join(map(str, module.stride))}", "other")
    if isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        size = module.kernel_size
        return Chip(f"average {'×'.join(map(str, size if isinstance(size, tuple) else (size,)))}", "other")
    return Chip(type(module).__name__, "other")


def _conv(conv: Layer) -> str:
    if torch_class(conv) in CONVS + TRANSPOSED_CONVS:
        return f"conv {ConvSpec.of(conv)}"
    return f"{type(conv).__name__} {conv.in_channels}→{conv.out_channels}"


def _lanes(block: RepBlock) -> tuple[Lane, ...]:
    running = block.running_in(training=False)
    lanes = [_lane("own conv", block.origin, "" if ORIGIN in running else "rests" if block.rests else "gate closed")]
    for name, branch in block.branches.items():
        lanes.append(_lane(name, branch, "" if name in running else "gate closed"))
    return tuple(lanes)


def _lane(name: str, chain: Chain, note: str) -> Lane:
    chips = [chip_of(stage) for stage in chain if not _does_nothing(stage)]
    return Lane(name, tuple(chips), note)


def _does_nothing(stage: nn.Module) -> bool:
    return isinstance(stage, nn.Identity) or (isinstance(stage, Pad) and not any(map(any, stage.padding)))


def _factor(block: RepBlock) -> str:
    return "" if block.attach_rate is None else f"branches × λ = {float(block.attach_rate):.2g}"


def _unit(sources: Sequence[str], modules: Mapping[str, nn.Module], result: Chip, rules: tuple[str, ...]) -> Unit:
    """Build the unit of a layer from the layers that it was made from.

    Sources inside a block are drawn as that block. Among the other sources, those with one parent form one lane.
    """
    blocks = dict.fromkeys(block for source in sources if (block := _block_around(source, modules)) is not None)
    others = [source for source in sources if _block_around(source, modules) is None]
    others = [source for source in others if not _does_nothing(modules[source])]
    parents = Counter(_parent(source) for source in others)
    keys = {source: _parent(source) if parents[_parent(source)] > 1 else source for source in others}
    shared = _common(list(keys.values()))
    lanes: dict[str, list[Chip]] = {}
    for source, key in keys.items():
        lanes.setdefault(key[len(shared) :].lstrip("."), []).append(chip_of(modules[source]))
    found = [modules[path] for path in blocks]
    inner = [block for block in found if isinstance(block, RepBlock)]
    own = inner[0] if len(inner) == 1 else None
    if own is not None:
        behind = [Lane("together with", tuple(chips)) for chips in lanes.values()]
        return Unit((*_lanes(own), *behind), result, rules, _factor(own))
    drawn = [Lane(path, (chip_of(modules[path]),)) for path in blocks]
    return Unit((*drawn, *(Lane(name, tuple(chips)) for name, chips in lanes.items())), result, rules)


def _block_around(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the path of the outermost block around a module; None if it lies in no block."""
    parts = path.split(".")
    outer = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((path for path in outer if isinstance(modules.get(path), RepBlock)), None)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _common(paths: Sequence[str]) -> str:
    """Return the longest beginning that all paths share, in whole names. A single path is returned whole."""
    split = [path.split(".") for path in paths]
    shared = []
    for names in zip(*split):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _names_of_parts(paths: Sequence[str]) -> dict[str, str]:
    """Name the part that each path belongs to: its first name or, if that divides too little, its first two.

    The names come from the path of the unit's parent. Every part is ``""``, the whole model, unless there are at least two parts and
    they have two units each on average.
    """
    for depth in (1, 2):
        names = {path: ".".join(path.split(".")[:-1][:depth]) for path in paths}
        parts = set(names.values())
        if len(parts) >= _FEW_PARTS and len(paths) >= 2 * len(parts):
            return names
    return dict.fromkeys(paths, "")
