"""Quantization-aware training: a fused model trained on with its numbers rounded to 8 bits, and written as a file of 8 bits.

Imports `onnx` and the wings above it (order: docs/architecture.md), and, inside functions, the packages of the `qat` extra.
Begin with `rounded`; `quantizer` needs torchao to be imported.
"""
