"""The command line as a user meets it: the files it leaves, what it prints and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch

import repfx
from repfx.blocks.branch import KINDS
from repfx.blocks.presets import PRESETS
from repfx.change.schedule import SCHEDULES
from repfx.cli import main
from repfx.commands.output import listing
from repfx.data.dataset import DataSource, InputForm
from repfx.data.load import load_data
from repfx.errors import ExportError
from repfx.records.journal import ACTIONS
from repfx.rewriting.rule import PASSES
from repfx.search.base import Search
from repfx.testing import relative_error
from repfx.training import experiment
from repfx.training.named_recipes import shipped_recipes
from repfx.training.run_folder import (
    ARCHITECTURE,
    CHECKPOINT,
    EVALUATION,
    HEAT_MAP,
    HISTORY,
    METRICS,
    MODEL,
    RECIPE,
    REPORT,
    STATE,
    STRUCTURE,
    RunFolder,
)
from tests.tiny import net

TINY = f"{Path(__file__).parents[1] / 'tiny.py'}:net"
TRAIN = ["train", "--model", TINY, "--image-size", "8", "--epochs", "2", "--learning-rate", "0.02"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the main job on the real digits, with a tiny net."""
    out = tmp_path_factory.mktemp("runs") / "first"
    with pytest.raises(SystemExit) as stopped:
        main([*TRAIN, "--out", str(out), "--json"])
    assert not stopped.value.code
    return out


# --- train ----------------------------------------------------------------------------------------------------------


def test_train_leaves_its_files_and_nothing_else(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        CHECKPOINT,
        STRUCTURE,
        MODEL,
        METRICS,
        EVALUATION,
        RECIPE,
        HISTORY,
        STATE,
    }


def test_train_learns_and_fusing_changes_no_prediction(finished: Path) -> None:
    metrics = json.loads((finished / METRICS).read_text())
    assert metrics["accuracy"]["expanded"] > 0.8
    assert metrics["accuracy"]["fused"] == metrics["accuracy"]["expanded"] == metrics["accuracy"]["onnxruntime"]
    assert metrics["flips"] == {"fused": 0, "onnxruntime": 0}
    assert 1 > metrics["top5"]["fused"] == metrics["top5"]["onnxruntime"] > metrics["accuracy"]["fused"]
    by_class = json.loads((finished / EVALUATION).read_text())["by_class"]
    assert sum(by_class.values()) / 10 == pytest.approx(metrics["accuracy"]["fused"], abs=0.01)
    assert metrics["losses"][1] < metrics["losses"][0]


def test_train_tells_what_each_form_costs(finished: Path) -> None:
    cost = json.loads((finished / METRICS).read_text())["cost"]
    assert cost["fused"]["macs"] == cost["plain"]["macs"] < cost["expanded"]["macs"]
    assert cost["fused"]["parameters"] < cost["plain"]["parameters"] < cost["expanded"]["parameters"]
    assert all(form["latency"] > 0 for form in cost.values())


def test_the_checkpoint_and_its_structure_give_the_trained_model_again(finished: Path) -> None:
    model = RunFolder(finished).load(trust=True)
    data = load_data(DataSource("digits"), InputForm(1, size=8))
    x = torch.stack([data.test[index][0] for index in range(len(data.test))])  # type: ignore[arg-type]
    y = torch.tensor([int(data.test[index][1]) for index in range(len(data.test))])  # type: ignore[arg-type]
    accuracy = json.loads((finished / METRICS).read_text())["accuracy"]
    assert isinstance(model[0], repfx.RepBlock)  # type: ignore[index]
    assert (model(x).argmax(1) == y).double().mean().item() == accuracy["expanded"]
    session = onnxruntime.InferenceSession(finished / MODEL)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(logits), model(x)) < 1e-5  # float32, another order


