"""A run with Lightning on two processes, and its resumption: torchrun … tests/programs/lightning_on_two_ranks.py SCHEDULE FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed

import repfx
from repfx.integrations.lightning import RepFXCallback
from tests.integrations.test_lightning import SHORT, Classifier, averaging, loader, pl, trainer_of


def main(name: str, folder: Path) -> None:
    strategy = "ddp_find_unused_parameters_true" if name == "repnas" else "ddp"
    journals = []
    for resume in (None, folder / "epoch=1.ckpt"):
        module, callback = Classifier(), RepFXCallback(SHORT[name])
        checkpoints = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, enable_version_counter=False)
        trainer = trainer_of(3, callback, averaging(), checkpoints, strategy=strategy, devices=2)
        torch.manual_seed(trainer.global_rank)  # from here on, all that is random differs
        trainer.fit(module, loader(), loader(), ckpt_path=resume)
        numbers = torch.cat([tensor.double().flatten() for tensor in module.state_dict().values()])
        gathered = [torch.empty_like(numbers) for _ in range(2)]
        distributed.all_gather(gathered, numbers)
        assert bool(numbers.isfinite().all())
        assert torch.equal(*gathered), float((gathered[0] - gathered[1]).abs().max())
        assert callback.driver is not None
        journals.append([action.kind for action in repfx.journal(module.net)])
        assert len(journals[-1]) > 2
        if trainer.is_global_zero:
            print(*(action for _, action in callback.driver.history), sep="\n")
    assert len(journals) == 2
    distributed.destroy_process_group()  # otherwise its threads may outlive the interpreter, which then aborts


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
