"""Structural re-parameterization as a compiler: expand, train, fuse, restore and verify any convolutional network.

`import repfx` imports nothing else. A name is imported when it is first used, so that the command line's help needn't wait for torch.
"""

import importlib
from typing import TYPE_CHECKING

from repfx.records.version import VERSION as _VERSION

if TYPE_CHECKING:  # the same names as in the table below, for programs that read code
    from repfx import branches as branches
    from repfx import errors as errors
    from repfx import passes as passes
    from repfx import schedules as schedules
    from repfx.algebra.kernel import Kernel as Kernel
    from repfx.blocks.architecture import Architecture as Architecture
    from repfx.blocks.block import RepBlock as RepBlock
    from repfx.blocks.branch import Branch as Branch
    from repfx.blocks.spec import BranchSpec as BranchSpec
    from repfx.blocks.spec import Spec as Spec
    from repfx.change.carry import carry as carry
    from repfx.change.checkpoint import load as load
    from repfx.change.checkpoint import save as save
    from repfx.change.driver import Driver as Driver
    from repfx.change.schedule import Schedule as Schedule
    from repfx.measuring.equivalence import check_equivalent as check_equivalent
    from repfx.onnx.export import export_onnx as export_onnx
    from repfx.onnx.fusing.fuse_file import fuse_onnx as fuse_onnx
    from repfx.onnx.program_file import export_program as export_program
    from repfx.onnx.quantize import quantize_onnx as quantize_onnx
    from repfx.passes.drop import drop as drop
    from repfx.passes.expand import expand as expand
    from repfx.passes.fuse import fuse as fuse
    from repfx.passes.restore import restore as restore
    from repfx.passes.squeeze import squeeze as squeeze
    from repfx.passes.squeeze import unsqueeze as unsqueeze
    from repfx.profiling.profile import profile as profile
    from repfx.records.journal import journal as journal
    from repfx.records.report import report as report
    from repfx.tracing.sites import sites as sites
    from repfx.training.objective.distillation import distillation_loss as distillation_loss

__version__ = _VERSION

_MODULES = {
    "branches": "repfx.branches",
    "errors": "repfx.errors",
    "passes": "repfx.passes",
    "schedules": "repfx.schedules",
    "Kernel": "repfx.algebra.kernel",
    "Architecture": "repfx.blocks.architecture",
    "RepBlock": "repfx.blocks.block",
    "Branch": "repfx.blocks.branch",
    "BranchSpec": "repfx.blocks.spec",
    "Spec": "repfx.blocks.spec",
    "carry": "repfx.change.carry",
    "load": "repfx.change.checkpoint",
    "save": "repfx.change.checkpoint",
    "Driver": "repfx.change.driver",
    "Schedule": "repfx.change.schedule",
    "check_equivalent": "repfx.measuring.equivalence",
    "export_onnx": "repfx.onnx.export",
    "fuse_onnx": "repfx.onnx.fusing.fuse_file",
    "export_program": "repfx.onnx.program_file",
    "quantize_onnx": "repfx.onnx.quantize",
    "drop": "repfx.passes.drop",
    "expand": "repfx.passes.expand",
    "fuse": "repfx.passes.fuse",
    "restore": "repfx.passes.restore",
    "squeeze": "repfx.passes.squeeze",
    "unsqueeze": "repfx.passes.squeeze",
    "profile": "repfx.profiling.profile",
    "journal": "repfx.records.journal",
    "report": "repfx.records.report",
    "sites": "repfx.tracing.sites",
    "distillation_loss": "repfx.training.objective.distillation",
}
"""The module that has each name. A module that ends in the name is meant itself."""

__all__ = list(_MODULES)

if not TYPE_CHECKING:  # a type checker would take every name for a known one

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        path = _MODULES[name]
        module = importlib.import_module(path)
        found = module if path == f"repfx.{name}" else getattr(module, name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return [*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"]
