"""Check the installed wheel in a separate environment. The only argument is the path of the checkout, which must not be imported."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import repfx
import repfx.passes
import repfx.recipes.nets
from repfx.training.named_recipes import shipped_recipes
from repfx.training.recipe_file import read_recipe

checkout = Path(sys.argv[1]).resolve()
for module in (repfx, repfx.passes, repfx.recipes.nets):
    location = Path(str(module.__file__)).resolve()
    if checkout in location.parents:
        sys.exit(f"{module.__name__} was imported from the checkout, not from the wheel: {location}")
if not (Path(str(repfx.__file__)).parent / "py.typed").exists():
    sys.exit("the wheel has no py.typed: its types are lost on users")
if not shipped_recipes() or "training" not in read_recipe("dyrep-vgg16-cifar10"):
    sys.exit("the wheel has no recipes")

model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval()
x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
expanded = repfx.expand(model, "dbb", preserve=False)
fused = repfx.fuse(expanded)
repfx.check_equivalent(expanded, fused, x)
convs = sum(isinstance(module, nn.Conv2d) for module in fused.modules())
if convs != 2:
    sys.exit(f"fusing left {convs} convs where the model has 2")
print(f"wheel: repfx from {Path(str(repfx.__file__)).parent.name}/, expand → fuse → check passed")
