"""The seconds that each node of an ONNX file takes in onnxruntime, from its own profiler."""

from __future__ import annotations

import ast
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from repfx.onnx.file import open_session, package
from repfx.profiling.timing import Timing

_ENDINGS = re.compile(r"(_token_\d+|_bn|_nchwc|_kernel_time|_fence_before|_fence_after)+$")
_SCOPES = "pkg.torch.onnx.name_scopes"
Feeds = Mapping[str, Any]  # arrays of numpy, by the names of inputs


@dataclass(frozen=True)
class Nodes:
    """The time of a file.

    Args:
        whole: of a run without the profiler.
        own: of each node, by its name in the file. Nodes that onnxruntime has merged count for the one that does most of the work.
        paths: paths of the modules that the nodes were exported from, as far as the file has them.
    """

    whole: Timing
    own: Mapping[str, Timing]
    paths: Mapping[str, str]


def node_times(
    files: Mapping[str, Path], feeds: Mapping[str, Feeds], *, rounds: int, warm_up: int = 3
) -> dict[str, Nodes]:
    """Measure files in onnxruntime. They take turns, and each runs with and without the profiler in every turn.

    Args:
        feeds: the inputs of each file.
        rounds: number of turns that count, after `warm_up` turns that don't.
    """
    with TemporaryDirectory() as folder:
        plain = {name: open_session(path, threads=torch.get_num_threads()) for name, path in files.items()}
        watched = {
            name: open_session(path, threads=torch.get_num_threads(), profile=Path(folder) / f"{place}")
            for place, (name, path) in enumerate(files.items())
        }
        whole: dict[str, list[float]] = {name: [] for name in files}
        order = list(files)
        for turn in range(warm_up + rounds):
            for name in order:
                seconds = _seconds(plain[name], feeds[name])
                watched[name].run(None, feeds[name])
                if turn >= warm_up:
                    whole[name].append(seconds)
            order.append(order.pop(0))
        events = {name: json.loads(Path(session.end_profiling()).read_text()) for name, session in watched.items()}
    found = {}
    for name, path in files.items():
        names = _Names.of(path)
        runs = list(_runs(events[name]))[-rounds:]
        keys = dict.fromkeys(key for run in runs for key in run)
        own: dict[str, list[float]] = {}
        for key in keys:
            sums = own.setdefault(names.node(*key), [0.0] * len(runs))
            for place, run in enumerate(runs):
                sums[place] += run.get(key, 0.0)
        timings = {node: Timing(tuple(values)) for node, values in own.items()}
        found[name] = Nodes(Timing(tuple(whole[name])), timings, names.paths)
    return found


def _seconds(session: Any, feeds: Feeds) -> float:
    began = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - began


def _runs(events: list[dict[str, Any]]) -> Iterator[dict[tuple[str, str], float]]:
    """Yield the seconds of each kernel in each run, by the kernel's name and operator. A run's event follows those of its kernels."""
    run: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["name"], event["args"].get("op_name", ""))
            run[key] = run.get(key, 0.0) + event["dur"] / 1e6
        elif event["name"] == "model_run":
            yield run
            run = {}


@dataclass(frozen=True)
class _Names:
    """The names in a file: its nodes by name, and by the tensors that they give."""

    nodes: Mapping[str, Any]
    makers: Mapping[str, Any]
    paths: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> _Names:
        nodes = package("onnx").load(path, load_external_data=False).graph.node
        makers = {tensor: node for node in nodes for tensor in node.output}
        paths = {node.name: found for node in nodes if (found := _path(node)) is not None}
        return cls({node.name: node for node in nodes}, makers, paths)

    def node(self, event: str, operator: str) -> str:
        """Return the name of the node of the file that a kernel stands for, or the kernel's own name.

        A kernel has the name of its node, or that of the last tensor of the nodes that it replaces.
        """
        name = _ENDINGS.sub("", event)
        if name in self.nodes:
            return name
        node = self.makers.get(name)
        while node is not None and operator and node.op_type != operator and operator in ("Conv", "FusedConv"):
            node = next((self.makers[tensor] for tensor in node.input if tensor in self.makers), None)
        return name if node is None else str(node.name)


def operators(path: Path) -> dict[str, str]:
    """Return what each node of a file is, by name, such as ``Conv 8×3×3×3``: its operator, and the size of its weight."""
    graph = package("onnx").load(path, load_external_data=False).graph
    sizes = {tensor.name: "×".join(map(str, tensor.dims)) for tensor in graph.initializer}
    weights = {node.name: sizes.get(node.input[1], "") if len(node.input) > 1 else "" for node in graph.node}
    return {node.name: f"{node.op_type} {weights[node.name]}".strip() for node in graph.node}


def _path(node: Any) -> str | None:
    """Return the path of the module that holds a node's weight, or whose code made the node, as torch's exporter has written it."""
    for tensor in node.input:
        if tensor.endswith(".weight"):
            return str(tensor.removesuffix(".weight"))
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), None)
    if text is None:
        return None
    scopes = ast.literal_eval(text)
    return str(scopes[-2]) if len(scopes) > 1 else ""
