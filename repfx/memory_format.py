"""Whether a model may have channels last, the order of memory in which convs are quicker on CPUs and GPUs."""

from __future__ import annotations

from torch import fx, nn

from repfx.graph import trace

_ASK_FOR_MEMORY = frozenset(
    {"view", "view_as", "as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr", "unfold"}
)
_KNOWN = ("torch.nn.", "repfx.")


def takes_channels_last(model: nn.Module) -> bool:
    """Whether all of a model's code is known, and nothing in it could mind how a tensor lies in memory.

    Args:
        model: a model with convs over two axes, and none over three.

    >>> convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> takes_channels_last(convs), takes_channels_last(nn.Sequential(*convs, nn.Unflatten(1, (2, 4)), nn.Conv3d(2, 8, 3)))
    (True, False)
    """
    axes = {tensor.ndim for tensor in (*model.parameters(), *model.buffers())}
    if 4 not in axes or 5 in axes:
        return False
    traces = trace(model)
    called = {island.full_path(node) for island in traces.islands for node in _calls(island.graph)}
    layers = [model.get_submodule(path) for path in called - {island.path for island in traces.islands}]
    return (
        not traces.untraced
        and not any(_asks_for_memory(node) for island in traces.islands for node in island.graph.nodes)
        and all(type(layer).__module__.startswith(_KNOWN) for layer in layers)
    )


def _calls(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def _asks_for_memory(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", None)
    return name in _ASK_FOR_MEMORY
