"""Functions that test_filling.py runs on several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from scaling import Counted
from training import small
from training.distributed import tasks

import fastattn
from fastattn.models.drawing import drawn
from fastattn.models.folder.layout import Weights
from fastattn.training.distributed.processes import Processes
from fastattn.training.runs.run import Parallel, fit, opened, prepare
from fastattn.training.runs.settings import Run
from fastattn.training.steps.gradients import local

LARGER = fastattn.GPTConfig(
    vocab_size=17, n_positions=16, n_embd=128, n_layer=12, n_head=2, bos_token_id=0, eos_token_id=0
)  # fmt: skip


def _drawn(seed: int, **how: Any) -> tuple[fastattn.GPT, Weights]:
    config = small.model(**how).config
    torch.manual_seed(seed)
    return drawn(config, torch.float32)


def parts(rank: int, numbers: dict[str, Any], how: dict[str, Any]) -> list[bool]:
    """Whether this process's parts, and logits, are those of a model that was whole."""
    whole, (late, weights) = small.model(**how), _drawn(0, **how)
    config = small.with_changes()
    tasks.parallel(**numbers).placed(whole, config)
    tasks.parallel(**numbers).placed(late, config, weights)
    pairs = zip(whole.named_parameters(), late.named_parameters(), strict=True)
    same = [n == m and torch.equal(local(a), local(b)) for (n, a), (m, b) in pairs]
    tied = whole.config.tie_word_embeddings == (late.lm_head.weight is late.wte.weight)
    ids = small.STREAM[None, :16]
    with torch.no_grad():
        return [all(same), tied, torch.equal(whole(ids), late(ids))]


def differing(rank: int) -> str:
    """What a run says of which rank 1 draws from another seed."""
    subject, weights = _drawn(rank)
    config = small.with_changes(steps=1, accumulation=2)
    try:
        small.trained(subject, config, parallel=tasks.parallel(shard=2), weights=weights)
    except ValueError as error:
        return str(error)
    return "nothing"


def peak(rank: int, numbers: dict[str, Any], late: bool, folder: Path | None) -> tuple[int, int]:
    """The bytes of all tensors at most while a model is made and divided, and of its parts."""
    config = small.with_changes()
    layout = tasks.parallel(**numbers)
    with Counted() as counted:
        if folder is not None:
            model, weights = fastattn.GPT.deferred(folder, dtype=torch.float32)
            layout.placed(model, config, weights)
        elif late:
            model, weights = drawn(LARGER, torch.float32)
            layout.placed(model, config, weights)
        else:
            model = fastattn.GPT(LARGER)
            layout.placed(model, config)
    own = sum(local(parameter).nbytes for parameter in model.parameters())
    return counted.peak, own


def run(rank: int, tables: dict[str, Any]) -> tuple[bool, list[float]]:
    """A run from its settings: whether its model was made in parts, and its validations' losses."""
    settings, processes = Run.of(tables), Processes("cpu")
    parallel = Parallel(processes, settings.distributed)
    with opened(settings, processes) as checkpoints:
        prepared = prepare(settings, checkpoints, parallel)
        history = fit(prepared)
    return prepared.weights is not None, [one.loss for one in history.evaluations]
