"""Plug-ins: packages that register by entry points, and files that the command line is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

import repfx
from repfx.blocks.branch import KINDS
from repfx.blocks.presets import PRESETS
from repfx.change.schedule import SCHEDULES
from repfx.cli import main
from repfx.commands import app
from repfx.errors import InvalidInput, UnknownName
from repfx.records import registry
from repfx.records.python_code import import_source
from repfx.records.registry import Registry
from repfx.rewriting.rule import PASSES, RULES
from repfx.training.experiment import Experiment
from repfx.training.experiment import run as run_experiment

ROOT = Path(__file__).resolve().parents[2]

BRANCH = '''
from torch import Tensor
from repfx.extend import Branch, ConvSpec, Norm, Preset, PRESETS, Spec, Stages, conv_stages

class Doubled(Branch):
    """A second k×k conv."""
    kind = "doubled"

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor) -> Stages:
        yield from conv_stages("conv", site, like)
        yield from norm.last(site.out_channels, site.dimensions, like)

PRESETS["twice"] = Preset("twice", "a second conv", Spec(["doubled"]))
'''
PASS = '''
from torch import nn
from repfx.extend import Report, Rule, Sequence, copy_of, is_convolution, no_dearer, unmutated, used_once, verb

RULE = Rule(
    "absorb_padding_behind",
    "Let a conv without bias do the zero padding that stands after it",
    Sequence(first=frozenset({"conv"}), second=frozenset({"pad"})),
    (used_once, is_convolution, unmutated, no_dearer),
)

@verb
def nothing(model: nn.Module) -> nn.Module:
    """Do nothing to a model."""
    return copy_of(model)
'''
SCHEDULE = '''
from collections.abc import Sequence
from dataclasses import dataclass
from repfx.extend import Action, BranchSpec, Expand, Observation, Schedule

@dataclass(frozen=True)
class Once(Schedule):
    """Grow the first conv once."""
    name = "once"

    def due(self, epoch: int) -> bool:
        return epoch == 0

    def decide(self, seen: Observation) -> Sequence[Action]:
        return [Expand(seen.candidates[0].site, (BranchSpec("1x1"),))]
'''
RECIPE = '# Three words here\nspec = "dbb"\n[model]\nname = "torchvision:resnet18"\n'
PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "small-plugin"
version = "1.0"
[project.entry-points."repfx.branches"]
doubled = "small_plugin.branch"
gone = "small_plugin.that_is_gone"
[project.entry-points."repfx.passes"]
padding = "small_plugin.padding"
[project.entry-points."repfx.schedules"]
once = "small_plugin.schedule"
[project.entry-points."repfx.recipes"]
own = "small_plugin.recipes"
[tool.setuptools]
packages = ["small_plugin", "small_plugin.recipes"]
[tool.setuptools.package-data]
"small_plugin.recipes" = ["*.toml"]
"""
FILES = {
    "pyproject.toml": PYPROJECT,
    "small_plugin/__init__.py": "",
    "small_plugin/branch.py": BRANCH,
    "small_plugin/padding.py": PASS,
    "small_plugin/schedule.py": SCHEDULE,
    "small_plugin/recipes/__init__.py": "",
    "small_plugin/recipes/mine.toml": RECIPE,
}
BROKEN = (
    "repfx leaves out the plug-in 'gone' of package 'small-plugin' (repfx.branches), which can't be loaded: "
    "ModuleNotFoundError: No module named 'small_plugin.that_is_gone'."
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small package with plug-ins is installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, text in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, capture_output=True)
    return target


