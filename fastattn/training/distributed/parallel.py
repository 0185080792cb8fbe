"""A model on its mesh of devices, and how much of each step is this process's.

    parallel = Parallel(processes, config)
    parallel.check(config, objective)
    called = parallel.placed(model, config)  # divides the weights; call it for a loss
    share = Share.of(step, batches, config, parallel)

Tensor parallel comes first, then FSDP2 or DDP around it. Batches are numbered through, and a step
has as many at any number of processes: a run's data do not depend on its layout.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from fastattn.models.folder.layout import Weights
from fastattn.training.contract import Batch, Objective
from fastattn.training.distributed.agreement import check_digests
from fastattn.training.distributed.context import part_of
from fastattn.training.distributed.filling import fill
from fastattn.training.distributed.layout import DistributedConfig, meshes_of
from fastattn.training.distributed.processes import Processes, losses_named
from fastattn.training.distributed.tensor import parallelize
from fastattn.training.steps.config import TrainingConfig
from fastattn.training.steps.precision import reduced_dtype

T = TypeVar("T")

OF_PARTS = ("causal", "chat")  # objectives whose loss is a sum over the tokens of a sequence


class Parallel:
    """The layout of a run as this process has it; with one process all is left as it is.

    Attributes:
        processes: the run's.
        device: this process's, where there are several; None for that of the model.
        readers, reader: how many groups of processes have batches of their own, and which one is
            this process's.
        place: which part of each sequence is this process's.
        mesh: of all processes, with the dimensions of `layout`; None for one process.
    """

    def __init__(
        self, processes: Processes | None = None, config: DistributedConfig | None = None
    ) -> None:
        """
        Raises:
            ValueError: the numbers do not multiply to the number of processes.
        """
        self.processes = processes or Processes("auto")
        self.config = config or DistributedConfig()
        count = self.processes.count
        replicate, self.shard, self.context, self.tensor = self.config.sizes(count)
        self.readers = replicate * self.shard
        self.device: torch.device | None = None
        self.mesh: DeviceMesh | None = None
        self.reader = self.place = 0
        if count > 1:
            self.device = torch.device(self.processes.device)
            self.mesh, self._weights_mesh = meshes_of(self.config, self.device.type)
            coordinate = self.mesh.get_coordinate()
            assert coordinate is not None
            self.reader = coordinate[0] * self.shard + coordinate[1]
            self.place = coordinate[2]

    @property
    def sharded(self) -> bool:
        """Whether a process has only a part of each weight."""
        return self.shard > 1 or self.tensor > 1

    def check(self, config: TrainingConfig, objective: Objective) -> None:
        """
        Raises:
            ValueError: a step has too few batches for all, or a format or an objective that a
                layout excludes.
        """
        if self.context > 1 and objective.name not in OF_PARTS:
            raise ValueError(
                f"the objective {objective.name!r} reads whole sequences: set [distributed] "
                f"context = 1, which is for {' and '.join(OF_PARTS)}"
            )
        if config.accumulation < self.readers:
            raise ValueError(
                f"training.accumulation={config.accumulation} batches a step are too few for the "
                f"{self.readers} groups of processes that have batches of their own (replicate x "
                f"shard): set it to {self.readers} or a multiple"
            )
        if config.precision == "float16" and self.sharded:
            raise ValueError(
                'precision "float16" scales the loss by gradients that must be whole: with shard '
                'or tensor above 1 take "bfloat16" or "float32"'
            )
        if self.config.offload and (self.device is None or self.device.type == "cpu"):
            raise ValueError("offload=true needs GPUs: on a CPU the weights are there already")

    def placed(
        self, model: torch.nn.Module, config: TrainingConfig, weights: Weights | None = None
    ) -> torch.nn.Module:
        """Divide the weights of `model` in place; what is returned is called for a loss.

        Args:
            weights: of a model on the meta device, where this layout is `sharded`.

        Raises:
            ValueError: sizes of the model do not divide; or on all processes, `weights` differ.
        """
        if self.mesh is None:
            return model
        assert self.device is not None
        if not self.sharded:
            model.to(self.device)
            # A parameter without a gradient in a step is no error of a single process either.
            return DistributedDataParallel(model, find_unused_parameters=True)
        if self.tensor > 1:
            there = model.to(self.device) if weights is None else model
            parallelize(there, self._weights_mesh["tensor"])
        if self._weights_mesh["replicate"].size() * self._weights_mesh["weights"].size() > 1:
            _shard(model, self._weights_mesh, self.device, config, self.config.offload)
        if weights is not None:
            device = torch.device("cpu") if self.config.offload else self.device
            digests = fill(model, weights, device, self.device)
            check_digests(self.processes, digests, "at the start")
        return model

    def part(self, batch: Batch) -> Batch:
        """This process's part of each of the batch's sequences.

        Raises:
            ValueError: as `context.part_of`.
        """
        if self.mesh is None or self.context == 1:
            return batch
        return part_of(batch, self.mesh.get_group("context"), self.place, self.context)

    def summed(self, *values: float) -> list[float]:
        """The sums over all processes that have different tokens; all must call it."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with losses_named():
            dist.all_reduce(total)
        return (total / self.tensor).tolist()

    def of_readers(self, value: T) -> list[T]:
        """The `value` of each group that has batches of its own; all processes must call it."""
        return self.processes.gathered(value)[:: self.context * self.tensor]

    def agreed(self, value: bool) -> bool:
        """`value` of rank 0; all must call it."""
        if self.mesh is None:
            return value
        lead = torch.tensor([value])
        with losses_named():
            dist.broadcast(lead, 0)
        return bool(lead.item())

    @property
    def averaged(self) -> int:
        """Over how many processes DDP and FSDP2 take the mean of the gradients."""
        return self.readers * self.context

    def unsynchronised(
        self, called: torch.nn.Module, last: bool
    ) -> contextlib.AbstractContextManager[None]:
        """DDP exchanges gradients at a step's last backward only; FSDP2 at each, for the memory."""
        if isinstance(called, DistributedDataParallel) and not last:
            return called.no_sync()
        return contextlib.nullcontext()


def _shard(
    model: torch.nn.Module,
    mesh: DeviceMesh,
    device: torch.device,
    config: TrainingConfig,
    offload: bool,
) -> None:
    """FSDP2 (Zhao et al. 2023, arXiv:2304.11277): blocks one by one, then the rest.

    The weights are gathered in the dtype of the products, and the gradients summed in float32.
    """
    inner = mesh["weights"] if mesh["replicate"].size() == 1 else mesh["replicate", "weights"]
    mixed = MixedPrecisionPolicy(
        param_dtype=reduced_dtype(device, config.precision),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    # Torch warns of each module whose output is a view; ours are not written to.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for block in [block for blocks in lists for block in blocks]:
        fully_shard(block, mesh=inner, mp_policy=mixed, offload_policy=policy)
    # The rest too is freed after the forward: weights that are set in between are gathered again.
    fully_shard(
        model, mesh=inner, mp_policy=mixed, offload_policy=policy, reshard_after_forward=True
    )
