"""Layers to kernels and back: `Kernel` and its laws, layers as linear maps, moments, baking.

Imports records, and knows nothing of graphs and blocks. Begin with `kernel`.
"""
