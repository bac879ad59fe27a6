"""Calls in graphs beyond layers and arithmetic: functions of several tensors, leaves of anybody, and what a scale and a shift can pass.

Imports `graphs` and the wings above it (order: docs/architecture.md). It changes no graph.
Begin with `with_tensors`.
"""
