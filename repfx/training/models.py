"""Models by name and weights from files, as the options `--model` and `--weights` of the command line give them.

A name is `torchvision:NAME`, `timm:NAME`, `package.module:callable` or `file.py:callable`. Only `load_pretrained` downloads anything.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from repfx.errors import InvalidInput, UnknownName, first_line
from repfx.records.pickled_file import load_pickled
from repfx.records.python_code import import_source

FORMS = "torchvision:NAME, timm:NAME, package.module:callable or file.py:callable"


@dataclass(frozen=True)
class ModelReference:
    """A model by its name, with enough to build it again elsewhere.

    Args:
        name: `torchvision:NAME`, `timm:NAME`, `package.module:callable` or `file.py:callable`.
        num_classes: number of classes, passed to the model's builder if it takes one. None leaves the builder's own number; `repfx train`
            then passes the data's.
        options: further keyword arguments for the model's builder.
    """

    name: str
    num_classes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def short_name(self) -> str:
        """The name, for those who don't have this machine's folders."""
        return self.name.replace("\\", "/").rpartition("/")[2]

    def build(self) -> nn.Module:
        """Build the model, with fresh weights.

        Raises:
            InvalidInput: the name is malformed or leads nowhere, or its callable builds no model.
            UnknownName: the file or module has no such callable.

        >>> type(ModelReference("torchvision:resnet18", num_classes=10).build()).__name__
        'ResNet'
        """
        source, separator, name = self.name.rpartition(":")
        if not (source and separator and name):
            raise InvalidInput(f"model {self.name!r} has the wrong form: it must be {FORMS}.")
        find = {"torchvision": _torchvision_builder, "timm": _timm_builder}.get(source)
        builder = _builder_in_python(source, name) if find is None else find(name)
        try:
            model = builder(**self._arguments(builder, always=find is not None))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # such as SystemExit, which would end this process as if all were well
            raise InvalidInput(
                f"model {self.name!r} can't be built: {type(error).__name__}: {first_line(error)}."
            ) from error
        if not isinstance(model, nn.Module):
            raise InvalidInput(f"{self.name!r} gave {type(model).__name__}, not a torch.nn.Module.")
        return model

    def _arguments(self, builder: Callable[..., Any], *, always: bool) -> dict[str, Any]:
        arguments = dict(self.options)
        if self.num_classes is not None and (always or _takes_num_classes(builder)):
            arguments.setdefault("num_classes", self.num_classes)
        return arguments


def _takes_num_classes(builder: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(builder).parameters
    except ValueError:
        return False
    return "num_classes" in parameters


def _unknown(library: str, name: str, known: list[str]) -> InvalidInput:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {len(known)} others."
    return InvalidInput(f"{library} has no model {name!r}; {hint}")


def _torchvision_builder(name: str) -> Callable[..., Any]:
    from torchvision import models

    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    return models.get_model_builder(name)  # type: ignore[no-any-return]


def _timm_builder(name: str) -> Callable[..., Any]:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise InvalidInput(f"model 'timm:{name}' needs timm: pip install timm.") from error
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    return lambda **options: timm.create_model(name, pretrained=False, **options)


def _builder_in_python(source: str, name: str) -> Callable[..., Any]:
    module = import_source(source)
    found = getattr(module, name, None)
    if not callable(found):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownName(f"callable in {source!r} named", name, callables)
    return found  # type: ignore[no-any-return]


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a `.safetensors`, `.pt` or `.pth` file into a model that it fits exactly, without running code in the file.

    Raises:
        InvalidInput: the file holds no weights, or doesn't fit the model; the model is then unchanged.
        OSError: the file can't be read.
    """
    weights = read_weights(path)
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise InvalidInput(
            f"{str(path)!r} doesn't fit this model: {_some('missing', missing)}, {_some('unexpected', unexpected)}."
        )
    for key, value in own.items():
        if value.shape != weights[key].shape:
            found, needed = tuple(weights[key].shape), tuple(value.shape)
            raise InvalidInput(
                f"{str(path)!r} doesn't fit this model: {key!r} is {found} in the file and {needed} in the model."
            )
    model.load_state_dict(weights)


def load_pretrained(model: nn.Module, reference: ModelReference) -> None:
    """Give a model the weights that its library has for it, all but those of the last layer if its classes are others.

    They come from the library's cache, or are downloaded.

    Raises:
        InvalidInput: the model isn't torchvision's or timm's, there are no weights for it, or they can't be loaded or don't fit.
    """
    find = {"torchvision": _torchvision_weights, "timm": _timm_weights}
    source, _, name = reference.name.partition(":")
    if source not in find:
        raise InvalidInput(
            f"there are no pretrained weights for {reference.name!r}: only models of torchvision and timm have some."
        )
    try:
        weights = find[source](name, reference)
    except Exception as error:  # whatever a download can fail with
        raise InvalidInput(
            f"the pretrained weights of {reference.name!r} can't be loaded: {first_line(error)}."
        ) from error
    own = model.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    others = {key.rpartition(".")[0] for key in own.keys() - fitting.keys()}
    if len(others) > 1:
        raise InvalidInput(
            f"the pretrained weights of {reference.name!r} don't fit {len(others)} layers of the model, such as {min(others)!r}: "
            "leave out options that change its layers."
        )
    model.load_state_dict({**own, **fitting})


def _torchvision_weights(name: str, reference: ModelReference) -> Mapping[str, Tensor]:
    from torchvision import models

    found: Mapping[str, Tensor] = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
    return found


def _timm_weights(name: str, reference: ModelReference) -> Mapping[str, Tensor]:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=True, **reference._arguments(timm.create_model, always=True))
    return model.state_dict()


def _some(what: str, keys: list[str]) -> str:
    shown = ", ".join(map(repr, keys[:2])) + (", …" if len(keys) > 2 else "")
    return f"{len(keys)} {what}" + (f" ({shown})" if keys else "")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, by name, on the CPU.

    A `.pt` file may hold them directly, or under `state_dict`, `model` or `model_state_dict`. If all names begin with `module.`, that
    prefix is removed.

    Raises:
        InvalidInput: the file holds no named tensors.
        OSError: the file can't be read.
    """
    with path.open("rb"):  # a missing file raises the same error for both formats
        pass
    try:
        found: Any = _read(path)
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"{str(path)!r} can't be read as weights: {first_line(error)}.") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    named = isinstance(found, Mapping) and all(isinstance(key, str) for key in found)
    if not named or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise InvalidInput(f"{str(path)!r} holds no weights: it must be a dict from names to tensors.")
    wrapped = all(key.startswith("module.") for key in found)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in found.items()}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return load_pickled(path)
