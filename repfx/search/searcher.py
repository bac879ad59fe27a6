"""`Searcher`: does in a run what a `Search` decides: it opens gates, trains their parameters and scores candidates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from repfx.blocks.architecture import Architecture
from repfx.blocks.gates import gates_in
from repfx.change.carry import copy_in
from repfx.change.companion import Companion, Run
from repfx.errors import InvalidInput
from repfx.records.journal import journal
from repfx.search.observation import Draw, Gated
from repfx.search.scoring import scores
from repfx.search.space import Code, Space

_TRAINING, _EVAL = (True,), (False,)


class Decides(Protocol):
    """The questions that a searcher asks a search; `repfx.search.base.Search` says what each answer means."""

    @property
    def epochs(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def measures_statistics(self) -> bool: ...
    @property
    def needs_score(self) -> bool: ...
    def trains_gates(self, epoch: int) -> bool: ...
    def first_population(self, space: Space) -> Sequence[Code]: ...
    def next_population(self, seen: Gated, epoch: int) -> Sequence[Code]: ...
    def evaluates(self, epoch: int) -> bool: ...
    def draws(self, seen: Gated, epoch: int, step: int) -> Sequence[Draw]: ...
    def choice(self, seen: Gated) -> Code: ...


class Searcher(Companion):
    """The companion of a search: it acts in a run and holds the search's state.

    Args:
        search: the search, which decides.
        run: the run in which the search acts. Its model has gates while the search goes on. The parameters of gates are taken out of its
            optimizers. Its averages run the same paths as the model. Its `score` scores candidates, and its `calibrate` has the inputs
            on which statistics are measured for each candidate.
    """

    def __init__(self, search: Decides, run: Run) -> None:
        if search.needs_score and run.score is None:
            raise InvalidInput(
                f"{type(search).__name__} scores candidates: give `score`, a function from a net to a number, the higher the better, "
                "such as its accuracy on data that it isn't trained on."
            )
        self.model = run.model
        self.search = search
        self.population: tuple[Code, ...] = ()
        self.scores: tuple[float, ...] = ()
        self.history: list[dict[str, Any]] = []
        self._optimizers = run.optimizers
        self._averages = run.averages
        self._score = run.score
        self._calibrate = run.calibrate
        self._found: Architecture | None = None
        self._known: _Parts | None = None
        self._drawn: tuple[tuple[int, int], Sequence[Draw]] | None = None
        self._state: dict[str, Any] | None = None

    @property
    def space(self) -> Space:
        """The gated paths; empty after the search."""
        return self._parts.space

    @property
    def architecture(self) -> Architecture:
        """The architecture that the search has found; before its end, the paths that run in eval mode, among all that it chooses from."""
        return self._found or Architecture.of(self.model)

    def observe(self) -> Gated:
        """Return the state by which the search decides."""
        parts, values = self._parts, self._parts.values()
        count = len(parts.alphas)
        return Gated(parts.space, values[:count], dict(zip(parts.betas, values[count:])), self.population, self.scores)

    def begin(self, epoch: int) -> None:
        """Draw the first population once there are gates, and open the gates for eval mode and for the first step."""
        if self.space.paths and not self.population:
            self.population = tuple(self.search.first_population(self.space))
            self._choose()
        self.before_step(epoch, 0)

    def shares(self, epoch: int, step: int) -> Iterator[float]:
        """Yield the share of each net of a step in the gradient. The net's gates are open until the next share is asked for."""
        draws = self._draws(epoch, step) if self.space.paths else ()
        for draw in draws:
            self._open(draw)
            yield 1 / len(draws)
        if not draws:
            yield 1.0

    def before_step(self, epoch: int, step: int) -> None:
        """Open the gates of the first net of a step."""
        if self.space.paths:
            self._open(self._draws(epoch, step)[0])

    def after_backward(self, epoch: int, scaler: torch.amp.GradScaler | None) -> None:
        """Train the parameters of gates by their gradients, if the search trains them in this epoch, and remove the gradients."""
        parameters = self._parts.parameters
        optimizer = self._parts.optimizer
        if optimizer is not None and self.search.trains_gates(epoch) and _are_finite(parameters, scaler):
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def after_epoch(self, epoch: int) -> None:
        """Score the population if it is due, and make the next one unless the search ends. Let eval mode run the best candidate."""
        if not self.space.paths:
            return
        if not self.search.needs_score:
            self._choose()
        elif self.search.evaluates(epoch):
            self._evaluate(epoch)
        if epoch == self.search.epochs:
            self._found = Architecture.of(self.model)

    def _evaluate(self, epoch: int) -> None:
        assert self._score is not None
        measured = self.search.measures_statistics
        statistics, calibrate = ("measured", self._calibrate) if measured else ("running", None)
        self.scores = tuple(
            scores(self.model, self.population, self._score, statistics=statistics, calibrate=calibrate)
        )
        best, code = max(zip(self.scores, self.population), key=lambda pair: pair[0])
        self.history.append({"epoch": epoch, "best": best, "code": self.space.digits(code)})
        self._choose()
        if epoch < self.search.epochs:
            self.population = tuple(self.search.next_population(self.observe(), epoch))
            self.scores = ()

    def _choose(self) -> None:
        code = self.search.choice(self.observe())
        for gates in self._parts.gates:
            self.space.open(gates, code, _EVAL)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the search; α, β and the open paths are in the model's state."""
        return {
            "population": [list(code) for code in self.population],
            "scores": list(self.scores),
            "history": self.history,
            "found": None if self._found is None else self._found.to_json(),
            "optimizer": None if self._parts.optimizer is None else self._parts.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        population = tuple(tuple(code) for code in state["population"])
        if not all(isinstance(is_open, bool) for code in population for is_open in code):
            raise InvalidInput("the codes of its candidates must hold true or false for each path")
        if not all(type(score) in (int, float) for score in state["scores"]) or len(state["scores"]) not in (
            0,
            len(population),
        ):
            raise InvalidInput(f"it must have a score, a number, for each of its {len(population)} candidates, or none")
        if not all(isinstance(entry, dict) and entry.keys() == {"epoch", "best", "code"} for entry in state["history"]):
            raise InvalidInput("each entry of its history must have an epoch, a best score and a code")
        self._found = None if state["found"] is None else Architecture.from_json(state["found"])
        self.population = population
        self.scores = tuple(state["scores"])
        self.history = list(state["history"])
        self._state = state["optimizer"]
        self._known = self._drawn = None  # the model itself may be loaded later

    def require_fits(self) -> None:
        """Raise `InvalidInput` if the candidates or the state of α and β don't fit the paths of the model."""
        paths = len(self.space.paths)
        wrong = next((len(code) for code in self.population if paths and len(code) != paths), None)
        if wrong is not None:
            raise InvalidInput(f"a candidate has {wrong} paths, and the model has {paths}")
        for state in self._parts.optimizer_state.values():
            for key, value in state.items():
                if not (isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()):
                    raise InvalidInput(f"{key!r} of a gate's parameter must be one number")

    def _draws(self, epoch: int, step: int) -> Sequence[Draw]:
        if self._drawn is None or self._drawn[0] != (epoch, step):
            self._drawn = (epoch, step), self.search.draws(self.observe(), epoch, step)
        return self._drawn[1]

    def _open(self, draw: Draw) -> None:
        for gates in self._parts.gates:
            self.space.open(gates, draw.code, _TRAINING)
        noises = self._parts.noises
        if draw.noise and noises:
            values = torch.tensor(draw.noise, dtype=noises[0].dtype, device=noises[0].device)
            torch._foreach_copy_(noises, list(values.unbind()))

    @property
    def _parts(self) -> _Parts:
        if self._known is None or self._known.done is not journal(self.model):
            old = {} if self._known is None else self._known.optimizer_state
            self._known = _Parts(self.model, self._averages, self.search)
            self._known.leave(self._optimizers)
            self._known.take_over(old)
            if self._state is not None and self._known.optimizer is not None:
                self._known.optimizer.load_state_dict(self._state)
                self._state = None
        return self._known


class _Parts:
    """The gates of a model in its present structure, and the optimizer of their parameters."""

    def __init__(self, model: nn.Module, averages: Sequence[nn.Module], search: Decides) -> None:
        gates: dict[str, Any] = gates_in(model)
        self.done = journal(model)
        self.space = Space.of(model)
        self.gates = [gates, *(gates_in(copy_in(average, model)) for average in averages)]
        single: list[Any] = [gate for each in gates.values() for gate in each.of.values()]
        self.alphas: list[nn.Parameter] = [gate.alpha for gate in single]
        self.betas: dict[str, nn.Parameter] = {
            site: each.block.alpha for site, each in gates.items() if hasattr(each, "block")
        }
        self.noises: list[Tensor] = [gate.noise for gate in single if hasattr(gate, "noise")]
        self.parameters = [*self.alphas, *self.betas.values()]
        adam = {"lr": search.learning_rate, "betas": search.betas, "weight_decay": search.weight_decay}
        self.optimizer = torch.optim.Adam(self.parameters, **adam) if self.parameters else None  # type: ignore[arg-type]

    @property
    def optimizer_state(self) -> dict[Any, Any]:
        """The state of the gates' optimizer, by parameter."""
        return {} if self.optimizer is None else dict(self.optimizer.state)

    def take_over(self, state: dict[Any, Any]) -> None:
        """Take over the optimizer's state of the parameters that were there before."""
        if self.optimizer is not None:
            self.optimizer.state.update({each: state[each] for each in self.parameters if each in state})

    def values(self) -> list[float]:
        """Return the values of all `parameters`, in one transfer from the device."""
        if not self.parameters:
            return []
        found: list[float] = torch.stack([parameter.detach() for parameter in self.parameters]).tolist()
        return found

    def leave(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Remove the parameters of gates from the optimizers of the weights."""
        own = set(self.parameters)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [parameter for parameter in group["params"] if parameter not in own]
            for parameter in own:
                optimizer.state.pop(parameter, None)


@torch.no_grad()
def _are_finite(parameters: Sequence[nn.Parameter], scaler: torch.amp.GradScaler | None) -> bool:
    """Divide gradients by a scaler's scale, if it is in use, and tell whether there are any and all are finite."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return False
    if scaler is not None and scaler.is_enabled():
        torch._foreach_div_(grads, scaler.get_scale())
    return bool(torch.stack(grads).isfinite().all())
