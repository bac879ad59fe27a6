"""The errors that repfx raises: one base class and a child for each thing a caller may want to catch.

Every message says what was asked, where (module path), what was found against what is needed, and what to do.
A refusal is not an error: it is a `Skip` in a pass's report. `strict=True` turns refusals into one `Refused`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class RepfxError(Exception):
    """Base of every error that repfx raises on purpose."""


class InvalidInput(RepfxError):
    """An argument can't be used: a model without convs, a malformed spec, a non-finite weight, a wrong shape."""


_MANY, _NEAREST = 20, 5  # of more names than the first number, only the nearest are listed


class UnknownName(InvalidInput):
    """A name that is in no registry; the message gives the nearest one and all known ones, or the nearest of many.

    >>> print(UnknownName("branch kind", "1x2", ["1x1", "identity"]))
    no branch kind '1x2'; did you mean '1x1'? Known: 1x1, identity
    >>> print(UnknownName("layer", "conv7", [f"layer{number}" for number in range(40)] + ["conv1"]))
    no layer 'conv7'; did you mean 'conv1'? Known: conv1, layer7, layer37, layer27, layer17, … (41 in all)
    """

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        listed = names
        if len(names) > _MANY:
            nearest = difflib.get_close_matches(name, names, n=_NEAREST, cutoff=0.0)
            listed = [*nearest, f"… ({len(names)} in all)"]
        super().__init__(f"no {what} {name!r}{hint} Known: {', '.join(listed)}")


class NotAConv(RepfxError, AttributeError):
    """A block was asked for an attribute that only a conv has, such as its weight."""


class Refused(RepfxError):
    """`strict=True` met at least one refusal; the message lists each with its reason."""


class EquivalenceError(RepfxError):
    """Two models that should compute the same function do not. `report` holds what was measured, or None if there is no report."""

    report: Any = None


class ExportError(RepfxError):
    """A model could not be exported, or the exported model computes something else."""


class Interrupted(RepfxError):
    """A signal ended the work early; a file holds what is needed to resume it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(". ")
