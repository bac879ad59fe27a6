"""A tracer for torch.fx that also records writes in place, arguments with defaults, and iteration over a parameter."""

from __future__ import annotations

import enum
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.utils import _pytree as pytree

from repfx.algebra.layers import has_call_of_its_own, has_hooks
from repfx.blocks.block import RepBlock
from repfx.errors import first_line
from repfx.graphs.checks import require_answer, require_default, require_given, require_nothing, require_parts
from repfx.graphs.vocabulary import ELEMENTWISE_LAYERS
from repfx.reading.further_arguments import only_passed_on
from repfx.records.generators import Generators
from repfx.tracing.counts import count_of, may_be_fewer
from repfx.tracing.forms import GrowingForms
from repfx.tracing.input_checks import check_at
from repfx.tracing.leaves import is_leaf, is_only_a_function, stays_whole
from repfx.tracing.modes import Modes, modes_put_back
from repfx.tracing.proxy import ValueProxy, is_of_sizes, is_tracing
from repfx.tracing.recording import calls_recorded, functions_recorded, tensors_recorded
from repfx.tracing.settings import Settings, changed_setting, in_mode, settings_in, settings_put_back

OUTSIDE = "repfx_outside"  # key of a node's meta: the class of the module, none of the root's, whose code made the node
_DRAWS = "it draws random numbers in code"  # a failure
_KINDS = ("_is_param", "_is_buffer")  # attributes that torch asks for when code keeps a tensor as an attribute
_PURE_LAYERS: frozenset[type[nn.Module]] = frozenset(
    {nn.Linear, *ELEMENTWISE_LAYERS}
)  # they compute the same in both modes
_GENERATED = "<eval_with_key>"  # the name of the files in which torch.fx writes the code of graphs


@dataclass(frozen=True)
class _Place:
    """Where a module inside the root holds a parameter or a buffer."""

    path: str
    owner: nn.Module
    kind: str
    name: str

    @property
    def tensor(self) -> object:
        """The parameter or buffer that is at this place now, or None."""
        table: dict[str, object] = vars(self.owner)[self.kind]
        return table.get(self.name)


def _places(root: nn.Module) -> Iterator[_Place]:
    """Yield the places of all parameters, then of all buffers, in the order in which torch lists them."""
    for kind in ("_parameters", "_buffers"):
        for path, module in root.named_modules():
            for name, tensor in vars(module).get(kind, {}).items():
                if tensor is not None:
                    yield _Place(f"{path}.{name}".lstrip("."), module, kind, name)


