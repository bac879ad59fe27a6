"""`python -m repfx`, which launchers of several processes need, such as ``torchrun --nproc-per-node 2 -m repfx train``."""

from repfx.cli import main

main()
