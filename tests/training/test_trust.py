"""Files name models and schedules. Without trust, no code runs that isn't torchvision's, timm's, repfx's or in this process already."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import repfx
from repfx.change.schedule import SCHEDULES
from repfx.cli import main
from repfx.data.dataset import DataSource, InputForm
from repfx.data.load import load_data
from repfx.errors import InvalidInput
from repfx.onnx.preprocessing import Preprocessing
from repfx.pages.run_page import write_run_page
from repfx.records.pickled_file import load_pickled
from repfx.records.python_code import import_source
from repfx.training.models import ModelReference
from repfx.training.recipe import Recipe
from repfx.training.recipe_file import read_recipe
from repfx.training.run_folder import CHECKPOINT, STRUCTURE, RunFolder, Setup
from repfx.training.trust import require_trusted

CODE = """
from pathlib import Path
from torch import nn
import repfx

Path(__file__).with_suffix(".ran").touch()

class Net(nn.Sequential):
    def __init__(self, num_classes=3, width=4):
        layers = [nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(width, num_classes))

def net(num_classes=3):
    return Net(num_classes)

class Never(repfx.Schedule):
    name = "never"
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of code that nobody has imported; the schedule in it is forgotten afterwards."""
    monkeypatch.setattr(SCHEDULES, "data", dict(SCHEDULES.known))
    path = tmp_path / "foreign.py"
    path.write_text(CODE)
    return path


def has_run(code: Path) -> bool:
    return code.with_suffix(".ran").exists()


HARMLESS: list[tuple[str, dict[str, Any]]] = [
    ("torchvision:resnet18", {}),
    ("timm:repvgg_a0", {}),
    ("repfx.recipes.nets:vgg16", {}),
    ("torch.nn:Conv2d", {"in_channels": 1}),
    ("torch.nn.modules.container:Sequential", {}),
    ("resnet18", {}),
]
HARMFUL: list[tuple[str, dict[str, Any]]] = [
    ("subprocess:check_output", {"args": ["touch", "proof"]}),
    ("os:system", {"command": "touch proof"}),
    ("builtins:exec", {"source": "1"}),
    ("builtins:eval", {}),
    ("torch:load", {"f": "x.pt", "weights_only": False}),
    ("torch.hub:load", {"repo_or_dir": "a/b"}),
    ("torch.nn:Module.apply", {}),
    ("importlib:import_module", {"package": "this"}),
    ("this:anything", {}),
    ("repfx.recipes.nets:OrderedDict", {}),
    ("repfx.records.python_code:import_source", {"source": "this"}),
    ("timm:repvgg_a0", {"checkpoint_path": "x.pth"}),
    ("timm:repvgg_a0", {"pretrained_cfg_overlay": {"file": "x.pth"}}),
    ("torchvision.models:resnet18", {}),
    ("nowhere.py:net", {}),
    ("torch.nn.functional:conv2d", {}),
    ("pathlib:Path", {}),
]


@pytest.mark.parametrize(("name", "options"), HARMLESS, ids=[name for name, _ in HARMLESS])
def test_a_file_may_name_what_can_only_build_a_model(name: str, options: dict[str, Any]) -> None:
    require_trusted({"model": {"name": name, "options": options}}, "it", trust=False)


@pytest.mark.parametrize(("name", "options"), HARMFUL, ids=[f"{name} {len(options)}" for name, options in HARMFUL])
def test_a_file_may_name_nothing_else_and_the_message_shows_the_call(name: str, options: dict[str, Any]) -> None:
    before = set(sys.modules)
    places = {"model": {"model": {"name": name, "num_classes": None, "options": options}}}
    places["teacher"] = {"training": {"distillation": {"teacher": {"name": name, "options": options}}}}
    places["schedule"] = {"schedule": {"name": name, **options}}
    for place, values in places.items():
        if place == "schedule" and name.startswith("timm:"):
            continue
        with pytest.raises(InvalidInput) as error:
            require_trusted(values, "'run.toml'", trust=False)
        message = str(error.value)
        assert message.startswith(f"'run.toml' would call {name!r} with ")
        assert all(f"{key}={value!r}" in message for key, value in options.items())
        assert "--trust" in message
        require_trusted(values, "it", trust=True)
        require_trusted(values, "it", trust=[name])
    assert "this" not in set(sys.modules) - before


def test_a_long_call_is_shown_on_one_line() -> None:
    values = {"model": {"name": "os:system", "options": {"command": "echo \n\x1b[2J" + "x" * 9999}}}
    with pytest.raises(InvalidInput) as error:
        require_trusted(values, "it", trust=False)
    assert len(str(error.value)) < 800
    assert str(error.value).isprintable()


def run_folder(path: Path, name: str, **options: Any) -> RunFolder:
    """The folder of a finished run of the net in `CODE`, whose structure.json names something."""
    path.mkdir()
    setup = Setup(ModelReference(name, 3, options), "dbb", None, Preprocessing((1, 6, 5), (0.5,), (0.25,)))
    (path / STRUCTURE).write_text(setup.to_json())
    width = options.get("width", 4)
    layers = [nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]
    repfx.save(path / CHECKPOINT, nn.Sequential(*layers), random_state=False)
    return RunFolder(path)


@pytest.mark.parametrize("what", ["Net", "net"])
def test_a_run_folder_is_loaded_once_it_is_trusted(what: str, code: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", f"{code}:{what}")
    with pytest.raises(InvalidInput, match=rf"structure\.json' would call .*foreign\.py:{what}' with num_classes=3"):
        folder.load()
    assert not has_run(code)
    page = write_run_page(folder)
    assert not has_run(code)
    assert "would call" in page.read_text()
    assert isinstance(folder.load(trust=True), nn.Sequential)
    assert isinstance(folder.load(trust=[f"{code}:{what}"]), nn.Sequential)
    if what == "Net":  # a class of nn.Module, in this process by now
        assert isinstance(folder.load(), nn.Sequential)
    else:
        with pytest.raises(InvalidInput, match="would call"):
            folder.load()


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0), capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["fuse", "inspect", "inspect --fused"])
def test_commands_take_a_folder_that_is_trusted(
    verb: str, code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", f"{code}:net").path
    name, *options = verb.split()
    arguments = [name, folder, *options, *(["--onnx", tmp_path / "net.onnx"] if name == "fuse" else [])]
    status, told = command(capsys, *arguments)
    assert status == 2
    assert "would call" in told
    assert "--trust" in told
    assert not has_run(code)
    assert not (tmp_path / "net.onnx").exists()
    assert command(capsys, *arguments, "--trust") == (0, "")


SHORT = ("--epochs", 1, "--image-size", 8, "--json")


def recipe(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.slow
def test_a_recipe_calls_what_the_user_names_or_trusts(
    code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = recipe(tmp_path / "own.toml", '[model]\nname = "foreign.py:net"\noptions = {}')
    status, told = command(capsys, "train", "--recipe", file, "--out", tmp_path / "run", *SHORT)
    assert status == 2
    assert "or name it yourself with --model" in told
    assert not has_run(code)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InvalidInput, match="would call"):
        read_recipe(file)
    assert read_recipe(file, trust=True)["model"]["name"] == f"{code}:net"
    named = ("train", "--recipe", file, "--model", "foreign.py:net", "--out", tmp_path / "run", *SHORT)
    assert command(capsys, *named) == (0, "")
    # ---- and so is its resuming
    resume = ("train", "--resume", "--out", tmp_path / "run", "--json")
    status, told = command(capsys, *resume)
    assert status == 2
    assert "would call" in told
    assert command(capsys, *resume, "--trust") == (0, "")
    assert command(capsys, *resume, "--model", "foreign.py:net") == (0, "")


@pytest.mark.parametrize("key", ["schedule", "teacher"])
def test_a_schedule_and_a_teacher_are_code_too(
    key: str, code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"schedule": f'[schedule]\nname = "{code}:Never"', "teacher": "[training.distillation]\nweights = 'w.pt'\n"}
    texts["teacher"] += f'[training.distillation.teacher]\nname = "{code}:net"'
    file = recipe(tmp_path / "own.toml", texts[key])
    status, told = command(capsys, "train", "--recipe", file, "--out", tmp_path / "run", *SHORT)
    assert status == 2
    assert "would call" in told
    assert not has_run(code)


# ---- what a user's own code may do to the process

ENDS = {
    "exit": "import sys\nsys.exit(0)",
    "exit in the call": "import sys\ndef net():\n    sys.exit(0)",
    "own": "class Stop(BaseException):\n    pass\nraise Stop('no\\nfurther')",
    "own in the call": "class Stop(BaseException):\n    pass\ndef net():\n    raise Stop('no')",
    "generator": "raise GeneratorExit",
    "exit in forward": """
