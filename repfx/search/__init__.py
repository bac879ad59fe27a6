"""Searches for the branches that help: the space of gated paths, candidates scored as plain nets, and what a search does for a driver.

Imports change and below. Begin with `base`.
"""
