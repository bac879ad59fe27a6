"""`Place`: one process of a training, with its device and the form in which a model runs there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repfx.data.predictions import logits_of
from repfx.training.memory_format import runs_with_channels_last
from repfx.training.objective.auxiliary import Auxiliary
from repfx.training.recipe import Recipe


class Place:
    """One process of a training.

    Args:
        accelerator: accelerator of this process, as `repfx.training.engine.accelerator_for` yields it.
    """

    def __init__(self, accelerator: Any, recipe: Recipe) -> None:
        self.accelerator = accelerator
        self.channels_last = recipe.channels_last
        self.compile, self.compile_mode = recipe.compile, recipe.compile_mode
        self.device: torch.device = accelerator.device
        self.process, self.processes = accelerator.process_index, accelerator.num_processes

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files."""
        return bool(self.accelerator.is_main_process)

    def put(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, in place, and lay its kernels out channels last if that was chosen."""
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def lay_out(self, models: Sequence[nn.Module], images: Tensor) -> None:
        """Choose the memory format if the recipe doesn't, for models that all get the same images, and put the models on the device.

        Args:
            images: two or more images, as the data has them.
        """
        if self.channels_last is None:
            known = self.device.type in ("cpu", "cuda")
            self.channels_last = known and all(runs_with_channels_last(model, images, self.device) for model in models)
        for model in models:
            self.put(model)

    def bring(self, x: Tensor) -> Tensor:
        """Move images or labels to the device, and lay images out channels last if that was chosen."""
        # a non-blocking copy to the CPU could be read too early
        x = x.to(self.device, non_blocking=self.device.type != "cpu")
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.ndim == 4 else x

    def wrap(self, model: nn.Module, *, unused_parameters: bool, auxiliary: Auxiliary | None = None) -> nn.Module:
        """Return a module that gives the logits of all heads in training, in all processes, and compiled if the recipe asks for it.

        The structure of the model itself is unchanged.

        Args:
            unused_parameters: whether some parameters have no part in some steps.
            auxiliary: auxiliary head of the training, which gives the second logits; None for none.
        """
        self.accelerator.free_memory()
        self.accelerator.ddp_handler.find_unused_parameters = unused_parameters
        heads = _Logits(self.put(model)) if auxiliary is None else auxiliary.joined(self.put(model))
        net: nn.Module = self.accelerator.prepare_model(heads)
        if self.compile:
            net = torch.compile(net, mode=self.compile_mode)  # type: ignore[assignment]
        return net

    def mean(self, value: float | Tensor) -> float:
        """Return the mean of the values that the processes have."""
        tensor = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        return float(self.accelerator.reduce(tensor, "mean")) if self.processes > 1 else float(value)

    def gather(self, own: list[str]) -> list[str]:
        """Return the texts of all processes."""
        if self.processes == 1:
            return own
        lists: list[list[str]] = [[] for _ in range(self.processes)]
        torch.distributed.all_gather_object(lists, own)
        return [text for each in lists for text in each]

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of the first, such as BatchNorm statistics. The next step would do so anyway."""
        if self.processes > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def agree(self, wish: bool) -> bool:
        """Tell whether `wish` is True in any process."""
        if self.processes == 1:
            return wish
        if wish:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (logits_of(self.model(x)),)