@pytest.mark.slow
def test_equal_seeds_leave_equal_weights(finished: Path, tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    assert repfx_command(*TRAIN, "--out", tmp_path / "again").code == 0
    assert (tmp_path / "again" / CHECKPOINT).read_bytes() == (finished / CHECKPOINT).read_bytes()


@pytest.mark.slow
def test_a_run_that_is_there_is_kept_unless_overwriting_is_asked_for(tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / METRICS).write_text("older")
    (tmp_path / "notes.txt").write_text("mine")
    refused = repfx_command(*TRAIN, "--out", tmp_path)
    assert (refused.code, refused.out) == (2, "")
    assert "holds a run already (metrics.json): --overwrite replaces it" in refused.err
    assert (tmp_path / METRICS).read_text() == "older"

    written = repfx_command(*TRAIN, "--out", tmp_path, "--overwrite", "--spec", "1x1,1xk", "--epochs", 1)
    assert written.code == 0
    assert "in onnxruntime" in written.out
    assert re.fullmatch(r"epoch 1: loss .*\n", written.err)  # no progress bar without a terminal
    assert json.loads((tmp_path / METRICS).read_text())["test_images"] == 355
    assert json.loads((tmp_path / STRUCTURE).read_text())["spec"] == "1x1,1xk"
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.slow_one_in(3)
@pytest.mark.parametrize(
    "schedule", [pytest.param(name, marks=[pytest.mark.slow] * (name != "fixed")) for name in SCHEDULES]
)
def test_train_with_a_schedule_tells_each_change_and_verifies_the_end(  # type: ignore[no-untyped-def]
    schedule: str, tmp_path: Path, repfx_command
) -> None:
    out = tmp_path / "out"
    outcome = repfx_command(*TRAIN, "--schedule", schedule, "--spec", "1x1,1xk", "--epochs", 6, "--out", out)
    assert outcome.code == 0, outcome.err
    results = [line for line in outcome.err.splitlines() if re.match(r"epoch \d: loss ", line)]
    assert [line.split(":")[0] for line in results] == [f"epoch {number}" for number in range(1, 7)]
    assert all(
        re.fullmatch(r"epoch \d: loss [\d.]+, accuracy [\d.]+%, learning rate [-\de.]+", line) for line in results
    )
    told = [line for line in outcome.err.splitlines() if line not in results]
    assert told
    kinds = "|".join(ACTIONS)
    assert all(re.match(rf"(after epoch \d|at the beginning): ({kinds}) ", line) for line in told)
    assert any("expand" in line and "1x1, 1xk" in line for line in told)
    metrics = json.loads((out / METRICS).read_text())
    assert metrics["flips"] == {"fused": 0, "onnxruntime": 0}
    assert metrics["accuracy"]["fused"] > 0.5
    assert json.loads((out / STRUCTURE).read_text())["schedule"]["name"] == schedule
    model = RunFolder(out).load(trust=True)
    assert len(repfx.journal(model)) == len(told)
    searches = issubclass(SCHEDULES[schedule], Search)
    assert ("What the search has found" in outcome.out) == searches
    assert [(out / name).is_file() for name in (ARCHITECTURE, HEAT_MAP)] == [searches] * 2


@pytest.mark.slow
def test_a_recipe_gives_the_same_run_again(finished: Path, tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    assert repfx_command("train", "--recipe", finished / RECIPE, "--trust", "--out", tmp_path / "again").code == 0
    assert (tmp_path / "again" / CHECKPOINT).read_bytes() == (finished / CHECKPOINT).read_bytes()
    assert (tmp_path / "again" / RECIPE).read_text() == (finished / RECIPE).read_text()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        "import sys; from repfx.cli import main; main(sys.argv[1:])",
        *TRAIN,
        "--out",
        str(out),
    ]
    interrupt = "import signal; from repfx.training.loop import _Training; step = _Training._step\n"
    interrupt += "def stop(run, x, y):\n    step(run, x, y)\n"
    interrupt += "    (run.progress.epoch, run.progress.step) == (1, 4) and signal.raise_signal(signal.SIGINT)\n"
    interrupt += "_Training._step = stop\n"
    stopped = subprocess.run([*command[:2], interrupt + command[2], *command[3:]], capture_output=True, text=True)
    assert stopped.returncode == 130, stopped.stderr
    advice = f"go on with: repfx train --resume --out {out} --trust"
    told, last = stopped.stderr.splitlines()
    assert told.startswith("epoch 1: loss ")
    assert last == f"repfx: stopped in epoch 2 after step 4; {advice}"
    with pytest.raises(SystemExit) as done:
        main(["train", "--resume", "--trust", "--out", str(out), "--json"])
    assert not done.value.code
    same = (out / CHECKPOINT).read_bytes() == (finished / CHECKPOINT).read_bytes()
    assert same, "the checkpoints differ"  # pytest would print them
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}