import sys
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
    def forward(self, x):
        sys.exit(0)
net = Net
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_model_file_can_t_end_a_command_in_silence(
    end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path / "net.py", ENDS[end])
    status, told = command(capsys, "fuse", f"{file}:net", "--onnx", tmp_path / "net.onnx", "--input-shape", "1x6x5")
    assert status == 2
    assert told.startswith("repfx: ")
    assert told.count("\n") == 1


def test_ctrl_c_in_a_model_file_is_still_ctrl_c(tmp_path: Path) -> None:
    file = recipe(tmp_path / "net.py", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        import_source(str(file))


# ---- other files


def test_torch_s_advice_to_unpickle_reaches_nobody(tmp_path: Path) -> None:
    files: dict[str, Any] = {"module": nn.Linear(2, 2), "inside": {"a": nn.ReLU()}, "set": {1, 2}, "path": Path()}
    for name, value in files.items():
        torch.save(value, tmp_path / name)
    for name, content in {
        "empty": b"",
        "text": b"weights",
        "zip": b"PK\x03\x04" + b"\0" * 40,
        "pickle": b"\x80\x02}q\0.",
    }.items():
        (tmp_path / name).write_bytes(content)
    told = []
    for path in sorted(tmp_path.iterdir()):
        try:
            load_pickled(path)
        except InvalidInput as error:
            told.append((path.name, str(error), str(error.__cause__)))
    assert {"empty", "inside", "module", "text", "zip"} <= {name for name, _, _ in told}
    for _, message, cause in told:
        assert "weights_only" not in message + cause
        assert message.endswith(".")
        assert "\n" not in message


RESNET = {"name": "torchvision:resnet18", "num_classes": 3, "options": {}}
PREPROCESSING = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25]}
WHOLE = {"format": 3, "model": RESNET, "spec": "dbb", "schedule": None, "preprocessing": None, "classes": []}
STRUCTURES = {
    "deep": "[" * 99999,
    "a list": "[]",
    "a number": "3",
    "a model of text": json.dumps({**WHOLE, "model": "x"}),
    "a name of none": json.dumps({**WHOLE, "model": {**RESNET, "name": None}}),
    "classes of text": json.dumps({**WHOLE, "model": {**RESNET, "num_classes": "3"}}),
    "options of a list": json.dumps({**WHOLE, "model": {**RESNET, "options": []}}),
    "a schedule of text": json.dumps({**WHOLE, "schedule": "dyrep"}),
    "preprocessing of a list": json.dumps({**WHOLE, "preprocessing": []}),
    "a huge shape": json.dumps({**WHOLE, "preprocessing": {**PREPROCESSING, "shape": [1, 2**40]}}),
    "a shape of text": json.dumps({**WHOLE, "preprocessing": {**PREPROCESSING, "shape": "3x8x8"}}),
    "no mean": json.dumps({**WHOLE, "preprocessing": {**PREPROCESSING, "mean": []}}),
    "classes of numbers": json.dumps({**WHOLE, "classes": [1, 2]}),
}


