"""Changing graphs: the view, matches, patterns, guards and rules, and the editor and pipeline that apply them.

Imports graphs and below. Begin with `rule`; a rule itself is one file in `passes/`.
"""
