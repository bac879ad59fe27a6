"""`Architecture`: the branches that each site of a net has, for example as a search found them. It is a value and a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.layers import KERNEL_LAYERS, is_conv
from repfx.algebra.meaning import torch_class
from repfx.blocks.block import ORIGIN, RepBlock
from repfx.blocks.cropped_conv import is_shared
from repfx.blocks.spec import BranchSpec, Normalisation, Spec, Weights
from repfx.errors import InvalidInput, RepfxError
from repfx.records.json_text import parse_json
from repfx.records.target_file import staged

_FORMAT = 1


@dataclass(frozen=True)
class SiteCode:
    """The paths that a site can have, and those that it has.

    Args:
        conv: sizes of the site's own conv, as text.
        branches: all branches that the search chose from, in order.
        code: one digit for the site's own conv and one for each branch: 1 if the site has it, else 0 (IRepNAS, figure A2).
        norm, weights, origin_scale, norm_behind: settings of `Spec`.
        importance: number that a search has learned for each path, in the order of the code: α of RepNAS, σ(α) · σ(β) of DES; None for a
            path without anything to learn. The tuple is empty without a search.
    """

    conv: str
    branches: tuple[BranchSpec, ...]
    code: str
    norm: Normalisation = "batch_norm"
    weights: Weights = "default"
    importance: tuple[float | None, ...] = ()
    origin_scale: float | None = None
    norm_behind: bool = False

    @property
    def chosen(self) -> tuple[BranchSpec, ...]:
        """The branches that the site has."""
        return tuple(branch for branch, digit in zip(self.branches, self.code[1:]) if digit == "1")

    @property
    def digits(self) -> list[tuple[str, int]]:
        """The name of each branch, and 1 if the site has it, else 0."""
        return [(branch.name or branch.kind, int(digit)) for branch, digit in zip(self.branches, self.code[1:])]

    @property
    def spec(self) -> Spec:
        """The spec that `expand` takes to build this site."""
        origin = self.code[0] == "1"
        options: dict[str, Any] = {"weights": self.weights, "origin": origin, "origin_scale": self.origin_scale}
        # the path says which layer it is
        return Spec(self.chosen, self.norm, layers="both", norm_behind=self.norm_behind, **options)

    @classmethod
    def of(cls, block: RepBlock) -> SiteCode:
        """Read the code of a block. The site has the paths that run in eval mode."""
        branches, gates = list(block.branches.values()), block.gates
        names, running = (ORIGIN, *block.branches), block.running_in(training=False)
        code = "".join("01"[name in running] for name in names)
        importance = () if gates is None else tuple(gates.importance_of(name) for name in names)
        weights: Weights = "shared" if any(map(is_shared, branches)) else "default"
        norm: Any = branches[0].normalisation if branches else "batch_norm"
        specs = tuple(
            replace(branch.spec, name=None if name == branch.kind else name) for name, branch in block.branches.items()
        )
        behind = block.norm_behind is not None
        return cls(str(block.site), specs, code, norm, weights, importance, block.origin_scale, behind)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        branches = [{**asdict(branch), "options": dict(branch.options)} for branch in self.branches]
        return {
            "conv": self.conv,
            "branches": branches,
            "code": self.code,
            "norm": self.norm,
            "weights": self.weights,
            "importance": list(self.importance),
            "origin_scale": self.origin_scale,
            "norm_behind": self.norm_behind,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiteCode:
        """Make a code from the values that `to_dict` returned, and check them."""
        branches = tuple(BranchSpec(**branch) for branch in values["branches"])
        found = cls(**{**values, "branches": branches, "importance": tuple(values.get("importance", ()))})
        if len(found.code) != len(found.branches) + 1 or set(found.code) - {"0", "1"}:
            raise InvalidInput(
                f"the code {found.code!r} isn't one digit 0 or 1 for each of {len(found.branches) + 1} paths"
            )
        if len(found.importance) not in (0, len(found.code)):
            raise InvalidInput(
                f"found {len(found.importance)} importances for {len(found.code)} paths; there must be one for each, or none"
            )
        if any(isinstance(value, (str, bool)) for value in found.importance):
            raise InvalidInput("importances must be numbers")
        if "1" not in found.code:
            raise InvalidInput("a site's code has no 1, so the site would have no path")
        return found


@dataclass(frozen=True)
class Architecture:
    """The branches that each site of a net has.

    `repfx.expand(model, "arch.json")` builds the blocks again from the plain net.

    Args:
        sites: codes of the sites by path, in the model's order.
        others: sizes, as text, of the net's other convs, by path. `require_fits` uses them to recognise another net.

    >>> import repfx
    >>> model = repfx.expand(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)), "repvgg")
    >>> print(Architecture.of(repfx.drop(model, "0", "identity")))
    0  11  origin, 1x1
    """

    sites: Mapping[str, SiteCode]
    others: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Architecture:
        """Read the architecture of a model from its blocks. A site has the paths that run in eval mode.

        Raises:
            InvalidInput: the model has no blocks, or blocks inside blocks.
        """
        blocks = {path: module for path, module in model.named_modules() if isinstance(module, RepBlock)}
        if not blocks:
            raise InvalidInput(f"{type(model).__name__} has no blocks; repfx.expand makes them.")
        nested = [path for path in blocks if any(path.startswith(f"{other}.") for other in blocks)]
        if nested:
            raise InvalidInput(f"{nested[0]!r} is a block inside a block, which no architecture describes.")
        others = {
            path: _sizes(module)
            for path, module in model.named_modules()
            if is_conv(module) and not any(path.startswith(f"{block}.") for block in blocks)
        }
        return cls({path: SiteCode.of(block) for path, block in blocks.items()}, others)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the architecture as JSON. The file appears whole or not at all."""
        with staged(path, ".json") as (_, staging):
            staging.write_text(self.to_json() + "\n", encoding="utf-8")

    def to_json(self) -> str:
        """Return the architecture as JSON text."""
        sites = {site: code.to_dict() for site, code in self.sites.items()}
        return json.dumps({"format": _FORMAT, "sites": sites, "others": dict(self.others)}, indent=2)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Architecture:
        """Read the file that `save` wrote.

        Raises:
            InvalidInput: the file holds something else; OSError: the file can't be read.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8", errors="replace"))
        except RepfxError as error:
            raise InvalidInput(f"{str(path)!r}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Read the text that `to_json` returned.

        Raises:
            InvalidInput: the text is something else.
        """
        try:
            found = parse_json(text)
            if found["format"] != _FORMAT:
                raise InvalidInput(f"it has format {found['format']}, and this version of repfx reads {_FORMAT}")
            sites = {site: SiteCode.from_dict(code) for site, code in found["sites"].items()}
            if not sites:
                raise InvalidInput("it has no sites")
            return cls(sites, {path: str(sizes) for path, sizes in found["others"].items()})
        except RepfxError as error:
            raise InvalidInput(f"this is no architecture: {str(error).rstrip('.')}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"this is no architecture that a search wrote: {text[:80]!r}.") from error

    @property
    def specs(self) -> dict[str, Spec]:
        """The specs that `expand` takes, by site. A site with its own conv alone is missing, so that it stays plain."""
        return {site: code.spec for site, code in self.sites.items() if code.chosen}

    def require_fits(self, convs: Mapping[str, str]) -> None:
        """Raise `InvalidInput` unless the architecture describes a net with these convs, given as sizes in text by path."""
        known = {site: code.conv for site, code in self.sites.items()} | dict(self.others)
        for site in dict.fromkeys((*known, *convs)):
            if known.get(site) != convs.get(site):
                told = [f"a conv {each}" if each else "none" for each in (known.get(site), convs.get(site))]
                raise InvalidInput(
                    f"the architecture is of another net: it has {told[0]} at {site!r}, this one has {told[1]}."
                )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of all branches that the sites chose from, in order: the columns of `matrices`."""
        return tuple(dict.fromkeys(name for code in self.sites.values() for name, _ in code.digits))

    def matrices(self, rows: int = 8) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Return the codes as matrices (IRepNAS, figure A2): a row for each site, and a column for each of `kinds`.

        The site's own conv has no column, because it always runs there. A branch that a site couldn't have counts as 0.

        Args:
            rows: number of sites in a matrix; the last matrix may have fewer. The paper's have 8, for the 16 3×3 convs of a ResNet-18.

        >>> import repfx
        >>> conv, strided = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        >>> found = Architecture.of(repfx.expand(nn.Sequential(conv, nn.ReLU(), strided), "repvgg"))
        >>> found.kinds, found.matrices()
        (('1x1', 'identity'), (((1, 1), (1, 0)),))
        """
        if rows < 1:
            raise InvalidInput(f"a matrix of {rows} rows holds no site: give at least 1.")
        lines = [dict(code.digits) for code in self.sites.values()]
        table = [tuple(line.get(kind, 0) for kind in self.kinds) for line in lines]
        return tuple(tuple(table[start : start + rows]) for start in range(0, len(table), rows))

    def __str__(self) -> str:
        rows = [(site, code.code, ", ".join(_names(code))) for site, code in self.sites.items()]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"{site:<{widths[0]}}  {code:<{widths[1]}}  {names}" for site, code, names in rows)


def _sizes(conv: nn.Module) -> str:
    return str(ConvSpec.of(conv)) if torch_class(conv) in KERNEL_LAYERS else "?"


def _names(code: SiteCode) -> list[str]:
    own = [ORIGIN] if code.code[0] == "1" else []
    return own + [branch.kind for branch in code.chosen]
