"""ONNX files: exported, checked in onnxruntime, and quantized.

Imports measuring, passes and below, and the packages of the `onnx` extra inside functions. Begin with `export`.
"""