def run(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the package is installed, in a folder that isn't the checkout."""
    paths = os.pathsep.join([str(installed), str(ROOT)])
    return subprocess.run(
        [sys.executable, *command],
        cwd=installed,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )


USE = """
import sys, warnings
import repfx, torch
from torch import nn
assert not [name for name in sys.modules if name.startswith("small_plugin")], "import repfx loads nobody's code"
x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ZeroPad2d(1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).double()
expanded = repfx.expand(model, {"3": ["doubled"]}, preserve=False)
assert list(expanded[3].branches) == ["doubled"]
assert list(repfx.expand(model, {"3": "twice"})[3].branches) == ["doubled"]
fused = repfx.fuse(expanded)
assert repfx.report(fused).counts["absorb_padding_behind"] == 1
repfx.check_equivalent(expanded, fused, x)
from repfx.extend import SCHEDULES
driver = repfx.Driver(nn.Sequential(nn.Conv2d(8, 8, 3)), torch.optim.SGD([torch.zeros(1)], 0.1), SCHEDULES["once"]())
print(*(action.kind for _, action in driver.history))
"""


@pytest.mark.slow
def test_an_installed_package_adds_kinds_rules_and_schedules(installed: Path) -> None:
    found = run(installed, "-W", "always", "-c", USE)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["expand"]
    assert found.stderr.count(BROKEN) == 1  # once, and nothing else is lost


LISTS = """
import json
from contextlib import redirect_stdout
from io import StringIO
from repfx.commands import app
from repfx.training.recipe_file import read_recipe
found = {"spec": read_recipe("mine")["spec"]}
for what in ("branches", "presets", "passes", "schedules", "recipes"):
    with redirect_stdout(StringIO()) as out:
        app(["list", what, "--json"], standalone_mode=False)
    found[what] = [row["name"] for row in json.loads(out.getvalue())]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_command_line_lists_what_an_installed_package_adds(installed: Path) -> None:
    done = run(installed, "-c", LISTS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "doubled" in found["branches"]
    assert "twice" in found["presets"]
    assert {"absorb_padding_behind", "nothing"} <= {*found["passes"]}
    assert "once" in found["schedules"]
    assert "mine" in found["recipes"]
    assert found["spec"] == "dbb"


# --- Registries -----------------------------------------------------------------------------------------------------


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """Entry points of a made-up group, which may be added to."""
    found: list[EntryPoint] = []
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registry, "entry_points", lambda group: [each for each in found if each.group == group])
    return found


def test_known_names_load_nothing_and_unknown_ones_load_once(
    points: list[EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    monkeypatch.setattr(EntryPoint, "load", lambda point: loads.append(point.name))
    points.append(EntryPoint("late", "nowhere", "group"))
    names: Registry[int] = Registry("group")
    names["one"] = 1
    assert names["one"] == 1
    assert "one" in names
    assert not loads
    assert "two" not in names
    with pytest.raises(KeyError):
        names["two"]
    assert (list(names), len(names), dict(names.items())) == (["one"], 1, {"one": 1})
    assert loads == ["late"]


def test_what_is_being_loaded_may_register_and_ask(points: list[EntryPoint], monkeypatch: pytest.MonkeyPatch) -> None:
    names: Registry[int] = Registry("group")

    def load(point: EntryPoint) -> None:
        assert "two" not in names
        names["two"] = 2

    monkeypatch.setattr(EntryPoint, "load", load)
    points.append(EntryPoint("late", "nowhere", "group"))
    assert names["two"] == 2


@pytest.mark.parametrize("error", [ImportError("no such thing\nat all"), SystemExit(0), InvalidInput("kind is taken.")])
def test_a_broken_plug_in_is_named_in_one_sentence_and_stops_nothing(
    points: list[EntryPoint], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    names: Registry[int] = Registry("group")

    def load(point: EntryPoint) -> None:
        if point.name == "broken":
            raise error
        names["two"] = 2

    monkeypatch.setattr(EntryPoint, "load", load)
    points += [EntryPoint("broken", "nowhere", "group"), EntryPoint("late", "nowhere", "group")]
    with pytest.warns(UserWarning, match=r"leaves out the plug-in 'broken' of an installed package \(group\)") as told:
        assert names["two"] == 2
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert str(told[0].message).endswith(".")


@pytest.mark.parametrize("names", [KINDS, PASSES, RULES, SCHEDULES], ids=["branches", "passes", "rules", "schedules"])
def test_the_registries_ask_installed_packages(names: Registry[Any]) -> None:
    assert names.group in ("repfx.branches", "repfx.passes", "repfx.schedules")
    assert names.known.keys() == {*names}  # nothing is installed here


# --- Files ----------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> str:
    """Write code to a file and give its path as text."""
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_a_file_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "counted.py", "import torch\ntorch.times_run = getattr(torch, 'times_run', 0) + 1\n")
    monkeypatch.setattr(torch, "times_run", 0, raising=False)
    monkeypatch.chdir(tmp_path)
    modules = {import_source(name) for name in (source, "counted.py", "./counted.py")}
    assert len(modules) == 1
    assert vars(torch)["times_run"] == 1


def test_a_file_that_failed_can_be_tried_again(tmp_path: Path) -> None:
    source = write(tmp_path / "failing.py", "raise ValueError('not yet')")
    with pytest.raises(InvalidInput, match=r"importing .* failed: ValueError: not yet\."):
        import_source(source)
    write(tmp_path / "failing.py", "value = 1")
    assert import_source(source).value == 1


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("no/such/file.py", "no file 'no/such/file.py'"),
        ("no_such_package_at_all", "importing 'no_such_package_at_all' failed"),
    ],
)
def test_what_is_not_there_is_named(source: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        import_source(source)


def command_line(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, "-m", "repfx", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def as_before() -> Iterator[None]:
    """The registries are what they were once a test is over."""
    registries: list[Registry[Any]] = [KINDS, PASSES, RULES, SCHEDULES, PRESETS]
    before = [(names, dict(names.known)) for names in registries]
    yield
    for names, known in before:
        names.data = known


def answers(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """Run a command in this process; gives the exit code, and what it printed on stdout and stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code, *capsys.readouterr()


@pytest.mark.usefixtures("as_before")
def test_each_command_takes_plug_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("branch.py", BRANCH), ("padding.py", PASS), ("net.py", NET)):
        write(tmp_path / name, text)
    monkeypatch.chdir(tmp_path)
    code, _, told = answers(capsys, "inspect", "net.py:net", "--spec", "twice")
    assert code == 2
    assert "no preset 'twice'" in told
    code, listed, _ = answers(capsys, "list", "branches", "--plugin", "branch.py", "--plugin", "padding.py")
    assert code == 0
    assert "doubled" in listed
    assert "absorb_padding_behind" in RULES
    code, shown, _ = answers(capsys, "inspect", "net.py:net", "--spec", "twice", "--plugin", "branch.py")
    assert code == 0
    assert "would get doubled" in shown
    code, _, told = answers(capsys, "list", "branches", "--plugin", "nowhere.py")
    assert (code, told) == (2, "repfx: no file 'nowhere.py' to import.\n")
    group: Any = typer.main.get_command(app)
    assert all(
        "--plugin" in {name for each in command.params for name in each.opts} for command in group.commands.values()
    )


NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""


@pytest.mark.slow
def test_a_schedule_comes_from_a_file(tmp_path: Path) -> None:
    for name, text in (("schedule.py", SCHEDULE), ("net.py", NET)):
        write(tmp_path / name, text)
    train = (
        "train",
        "--model",
        "net.py:net",
        "--schedule",
        "schedule.py:Once",
        "--epochs",
        "1",
        "--json",
        "--out",
        "run",
    )
    found = command_line(*train, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    begun = json.loads((tmp_path / "run" / "history.json").read_text())["epochs"][0]
    assert [action["action"] for action in begun["actions"]] == ["expand"]
    assert f"{tmp_path / 'schedule.py'}:Once" in (tmp_path / "run" / "recipe.toml").read_text()
    resumed = command_line("train", "--resume", "--trust", "--out", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr


def test_what_is_no_schedule_is_named(tmp_path: Path) -> None:
    options = {"name": f"{write(tmp_path / 'net.py', NET)}:net"}
    with pytest.raises(
        InvalidInput, match=r"net\.py:net' is no schedule: it must be a subclass of repfx\.Schedule that sets"
    ):
        run_experiment(Experiment(schedule=options, out=tmp_path / "run"))


def test_verbs_can_be_called_as_messages_name_them() -> None:
    passes: Any = repfx.passes
    model = repfx.expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb")
    passes.ungate(passes.gate(model, "0"), "0")
    passes.freeze(passes.recompute(model), "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passes.calibrate(model, [torch.randn(4, 8, 7, 5)])
    assert [action.kind for action in repfx.journal(model)] == ["expand", "gate", "ungate", "freeze", "calibrate"]
    with pytest.raises(UnknownName):
        passes.gate(model, "1")
