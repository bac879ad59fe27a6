"""Pictures of the papers, for any run: what differs between branches, which branches a net has, maps of features, gradients.

Begin with `of_run`.
"""
