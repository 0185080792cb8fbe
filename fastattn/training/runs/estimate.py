"""The cost of a run before it is run: floating-point operations, memory, time."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastattn import models
from fastattn.nn.mode import in_mode
from fastattn.training.contract import Batches, Objective
from fastattn.training.loop import train
from fastattn.training.sizes import text_config
from fastattn.training.steps.config import TrainingConfig
from fastattn.training.steps.optimizers import optimizers_of
from fastattn.training.steps.precision import autocast
from fastattn.training.steps.recomputation import recomputed_blocks


def flops_per_token(model: Any, context: int) -> float | None:
    """Operations of a step for a token (Chowdhery et al. 2022, appendix B): 6 N + 12 L W T.

    N is the number of weights in matrices (in an embedding's where a head shares it), L layers have
    heads that are W wide together, and T is the context: a bound where a token attends to fewer. A
    frozen weight has no gradient: 4 in place of 6. None where the tokens do not all pass through
    all layers, as in an encoder-decoder, and for configs without these sizes.
    """
    config = text_config(model)
    if isinstance(model, models.EncoderDecoder) or getattr(config, "is_encoder_decoder", False):
        return None
    layers = getattr(config, "n_layer", getattr(config, "num_hidden_layers", None))
    heads = getattr(config, "n_head", getattr(config, "num_attention_heads", None))
    width = getattr(config, "n_embd", getattr(config, "hidden_size", None))
    if layers is None or heads is None or width is None:
        return None
    size = getattr(config, "head_size", getattr(config, "head_dim", None)) or width // heads
    looked_up = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    multiplied = {
        id(module.weight)
        for module in model.modules()
        if not isinstance(module, torch.nn.Embedding)
        and isinstance(getattr(module, "weight", None), Tensor)
    }
    weights = sum(
        parameter.numel() * (6 if parameter.requires_grad else 4)
        for parameter in model.parameters()
        if parameter.dim() > 1 and id(parameter) not in looked_up - multiplied
    )
    return weights + 12.0 * layers * heads * size * context


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that come and go in the block, by its operators' results.

    A result that shares the memory of another counts with that one, and of a tensor that was there
    before, not at all, if `there` names it. An operator's own workspace is not seen.

    Attributes:
        now, peak: bytes at this moment, and at most.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, object] = {
            id(storage): storage for storage in map(Tensor.untyped_storage, there)
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.now += size


@dataclass(frozen=True)
class Estimate:
    """The sizes of a run, and what was measured of its first steps.

    Attributes:
        weights, optimizer: bytes of parameters and buffers; of the optimisers' states and the
            average of the weights.
        working: bytes that a step needs beside these at its peak: activations and gradients.
        tokens: that a step reads.
        seconds: of a step; validations and checkpoints come on top.
    """

    weights: int
    optimizer: int
    working: int
    tokens: int
    seconds: float


def estimated(
    model: torch.nn.Module, objective: Objective, training: Batches, config: TrainingConfig
) -> Estimate:
    """Make two steps, of which the second is timed, and measure the memory of a batch.

    The model is no longer what it was. On a CPU the tensors are counted, on a GPU what torch has
    allocated there.
    """
    own = [*{id(t): t for t in (*model.parameters(), *model.buffers())}.values()]
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    average = trained if config.ema_decay else 0
    states = sum(
        (1 if isinstance(optimizer, torch.optim.Muon) else 2) * parameter.nbytes
        for optimizer in optimizers_of(model, config)
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    working = _working(model, objective, training, config, own)
    history = train(model, objective, training, dataclasses.replace(config, steps=2))
    return Estimate(
        weights=sum(tensor.nbytes for tensor in own),
        optimizer=states + average,
        working=working,
        tokens=history.steps[-1].tokens,
        seconds=history.steps[-1].seconds,
    )


def _working(
    model: torch.nn.Module,
    objective: Objective,
    training: Batches,
    config: TrainingConfig,
    own: list[Tensor],
) -> int:
    """Bytes that come on top of the model in forward and backward of one batch."""
    device = own[0].device
    batch = training.batch(0).to(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_mode(model, training=True))
        if config.activation_checkpointing:
            stack.enter_context(recomputed_blocks(model))
        allocated = stack.enter_context(Allocated(own))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        for _ in range(min(2, config.accumulation)):  # the second finds the gradients of the first
            with autocast(device, config.precision):
                loss = objective.loss(model, batch)
            loss.backward()
        model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return allocated.peak
