"""Import one module with a mistake in it. The file on disk stays as it is, so several processes can do this at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

from tests.mutation.mutants import Mutant


class _MutatedLoader(SourceFileLoader):
    """Reads the source with the mistake, and neither reads nor writes bytecode."""

    mutant: Mutant

    def get_code(self, fullname: str) -> CodeType:
        source = self.mutant.mutated(self.get_data(self.path).decode("utf-8"))
        code: CodeType = compile(source, self.path, "exec", dont_inherit=True)
        return code


class _Finder:
    """Finds the mutated module before Python's own finders do."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == self._mutant.module else None
        if spec is None or spec.origin is None:
            return None
        loader = _MutatedLoader(fullname, spec.origin)
        loader.mutant = self._mutant
        spec.loader = loader
        return spec


def import_with_mistake(mutant: Mutant) -> None:
    """Import the mutant's module with its mistake, for the rest of this process."""
    if "repfx" in sys.modules:
        raise RuntimeError("repfx is imported already, without the mistake.")
    sys.meta_path.insert(0, _Finder(mutant))
    module = importlib.import_module(mutant.module)
    if not isinstance(module.__loader__, _MutatedLoader):
        raise RuntimeError(f"{mutant.module} was imported without the mistake.")
