"""The one stable module for authors of branch kinds, passes, schedules, searches and meanings of layers.

The names here keep their meaning from version to version, as do the names of `import repfx` itself and `repfx.testing`.
All other modules of repfx are private: they may move or change at any time.

>>> from repfx.extend import Branch, Norm, Stages, conv_stages  # everything that a branch kind needs
"""

from repfx.algebra.baking import conv_module
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.layers import Layer, is_batch_norm, is_conv
from repfx.algebra.meaning import Meaning, kernel_of, meaning_of, reads
from repfx.blocks.block import RepBlock
from repfx.blocks.branch import KINDS, Branch, fitting
from repfx.blocks.presets import PRESETS, Preset, resolve_spec
from repfx.blocks.spec import BranchSpec, Spec
from repfx.blocks.stages import AVERAGE_POOL_OF, BATCH_NORM_OF, Factor, Norm, Pad, Scale, Stages, Subsample, conv_stages
from repfx.change.saliency import METRICS
from repfx.change.schedule import SCHEDULES, Candidate, Observation, ObservedBlock, Schedule
from repfx.passes.calibrate import Calibrate
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.passes.freeze import Freeze
from repfx.passes.fuse import Fuse
from repfx.passes.gate import Gate, Ungate
from repfx.passes.restore import Restore
from repfx.passes.squeeze import Squeeze, Unsqueeze
from repfx.records.journal import ACTIONS, Action
from repfx.records.notes import copy_of
from repfx.records.report import Edit, Report, Skip
from repfx.rewriting.guards import channels_stay_put, is_convolution, no_dearer, unmutated, used_once
from repfx.rewriting.match import Match
from repfx.rewriting.patterns import Sequence, Single, Sum
from repfx.rewriting.pipeline import verb
from repfx.rewriting.rule import PASSES, RULES, Rule
from repfx.rewriting.view import View
from repfx.search.base import PopulationSearch, Search
from repfx.search.observation import Draw, Gated
from repfx.search.space import Space

__all__ = [
    # branch kinds and presets
    "AVERAGE_POOL_OF",
    "BATCH_NORM_OF",
    "Branch",
    "BranchSpec",
    "ConvSpec",
    "Factor",
    "Norm",
    "Pad",
    "Preset",
    "RepBlock",
    "Scale",
    "Spec",
    "Stages",
    "Subsample",
    "conv_module",
    "conv_stages",
    "fitting",
    "resolve_spec",
    # meanings of layers
    "Kernel",
    "Layer",
    "Meaning",
    "NoKernel",
    "is_batch_norm",
    "is_conv",
    "kernel_of",
    "meaning_of",
    "reads",
    # passes: rules
    "Match",
    "Rule",
    "Sequence",
    "Single",
    "Sum",
    "View",
    "channels_stay_put",
    "is_convolution",
    "no_dearer",
    "unmutated",
    "used_once",
    # passes: verbs
    "Edit",
    "Report",
    "Skip",
    "copy_of",
    "verb",
    # schedules and searches
    "ObservedBlock",
    "Candidate",
    "Draw",
    "Gated",
    "Observation",
    "PopulationSearch",
    "Schedule",
    "Search",
    "Space",
    # actions
    "Action",
    "Calibrate",
    "Drop",
    "Expand",
    "Freeze",
    "Fuse",
    "Gate",
    "Restore",
    "Squeeze",
    "Ungate",
    "Unsqueeze",
    # registries, by name
    "ACTIONS",
    "KINDS",
    "METRICS",
    "PASSES",
    "PRESETS",
    "RULES",
    "SCHEDULES",
]