@pytest.mark.parametrize("text", STRUCTURES.values(), ids=STRUCTURES)
def test_a_forged_structure_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / STRUCTURE).write_text(text)
    with pytest.raises(InvalidInput, match=r"is no structure that `repfx train` wrote.*\.$"):
        RunFolder(tmp_path).load(trust=True)


def test_a_recipe_nested_too_deep_is_one_error(tmp_path: Path) -> None:
    for depth in (200, 99999):
        with pytest.raises(InvalidInput, match=r"own\.toml' is no .*nested too deep\.$"):
            read_recipe(recipe(tmp_path / "own.toml", "spec = " + "[" * depth + "]" * depth))


@pytest.mark.parametrize("seed", [-1, 2**63, 2**65, 10**400])
def test_seeds_that_no_generator_takes_are_refused(seed: int) -> None:
    with pytest.raises(InvalidInput, match=r"seed is .*; it must be at"):
        Recipe(seed=seed)


X, Y = numpy.random.default_rng(0).random((6, 5, 4), numpy.float32), numpy.arange(6) % 2
GREATEST = numpy.full(6, 2**64 - 1, numpy.uint64)
ARRAYS: dict[str, tuple[Any, Any, str]] = {
    "complex": (X.astype(numpy.complex64), Y, "holds complex64; images must be real numbers"),
    "dates": (X.astype("datetime64[s]"), Y, "images must be real numbers"),
    "text": (X.astype(str), Y, "images must be real numbers"),
    "huge label": (X, Y * 2**40, "has the class 1099511627776"),
    "huge unsigned label": (X, GREATEST, "has the class 18446744073709551615"),
    "65536 classes": (X, Y * 2**16, "has the class 65536"),
    "complex labels": (X, Y * 1j, "must hold the classes as whole numbers"),
    "negative label": (X, -Y, "must hold the classes as whole numbers"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_are_no_images_or_classes_are_refused(case: str, tmp_path: Path) -> None:
    x, y, message = ARRAYS[case]
    numpy.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=X, y_test=abs(Y))
    with pytest.raises(InvalidInput, match=message):
        load_data(DataSource(str(tmp_path / "data.npz")), InputForm(1, 2))


def test_arrays_that_are_cut_off_or_garbled_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    numpy.savez_compressed(path, x_train=X, y_train=Y, x_test=X, y_test=Y)
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]):
            path.write_bytes(content)
            with suppress(InvalidInput):  # and nothing else
                load_data(DataSource(str(path)), InputForm(1, 2))
