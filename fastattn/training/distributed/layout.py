"""How a run's processes are laid out: four numbers, and the mesh of devices that they make.

    replicate   copies of the model, each with batches of its own         DDP, HSDP
    shard       processes that share one copy's weights and states        FSDP2
    context     processes that share each sequence                        ring attention
    tensor      processes that share each matrix                          DTensor plans

Their product is the number of processes. Neighbours in the innermost dimension, tensor, talk most
and are processes of consecutive ranks, so of one machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastattn.nn.checks import check_bool, check_integer, check_within

DIMENSIONS = ("replicate", "shard", "context", "tensor")  # outermost first


@dataclass(frozen=True)
class DistributedConfig:
    """How a model and its data are divided among the processes that torchrun starts.

    Attributes:
        replicate: copies of the model, each trained on batches of its own.
        shard: processes among which each copy's weights, gradients and optimiser states lie
            (FSDP2); they too have batches of their own. 0 for all processes that the other numbers
            leave.
        context: processes among which each sequence lies (ring attention).
        tensor: processes among which each layer's heads and columns lie, and the vocabulary.
        offload: whether sharded weights and optimiser states lie in the memory of the CPU.
        lost_seconds: without a sign of life, after which a process counts as lost, and all end. A
            process that computes, saves or compiles gives one however long that takes.
        step_minutes: that a process which lives may be waited for in a step.

    Raises:
        TypeError, ValueError: a number is not an integer in range; the message names it.
    """

    replicate: int = 1
    shard: int = 0
    context: int = 1
    tensor: int = 1
    offload: bool = False
    lost_seconds: float = 60.0
    step_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name in DIMENSIONS:
            check_integer(name, getattr(self, name), at_least=0 if name == "shard" else 1)
        check_bool("offload", self.offload)
        for name in ("lost_seconds", "step_minutes"):
            check_within(name, getattr(self, name), "(0, inf)", "positive and finite")

    def sizes(self, processes: int) -> tuple[int, ...]:
        """The sizes of DIMENSIONS for so many processes.

        Raises:
            ValueError: their product is another number.
        """
        given = self.replicate * self.context * self.tensor
        shard = self.shard or max(1, processes // given)
        if given * shard != processes:
            raise ValueError(
                f"[distributed] replicate={self.replicate}, shard={self.shard}, "
                f"context={self.context} and tensor={self.tensor} make "
                f"{given * shard} processes, and there are {processes}: start "
                f"torchrun --nproc-per-node {given * shard}, or change the numbers"
            )
        return self.replicate, shard, self.context, self.tensor


def meshes_of(config: DistributedConfig, device_type: str) -> tuple[DeviceMesh, DeviceMesh]:
    """The mesh of all processes, of DIMENSIONS, and the same for the weights.

    FSDP2 divides a weight among the processes that share a copy's data and those that share its
    sequences: the second mesh has "weights", shard x context, in place of the two.
    """
    sizes = config.sizes(torch.distributed.get_world_size())
    replicate, shard, context, tensor = sizes
    return (
        init_device_mesh(device_type, sizes, mesh_dim_names=DIMENSIONS),
        init_device_mesh(
            device_type,
            (replicate, shard * context, tensor),
            mesh_dim_names=("replicate", "weights", "tensor"),
        ),
    )
