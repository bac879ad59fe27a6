"""Structural re-parameterization as a compiler: expand, train, fuse, restore and verify any convolutional network."""

from __future__ import annotations

import repfx.branches
import repfx.passes as _passes
from repfx import errors as errors
from repfx import schedules as schedules
from repfx.architecture import Architecture as Architecture
from repfx.block import RepBlock as RepBlock
from repfx.branch import Branch as Branch
from repfx.carrying import carry as carry
from repfx.checkpoint import load as load
from repfx.checkpoint import save as save
from repfx.distillation import distillation_loss as distillation_loss
from repfx.driver import Driver as Driver
from repfx.equivalence import check_equivalent as check_equivalent
from repfx.journaling import journal as journal
from repfx.kernel import Kernel as Kernel
from repfx.onnx import export_onnx as export_onnx
from repfx.passes.drop import drop as drop
from repfx.passes.expand import expand as expand
from repfx.passes.fuse import fuse as fuse
from repfx.passes.restore import restore as restore
from repfx.passes.squeeze import squeeze as squeeze
from repfx.passes.squeeze import unsqueeze as unsqueeze
from repfx.quantization import quantize_onnx as quantize_onnx
from repfx.reporting import report as report
from repfx.schedule import Schedule as Schedule
from repfx.site import sites as sites
from repfx.spec import BranchSpec as BranchSpec
from repfx.spec import Spec as Spec

__version__ = "0.1.0"