class Tracer(fx.Tracer):
    """A tracer of one module in one mode.

    Leaves are torch's convs, BatchNorms, and modules that hold neither or that have hooks. So are the blocks in `shared`, and modules of
    the `opaque` classes. Code that draws from one of the `generators` counts as a failure.

    Args:
        given: what a caller gives the traced module, by the name of the argument; None if that isn't known.
        settled: modules whose code runs in one mode, in whatever mode the code is that calls them; each with whether it is training mode.
        differentiated: the answer to code that asks whether a value which depends on the input needs a gradient.
    """

    proxy_buffer_attributes = True  # else a value computed from a buffer would stay as it is when others are loaded

    def __init__(
        self,
        shared: Container[nn.Module] = (),
        opaque: Container[type[nn.Module]] = (),
        given: Mapping[str, Any] | None = None,
        generators: Generators | None = None,
        settled: Mapping[nn.Module, bool] | None = None,
        *,
        differentiated: bool = False,
    ) -> None:
        super().__init__()
        self._differentiated = differentiated
        self._settled = settled or {}
        self._generators = generators
        self.forms = GrowingForms(fx.Graph(), nn.Module())
        self._hooked: set[nn.Module] = set()
        self.shared = shared
        self.opaque = opaque
        self.given = given
        self.block_calls: Counter[nn.Module] = Counter()
        self._modes = Modes.now()
        self._settings: Settings = {}
        self._leaves: dict[nn.Module, bool] = {}
        self._places: dict[int, _Place] = {}  # of the root's parameters and buffers, by their ids
        self.running: list[nn.Module] = []  # modules whose code runs now; after an error, whose code failed
        self.failures: list[tuple[str, nn.Module | None]] = []  # caught by code or not; with the module that failed

    def let_go(self) -> None:
        """Drop all references to modules.

        torch.fx puts a tracer that has run into a reference cycle, which only Python's garbage collector can free.
        """
        self.root = nn.Module()
        self.submodule_paths = None
        self.tensor_attrs = {}
        self._hooked.clear()
        self._settings = {}
        self._settled = {}
        self._leaves.clear()
        self._places.clear()
        self.forms = GrowingForms(fx.Graph(), self.root)
        self.block_calls.clear()
        self.running.clear()
        self.failures.clear()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a module like torch.fx, but without its wrappers in `nn.Module`, which the code of all threads would run into."""
        function = type(root).forward
        if not isinstance(function, FunctionType):
            raise TypeError("its forward is no function of Python")
        self._begin(root, function.__code__)
        self._settings = settings_in(root)
        function, arguments = self.create_args_for_root(function, True, concrete_args)
        with (
            settings_put_back(self._settings),
            modes_put_back() as self._modes,
            functions_recorded(root),
            calls_recorded(root, self.call_module),
            tensors_recorded(root, partial(self._read, {})),
        ):
            result = self.create_arg(function(*arguments))
            self.create_node("output", "output", (result,), {}, type_expr=function.__annotations__.get("return"))
            for module in self._settings:
                self._require_settings(module)
        self.submodule_paths = None
        return self.graph

    def _begin(self, root: nn.Module, code: CodeType) -> None:
        """Set the attributes that `fx.Tracer` works with."""
        self.root, self.root_module_name = root, root._get_name()
        self.submodule_paths = {module: path for path, module in root.named_modules()}
        self.tensor_attrs = {
            value: f"{path}.{name}".lstrip(".")
            for path, module in root.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, _symbolic_trace._constant_attribute_types)
        }
        self._places = {id(place.tensor): place for place in reversed([*_places(root)])}  # the first place counts
        self.graph = fx.Graph(tracer_cls=type(self))
        self.forms = GrowingForms(self.graph, root)
        self.graph._co_fields = {name: getattr(code, name) for name in ("co_name", "co_filename", "co_firstlineno")}

    def _read(self, proxies: dict[str, fx.Proxy], name: str, tensor: Any) -> Any:
        place = self._places.get(id(tensor))
        if place is None or place.tensor is not tensor:  # torch.fx compares it with each tensor of the root
            return self.getattr(name, tensor, proxies)
        if place.path not in proxies:
            proxies[place.path] = self.create_proxy("get_attr", place.path, (), {})
        return proxies[place.path]

    def _require_same_surroundings(self) -> nn.Module | None:
        """Raise an error if code has switched a mode, or if it runs inside a module that the root doesn't have.

        Such a module is kept in a list, a class or a global name. The graph couldn't follow its weights and its mode. If it has neither,
        as an activation hasn't, return it.
        """
        self._modes.require()
        module = _innermost_called()
        if module is None or module in (self.submodule_paths or {}):
            return None
        if not is_only_a_function(module):
            raise NameError(f"it calls a {type(module).__name__} that is not installed as a submodule")
        return module

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._require_same_surroundings()
        if has_call_of_its_own(m):  # its __call__ has already run by now, and would run again in the graph
            self.running.append(m)
            raise TypeError(f"{type(m).__name__} has a __call__ of its own")
        self._require_settings(m)
        self.block_calls[m] += isinstance(m, RepBlock)
        self.running.append(m)
        with in_mode(m, self._settled[m], self._settings) if m in self._settled else nullcontext():
            if self._computes_a_constant(m, args, kwargs):
                result = forward(*args, **kwargs)
            else:
                result = super().call_module(m, self._watched(forward), args, kwargs)
        self.running.pop()
        return result

    def _computes_a_constant(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a layer of torch gets only what is computed from parameters alone. Its own code is traced then.

        So what it returns is known to be such a value, too.
        """
        if type(m) not in _PURE_LAYERS or has_hooks(m):
            return False
        given = [value for value in pytree.tree_leaves((args, kwargs)) if issubclass(type(value), fx.Proxy)]
        return bool(given) and all(self.forms.of(value.node) is not None for value in given)

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of a module that is traced through, with a look at what the code before it and its own code have drawn."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.note_draws(self.running[-2] if len(self.running) > 1 else None)
            result = forward(*args, **kwargs)
            self.note_draws(self.running[-1])
            return result

        return run

    def note_draws(self, module: nn.Module | None) -> None:
        """Count it as a failure of a module's code if random numbers were drawn since the last time: a graph would repeat them."""
        if self._generators is not None and self._generators.have_drawn():
            self.failures.append((_DRAWS, module))

    def _require_settings(self, module: nn.Module) -> None:
        """Raise `TypeError` if code has changed a setting of a module that it calls. It isn't known which code did that.

        A hook that code has added counts as a failure.
        """
        is_leaf = self.is_leaf_module(module, "")
        for inner in module.modules() if is_leaf else (module,):
            if has_hooks(inner) and inner not in self._hooked:
                self.failures.append(("its code adds hooks", self.running[-1] if self.running else None))
            changed = changed_setting(inner, self._settings)
            if changed is not None:
                self.running.clear()
                raise TypeError(f"it changes {changed.strip('_')!r} of a {type(inner).__name__} while it runs")

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        """Make a node, without an annotation that is text, because torch 2.8 can't pickle a graph with one.

        ``from __future__ import annotations`` turns annotations into text.

        Raises:
            TypeError: code has switched gradients or autocast on or off since tracing began. A graph can't record that.
            NameError: code of a module runs that isn't inside the root, and is more than a function.
        """
        outside = self._require_same_surroundings()
        annotation = None if isinstance(type_expr, str) else type_expr
        node = super().create_node(kind, target, args, kwargs, name, annotation)
        if outside is not None:
            node.meta[OUTSIDE] = type(outside).__name__
        self.forms.add(node)
        return node

    def create_arg(self, a: Any) -> Any:
        """Turn numpy's numbers, and other numbers of a class of their own, into plain ones, because the graph is written as text.

        Raises:
            TypeError: a tensor was computed from parameters that were not read as attributes. It would stay as it is when they change.
        """
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and a.grad_fn is not None:
            raise TypeError("it computes with parameters that it doesn't read as attributes of its modules")
        if type(a).__module__ == "numpy" and getattr(a, "ndim", 1) == 0:
            return a.item()
        if type(a) not in (bool, int, float) and isinstance(a, (int, float)) and not isinstance(a, enum.Enum):
            return int(a) if isinstance(a, int) else float(a)
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        names = self.forms.parameters_of(obj.node)
        if obj.node.target is getattr and obj.node.args[1] in _KINDS and names:
            raise self._noted(
                TypeError(f"code keeps what it computes from {names} as an attribute, or asks for its class")
            )
        if names:
            raise self._noted(TypeError(f"code decides by {names}, and a graph would keep the decision"))
        if asks_for_gradient(obj.node):
            return self._differentiated
        check = check_at(_asking_frame()) if is_of_sizes(obj.node) else None
        if check is not None:
            self.create_proxy("call_function", require_answer, (obj, *check), {})
            return check.answer
        return bool(self._noting_failure(super().to_bool, obj))

    def count_of(self, obj: fx.Proxy) -> int | None:
        """Return over how many values code iterates in a proxy, or None. The graph checks the number where the input may change it."""
        count = count_of(obj.node) or self.forms.parts_of(obj.node)
        checked = any(user.target is require_parts for user in obj.node.users)
        if count is not None and may_be_fewer(obj.node) and not checked:
            self.create_proxy("call_function", require_parts, (obj, count), {})
        return count

    def as_number(self, obj: fx.Proxy, asked: str) -> Exception:
        """Return the error for code that asks for a plain number, by `float()` for example. Note it as a failure."""
        names = self.forms.parameters_of(obj.node)
        if names:
            return self._noted(TypeError(f"code makes {names} a plain number by {asked}, and a graph would keep it"))
        return self._noted(TypeError(f"{asked} of a value that depends on the input"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        count = self.count_of(obj)
        if count is not None:
            value: Any = obj
            return iter([value[index] for index in range(count)])
        found: Iterator[Any] = self._noting_failure(super().iter, obj)
        return found

    def _noting_failure(self, function: Callable[[fx.Proxy], Any], obj: fx.Proxy) -> Any:
        """Call a function and note its error, because code may catch the error and go on as if it had been its own."""
        try:
            return function(obj)
        except Exception as error:
            self._noted(error)
            raise

    def _noted(self, error: Exception) -> Exception:
        self.failures.append((sentence(error), self.running[-1] if self.running else None))
        return error

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ValueProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m not in self._leaves:
            self._leaves[m] = is_leaf(m) or stays_whole(m) is not None or m in self.shared or type(m) in self.opaque
        return self._leaves[m]

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Trace each argument that has a default with that default, unless it is an input; and with no further arguments that are options.

        The graph refuses any other value when it is called, and it refuses the default of an input.
        """
        self._hooked = {module for module in self.root.modules() if has_hooks(module)}
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = list(inspect.signature(root_fn).parameters.values())
        single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # torch.fx lists them first
        if not root_fn.__code__.co_filename.startswith(_GENERATED):  # a graph's own code has its checks
            kept = _values_kept(parameters[1:], self.given)
            for index, parameter in enumerate(single[1:], 1):
                if parameter.default is not parameter.empty and isinstance(arguments[index], fx.Proxy):
                    arguments[index] = self._checked(arguments[index], parameter, kept)
            options = only_passed_on(root_fn, type(self.root)) - (self.given or {}).keys()
            further = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            for index, parameter in enumerate(further, len(single)):
                if parameter.name in options:
                    self.create_proxy("call_function", require_nothing, (arguments[index], parameter.name), {})
                    arguments[index] = () if parameter.kind is parameter.VAR_POSITIONAL else {}
        _order_placeholders(parameters[1:], self.graph)
        return function, arguments

    def _checked(self, argument: fx.Proxy, parameter: inspect.Parameter, kept: Mapping[str, Any]) -> Any:
        """Let the graph check an argument when it is called. Return the value that stands for it: the argument itself if it is an input."""
        if argument.node.all_input_nodes:
            raise TypeError(f"{parameter.name!r} has a tensor as its default, which torch.fx can't write")
        name, default = parameter.name, kept.get(parameter.name, parameter.default)
        check = require_default if name in kept else require_given
        self.create_proxy("call_function", check, (argument, name, default), {})
        return kept.get(name, argument)


def asks_for_gradient(node: fx.Node) -> bool:
    """Whether a node asks whether a tensor needs a gradient."""
    return node.op == "call_function" and node.target is getattr and str(node.args[1]) == "requires_grad"


def _asking_frame() -> FrameType:
    """The innermost frame of the model's own code."""
    frame = sys._getframe(1)
    while frame.f_back is not None and is_tracing(frame):
        frame = frame.f_back
    return frame


def _values_kept(parameters: list[inspect.Parameter], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the value of each argument that has a default and is no input, by its name.

    Inputs are the arguments that a caller gives a tensor. If nothing is known of a caller, only the first one is an input.
    """
    optional = [parameter for parameter in parameters if parameter.default is not parameter.empty]
    if given is None:
        return {parameter.name: parameter.default for parameter in optional if parameter is not parameters[0]}
    values = {parameter.name: given.get(parameter.name, parameter.default) for parameter in optional}
    return {name: value for name, value in values.items() if not _holds_a_tensor(value)}


def _holds_a_tensor(value: object) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _order_placeholders(parameters: list[inspect.Parameter], graph: fx.Graph) -> None:
    """Give the graph's forward the order of arguments that the traced forward has.

    torch.fx would put ``*args`` after arguments that are taken by keyword alone.
    """
    required = inspect.Parameter.empty
    parameters = sorted(parameters, key=lambda p: (p.kind, p.kind is p.KEYWORD_ONLY and p.default is not required))
    placeholders = {str(node.target).lstrip("*"): node for node in graph.nodes if node.op == "placeholder"}
    nodes = [placeholders[parameter.name] for parameter in parameters]
    for before, node in itertools.pairwise(nodes):
        before.append(node)
    for before, after in itertools.pairwise(parameters):
        if after.kind is after.KEYWORD_ONLY and after.default is required and before.default is not required:
            raise TypeError(f"torch.fx can't take {after.name!r} by keyword alone, after an argument with a default")


_CALLED = nn.Module._call_impl.__code__
_STOPS = frozenset(
    map(id, (_CALLED, Tracer.call_module.__code__, Tracer.trace.__code__))
)  # hashing code takes as long as it is


def _innermost_called() -> nn.Module | None:
    """The module whose code runs now and was called outside of what the tracer records, or None if the tracer itself made the call."""
    frame: FrameType | None = sys._getframe(3)  # the caller of what the tracer does
    while frame is not None and id(frame.f_code) not in _STOPS:
        frame = frame.f_back
    return frame.f_locals["self"] if frame is not None and frame.f_code is _CALLED else None


def sentence(error: Exception) -> str:
    """Return the first sentence of an error, without torch.fx's advice.

    It is kept instead of the error, because the error's frames would keep the model alive.
    """
    return first_line(error).split(". ")[0]
