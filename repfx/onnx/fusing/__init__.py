"""An ONNX file fused: its graph in words of torch, the rules of `fuse`, and the ONNX graph again.

Imports the wings above `onnx` and the files beside this folder. Begin with `fuse_file`.
"""
