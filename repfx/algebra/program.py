"""`Program`: recorded operations, run so that equal operations on equal shapes are one.

Almost everything that the algebra does to weights acts on the entries of the first axis, the rows, one by one: scaling output channels,
adding kernels, multiplying one matrix for each group. So operations of several kernels run as one operation on all their rows, one
below the other. Only the shape behind the first axis has to be equal. Views need no rows in common, but they, too, run together, so
that operands need not be put together again.

The number of operations grows with the number of shapes, not with the number of kernels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.algebra.deferred import Deferred

_MOST_NUMBERS = 2**26  # in one operation, because putting operands together takes memory

_OF_NUMBERS: dict[str, Callable[..., Tensor]] = {
    "mul": torch.mul,
    "add": torch.add,
    "neg": torch.neg,
    "rsqrt": torch.rsqrt,
}


def _run(node: Deferred, rows: int, sources: Sequence[Tensor]) -> Tensor:
    """Run an operation on `rows` rows."""
    name, options = node.name, node.options
    if name in _OF_NUMBERS:
        operands = iter(sources)
        return _OF_NUMBERS[name](*(next(operands) if each is None else each for each in options))
    shape = (rows, *node.shape[1:]) if node.shape else ()
    match name:
        case "full":
            return torch.full(shape, options, dtype=node.dtype, device=node.device)
        case "to":
            return sources[0].to(options)
        case "sum":
            return sources[0].sum(options)
        case "einsum":
            return torch.einsum(options, *sources)
        case "reshape":
            return sources[0].reshape(shape)
        case "expand":
            return sources[0].expand(shape)
        case "permute":
            return sources[0].permute(options)
        case "pad":
            return F.pad(sources[0], options)
        case "diag_embed":
            return torch.diag_embed(sources[0], *options)
    places = tuple(slice(*each) if isinstance(each, tuple) else each for each in options)
    return sources[0][places]


def _acts_on_rows(node: Deferred) -> bool:
    """Whether an operation computes each row of its result from the same row of each operand, as it would from these rows alone."""
    if not node.shape or not node.sources or any(each.shape[:1] != node.shape[:1] for each in node.sources):
        return False
    match node.name:
        case "sum":
            return bool(node.options > 0)
        case "einsum":
            *terms, result = node.options.replace("->", ",").split(",")
            return all(term[0] == result[0] for term in terms)
        case "permute":
            return bool(node.options[0] == 0)
        case "pad":
            return len(node.options) < 2 * node.ndim
        case "diag_embed":
            return bool(min(node.options[1:]) > 0)
        case "slice":
            return node.options[0] is ... and len(node.options) <= node.ndim
    return all(each.ndim == node.ndim for each in node.sources) if node.name in _OF_NUMBERS else True


def _size(node: Deferred) -> int:
    """Return the numbers that an operation reads or writes."""
    return max(math.prod(each.shape) for each in (node, *node.sources))


def _alike(node: Deferred) -> Hashable:
    """Return a key that is equal for nodes that can run as one operation."""
    kind = (node.name, node.options, node.dtype, node.device)
    if _acts_on_rows(node):
        return kind, node.shape[1:], *(each.shape[1:] for each in node.sources)
    if node.name == "reshape" and node.shape and node.sources[0].shape:  # rows of equal shape are split in equal ways
        return kind, node.shape, node.sources[0].shape
    return id(node)


@dataclass(eq=False)
class _Value:
    """A tensor that a program computes: the rows of one or several nodes, one below the other."""

    nodes: tuple[Deferred, ...]
    operands: list[list[_Part]] = field(default_factory=list)
    splits: list[tuple[set[int], set[int]]] = field(default_factory=list)  # what each needs: nodes, and where to cut

    def __post_init__(self) -> None:
        self.ends = [0, *accumulate(node.shape[0] if node.shape else 1 for node in self.nodes)]

    def parts(self, ranges: Sequence[tuple[int, int]]) -> list[list[_Part]]:
        """Return for each range of nodes the parts that it consists of, all from one split.

        A split gives each node to one operand alone. So gradients of the whole are put together once, not added piece by piece.
        """
        whole = (0, len(self.nodes))
        wanted = {*ranges} - {whole}
        nodes = [node for each in wanted for node in range(*each)]
        if len({*nodes}) < len(nodes):  # ranges overlap
            units = iter(self.parts([(node, node + 1) for each in ranges for node in range(*each)]))
            return [[part for _ in range(*each) for part in next(units)] for each in ranges]
        index = next((i for i, (taken, _) in enumerate(self.splits) if taken.isdisjoint(nodes)), len(self.splits))
        if wanted:
            if index == len(self.splits):
                self.splits.append((set(), {*whole}))
            taken, cuts = self.splits[index]
            taken.update(nodes)
            cuts.update(end for each in wanted for end in each)
        return [[_Part(self, None, 0) if each == whole else _Part(self, index, each[0])] for each in ranges]

    def pieces(self) -> list[tuple[list[_Part], list[int]]]:
        """Return for each split its parts and their numbers of rows."""
        found = []
        for index, (_, cuts) in enumerate(self.splits):
            parts = [_Part(self, index, cut) for cut in sorted(cuts)[:-1]]
            found.append((parts, [self.ends[last] - self.ends[first] for first, last in pairwise(sorted(cuts))]))
        return found


@dataclass(frozen=True)
class _Part:
    """All of a value, or the piece of one of its splits that begins at a node."""

    value: _Value
    split: int | None
    first: int


class Program:
    """A pure function from tensors to tensors, which runs what was recorded.

    Args:
        outputs: what to compute.

    `needs` has, for each output, the numbers of the tensors that it depends on.

    >>> from repfx.algebra.deferred import Recording
    >>> recording, tensors = Recording(), [torch.ones(2, 3), torch.ones(4, 3)]
    >>> first, second = map(recording.input, tensors)
    >>> program = Program([first * 2, second * 2])
    >>> [tuple(each.shape) for each in program(tensors)], program.needs
    ([(2, 3), (4, 3)], [frozenset({0}), frozenset({1})])
    """

    def __init__(self, outputs: Sequence[Deferred]) -> None:
        places, values = _schedule(outputs)
        self.needs = [frozenset(_inputs_of(node)) for node in outputs]
        self._inputs = [(value, node.options) for node, (value, _) in places.items() if node.name == "input"]
        self._outputs = [_parts([places[node]]) for node in outputs]
        self._splits = {value: value.pieces() for value in values}
        self._values: list[_Value] = []
        self._constants: dict[_Part, Tensor] = {}
        with torch.no_grad(), torch.inference_mode(False):
            for value in values:
                if all(part in self._constants for parts in value.operands for part in parts):
                    self._compute(value, self._constants)
                else:
                    self._values.append(value)
        self._last_uses = self._find_last_uses()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute the outputs; differentiable.

        Args:
            tensors: the tensors of the recording, or others of their shapes, dtypes and devices.
        """
        found = {**self._constants, **{_Part(value, None, 0): tensors[index] for value, index in self._inputs}}
        for value, done in zip(self._values, self._last_uses):
            self._compute(value, found)
            for part in done:
                del found[part]
        return [_joined(parts, found) for parts in self._outputs]

    def _compute(self, value: _Value, found: dict[_Part, Tensor]) -> None:
        """Compute a value, and cut it in all ways in which it is needed."""
        operands = [_joined(parts, found) for parts in value.operands]
        whole = found[_Part(value, None, 0)] = _run(value.nodes[0], value.ends[-1], operands)
        for parts, sizes in self._splits[value]:
            found.update(zip(parts, whole.split(sizes)))

    def _find_last_uses(self) -> list[list[_Part]]:
        """Return for each value the parts that nothing behind it needs."""
        seen = {part for parts in self._outputs for part in parts}
        found: list[list[_Part]] = []
        for value in reversed(self._values):
            parts = {_Part(value, None, 0), *(part for split, _ in self._splits[value] for part in split)}
            used = {part for operand in value.operands for part in operand}
            found.append([part for part in parts | used if part not in seen])
            seen |= used
        return found[::-1]


