"""What the tests of context parallelism have run on several processes; each gets its rank first."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy
import torch
import torch.distributed as dist

from fastattn import GPT, GPTConfig
from fastattn.nn import SequencePart
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch
from fastattn.training.distributed.context import part_of
from fastattn.training.objectives.collation import packed_batch
from fastattn.training.steps.recomputation import recomputed_blocks
from oracle import assert_all_close_to_reference

VOCABULARY = 61
LENGTHS = (7, 1, 16, 5, 12)  # together 41, which no number of processes divides


def model(changes: dict[str, Any]) -> GPT:
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "initializer_range": 0.3, **changes,
    }  # fmt: skip
    return GPT(GPTConfig(**settings))


def packed(seed: int = 0, counting: float = 0.7) -> Batch:
    random = numpy.random.default_rng(seed)
    ids = [random.integers(VOCABULARY, size=n) for n in LENGTHS]
    labels = [numpy.where(random.random(len(x)) < counting, x, IGNORED) for x in ids]
    return packed_batch(ids, labels, "fastattn")


def rows(seed: int = 0) -> Batch:
    """Two rows, of a length that 1 to 4 processes divide."""
    ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(seed))
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORED
    return Batch({"input_ids": ids, "targets": targets}, 46, 48)


def few_targets() -> Batch:
    """All that count lie in the first piece, so that most processes have none."""
    batch = packed()
    targets = torch.full_like(batch.arguments["targets"], IGNORED)
    targets[0, :3] = torch.tensor([4, 0, 60])
    return Batch({**batch.arguments, "targets": targets}, 3, batch.tokens)


BATCHES = {"packed": packed, "rows": rows, "few targets": few_targets}


def _results(subject: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss, and all gradients by its backward."""
    loss.backward()
    return {"loss": loss.detach(), **{name: x.grad for name, x in subject.named_parameters()}}


def _of_one(subject: GPT, batch: Batch) -> dict[str, torch.Tensor]:
    return _results(subject, subject(**batch.arguments)[1])


def held_to_the_rule(
    rank: int, changes: dict[str, Any], kind: str, recomputed: bool = False, half: bool = False
) -> tuple[int, int]:
    """Loss and all gradients, summed over the processes; returns counted and tokens of the part."""
    group, size = dist.group.WORLD, dist.get_world_size()
    batch = BATCHES[kind]()
    part = part_of(batch, group, rank, size)
    subject = model(changes)

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()

    with recomputed_blocks(subject) if recomputed else contextlib.nullcontext():
        with autocast():
            loss = subject(**part.arguments)[1] * (part.counted / batch.counted)
        got = _results(subject, loss)
    for value in got.values():
        dist.all_reduce(value)
    with autocast():
        eager = _of_one(model(changes), batch)
    exact = _of_one(model(changes).double(), batch)
    capped = any("softcap" in name for name in changes)
    factors = {"max_factor": 3.0, "rms_factor": 2.0} if capped else {}
    assert_all_close_to_reference(
        {name: (got[name], eager[name], exact[name]) for name in exact}, ulps=32, **factors
    )
    return part.counted, part.tokens


def refusals(rank: int, cases: list[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """The errors of GPT on a part, by the names of the cases: what they change in its arguments.

    The group of a part is this process's, of one.
    """
    found = {}
    subject = model({"attn_pdrop": 0.1})
    subject.eval()(torch.zeros(1, 8, dtype=torch.long), part=SequencePart(dist.group.WORLD, 8))
    for name, changes in cases:
        subject.train(name == "dropout")
        given = {"input_ids": torch.zeros(1, 8, dtype=torch.long), **changes}
        if isinstance(given.get("part"), int):
            given["part"] = SequencePart(dist.group.WORLD, given["part"])
        try:
            subject(**given)
            found[name] = "nothing was raised"
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
