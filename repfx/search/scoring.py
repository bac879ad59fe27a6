"""Fast scoring: one plain net for all candidates of a search over gated paths. It is refilled for each candidate instead of rebuilt.

Let *K_p* be the kernels of a block's paths, gates and λ included. A block whose open paths are *O* is the one conv (IRepNAS, eq. 6 and 7,
and sec. 3.4)

    K_always + Σ_{p ∈ O} K_p

for every *O*. So each *K_p* is computed once for a state of the supernet, and a candidate is a masked sum at each gated site. The rest of
the net is fused once. IRepNAS fuses each candidate anew.
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
from repfx.algebra.layers import Layer, has_hooks, keeps_statistics
from repfx.algebra.meaning import affine_of
from repfx.blocks.block import SIZES, RepBlock
from repfx.blocks.paths import block_at
from repfx.change.ranks import is_distributed
from repfx.errors import InvalidInput, UnknownName, first_line
from repfx.measuring.calibration import calibrate_norms
from repfx.records.module_tree import called_by, require_module
from repfx.records.notes import copy_of
from repfx.rewriting.pipeline import rewrite
from repfx.rewriting.rule import RULES
from repfx.search.space import Code, Space
from repfx.tracing.sites import find_sites

STATISTICS = ("running", "measured")


class FusedSupernet:
    """The plain nets of all candidates of a model with gated blocks, in eval mode. The model is copied and left untouched.

    The nets have the state that the model has now, so make a new `FusedSupernet` after a step of training.

    `statistics` says where the statistics of a candidate's BatchNorms come from:

    - ``running``: from the supernet, which has gathered them. They cost nothing. But if paths were drawn anew for each step, these
      statistics are those of a mixture of nets, and of no net exactly.
    - ``measured``: from `calibrate`. For each candidate, all BatchNorms that keep statistics, including those of its open branches, are
      set to the mean over these data, in the candidate's multi-branch form, before it is fused. This takes one pass over the data and
      new kernels for each candidate, which is most of what ``running`` saves, so give few batches.

    Neither promises that its ranking of the candidates is nearer to their ranking after retraining.

    Args:
        model: a model with gates of `repfx.passes.gate`; which of them are open doesn't matter.
        statistics: ``running`` or ``measured``.
        calibrate: inputs of the model, or a data loader, for ``measured``. It is read once and kept, so that all candidates see the same
            data.

    Raises:
        UnknownName: there is no such `statistics`.
        InvalidInput: the model has no gates, or gates inside a gated block, or a gated block with hooks; `calibrate` is missing, empty or
            not needed; the kernel of what always runs at a site isn't finite.

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
            raise InvalidInput("calibrate is used only with statistics='measured': leave it out.")
        if statistics == "measured" and calibrate is None:
            raise InvalidInput("statistics='measured' needs calibrate: the data to measure them on.")
        self.space = Space.of(model)
        _require_separate_blocks(self.space.sites, model)
        supernet = copy_of(model).eval().requires_grad_(False)
        self._nets = _Running(supernet, self.space) if calibrate is None else _Measured(supernet, self.space, calibrate)

    def net(self, code: Code) -> nn.Module:
        """Return the plain net of a candidate, in eval mode.

        With ``running`` statistics, all calls return the same module, filled with the weights of the latest code. Don't change it, and copy
        it if you want to keep it. Only sites at which the code differs from the last one are refilled. The net equals the fused
        candidate to 1e-6 in float32 and to 1e-9 in float64. Each kernel is computed in float64 and rounded once to the model's dtype,
        or to float32 if that has more digits, and the kernels are summed in this dtype. On a CPU the net has channels last if nothing
        in it depends on the order of memory.

        With ``measured`` statistics, each call returns a new net.

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
    """Return the score of the plain net of each code, in the order of the codes. No gradients are computed.

    In a run of `torch.distributed` the codes are dealt out, code k to rank k mod the number of ranks, and each rank gets all scores. All
    ranks must call this with the same codes, and all score the first rank's model.

    Args:
        model: a model with gated blocks; it is left untouched.
        codes: the codes; each says for each path of `Space.of(model)` whether it is open.
        score: a function from a plain net in eval mode to a number; higher is better. NaN, such as from a net that overflows, counts as
            minus infinity. The function must not keep the net, because the next code gets the same one.
        statistics, calibrate: the arguments of `FusedSupernet`.

    Raises:
        InvalidInput: as for `FusedSupernet`; or `score` returned something that is no number, or NaN for all codes.

    >>> from repfx.passes.expand import expand
    >>> from repfx.passes.gate import gate
    >>> model = gate(expand(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "acb", preserve=False).eval(), "0")
    >>> images = torch.randn(4, 3, 8, 8)
    >>> found = scores(model, [(True, False), (False, False), (True, False)], lambda net: -net(images).square().mean())
    >>> found[0] == found[2], found[0] == found[1]
    (True, False)
    """
    if is_distributed():
        model = _of_first_rank(model)
    supernet = FusedSupernet(model, statistics=statistics, calibrate=calibrate)
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if is_distributed() else (0, 1)
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
    """One conv whose kernel is refilled. It takes the place of a gated block in a plain net.

    `fuse` merges nothing with it, because `fuse` doesn't know its class and it has no parameters. The sizes of the site's own conv
    (``kernel_size``, ``stride``, …) can be read from it, as from the block.

    Args:
        kernel: the kernel of what always runs, with a window for all paths; the conv is filled with it at first.
        conv: the site's own conv, from which dtype, device and memory format are taken.
        site: path of the site.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, kernel: Kernel, conv: Layer, site: str) -> None:
        super().__init__()
        for name in SIZES:
            if hasattr(conv, name):
                setattr(self, name, getattr(conv, name))
        self.site = site
        self.open: tuple[str, ...] = ()  # the gated paths that it is filled with
        self._sizes = kernel.to("meta")
        filled: Layer = conv_from_kernel(kernel, conv, site)
        self.register_buffer("weight", filled.weight.detach())
        self.register_buffer("bias", _bias(kernel).to(filled.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in, *axes)`` to ``(batch, out, *axes)``."""
        return replace(self._sizes, weight=self.weight, bias=self.bias)(x)

    def extra_repr(self) -> str:
        return f"{ConvSpec.of_kernel(self._sizes)}, open: {', '.join(self.open) or 'none'}"


@dataclass(frozen=True, eq=False)
class _Terms:
    """The terms of which the kernel of a site is the sum, all on one lattice: first what always runs, then each gated path.

    Args:
        names: names of the gated paths.
        weights: weights of the terms, ``(1 + paths, out, in / groups, *window)``.
        biases: biases of the terms, ``(1 + paths, out)``.
    """

    names: tuple[str, ...]
    weights: Tensor
    biases: Tensor

    @classmethod
    def of(cls, names: tuple[str, ...], kernels: Sequence[Kernel], like: Tensor) -> _Terms:
        """Make the terms from kernels in float64. Each is rounded once to the dtype of `like`, float32 at least, on its device."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        weights = [kernel.weight.to(like.device, dtype) for kernel in kernels]
        biases = [_bias(kernel).to(like.device, dtype) for kernel in kernels]
        return cls(names, torch.stack(weights), torch.stack(biases))

    def fill(self, conv: SummedConv, open_paths: tuple[str, ...]) -> None:
        """Fill a conv with the kernel of what always runs and these paths."""
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
    """One net for all codes, with the statistics that the supernet has gathered."""

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
    """Whether a net runs on a CPU, where convs are faster with channels last, and nothing in it depends on the order of memory."""
    tensors = (*net.parameters(), *net.buffers())
    if not isinstance(net, fx.GraphModule) or any(each.device.type != "cpu" or each.ndim == 5 for each in tensors):
        return False
    methods = {str(node.target) for node in net.graph.nodes if node.op == "call_method"}
    layers = [called_by(net, node) for node in net.graph.nodes if node.op == "call_module"]
    return not methods & _MEMORY and all(
        type(layer).__module__.startswith("torch.nn.") or isinstance(layer, SummedConv) for layer in layers
    )


_MEMORY = {"view", "view_as", "as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr", "unfold"}


class _Measured:
    """A new net for each code, with statistics measured for it."""

    def __init__(self, supernet: nn.Module, space: Space, batches: Iterable[Any]) -> None:
        self._supernet = supernet
        self._space = space
        self._batches = list(batches)
        if not self._batches:
            raise InvalidInput("calibrate gave no batch; it takes an iterable of inputs.")
        self._norms = [module for module in supernet.modules() if keeps_statistics(module)]

    def __call__(self, code: Code) -> nn.Module:
        self._space.choose(self._supernet, code)
        calibrate_norms(self._supernet, self._norms, self._batches)
        return _Running(self._supernet, self._space)(code)


def _norms_behind(supernet: nn.Module, blocks: Mapping[str, RepBlock]) -> dict[str, Layer]:
    """Return the BatchNorm that only the sum of a block feeds, by the block's path. Branches of such blocks have none of their own."""
    outline = copy_of(supernet, {id(block): copy.deepcopy(block.conv) for block in blocks.values()})
    return {
        site.path: supernet.get_submodule(site.norm)
        for site in find_sites(outline)
        if site.path in blocks and site.norm is not None and site.refusal is None
    }


def _parts(block: RepBlock, norm: Layer | None) -> tuple[tuple[str, ...], list[Kernel]]:
    """Return the gated paths of a block, and on one lattice the kernel of what always runs and that of each gated path.

    The BatchNorm behind the block is folded into the kernels.
    """
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


def _require_separate_blocks(sites: Collection[str], model: nn.Module) -> None:
    """Raise `InvalidInput` unless each site's kernel is a sum over its open paths, and nothing else runs there."""
    if not sites:
        raise InvalidInput(f"{type(model).__name__} has no gates; repfx.passes.gate adds them to a block.")
    for site in sites:
        if not site:
            raise InvalidInput("the gated block is the model itself: put it into an nn.Sequential.")
        inner = next((other for other in sites if other.startswith(f"{site}.")), None)
        if inner is not None:
            raise InvalidInput(
                f"{inner!r} has gates inside {site!r}, which has gates, too: its kernel is no sum over the open paths."
            )
        if any(has_hooks(module) for module in model.get_submodule(site).modules()):
            raise InvalidInput(f"{site!r} has hooks, which a plain net wouldn't run: remove them.")


def _number(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(
            f"score must return one number for a net; it returned a {type(found).__name__}: {first_line(error)}."
        ) from error


# ---- several processes


@torch.no_grad()
def _of_first_rank(model: nn.Module) -> nn.Module:
    """Return a copy with the first rank's tensors, because running statistics differ among the ranks of a `DistributedDataParallel`."""
    copied: nn.Module = copy_of(model)
    for tensor in (*copied.parameters(), *copied.buffers()):
        distributed.broadcast(tensor, 0)
    return copied


def _summed_over_ranks(values: Tensor, model: nn.Module) -> Tensor:
    if not is_distributed():
        return values
    if distributed.get_backend() == "nccl":
        values = values.to(next(model.parameters()).device)
    distributed.all_reduce(values)
    return values
