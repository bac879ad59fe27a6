"""Training: the loop, recipes, the engine, the loss, run folders, and the main job in one call.

Imports data and below, and the packages of the `train` extra. Begin with `experiment`; `interruption` handles Ctrl-C.
"""
