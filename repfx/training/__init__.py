"""The training loop and what is around it: recipes, engine, loss, run folders, and the main job in one call.

Imports data and below, and the packages of the `train` extra. Begin with `experiment`; `interruption` has Ctrl-C.
"""