def test_a_finished_run_is_not_run_again_and_not_changed(finished: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    before = (finished / METRICS).read_bytes()
    outcome = repfx_command("train", "--resume", "--trust", "--out", finished, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out) == json.loads(before)
    refused = repfx_command("train", "--resume", "--trust", "--out", finished, "--epochs", 1)
    assert "was begun with 2 epochs, and now there are 1" in refused.err
    assert (finished / METRICS).read_bytes() == before


@pytest.mark.slow
def test_options_of_a_schedule_are_its_own(tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    options = ("--schedule", "dyrep", "--schedule-option", "metric=snip", "--schedule-option", "drop=false")
    assert repfx_command(*TRAIN, *options, "--epochs", 2, "--out", tmp_path).code == 0
    schedule = json.loads((tmp_path / STRUCTURE).read_text())["schedule"]
    assert (schedule["metric"], schedule["drop"]) == ("snip", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "dyrap"], "no schedule 'dyrap'; did you mean 'dyrep'?"),
        (["--schedule-option", "interval=1"], "options for a schedule, and no schedule"),
        (["--schedule", "dyrep", "--schedule-option", "speed=1"], "no option of DyRep 'speed'"),
        (["--schedule", "repan", "--schedule-option", "cycles=7"], "2 epochs can't be split into 7 cycles"),
        (["--spec", "dbbb"], "no preset 'dbbb'; did you mean 'dbb'?"),
        (["--spec", "dbbb", "--data", "no/such/data.npz"], "no preset 'dbbb'"),  # before the data is read
        (["--spec", "1x1,1x2"], "no branch kind '1x2'"),
        (["--spec", "{1x1}"], "is no JSON"),
        (["--data", "no/such/data.npz"], "no/such/data.npz"),
        (["--num-classes", "3"], "the model gives 3 classes, the data has 10: set --num-classes 10, or leave it out"),
        (["--schedule", "dyrep", "--spec", "[]"], "the spec is empty, so that dyrep has no branches"),
        (["--device", "nowhere"], "device 'nowhere' can't be used"),
        (["--option", "width"], "must be NAME=VALUE"),
        (["--option", "depth=3"], "can't be built: TypeError"),
        (["--weights", "no/such/file.pt"], "'no/such/file.pt': No such file or directory."),
        (["--learning-rate", "-1"], "must be a positive number"),
        (["--recipe", "vgg"], "no recipe (a name, or a file that ends in .toml) 'vgg'"),
        (["--set", "training.epoch=1"], "no key in training 'epoch'; did you mean 'epochs'?"),
        (["--set", "training.clip=high"], "training.clip is 'high'; it must be a number"),
        (["--mixed-precision", "fp8"], "no mixed_precision 'fp8'"),
        (["--set", "out=x"], "out can't be set in a recipe: give the option --out"),
        (["--set", "data=digits"], "data is 'digits'; it must be a table"),
        (["--overwrite", "--resume"], "give --overwrite or --resume"),
        (["--set", "training.warm_up=2"], "warm_up is 2.0 epochs; it must be less than the 2"),
        (["--set", "training.augmentation.color_jitter=0.5"], "color_jitter needs pictures of bytes"),
        (["--log-with", "paper"], "no tracker 'paper'"),
        (
            ["--set", "training.augmentation.flip=0.5", "--set", "training.augmentation.auto_augment=rand"],
            "needs pictures of bytes",
        ),
    ],
)
def test_what_train_can_not_do_is_one_line_and_leaves_nothing(  # type: ignore[no-untyped-def]
    arguments: list[str], message: str, tmp_path: Path, repfx_command
) -> None:
    outcome = repfx_command(*TRAIN, "--out", tmp_path / "runs" / "first", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.startswith("repfx: ")
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
    assert not (tmp_path / "runs").exists()


def test_an_out_that_is_a_file_is_refused_before_training(tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "taken").write_text("mine")
    outcome = repfx_command(*TRAIN, "--out", tmp_path / "taken")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.slow
def test_a_failed_export_keeps_the_trained_weights(  # type: ignore[no-untyped-def]
    tmp_path: Path, repfx_command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ExportError("no export today.")

    monkeypatch.setattr(experiment, "export_onnx", fail)
    outcome = repfx_command(*TRAIN, "--out", tmp_path / "out", "--epochs", 1)
    assert outcome.code == 2
    assert "no export today" in outcome.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CHECKPOINT, STRUCTURE, RECIPE, HISTORY, STATE}


# --- fuse -----------------------------------------------------------------------------------------------------------


def test_fuse_exports_a_finished_run(finished: Path, tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    outcome = repfx_command("fuse", finished, "--trust", "--onnx", tmp_path / "again.onnx")
    assert outcome.code == 0, outcome.err
    assert "[batch, 1, 8, 8]" in outcome.out
    x = torch.randn(3, 1, 8, 8)
    sessions = [onnxruntime.InferenceSession(path) for path in (finished / MODEL, tmp_path / "again.onnx")]
    outputs = [session.run(None, {session.get_inputs()[0].name: x.numpy()})[0] for session in sessions]
    assert relative_error(*(torch.from_numpy(output) for output in outputs)) < 1e-5


@pytest.mark.slow
def test_fuse_writes_a_program_beside_the_file(finished: Path, tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    command = ("fuse", finished, "--trust", "--onnx", tmp_path / "m.onnx", "--also", "pt2")
    outcome = repfx_command(*command, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["program"]["path"] == str(tmp_path / "m.pt2")
    x = torch.randn(3, 1, 8, 8)
    extra = {"repfx.json": ""}
    program: Any = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {"images": x.numpy()})
    assert relative_error(torch.from_numpy(found), program(x)) < 1e-5
    assert json.loads(json.loads(extra["repfx.json"])["id2label"])["3"] == "3"
    outcome = repfx_command(*command)
    assert f"{tmp_path / 'm.pt2'} (" in outcome.out
    for more, message in (
        (("--int8", "--data", "digits"), "--also writes the model in floats"),
        (("--also", "pt"), "pt2"),
    ):
        outcome = repfx_command(*command, *more)
        assert outcome.code == 2
        assert message in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "no such command 'frobnicate'"),
        (["train", "--epochs", "x"], "invalid value for '--epochs'"),
        (["train", "--epoch", "1"], "no such option"),
        (["predict"], "missing argument"),
        (["fuse", "x", "--onnx"], "option '--onnx' requires an argument"),
    ],
)
def test_wrong_use_is_one_line_like_all_errors(arguments: list[str], message: str, repfx_command: Any) -> None:
    outcome = repfx_command(*arguments)
    assert outcome.code == 2
    assert outcome.err.lower().startswith(f"repfx: {message}")
    assert outcome.err.count("\n") == 1
    assert not outcome.out


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal_and_lists_all_options_in_groups(
    columns: int, repfx_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    help = repfx_command("train", "--help")
    assert help.code == 0
    lines = help.out.splitlines()
    assert max(map(len, lines)) <= columns
    titles = [line for line in lines if re.fullmatch(r"[A-Z]\w+:", line)]
    assert titles == ["Model:", "Data:", "Method:", "Training:", "Output:", "Options:"]
    assert re.search(r"-e, --epochs <?\w+", help.out)
    assert "…" not in help.out.replace("mps, …", "")
    assert not re.search(r"\[default: \(", help.out)
    listed = repfx_command("--help").out
    assert "..." not in listed.partition("Commands:")[2]
    assert repfx_command().err.startswith("Usage: repfx")


@pytest.mark.slow
def test_fuse_takes_a_model_with_weights(tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    model = net(4).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    arguments = ("--weights", tmp_path / "w.pt", "--num-classes", 4, "--input-shape", "1x8x8")
    outcome = repfx_command("fuse", TINY, *arguments, "--onnx", tmp_path / "m.onnx")
    assert outcome.code == 0, outcome.err
    x = torch.randn(2, 1, 8, 8)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(found), model(x)) < 1e-5


@pytest.mark.slow
def test_fuse_writes_8_bits_and_says_what_that_costs(finished: Path, tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    arguments = ("fuse", finished, "--trust", "--int8", "--data", "digits", "--calibration-images", 100)
    outcome = repfx_command(*arguments, "--onnx", tmp_path / "m.onnx", "--json", "--keep-float", "8")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    found = json.loads(outcome.out)["quantization"]
    assert [layer["name"] for layer in found["layers"] if layer["quantized"]] == ["0", "3"]
    assert found["images"] == 100
    accuracy = json.loads((finished / METRICS).read_text())["accuracy"]["onnxruntime"]
    assert found["accuracy"]["float32"] == accuracy
    assert abs(found["accuracy"]["int8"] - accuracy) * 355 <= found["accuracy"]["flips"] + 1e-9 < 0.05 * 355

    outcome = repfx_command(*arguments, "--onnx", tmp_path / "m.onnx", "--bound", 99)
    assert re.search(r"^ 3 +[\d.]+ +[\d.]+ +0 to [\d.]+ +\d+% +[\d.]+ dB +[\d.]+ dB", outcome.out, re.MULTILINE)
    assert "first layer below 99 dB: 0" in outcome.out
    assert outcome.err == ""

    found = json.loads(repfx_command(*arguments, "--onnx", tmp_path / "m.onnx", "--equalize", "--json").out)[
        "quantization"
    ]
    assert found["accuracy"]["float32"] == accuracy


def test_only_weights_in_8_bits_are_evened_out(tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    outcome = repfx_command("fuse", TINY, "--onnx", tmp_path / "m.onnx", "--equalize")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--equalize is for weights in 8 bits" in outcome.err


@pytest.mark.slow
def test_fuse_writes_float16_for_a_fixed_batch(finished: Path, tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    outcome = repfx_command(
        "fuse", finished, "--trust", "--fp16", "--batch-size", 1, "--onnx", tmp_path / "m.onnx", "--json"
    )
    assert outcome.code == 0, outcome.err
    (taken,) = json.loads(outcome.out)["export"]["inputs"]
    assert (taken["dtype"], taken["shape"]) == ("float16", [1, 1, 8, 8])


def test_ranges_are_not_measured_on_pixels_of_another_range(finished: Path, tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    images, labels = torch.rand(20, 8, 8).numpy(), torch.arange(20).numpy() % 10
    numpy.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    outcome = repfx_command(
        "fuse", finished, "--trust", "--int8", "--data", tmp_path / "d.npz", "--onnx", tmp_path / "m.onnx"
    )
    assert (outcome.code, outcome.out) == (2, "")
    assert "was trained on images whose pixels go from 0 to 16; those of" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["d.npz"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nix"], "there is no run 'nix': no such folder. A model has the form torchvision:NAME"),
        ([TINY, "--int8"], "--int8 measures ranges on real images: give --data"),
        ([TINY, "--data", "digits"], "--data is what --int8 measures ranges on"),
        ([TINY, "--int8", "--fp16", "--data", "digits"], "--int8 and --fp16 exclude each other"),
        ([TINY, "--int8", "--data", "digits", "--input-shape", "1x8x6"], "are as high as they are wide"),
        ([TINY, "--input-shape", "1x8x8", "--dynamic-size"], "leave fewer axes free than batch, height, width"),
        ([".."], "holds no training run"),
        ([TINY, "--weights", __file__], "can't be read as weights"),
        ([TINY, "--input-shape", "1xbx8"], "must be whole numbers"),
        ([TINY, "--input-shape", "3x8x8"], "can't run on x"),
    ],
)
def test_what_fuse_can_not_do_is_one_line_and_leaves_nothing(  # type: ignore[no-untyped-def]
    arguments: list[str], message: str, tmp_path: Path, repfx_command
) -> None:
    outcome = repfx_command("fuse", *arguments, "--onnx", tmp_path / "m.onnx")
    assert (outcome.code, outcome.err.count("\n"), outcome.out) == (2, 1, "")
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_structure_from_elsewhere_is_refused(tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    for text, message in (("{}", "no structure"), ("[", "no structure"), ('{"format": 99}', "has format 99")):
        (tmp_path / STRUCTURE).write_text(text)
        outcome = repfx_command("fuse", tmp_path, "--onnx", tmp_path / "m.onnx")
        assert (outcome.code, message in outcome.err) == (2, True), outcome.err


def test_a_run_that_is_not_finished_says_how_to_go_on(finished: Path, tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    shutil.copy(finished / STRUCTURE, tmp_path / STRUCTURE)
    for verb in (["fuse", tmp_path, "--onnx", tmp_path / "m.onnx"], ["inspect", tmp_path]):
        outcome = repfx_command(*verb)
        assert outcome.code == 2
        assert "isn't finished: `repfx train --resume --out" in outcome.err


# --- inspect and list -----------------------------------------------------------------------------------------------


def test_inspect_shows_each_site_and_what_a_spec_would_do(repfx_command) -> None:  # type: ignore[no-untyped-def]
    lines = repfx_command("inspect", TINY, "--spec", '{"3": "acb"}').out.splitlines()
    assert len(lines) == 3
    assert "no pattern of the spec names it" in lines[1]
    assert "1xk, kx1" in lines[2]


def test_inspect_shows_the_branches_of_a_finished_run(finished: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    assert "1x1, 1x1-kxk, 1x1-avg" in repfx_command("inspect", finished, "--trust").out


def test_inspect_tells_programs_the_same(finished: Path, tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    first, second = json.loads(repfx_command("inspect", TINY, "--spec", '{"3": "acb"}', "--json").out)
    assert (first["path"], first["note"]) == ("0", "no pattern of the spec names it")
    assert (second["path"], second["conv"]["kernel_size"], second["norm"]) == ("3", [3, 3], "4")
    assert json.loads(repfx_command("inspect", finished, "--trust", "--json").out)[0]["branches"] == [
        "1x1",
        "1x1-kxk",
        "1x1-avg",
    ]
    assert [row["path"] for row in json.loads(repfx_command("inspect", TINY, "--fused", "--json").out)] == ["0", "3"]
    page = tmp_path / "model.html"
    found = json.loads(repfx_command("inspect", TINY, "--html", page, "--json").out)
    assert found == {"page": str(page), "not_compared": None}


@pytest.mark.slow
def test_inspect_writes_a_page_in_place_of_the_list(finished: Path, tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    outcome = repfx_command("inspect", finished, "--trust", "--html", tmp_path / "model.html")
    assert (outcome.code, outcome.out.count("\n")) == (0, 1), outcome.err
    assert "Equivalent." in (tmp_path / "model.html").read_text()
    refused = repfx_command("inspect", TINY, "--html", tmp_path / "no" / "model.html")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "there is no folder" in refused.err


@pytest.mark.slow
def test_report_writes_the_page_of_a_run_into_its_folder(finished: Path, tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    page = tmp_path / "page.html"
    outcome = repfx_command("report", finished, "--trust", "--out", page, "--json")
    assert (outcome.code, json.loads(outcome.out)) == (0, {"page": str(page)})
    run = shutil.copytree(finished, tmp_path / "run")
    outcome = repfx_command("report", run, "--trust")
    assert outcome.out == f"The page is {run / REPORT}.\n"
    assert "<h1>run</h1>" in (run / REPORT).read_text()
    refused = repfx_command("report", tmp_path)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "holds no training run" in refused.err


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("branches", KINDS),
        ("presets", PRESETS),
        ("passes", PASSES),
        ("schedules", SCHEDULES),
        ("recipes", shipped_recipes()),
    ],
)
def test_list_shows_each_name_once(what: str, names: dict[str, object], repfx_command) -> None:  # type: ignore[no-untyped-def]
    lines = repfx_command("list", what).out.splitlines()
    assert [line.split()[0] for line in lines] == list(names)
    assert all(len(line.split()) > 1 for line in lines)
    rows = json.loads(repfx_command("list", what, "--json").out)
    assert [row["name"] for row in rows] == list(names)
    assert all(row["description"] for row in rows)


@pytest.mark.parametrize("width", [80, 120])
def test_a_list_fits_the_terminal_and_loses_no_word(width: int) -> None:
    rows = [(preset.name, preset.description) for preset in PRESETS.values()]
    lines = listing(rows, width).splitlines()
    assert max(map(len, lines)) <= width < max(map(len, listing(rows).splitlines()))
    assert " ".join(lines).split() == [word for row in rows for word in " ".join(row).split()]
    assert {line[: len("mobileone  ")].strip() for line in lines} == {"", *PRESETS}


# --- the command itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "fuse", "inspect", "report", "list"])
def test_each_command_explains_itself(command: str, repfx_command) -> None:  # type: ignore[no-untyped-def]
    outcome = repfx_command(command, "--help")
    assert outcome.code == 0
    assert f"repfx {command}" in outcome.out


def test_the_version_is_told(repfx_command) -> None:  # type: ignore[no-untyped-def]
    assert repfx_command("--version").out == f"repfx {repfx.__version__}\n"
