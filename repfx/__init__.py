"""Structural re-parameterization as a compiler: expand, train, fuse, restore and verify any convolutional network."""

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
from repfx.records.version import VERSION as _VERSION
from repfx.tracing.sites import sites as sites
from repfx.training.objective.distillation import distillation_loss as distillation_loss

__version__ = _VERSION
