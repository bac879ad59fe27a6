"""The training form: specs and presets, `RepBlock`, the stages that branches are made of, gates, and squeezed forms.

Imports algebra and records; the branch kinds themselves are in `repfx.branches`. Begin with `block`.
"""
