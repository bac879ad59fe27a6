"""Scripts that complete the command line, run by the shells themselves where these are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from repfx.blocks.presets import PRESETS
from repfx.change.schedule import SCHEDULES
from repfx.cli import main
from repfx.commands import names, shells
from repfx.commands.completion import commands_of_app
from repfx.commands.shells import Command, Option, Values
from repfx.training.named_recipes import shipped_recipes
from repfx.training.recipe import KEPT

MODELS = Values(("torchvision:resnet18", "torchvision:resnet50", "timm:resnet18"), files=True)
KEYS = Values(("training.epochs=", "training.clip="))
COMMANDS = (
    Command(
        "train",
        "Train a model [it's long].",
        (
            Option(("--model", "-m"), "The model: torchvision's", MODELS),
            Option(("--set",), "Set a key", KEYS),
            Option(("--keep",), "What to keep", Values(("last", "best"))),
            Option(("--epochs", "-e"), "Number of passes", Values()),
            Option(("--resume",), "Go on"),
        ),
    ),
    Command("recipe", "Show a recipe.", (), (Values(("show", "schema")), Values(("mine", "yours"), files=True))),
    Command("predict", "Say what images show.", (), (Values(("first",)), Values(("image",))), repeats=True),
)
CASES = {
    "repfx tr": ["train"],
    "repfx ": ["predict", "recipe", "train"],
    "repfx train --mo": ["--model"],
    "repfx train --model torchvision:r": ["torchvision:resnet18", "torchvision:resnet50"],
    "repfx train -m timm:": ["timm:resnet18"],
    "repfx train --keep=b": ["best"],
    "repfx train --resume --keep ": ["best", "last"],
    "repfx train --epochs 3 --set training.e": ["training.epochs="],
    "repfx recipe s": ["schema", "show"],
    "repfx recipe show m": ["mine"],
    "repfx predict f": ["first"],
    "repfx predict first im": ["image"],
    "repfx predict first one two im": ["image"],
}
SCRIPTS: dict[str, Callable[..., str]] = {"bash": shells.bash, "zsh": shells.zsh, "fish": shells.fish}


def asked_of_bash(line: str, script: str, breaks: str = " \t\n:=") -> list[str]:
    """Return the words that bash would offer, each as it replaces what follows the last sign that breaks words."""
    ask = f"{script}\ncompopt() {{ :; }}\nCOMP_WORDBREAKS=$2 COMP_LINE=$1 COMP_POINT=${{#1}}\n_repfx\n"
    ask += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", ask, "bash", line, breaks], capture_output=True, text=True, check=True)
    assert not done.stderr
    return sorted(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash isn't installed")
@pytest.mark.parametrize("line", CASES)
def test_bash_offers_what_fits(line: str) -> None:
    tail = [each.rpartition(":")[2] if ":" in line else each for each in CASES[line]]
    assert asked_of_bash(line, shells.bash(COMMANDS)) == tail


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash isn't installed")
def test_bash_replaces_whole_words_where_colons_dont_break_them() -> None:
    assert asked_of_bash("repfx train -m timm:", shells.bash(COMMANDS), " \t\n=") == ["timm:resnet18"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish isn't installed")
@pytest.mark.parametrize("line", CASES)
def test_fish_offers_what_fits(line: str) -> None:
    ask = f"{shells.fish(COMMANDS)}\ncomplete -C $argv[1]"
    done = subprocess.run(
        ["fish", "--no-config", "-c", ask, line], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    offered = {each.partition("\t")[0] for each in done.stdout.splitlines()}
    assert {each.rpartition("=")[2] if "--keep=" in line else each for each in offered} >= set(CASES[line])


@pytest.mark.parametrize("shell", ["zsh", "fish", "bash"])
def test_a_shell_can_parse_its_script(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} isn't installed")
    script = tmp_path / "script"
    script.write_text(SCRIPTS[shell](COMMANDS))
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_script_holds_all_words(shell: str) -> None:
    text = SCRIPTS[shell](COMMANDS)
    values = [option.values for command in COMMANDS for option in command.options if option.values is not None]
    values += [each for command in COMMANDS for each in command.arguments]
    options = [name for command in COMMANDS for option in command.options for name in option.names]
    words = {*(command.name for command in COMMANDS), *(name for each in values for name in each.names)}
    words |= {name.lstrip("-") if shell == "fish" else name for name in options}
    assert not {word for word in words if word not in text}


def test_the_app_tells_its_names_and_where_files_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it weren't installed; its list takes a second
    found = {command.name: command for command in commands_of_app()}
    train = {name: option.values for option in found["train"].options for name in option.names}
    assert train["--schedule"] == Values(tuple(SCHEDULES), files=True)
    assert train["--recipe"] == Values(tuple(shipped_recipes()), files=True)
    assert train["--keep"] == Values(KEPT)
    assert train["--out"] == Values(files=True)
    assert train["--epochs"] == Values()
    assert train["--resume"] is None
    assert {"training.epochs=", "training.augmentation.cutout=", "spec="} < set((train["--set"] or Values()).names)
    assert "out=" not in (train["--set"] or Values()).names
    assert set(PRESETS) < set((train["--spec"] or Values()).names)
    assert {"digits", "CIFAR10"} < set((train["--data"] or Values()).names)
    (model,) = found["fuse"].arguments
    assert "torchvision:resnet18" in model.names
    assert not any(name.startswith("timm:") for name in model.names)
    assert "recipes" in found["list"].arguments[0].names
    assert found["report"].repeats


def test_models_of_timm_are_among_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(list_models=lambda: ["repvgg_a0"]))
    assert {"timm:repvgg_a0", "torchvision:resnet18", names.FILES} < set(names.model_names())


def test_the_command_prints_a_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "zsh"])
    assert not stopped.value.code
    assert capsys.readouterr().out.startswith("#compdef repfx\n")
