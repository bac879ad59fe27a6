"""Runs that are over soon after their training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from repfx.training import experiment


@pytest.fixture
def quick_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out of a run what comes after the training and isn't looked at: the export and the measuring."""

    def export(fused: nn.Module, path: Path, *rest: object, **options: object) -> Any:
        path.write_text(str(sum(float(each.detach().double().sum()) for each in fused.parameters())))
        return SimpleNamespace(max_error=0.0)

    monkeypatch.setattr(experiment, "export_onnx", export)
    monkeypatch.setattr(experiment, "onnx_session", lambda path: lambda x: torch.zeros(len(x), 10))
    monkeypatch.setattr(experiment, "measure_latency", lambda calls: dict.fromkeys(calls, 1.0))
