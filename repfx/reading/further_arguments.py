"""Further arguments, ``*args`` and ``**kwargs``, that code only passes on to methods of its own, as detectors of ultralytics do."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from repfx.reading.function_source import function_node


def only_passed_on(forward: Callable[..., Any], cls: type) -> frozenset[str]:
    """Return the names of further arguments that a forward only passes on to methods of its class which take named arguments alone.

    Such code runs without them, too: they are options, and not inputs as in ``forward(self, *features)``.

    >>> class Detector:
    ...     def forward(self, x, *args): return self.predict(x, *args)
    ...     def predict(self, x, augment=False): return x
    >>> class Decoder(Detector):
    ...     def forward(self, x, *skips): return sum(skips, x)
    >>> only_passed_on(Detector.forward, Detector), only_passed_on(Decoder.forward, Decoder)
    (frozenset({'args'}), frozenset())
    """
    node = function_node(forward)
    if not isinstance(node, ast.FunctionDef) or not node.args.args:
        return frozenset()
    names = {each.arg for each in (node.args.vararg, node.args.kwarg) if each is not None}
    own = node.args.args[0].arg
    passed = {id(value) for call in ast.walk(node) if isinstance(call, ast.Call) for value in _passed(call, own, cls)}
    read = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
    used = {each.id for each in read if id(each) not in passed}
    # whatever is given to code that reads none of them is all the same
    return frozenset(names & {each.id for each in read} - used)


def _passed(call: ast.Call, own: str, cls: type) -> Iterator[ast.expr]:
    """Yield what a call of an own method passes on by ``*`` or ``**`` if the method takes named arguments alone."""
    function = call.func
    if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == own):
        return
    method = inspect.getattr_static(cls, function.attr, None)
    if not inspect.isfunction(method):
        return
    parameters = inspect.signature(method).parameters.values()
    if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters):
        return
    yield from (each.value for each in call.args if isinstance(each, ast.Starred))
    yield from (each.value for each in call.keywords if each.arg is None)
