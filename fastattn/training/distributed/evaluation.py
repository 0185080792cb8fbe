"""An evaluation that several processes share: the figures are those of one process.

Each group of processes that has batches of its own reads every n-th batch of the data, and tells
the others what it observed: numbers and texts, which all join in the order of the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastattn.training.contract import Batches, Objective
from fastattn.training.distributed.parallel import Parallel


def observations(
    model: torch.nn.Module,
    objective: Objective,
    batches: Batches,
    tokens: int,
    device: torch.device,
    parallel: Parallel,
) -> Iterator[Any]:
    """`Objective.observe` of whole batches, in order, until they have `tokens` tokens; 0 for all.

    All processes must call it, and read it to the end.
    """
    own = iter(batches.once(parallel.reader, parallel.readers))
    batch = next(own, None)
    # Processes that share weights exchange them in each forward, so all must run as many.
    spare = batch if batch is not None else next(iter(batches.once()), None)
    there, seen = any(parallel.of_readers(batch is not None)), 0
    while there:
        observed, following = None, next(own, None)
        if batch is not None:
            observed = objective.observe(model, batch.to(device)), batch.tokens
        elif parallel.sharded and spare is not None:
            objective.observe(model, spare.to(device))
        found = parallel.of_readers((observed, following is not None))
        for one in [one for one, _ in found if one is not None]:
            yield one[0]
            seen += one[1]
            if tokens and seen >= tokens:
                return
        there, batch = any(more for _, more in found), following
