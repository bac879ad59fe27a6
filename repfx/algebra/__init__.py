"""From a layer to its kernel and back: `Kernel` and its laws, what layers mean as linear maps, moments, baking.

Imports records. No graph and no block is in sight here. Begin with `kernel`.
"""
