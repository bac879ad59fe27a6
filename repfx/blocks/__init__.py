"""The training form: specs and presets, `RepBlock`, the stages that branches are made of, gates, and squeezed forms.

Imports `errors`, `records` and `algebra`. The branch kinds themselves lie in `repfx.branches`.
Begin with `block`.
"""
