"""Weights of a model that is divided before it has any: each is whole only for a moment.

made = skeleton(GPT, config)                          # on the meta device: shapes and no numbers
called = parallel.placed(made, training, weights)     # of each weight the process's part
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from fastattn.models.folder.layout import Weights
from fastattn.training.distributed.agreement import digest
from fastattn.training.distributed.tensor import localised


@torch.no_grad()
def fill(
    model: torch.nn.Module, weights: Weights, device: torch.device, computing: torch.device
) -> dict[str, int]:
    """Give a divided model on the meta device its weights; of each whole one its digest.

    Args:
        device: of the weights.
        computing: where the model computes, and has what is computed and not stored.

    Raises:
        RuntimeError: `weights` has not all, or others.
    """
    computed = [m for m in model.modules() if any(b.is_meta for b in m.buffers(recurse=False))]
    model.to_empty(device=device)
    for module in computed:
        reset: Any = module.reset_parameters
        reset(computing)
    places = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    left, digests = {name for name, _ in model.named_parameters()}, {}
    for name, whole in weights():
        if name not in places:
            raise RuntimeError(f"the model has no {name}")
        place, digests[name] = places[name], digest(whole)
        turned = localised(model, name, whole)
        if isinstance(place, DTensor):
            mesh, placements = place.device_mesh, place.placements
            part = distribute_tensor(turned, mesh, placements, src_data_rank=None)
            place.to_local().copy_(part.to_local())
        else:
            place.copy_(turned)
        left.discard(name)
    if left:
        raise RuntimeError(f"there are no weights for {', '.join(sorted(left))}")
    return digests