def _joined(parts: list[_Part], found: dict[_Part, Tensor]) -> Tensor:
    pieces = [found[part] for part in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _parts(places: Iterable[tuple[_Value, int]]) -> list[_Part]:
    """Return the parts that nodes at these places make up, as few as possible."""
    ranges: list[tuple[_Value, tuple[int, int]]] = []
    for value, place in places:
        if ranges and ranges[-1][0] is value and ranges[-1][1][1] == place:
            ranges[-1] = value, (ranges[-1][1][0], place + 1)
        else:
            ranges.append((value, (place, place + 1)))
    of_value: dict[_Value, list[tuple[int, int]]] = defaultdict(list)
    for value, each in ranges:
        of_value[value].append(each)
    parts = {value: iter(value.parts(each)) for value, each in of_value.items()}
    return [part for value, _ in ranges for part in next(parts[value])]


def _schedule(outputs: Sequence[Deferred]) -> tuple[dict[Deferred, tuple[_Value, int]], list[_Value]]:
    """Return where each node that the outputs need is computed, and all values in the order of computing."""
    users = _users(outputs)
    ranks = _ranks(users)
    waiting = {node: len(set(node.sources)) for node in users}
    ready: dict[Hashable, list[Deferred]] = defaultdict(list)
    depths: dict[Hashable, int] = defaultdict(int)
    places: dict[Deferred, tuple[_Value, int]] = {}
    order: list[_Value] = []

    def done(value: _Value) -> None:
        places.update((node, (value, place)) for place, node in enumerate(value.nodes))
        for node in value.nodes:
            for user in users[node]:
                waiting[user] -= 1
                if not waiting[user]:
                    add(user)

    def add(node: Deferred) -> None:
        ready[_alike(node)].append(node)
        depths[_alike(node)] += node.depth

    for node in [node for node, count in waiting.items() if not count]:
        if node.name == "input":
            done(_Value((node,)))
        else:
            add(node)
    while ready:
        # what is behind much else can wait for more like it
        key = min(ready, key=lambda each: depths[each] / len(ready[each]))
        del depths[key]
        for group in _chunks(sorted(ready.pop(key), key=ranks.__getitem__)):
            operands = [_parts(places[node.sources[i]] for node in group) for i in range(len(group[0].sources))]
            order.append(_Value(group, operands))
            done(order[-1])
    return places, order


def _chunks(group: list[Deferred]) -> Iterator[tuple[Deferred, ...]]:
    """Cut a group where its numbers become more than one operation should have."""
    chunk: list[Deferred] = []
    total = 0
    for node in group:
        size = _size(node)
        if chunk and total + size > _MOST_NUMBERS:
            yield tuple(chunk)
            chunk, total = [], 0
        chunk.append(node)
        total += size
    yield tuple(chunk)


def _ancestors(outputs: Iterable[Deferred]) -> dict[Deferred, None]:
    """Return all nodes that the outputs need, themselves included."""
    found: dict[Deferred, None] = {}
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending.extend(node.sources)
    return found


def _inputs_of(output: Deferred) -> Iterable[int]:
    return (node.options for node in _ancestors([output]) if node.name == "input")


def _users(outputs: Sequence[Deferred]) -> dict[Deferred, list[Deferred]]:
    """Return all nodes that the outputs need, each with the nodes that need it, operands first."""
    users: dict[Deferred, list[Deferred]] = {
        node: [] for node in sorted(_ancestors(outputs), key=lambda node: node.depth)
    }
    for node in users:
        for source in dict.fromkeys(node.sources):
            users[source].append(node)
    return users


def _ranks(users: dict[Deferred, list[Deferred]]) -> dict[Deferred, Any]:
    """Return where each node belongs in its value. Nodes that are used together stand side by side, so that nothing is reordered."""
    numbers: dict[Hashable, int] = {}
    ranks: dict[Deferred, Any] = {}
    for index, node in enumerate(reversed(users)):
        largest = max(users[node], key=lambda user: len(user.shape), default=None)
        number = numbers.setdefault(_alike(node), len(numbers))
        ranks[node] = (number, ranks[largest]) if largest is not None else (number, (-index,))
    return ranks
