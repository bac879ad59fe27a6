"""Files appear whole or not at all: on a full disk, after a kill, with the permissions of the umask, and synced before they take a name."""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import repfx
from repfx.blocks.architecture import Architecture
from repfx.errors import RepfxError
from repfx.onnx.export import export_onnx
from repfx.onnx.preprocessing import Preprocessing
from repfx.pages.model_page import write_model_page
from repfx.records.target_file import staged
from repfx.search.heat_map import draw
from repfx.training.models import ModelReference
from repfx.training.run_folder import RunFolder, Setup

pytestmark = pytest.mark.skipif(os.name == "nt", reason="limits, locks and the umask are those of POSIX")
ROOT = Path(__file__).parents[2]
X = torch.randn(4, 3, 9, 7, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def net() -> nn.Sequential:
    layers = [nn.Conv2d(3, 6, (3, 1), bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3)]
    return nn.Sequential(*layers).cpu().eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to quantize."""
    path = tmp_path_factory.mktemp("source") / "source.onnx"
    export_onnx(net(), path, X)
    return path


def begin(path: Path) -> None:
    setup = Setup(
        ModelReference("torchvision:resnet18"), "dbb", None, Preprocessing((3, 9, 7), (0.5,) * 3, (0.25,) * 3)
    )

    def fill(staging: Path) -> None:
        staging.write_text(setup.to_json())

    RunFolder(path.parent).write(path.name, fill)


WRITERS: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "save": ("run.ckpt", lambda path, _: repfx.save(path, repfx.expand(net(), "acb"))),
    "export_onnx": ("net.onnx", lambda path, _: repfx.export_onnx(net(), path, X)),
    "quantize_onnx": ("int8.onnx", lambda path, source: repfx.quantize_onnx(source, path, [X])),
    "page": ("net.html", lambda path, _: write_model_page(net(), path, X, name="net", trained=True)),
    "architecture": ("arch.json", lambda path, _: Architecture.of(repfx.expand(net(), "acb")).save(path)),
    "picture": ("arch.png", lambda path, _: draw(Architecture.of(repfx.expand(net(), "acb")), path)),
    "run folder": ("structure.json", lambda path, _: begin(path)),
}


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let each file have `room` bytes; every further write fails, in Python, C++ and Rust alike."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def refused(write: Callable[[], object], target: Path) -> None:
    """Check that a write fails with one sentence, and leaves the older file as it was and nothing beside it."""
    with pytest.raises(RepfxError) as error:
        write()
    message = str(error.value)
    assert message.startswith((f"can't write {str(target)!r}: ", "can't write into folder"))
    assert "\n" not in message
    assert message.endswith(".")
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert target.read_text() == "older"


@pytest.mark.slow_one_in(3)
@pytest.mark.one_in(6)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_at_any_byte_is_one_error_and_changes_nothing(writer: str, tmp_path: Path, source: Path) -> None:
    name, write = WRITERS[writer]
    target = tmp_path / name
    write(target, source)
    size = target.stat().st_size
    target.write_text("older")
    for room in sorted({0, 1, 7, size // 3, size // 2, size - 1}):
        with full_disk(room):
            refused(lambda: write(target, source), target)
    write(target, source)
    assert abs(target.stat().st_size - size) < 64
    assert [path.name for path in tmp_path.iterdir()] == [name]


CALLS = ("mkdir", "chmod", "fsync", "replace", "open")


class Failing:
    """Calls that write into a folder, of which the k-th one fails: those of `os`, and Python's own `open`."""

    def __init__(self, folder: Path, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.left, self.failed = str(folder), k, False
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(io, "open", self._counted(open))
        monkeypatch.setattr(builtins, "open", self._counted(open))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(first: Any, *arguments: Any, **options: Any) -> Any:
            path = path_of(first)
            if path.startswith(self.folder) and writes(call.__name__, *arguments, **options):
                self.left -= 1
                if self.left == 0:
                    self.failed = True
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return call(first, *arguments, **options)

        counted.__name__ = call.__name__
        return counted


def path_of(first: Any) -> str:
    """The path that a call is about, of which it got the name or an open file."""
    return str(Path(f"/proc/self/fd/{first}").readlink()) if isinstance(first, int) else os.fspath(first)


def writes(name: str, how: Any = "r", *arguments: Any, mode: Any = None, **options: Any) -> bool:
    """Whether a call writes. Folders are opened to be locked, synced and emptied, too."""
    if name != "open":
        return True
    return bool(how & os.O_CREAT) if isinstance(how, int) else "r" not in (mode if isinstance(mode, str) else how)


def error_of(write: Callable[[], object]) -> str | None:
    try:
        write()
    except RepfxError as error:
        return str(error)
    return None


@pytest.mark.slow_one_in(3)
@pytest.mark.one_in(6)
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the calls are told apart by /proc")
@pytest.mark.parametrize("writer", WRITERS)
def test_each_call_of_the_system_may_fail(
    writer: str, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every k until nothing fails any more. A failure that the work doesn't depend on, such as that of a lock, may be passed over."""
    name, write = WRITERS[writer]
    target, refusals = tmp_path / name, 0
    for k in range(1, 200):
        target.write_text("older")
        with monkeypatch.context() as patch:
            failing = Failing(tmp_path, k, patch)
            told = error_of(lambda: write(target, source))
        if told is not None:
            refusals += 1
            assert "\n" not in told
            assert "can't write" in told
            assert "No space left on device" in told
            assert target.read_text() == "older"
        assert [path.name for path in tmp_path.iterdir()] == [name]
        if not failing.failed:
            break
    assert not failing.failed
    assert refusals >= 3  # the folder, a sync, the move


@pytest.mark.slow_one_in(5)
@pytest.mark.one_in(4)
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
@pytest.mark.parametrize("writer", WRITERS)
def test_permissions_follow_the_umask(writer: str, mask: int, tmp_path: Path, source: Path) -> None:
    name, write = WRITERS[writer]
    before = os.umask(mask)
    try:
        write(tmp_path / name, source)
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_file_is_synced_before_it_takes_its_name_and_its_folder_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(file: int) -> None:
        calls.append(("sync", Path(path_of(file)).name))
        fsync(file)

    def moved(file: Any, target: Any, **options: Any) -> None:
        calls.append(("move", Path(file).name))
        replace(file, target, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    with staged(tmp_path / "net.onnx") as (_, staging):
        staging.write_text("net")
        staging.with_name("net.onnx.data").write_text("weights")
    assert set(calls[:2]) == {("sync", "net.onnx"), ("sync", "net.onnx.data")}
    assert calls[2:] == [("move", "net.onnx.data"), ("move", "net.onnx"), ("sync", tmp_path.name)]


KILLED = """
import os, sys, time
from repfx.records.target_file import staged
with staged(sys.argv[1]) as (_, staging):
    staging.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def writing(target: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing a file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, target], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_what_a_killed_process_left_goes_with_the_next_write_and_not_before_it_is_dead(tmp_path: Path) -> None:
    target = tmp_path / "run.ckpt"
    (tmp_path / ".run.ckpt.backup01").mkdir()  # somebody else's
    process = writing(target)
    try:
        repfx.save(target, net())
        assert len(list(tmp_path.iterdir())) == 3  # the other process is still at work
    finally:
        process.kill()
        process.wait()
    assert len(list(tmp_path.iterdir())) == 3
    repfx.save(target, net())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.ckpt.backup01", "run.ckpt"]


@pytest.mark.slow_one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.safetensors", "history.json", "checkpoint.safetensors", "report.html"])
def test_what_a_killed_run_left_goes_when_it_is_resumed(name: str, tmp_path: Path) -> None:
    process = writing(tmp_path / name)
    process.kill()
    process.wait()
    (tmp_path / f".{name}.ab12cd34").mkdir()  # an older repfx called it so
    (tmp_path / "recipe.toml").write_text("")
    assert len(list(tmp_path.iterdir())) == 3
    with RunFolder(tmp_path).new_run(overwrite=False, resume=True):
        assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]
