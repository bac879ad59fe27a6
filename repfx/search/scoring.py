"""Fast scoring: one plain net for all candidates of a search over gated paths, refilled for each instead of rebuilt.

With kernels *K* of its paths, gates and λ included, a block whose open paths are *O* is one conv (IRepNAS, eq. 6 and 7, and sec. 3.4)

    K_always + Σ_{p ∈ O} K_p,

whatever O is. So each *K_p* is computed once for a state of the supernet, and a candidate is a masked sum at each gated site; all else
is fused once. IRepNAS fuses each candidate anew.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn

from repfx.algebra.activated_norm import norm_of, rest_of
from repfx.algebra.baking import conv_from_kernel, float64_like
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer, has_hooks, is_batch_norm
from repfx.algebra.meaning import affine_of
from repfx.blocks.block import RepBlock
from repfx.blocks.paths import block_at
from repfx.errors import InvalidInput, UnknownName, first_line
from repfx.graphs.sites import find_sites
from repfx.measuring.calibration import calibrate_norms
from repfx.records.module_tree import require_module
from repfx.records.notes import copy_of
from repfx.rewriting.pipeline import rewrite
from repfx.rewriting.rule import RULES
from repfx.search.space import Code, Space

STATISTICS = ("running", "measured")


class FusedSupernet:
    """The plain nets of all candidates of a model with gated blocks, in eval mode; the model is copied and left untouched.

    What it knows is the state that the model has now: after a step of training make a new one.

    Which statistics the BatchNorms of a candidate have is a choice. ``running``: those that the supernet has gathered. They cost nothing,
    but where paths were drawn anew for each step, they are those of a mixture of nets, and of none exactly. ``measured``: for each
    candidate all BatchNorms that keep statistics, those of its open branches among them, are set to the mean over `calibrate`, in its
    multi-branch form, before that is fused. This takes one pass over these data and all kernels anew for each candidate, which is most of
    what ``running`` saves, so few batches should do. Which order of the candidates is nearer to that after retraining, neither can promise.

    Args:
        model: its gates are those of `repfx.passes.gate`; which of them are open doesn't matter.
        statistics: ``running`` or ``measured``.
        calibrate: inputs of the model, or a data loader, for ``measured``; it is gone through once and kept, so that all candidates see the
            same data.

    Raises:
        UnknownName: no such `statistics`.
        InvalidInput: the model has no gates, or gates inside a gated block, or a gated block with hooks; `calibrate` is missing, empty or
            of no use; what always runs at a site isn't finite.

    >>> from repfx.passes.expand import expand
    >>> from repfx.passes.gate import gate
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> supernet = FusedSupernet(gate(expand(model, "acb"), "0", "sigmoid").eval())
    >>> supernet.space.paths
    (('0', '1xk'), ('0', 'kx1'))
    >>> net = supernet.net((True, False))
    >>> net.get_submodule("0")
    SummedConv(3×3 3→8, open: 1xk)
    """

    def __init__(
        self, model: nn.Module, *, statistics: str = "running", calibrate: Iterable[Any] | None = None
    ) -> None:
        require_module(model)
        if statistics not in STATISTICS:
            raise UnknownName("source of statistics", statistics, STATISTICS)
        if statistics == "running" and calibrate is not None:
            raise InvalidInput("calibrate is of use for statistics='measured' alone.")
        if statistics == "measured" and calibrate is None:
            raise InvalidInput("statistics='measured' needs calibrate: the data to measure them on.")
        self.space = Space.of(model)
        _require_separate_blocks(self.space.sites, model)
        supernet = copy_of(model).eval().requires_grad_(False)
        self._nets = _Running(supernet, self.space) if calibrate is None else _Measured(supernet, self.space, calibrate)

    def net(self, code: Code) -> nn.Module:
        """The plain net of a candidate, in eval mode.

        With ``running`` statistics it is one module for all codes, with the weights of the code that was asked for last. It is not to be
        changed, and copied where it is to be kept. Only sites at which the code differs from the last one are refilled. It equals the
        fused candidate, to 1e-6 in float32 and to 1e-9 in float64: each kernel is computed in float64 and rounded once to the model's
        dtype, or to float32 where that has more digits, and in this the sums are taken. On a CPU it has channels last where nothing in the
        net could mind that.

        With ``measured`` statistics each call gives a net of its own.

        Args:
            code: for each path of `space`, whether it is open.

        Raises:
            InvalidInput: the code has another length, or a batch of `calibrate` doesn't fit the model.
        """
        if len(code) != len(self.space.paths):
            raise InvalidInput(
                f"a code of {len(code)} entries can't say which of {len(self.space.paths)} paths are open."
            )
        return self._nets(code)


def scores(
    model: nn.Module,
    codes: Sequence[Code],
    score: Callable[[nn.Module], float],
    *,
    statistics: str = "running",
    calibrate: Iterable[Any] | None = None,
) -> list[float]:
    """What `score` gives for the plain net of each code, in the order of the codes; no gradients are computed.

    In a run of `torch.distributed` the codes are dealt out, code k to rank k mod the number of ranks, and each rank gets all scores. All
    ranks have to call this with the same codes; it is the first rank's model that all of them score.

    Args:
        model: with gated blocks; it is left untouched.
        codes: for each path of `Space.of(model)`, whether it is open.
        score: from a plain net in eval mode to a number, higher is better. NaN, as of a net that overflows, counts as minus infinity. The
            net is not to be kept: the next code gets the same one.
        statistics, calibrate: as for `FusedSupernet`.

    Raises:
        InvalidInput: as of `FusedSupernet`; `score` gave something that is no number, or NaN for all codes.

    >>> from repfx.passes.expand import expand
    >>> from repfx.passes.gate import gate
    >>> model = gate(expand(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "acb", preserve=False).eval(), "0")
    >>> images = torch.randn(4, 3, 8, 8)
    >>> found = scores(model, [(True, False), (False, False), (True, False)], lambda net: -net(images).square().mean())
    >>> found[0] == found[2], found[0] == found[1]
    (True, False)
    """
    if _is_distributed():
        model = _of_first_rank(model)
    supernet = FusedSupernet(model, statistics=statistics, calibrate=calibrate)
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if _is_distributed() else (0, 1)
    values = torch.zeros(len(codes), dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for index in range(rank, len(codes), world):
            values[index] = _number(score(supernet.net(codes[index])))
    found = _summed_over_ranks(values, model).tolist()
    if found and all(map(math.isnan, found)):
        raise InvalidInput(
            f"score gave NaN for all {len(found)} codes; look for NaN or Inf in the model and in the data."
        )
    return [-math.inf if math.isnan(value) else value for value in found]


class SummedConv(nn.Module):
    """One conv whose kernel is refilled: what stands for a gated block in a plain net.

    `fuse` doesn't know its class, and it has no parameters, so nothing is merged with it, whatever stands around it. The sizes of the
    site's own conv (``kernel_size``, ``stride``, …) can be read from it, as from the block.

    Args:
        kernel: of what always runs, with the window of all paths; it is filled with this at first.
        conv: the site's own; gives dtype, device and memory format.
        site: its path.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, kernel: Kernel, conv: Layer, site: str) -> None:
        super().__init__()
        for name in ConvSpec.__dataclass_fields__:
            setattr(self, name, getattr(conv, name))
        self.site = site
        self.open: tuple[str, ...] = ()  # the gated paths that it is filled with
        self._sizes = kernel.to("meta")
        filled: Layer = conv_from_kernel(kernel, conv, site)
        self.register_buffer("weight", filled.weight.detach())
        self.register_buffer("bias", _bias(kernel).to(filled.weight))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in, *axes)`` to ``(batch, out, *axes)``."""
        return replace(self._sizes, weight=self.weight, bias=self.bias)(x)

    def extra_repr(self) -> str:
        return f"{ConvSpec.of_kernel(self._sizes)}, open: {', '.join(self.open) or 'none'}"


@dataclass(frozen=True, eq=False)
class _Terms:
    """What the kernel of a site is the sum of, all on one lattice: what always runs, then each gated path.

    Args:
        names: of the gated paths.
        weights: ``(1 + paths, out, in / groups, *window)``.
        biases: ``(1 + paths, out)``.
    """

    names: tuple[str, ...]
    weights: Tensor
    biases: Tensor

    @classmethod
    def of(cls, names: tuple[str, ...], kernels: Sequence[Kernel], like: Tensor) -> _Terms:
        """From float64, each rounded once to the dtype of `like`, on its device."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        weights = [kernel.weight.to(like.device, dtype) for kernel in kernels]
        biases = [_bias(kernel).to(like.device, dtype) for kernel in kernels]
        return cls(names, torch.stack(weights), torch.stack(biases))

    def fill(self, conv: SummedConv, open_paths: tuple[str, ...]) -> None:
        """Let a conv be that of these paths."""
        if conv.open == open_paths:
            return
        rows = [row for row, name in enumerate(self.names, start=1) if name in open_paths]
        for terms, tensor in ((self.weights, conv.weight), (self.biases, conv.bias)):
            total = terms[0].clone()
            for row in rows:
                total += terms[row]
            tensor.copy_(total)
        conv.open = open_paths


