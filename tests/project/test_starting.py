"""`import repfx` starts without torch, and so does whatever the command line says without a model."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import repfx
from repfx.cli import main
from repfx.records.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "onnx", "torchvision")
REPORT = f"print('loaded:', *[name for name in {HEAVY} if name in sys.modules])"


def loaded_by(code: str) -> str:
    """Run code in a process of its own, and give the heavy packages that it has loaded by its end."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.rpartition("loaded:")[2].strip()


def test_what_is_loaded_is_seen() -> None:
    assert loaded_by(f"import sys, types; sys.modules['onnx'] = types.ModuleType('onnx')\n{REPORT}") == "onnx"


def test_import_repfx_loads_no_torch() -> None:
    assert loaded_by(f"import sys, repfx; repfx.errors, repfx.__version__\n{REPORT}") == ""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["list", "recipes"], ["list", "recipes", "--json"], ["list", "--help"]]
)
def test_a_command_that_needs_no_model_loads_no_torch(arguments: list[str]) -> None:
    code = f"import sys\nfrom repfx.cli import main\ntry:\n    main({arguments})\nexcept SystemExit as end:\n    assert not end.code\n"
    assert loaded_by(code + REPORT) == ""


def test_the_list_of_commands_says_of_each_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out.split("Commands:\n")[1].splitlines()
    assert "  list        List branch kinds, presets, passes, schedules and recipes." in listed
    assert len(listed) == len(
        [path for path in (ROOT / "repfx" / "commands").glob("*.py") if "@command(" in path.read_text()]
    )


def test_a_misspelt_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "no such command 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def imports_of_type_checkers() -> dict[str, str]:
    """The names that `repfx/__init__.py` imports for programs that read code, each with its module."""
    tree = ast.parse(inspect.getsource(repfx))
    (guarded, *_) = [node for node in tree.body if isinstance(node, ast.If)]
    found = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    return {
        alias.name: f"repfx.{alias.name}" if node.module == "repfx" else str(node.module)
        for node in found
        for alias in node.names
    }


def test_programs_that_read_code_see_the_names_that_there_are() -> None:
    assert imports_of_type_checkers() == repfx._MODULES


@pytest.mark.parametrize("name", repfx.__all__)
def test_each_name_is_what_its_module_has(name: str) -> None:
    found = getattr(repfx, name)
    assert name in dir(repfx)
    assert getattr(found, "__name__", name).rpartition(".")[2] == name


def test_all_names_can_be_imported_at_once_and_others_are_refused() -> None:
    names: dict[str, object] = {}
    exec("from repfx import *", names)
    assert {*repfx.__all__} <= names.keys()
    assert repfx.__version__ == VERSION
    with pytest.raises(AttributeError, match="module 'repfx' has no attribute 'exapnd'"):
        getattr(repfx, "exapnd")  # noqa: B009


REGISTERED_FIRST = """
from repfx.extend import {base}, {registry}
try:
    {code}
except Exception as error:
    print(error)
print({registry}.keys() > {{"{own}"}}, list({registry})[-1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("registry", "base", "code", "own", "said"),
    [
        ("KINDS", "Branch", "type('Mine', (Branch,), {'kind': '1x1'})", "1x1", "needs another `kind`: '1x1' is taken"),
        ("KINDS", "Branch", "type('Mine', (Branch,), {'kind': 'mine'})", "1x1", "True mine"),
        ("SCHEDULES", "Schedule", "type('Mine', (Schedule,), {'name': 'mine'})", "dyrep", "True mine"),
    ],
)
def test_what_repfx_brings_is_registered_before_a_plug_in(
    registry: str, base: str, code: str, own: str, said: str
) -> None:
    program = REGISTERED_FIRST.format(registry=registry, base=base, code=code, own=own)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said in done.stdout


FUSED = """
import sys, torch, repfx
from torch import nn
layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
for spec in ("repvgg", "acb", "dbb", "dyrep", "mobileone"):
    fused = repfx.fuse(repfx.expand(model, spec))
    assert not [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
repfx.fuse(repfx.restore(fused))
print("compiler:", "torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_expanding_and_fusing_load_no_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", FUSED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["compiler:", "False"]
