"""Each extra is complete: its verbs work where nothing else is installed, and without the extra they name it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Container
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.project.test_packaging import PYPROJECT, ROOT

EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
TINY = f"{ROOT / 'tests' / 'tiny.py'}:net"

PREPARED = """
import torch
from torch import nn
import repfx
from repfx.blocks.architecture import Architecture
from repfx.cli import main
from repfx.search.heat_map import draw

plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
x = torch.randn(2, 3, 8, 9)
model = repfx.expand(plain, "dbb")
"""

WITH_TORCH_ALONE = """
fused = repfx.fuse(model)
repfx.check_equivalent(model, fused, x)
repfx.check_equivalent(fused, repfx.restore(fused), x)
repfx.drop(model, "0", "1x1")
driver = repfx.Driver(plain, torch.optim.SGD(plain.parameters(), lr=0.1), repfx.schedules.DyRep(interval=1), calibrate=[x])
plain(x).sum().backward()
driver.after_backward()
driver.after_epoch()
"""

# Code that each extra must make work.
USES = {
    "checkpoint": "repfx.save('run.ckpt', model)\nrepfx.load('run.ckpt', plain)",
    "onnx": "repfx.export_onnx(model, 'model.onnx', x)\nrepfx.fuse_onnx('model.onnx', 'fused.onnx')",
    "plot": "draw(Architecture.of(model), 'architecture.png')",
    "report": "from repfx.pages.model_page import write_model_page\nwrite_model_page(model, 'page.html', x, name='tiny')",
    "cli": f"main(['inspect', {TINY!r}])",
    "train": f"main(['train', '--model', {TINY!r}, '--image-size', '8', '--epochs', '1', '--out', 'run'])",
    "hub": "import repfx.hub\nfrom repfx.hub.repository import _hub\n_hub().HfApi(endpoint='http://127.0.0.1:9')",
    "qat": "from repfx.qat.file import export_int8\nfrom repfx.qat.rounded import rounded\nexport_int8(rounded(model, x), 'int8.onnx', x)",
    "lightning": "from repfx.integrations.lightning import RepFXCallback\nRepFXCallback(repfx.schedules.DyRep())",
}
FOR_CONTRIBUTORS = {"docs", "dev", "tools", "zoo"}
OF_THE_TOOLS = {"datasets"}  # which `tests/tools` runs


def installed(*requirements: str) -> dict[str, metadata.Distribution]:
    """Distributions, by name, that pip would install for these requirements, as far as they are installed here."""
    found: dict[str, metadata.Distribution] = {}
    pending = [Requirement(text) for text in requirements]
    seen = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        if name == "repfx":
            pending += [Requirement(text) for extra in requirement.extras for text in EXTRAS[extra]]
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another system, or not needed by this build of torch
            continue
        for text in found[name].requires or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                pending.append(needed)
    return found


def run_with(extra: str, program: str, folder: Path, without: Container[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a program in an environment that has only torch and the packages of one extra."""
    site = folder / "site"
    site.mkdir()
    asked = [*PYPROJECT["project"]["dependencies"], *([f"repfx[{extra}]"] if extra else [])]
    for distribution in (found for name, found in installed(*asked).items() if name not in without):
        for name in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(distribution.locate_file(name))))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-S", "-W", "ignore", "-c", PREPARED + program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def refusal(use: str) -> str:
    """A program that runs a use that must be refused and prints the error."""
    return f"""
try:
    {use}
    print("no refusal")
except repfx.errors.RepfxError as error:
    print(error)
"""


@pytest.mark.slow
def test_torch_alone_is_enough_and_each_further_verb_names_its_extra(tmp_path: Path) -> None:
    uses = [*(USES[extra].splitlines()[0] for extra in ("checkpoint", "onnx", "plot")), "repfx.load('x', plain)"]
    ended = run_with("", "".join([WITH_TORCH_ALONE, *map(refusal, uses), USES["cli"]]), tmp_path)
    assert ended.returncode == 2, ended.stderr
    said = [*ended.stdout.splitlines(), *ended.stderr.splitlines()]
    for extra, line in zip(("checkpoint", "onnx", "plot", "checkpoint", "cli"), said, strict=True):
        assert f"pip install 'repfx[{extra}]'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


@pytest.mark.slow
@pytest.mark.parametrize("extra", USES)
def test_an_extra_is_enough_for_what_it_is_for(extra: str, tmp_path: Path) -> None:
    ended = run_with(extra, USES[extra], tmp_path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow_one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize(("extra", "package"), [("checkpoint", "numpy"), ("onnx", "onnxscript"), ("onnx", "onnx")])
def test_half_an_extra_is_refused_by_its_name(extra: str, package: str, tmp_path: Path) -> None:
    ended = run_with(extra, refusal(USES[extra].splitlines()[0]), tmp_path, without=[package])
    assert ended.returncode == 0, ended.stderr
    assert package in ended.stdout
    assert f"pip install 'repfx[{extra}]'" in ended.stdout


def test_no_extra_is_left_untested() -> None:
    assert set(EXTRAS) == {*USES, *FOR_CONTRIBUTORS, *OF_THE_TOOLS}