class _Running:
    """One net for all codes."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, supernet: nn.Module, space: Space) -> None:
        self._space = space
        self._terms: dict[str, _Terms] = {}
        blocks = {site: block_at(supernet, site) for site in space.sites}
        norms = _norms_behind(supernet, blocks)
        instead: dict[int, Any] = {}
        for site, block in blocks.items():
            norm = norms.get(site)
            names, kernels = _parts(block, norm)
            self._terms[site] = _Terms.of(names, kernels, block.conv.weight)
            instead[id(block)] = SummedConv(kernels[0], block.conv, site)
            if norm is not None:
                instead[id(norm)] = copy.deepcopy(rest_of(norm))
        plain = copy_of(supernet, instead).eval()
        self._net: nn.Module = rewrite(plain, RULES.values(), "fuse").model
        if _takes_channels_last(self._net):
            self._net.to(memory_format=torch.channels_last)
        self._convs = [module for module in self._net.modules() if isinstance(module, SummedConv)]

    @torch.no_grad()
    def __call__(self, code: Code) -> nn.Module:
        open_paths = self._space.open_at(code)
        for conv in self._convs:
            self._terms[conv.site].fill(conv, open_paths[conv.site])
        return self._net.eval()


def _takes_channels_last(net: nn.Module) -> bool:
    """Whether a net runs on a CPU, where convs are quicker with channels last, and nothing in it could mind the order of memory."""
    tensors = (*net.parameters(), *net.buffers())
    if not isinstance(net, fx.GraphModule) or any(each.device.type != "cpu" or each.ndim == 5 for each in tensors):
        return False
    methods = {str(node.target) for node in net.graph.nodes if node.op == "call_method"}
    layers = [net.get_submodule(str(node.target)) for node in net.graph.nodes if node.op == "call_module"]
    return not methods & _MEMORY and all(
        type(layer).__module__.startswith("torch.nn.") or isinstance(layer, SummedConv) for layer in layers
    )


_MEMORY = {"view", "view_as", "as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr", "unfold"}


class _Measured:
    """A net for each code, with statistics of its own."""

    def __init__(self, supernet: nn.Module, space: Space, batches: Iterable[Any]) -> None:
        self._supernet = supernet
        self._space = space
        self._batches = list(batches)
        if not self._batches:
            raise InvalidInput("calibrate gave no batch; it takes an iterable of inputs.")
        self._norms = [module for module in supernet.modules() if _keeps_statistics(module)]

    def __call__(self, code: Code) -> nn.Module:
        self._space.choose(self._supernet, code)
        calibrate_norms(self._supernet, self._norms, self._batches)
        return _Running(self._supernet, self._space)(code)


def _norms_behind(supernet: nn.Module, blocks: Mapping[str, RepBlock]) -> dict[str, Layer]:
    """The BatchNorm that only the sum of a block feeds, by the block's path, where branches have none of their own."""
    outline = copy_of(supernet, {id(block): copy.deepcopy(block.conv) for block in blocks.values()})
    return {
        site.path: supernet.get_submodule(site.norm)
        for site in find_sites(outline)
        if site.path in blocks and site.norm is not None and site.refusal is None
    }


