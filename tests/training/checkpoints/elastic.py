"""A run of several processes under torchrun, of which one is killed with SIGKILL now and then.

    torchrun --standalone --nproc-per-node 2 --max-restarts 2 elastic.py FOLDER step save

In the first attempt, rank 1 kills itself in the step after a checkpoint, in the second while it
writes one; the last goes on to the end and leaves the whole weights in FOLDER/final.safetensors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import safetensors.torch
import torch
from training import small
from training.checkpoints import tasks
from training.distributed.tasks import whole

from fastattn.training import Checkpoints, History
from fastattn.training.distributed.layout import DistributedConfig
from fastattn.training.distributed.parallel import Parallel
from fastattn.training.distributed.processes import joined


def main() -> None:
    folder, moments = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    moment = moments[attempt] if attempt < len(moments) else "none"
    if moment == "save":
        tasks.at_write(rank, 1, 1, tasks.killed)

    def progress(history: History) -> None:
        if moment == "step" and rank == 1 and len(history.steps) == 3:
            tasks.killed()

    subject = small.model(dropout=0.1)
    with joined("cpu") as processes:
        small.trained(
            subject, tasks.CONFIG, validation=None, on_progress=progress,
            parallel=Parallel(processes, DistributedConfig(shard=2)),
            checkpoints=Checkpoints(folder, every_steps=1, keep=2, processes=processes),
        )  # fmt: skip
        weights = {name: whole(value) for name, value in subject.state_dict().items()}
        if processes.leads:
            safetensors.torch.save_file(weights, folder / "final.safetensors")


if __name__ == "__main__":
    main()
