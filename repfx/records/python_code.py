"""Python code by the dotted name of a module or the path of a file; no file is run twice."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from repfx.errors import InvalidInput, first_line


def import_source(source: str) -> ModuleType:
    """Import a module by its dotted name, or a file by a path that ends in ``.py``. Plug-ins register what they define by this alone.

    Raises:
        InvalidInput: there is no such module or file, or its code failed.

    >>> import_source("repfx.errors").__name__
    'repfx.errors'
    """
    try:
        return _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    except (InvalidInput, KeyboardInterrupt):
        raise
    except BaseException as error:  # such as SystemExit, which would end this process as if all were well
        raise InvalidInput(f"importing {source!r} failed: {type(error).__name__}: {first_line(error)}.") from error


def imported_already(source: str) -> ModuleType | None:
    """Return the module that `import_source` would return without running any code; None if it would have to run some.

    >>> imported_already("repfx.errors") is import_source("repfx.errors"), imported_already("this")
    (True, None)
    """
    found = _module_of(Path(source).resolve()) if source.endswith(".py") else sys.modules.get(source)
    return found if isinstance(found, ModuleType) else None


def _module_of(path: Path) -> ModuleType | None:
    for known in list(sys.modules.values()):
        file = getattr(known, "__file__", None)
        if isinstance(file, str) and file.endswith(path.name) and Path(file).resolve() == path:
            return known
    return None


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InvalidInput(f"no file {str(path)!r} to import.")
    path = path.resolve()
    known = _module_of(path)
    if known is not None:
        return known
    name = f"_repfx_file_{path.stem}_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"{str(path)!r} can't be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # so that it can be tried again
        raise
    return module


def _import_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:  # a console script doesn't look there, `python -m` does
        sys.path.insert(0, here)
    return importlib.import_module(name)
