"""`repfx fuse` and `repfx inspect` on ONNX files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from repfx.cli import main
from tests.onnx.test_fuse_file import parallel_convs, write


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    nodes, constants, _ = parallel_convs()
    return write(tmp_path / "in.onnx", nodes, constants)


def test_fuse(source: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    target = source.with_name("out.onnx")
    code, out, _ = command("fuse", source, "--onnx", target)
    assert code == 0
    assert target.is_file()
    assert "2 → 1 Conv" in out
    code, out, _ = command("fuse", source, "--onnx", target, "--json")
    found = json.loads(out)
    assert (found["convs_before"], found["convs"], found["nodes"]) == (2, 1, {"Conv": 1})
    assert found["max_error"] < found["tolerance"]


def test_inspect_writes_nothing(source: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = command("inspect", source)
    assert code == 0
    assert "2 → 1 Conv" in out
    assert "the y: no rule: the output follows" in out
    assert json.loads(command("inspect", source, "--json")[1])["stays"][0]["path"] == "the y"
    assert list(source.parent.iterdir()) == [source]
    target = source.with_name("out.onnx")
    command("fuse", source, "--onnx", target)
    assert (
        f"{target} is as small as fusing makes it.\nWhat is left, and why it stays:\n" in command("inspect", target)[1]
    )


@pytest.mark.parametrize("option", [("--fp16",), ("--opset", "17"), ("--input-shape", "3x8x8")])
def test_options_of_models_are_refused(
    option: tuple[str, ...], source: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = command("fuse", source, "--onnx", source.with_name("out.onnx"), *option)
    assert code == 2
    assert f"an ONNX file has its own weights, sizes and types: leave {option[0]} out" in " ".join(err.split())


@pytest.mark.slow
def test_profile(source: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = command("profile", source, "--rounds", 2)
    assert code == 0
    assert "Conv" in out
    assert "A run in onnxruntime" in out
    code, out, _ = command("profile", source, "--rounds", 2, "--json")
    (row,) = (row for row in json.loads(out)["rows"] if row["layer"].startswith("Conv"))
    assert row["merged"] >= 2
    assert 0 < row["after"]["low"] <= row["after"]["high"]
    code, _, err = command("profile", source, "--input-shape", "3x8x8")
    assert code == 2
    assert "leave --input-shape out" in err