def _parts(block: RepBlock, norm: Layer | None) -> tuple[tuple[str, ...], list[Kernel]]:
    """The gated paths of a block, and on one lattice the kernels of what always runs and of each of them, with the BatchNorm behind it."""
    like = float64_like(block.conv.weight)
    kernels = {name: block.kernel_of(name, like) for name in block.paths}
    total = reduce(Kernel.add, (kernel.to("meta") for kernel in kernels.values()))
    nothing = replace(total, weight=like.new_zeros(total.weight.shape), bias=None)
    gated = block.gates.names if block.gates is not None else ()
    always = reduce(Kernel.add, (kernel for name, kernel in kernels.items() if name not in gated), nothing)
    parts = [nothing.add(kernels[name]) for name in gated]
    if norm is None:
        return gated, [always, *parts]
    scale, shift = affine_of(norm_of(norm), like)
    return gated, [always.fold_affine(scale, shift), *(part.fold_affine(scale) for part in parts)]


def _bias(kernel: Kernel) -> Tensor:
    return kernel.weight.new_zeros(kernel.out_channels) if kernel.bias is None else kernel.bias


def _keeps_statistics(module: Layer) -> bool:
    return is_batch_norm(module) and getattr(module, "num_batches_tracked", None) is not None


def _require_separate_blocks(sites: Collection[str], model: nn.Module) -> None:
    """Raise unless each site's sum is linear in what is open, and is all that runs there."""
    if not sites:
        raise InvalidInput(f"{type(model).__name__} has no gates; repfx.passes.gate gives a block's paths theirs.")
    for site in sites:
        if not site:
            raise InvalidInput("the gated block is the model itself: put it into an nn.Sequential.")
        inner = next((other for other in sites if other.startswith(f"{site}.")), None)
        if inner is not None:
            raise InvalidInput(
                f"{inner!r} has gates inside {site!r}, which has some, too: its kernel is no sum over them."
            )
        if any(has_hooks(module) for module in model.get_submodule(site).modules()):
            raise InvalidInput(f"{site!r} has hooks, which a plain net wouldn't run: remove them.")


def _number(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(
            f"score has to give one number for a net; it gave this {type(found).__name__}: {first_line(error)}."
        ) from error


# ---- several processes


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@torch.no_grad()
def _of_first_rank(model: nn.Module) -> nn.Module:
    """A copy with the first rank's tensors: running statistics differ between the ranks of a `DistributedDataParallel`."""
    copied: nn.Module = copy_of(model)
    for tensor in (*copied.parameters(), *copied.buffers()):
        distributed.broadcast(tensor, 0)
    return copied


def _summed_over_ranks(values: Tensor, model: nn.Module) -> Tensor:
    if not _is_distributed():
        return values
    if distributed.get_backend() == "nccl":
        values = values.to(next(model.parameters()).device)
    distributed.all_reduce(values)
    return values
