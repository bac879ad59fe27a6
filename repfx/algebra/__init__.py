"""Layers to kernels and back: `Kernel` and its laws, layers as linear maps, moments, baking.

Imports `errors` and `records`. It knows nothing of graphs and blocks.
Begin with `kernel`.
"""
