"""`Selection`: which sites get which spec. One spec serves all sites, or patterns of their paths choose."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from repfx.blocks.architecture import Architecture
from repfx.blocks.presets import SpecLike, resolve_spec
from repfx.blocks.spec import Spec
from repfx.errors import InvalidInput
from repfx.records.module_tree import fits


@dataclass(frozen=True)
class Selection:
    """Specs by glob pattern of site paths; the first pattern that fits counts.

    >>> chosen = Selection.of({"layer1.*": "acb", "layer4.*": ["1x1", "1xk"]})
    >>> chosen.spec_for("layer1.0.conv1") is not None, chosen.spec_for("conv1")
    (True, None)
    """

    patterns: tuple[tuple[str, Spec], ...]
    architecture: Architecture | None = None

    @classmethod
    def of(cls, spec: SpecLike | Architecture) -> Selection:
        """Make a selection from anything that `expand` takes as a spec."""
        found = Architecture.load(spec) if isinstance(spec, str) and spec.endswith(".json") else spec
        if isinstance(found, Architecture):
            return cls(tuple(found.specs.items()), found)
        spec = found
        if not isinstance(spec, Mapping):
            return cls((("*", resolve_spec(spec)),))
        if not spec:
            raise InvalidInput("the spec is an empty dict; it takes at least one pattern of site paths.")
        return cls(tuple((str(pattern), resolve_spec(value)) for pattern, value in spec.items()))

    @property
    def keeps_origins(self) -> bool:
        """Whether every site that gets a block keeps running its own conv."""
        return all(spec.origin for _, spec in self.patterns)

    def spec_for(self, path: str) -> Spec | None:
        """Return the spec of a site, or None."""
        return next((spec for pattern, spec in self.patterns if fits(path, pattern)), None)

    def takes(self, path: str, *, linear: bool) -> bool:
        """Whether a layer at a path is one of those that the specs are for; one that no pattern names is if it is a conv."""
        spec = self.spec_for(path)
        return not linear if spec is None else spec.layers in ("both", "linear" if linear else "conv")

    def names(self, path: str) -> bool:
        """Whether a pattern is exactly this path."""
        return any(pattern == path for pattern, _ in self.patterns)

    def require_used(self, convs: Mapping[str, str], others: Collection[str] = ()) -> None:
        """Raise `InvalidInput` if a pattern fits no site, or if the architecture is of another net.

        Args:
            convs: sizes of the layers that the specs are for, by path.
            others: the paths of all other layers.
        """
        known = list(convs)
        if self.architecture is not None:
            self.architecture.require_fits(convs)
        for pattern, spec in self.patterns:
            if not any(fits(path, pattern) for path in known):
                if any(fits(path, pattern) for path in others):
                    sort, needed = ("convs", "conv") if spec.layers == "linear" else ("linear layers", "linear")
                    raise InvalidInput(
                        f"the spec's pattern {pattern!r} fits {sort} alone: give a repfx.Spec with layers={needed!r} for them."
                    )
                near = difflib.get_close_matches(pattern, known, n=1)
                hint = f" (nearest: {near[0]!r})" if near else ""
                shown = ", ".join(known[:5]) + (", …" if len(known) > 5 else "")
                raise InvalidInput(
                    f"the spec's pattern {pattern!r} fits no site{hint}; there are {len(known)}: {shown}"
                )


def spec_at(spec: SpecLike, path: str) -> Spec:
    """Return a schedule's spec for one site. A dict of patterns may leave the site without branches.

    Raises:
        InvalidInput: the spec can't be used at any site; UnknownName: there is no preset of that name.

    >>> [len(spec_at({"layer*": "acb"}, path).branches) for path in ("conv1", "layer1.0.conv1")]
    [0, 2]
    """
    if isinstance(spec, Mapping):
        return Selection.of(spec).spec_for(path) or Spec([])
    return resolve_spec(spec)
