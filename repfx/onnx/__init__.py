"""ONNX files: exported, fused, checked in onnxruntime, and quantized.

Imports `passes` and the wings above it (order: docs/architecture.md), and, inside functions, the packages of the `onnx` extra.
Begin with `export`, or with `fusing/fuse_file`.
"""
