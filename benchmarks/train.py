"""train: the parts of a training run, each beside the usual way to do the same.

- step: a step of GPT-2 with the settings of transformers' Trainer (fused AdamW, gradients clipped
  to norm 1, float32): an accelerated model against the same without `fastattn.accelerate`;
- packing: forward and backward of lines of the shipped texts in a drawn order: joined to rows
  without padding, against the same lines padded to the longest of each batch, as Trainer's
  collators do. Padding is no token; a line longer than the context loses its end when it is
  padded, and none when it is packed;
- shards: the shipped texts, several times over, to memory-mapped shards in a new folder; the
  ceiling is the tokenizer's own call on the same lines, on as many threads;
- checkpoint: writing one, durably, of a model and its optimiser after a step; the ceiling is the
  same bytes written and synced as one file.

A step is checked as in gpt_train.py, packing for lost tokens; the rest is the tests' business.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import checkout  # noqa: F401
import gpt_train
import numpy
import torch
from gpt_models import TRANSFORMERS, config_of
from harness import OURS, Cell, timed_interleaved
from schema import Entry, Row
from script import Axis, Subject, grids, main
from torch import Tensor

import fastattn
from fastattn.ops.cross_entropy import IGNORED
from fastattn.timing import Candidate, Sample, ratio
from fastattn.training import Tokenizer, load_corpus
from fastattn.training.checkpoints import Checkpoints
from fastattn.training.data.order import Packed
from fastattn.training.data.preparation import prepare
from fastattn.training.history import History, Step
from fastattn.training.objectives.causal import Causal
from fastattn.training.steps.state import TrainingState

STEP, PACKING, SHARDS, CHECKPOINT = PARTS = ("step", "packing", "shards", "checkpoint")
FASTER_STEP, FASTER_PACKED = 1.2, 1.5
DROPPED = 0.01  # the most of the tokens
SHARD_RATE = 1e6  # bytes a second and processor
CHECKPOINT_SHARE = 0.02  # of the time between two at the default interval
COPIES = 4  # of the shipped texts, for a second of work
VOCABULARY = 4096
STEPS, CHARACTERS_A_TOKEN = 6, 3  # of a packed pass
PADDED, BARE, FILE = "padded", "tokenizers", "one file"


class StepCell(gpt_train.TrainCell):
    """`gpt_train`'s row with the accelerated model as ours."""

    def holds(self, samples: Mapping[str, Sample]) -> bool:
        theirs = samples.get(TRANSFORMERS)
        return theirs is not None and ratio(theirs, samples[OURS]).median >= FASTER_STEP


@dataclass(frozen=True, kw_only=True)
class PartCell(Cell):
    """A row of another part; `model`, `batch` and `seqlen` as far as the part has them."""

    model: str
    batch: int
    seqlen: int

    promise: ClassVar[str]  # the target
    reference = None
    limit = 900.0
    rounds = 9

    def run(
        self, entries: dict[str, Entry], candidates: Sequence[Candidate], seconds: float
    ) -> tuple[Row, dict[str, Sample]]:
        """The row with its times."""
        row = self.row(entries)
        row["right"] = True
        return row, timed_interleaved(self, candidates, seconds, row)

    def rate(self, row: Row, samples: Mapping[str, Sample], size: int, ceiling: str) -> None:
        """Write the rates of so many bytes, and our share of the ceiling."""
        for name, sample in samples.items():
            row["peers"][name]["gbps"] = size / sample.median / 1e9
        row["bound"] = ceiling
        row["peers"][OURS]["share"] = samples[ceiling].median / samples[OURS].median


# --- packing --------------------------------------------------------------------------------------


class PackingCell(PartCell):
    sizes = ("model", "batch", "seqlen")
    promise = f"packed {FASTER_PACKED} times as fast as padded, at most 1% of tokens dropped"

    def holds(self, samples: Mapping[str, Sample]) -> bool:
        return ratio(samples[PADDED], samples[OURS]).median >= FASTER_PACKED

    def measure(self, seconds: float, peers: Sequence[str] | None = None) -> Row:
        tokenizer = trained_tokenizer()
        objective, tokens = Causal(tokenizer), self.batch * self.seqlen
        torch.manual_seed(0)
        config = replace(config_of(self.model), vocab_size=tokenizer.vocab_size)
        model = fastattn.GPT(config).to(self.device).train()
        with tempfile.TemporaryDirectory() as folder:
            path = write_lines(Path(folder), some_lines(CHARACTERS_A_TOKEN * STEPS * tokens))
            examples = prepare(path, objective, Path(folder) / "shards", documents="line")
            packed = Packed(examples, objective, tokens, self.seqlen, seed=0)
            batches = [batch.to(torch.device(self.device)) for batch in packed.once()]
            documents = [
                torch.from_numpy(examples[i]["input_ids"].astype("int64"))
                for i in range(len(examples))
            ]
        total, read = sum(map(len, documents)), sum(batch.tokens for batch in batches)
        wide = self.padded(documents)
        held = sum(min(len(ids), self.seqlen) for ids in documents)

        def ours() -> None:
            for batch in batches:
                objective.loss(model, batch).backward()
                model.zero_grad(set_to_none=True)

        def padded() -> None:
            for ids, targets in wide:
                model(ids, targets)[1].backward()
                model.zero_grad(set_to_none=True)

        entries: dict[str, Entry] = {OURS: {}, PADDED: {}}
        for name, kept, places in (
            (OURS, read, read),
            (PADDED, held, sum(ids.numel() for ids, _ in wide)),
        ):
            entries[name]["note"] = (
                f"{1 - kept / places:.0%} of the places are padding, {1 - kept / total:.1%} of the "
                "tokens are dropped"
            )
        candidates = [Candidate(OURS, ours), Candidate(PADDED, padded)]
        row, samples = self.run(entries, candidates, seconds)
        for name, count in ((OURS, read), (PADDED, held)):
            entries[name]["tokens_per_second"] = count / samples[name].median
        row["right"] = entries[OURS]["right"] = read >= (1 - DROPPED) * total
        return row

    def padded(self, documents: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets, of as many documents a batch as `batch` rows hold on average."""
        mean = sum(map(len, documents)) / len(documents)
        count = max(1, round(self.batch * self.seqlen / mean))
        batches = []
        for first in range(0, len(documents), count):
            rows = [ids[: self.seqlen] for ids in documents[first : first + count]]
            ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
            targets = torch.full_like(ids, IGNORED)
            for b, row in enumerate(rows):
                ids[b, : len(row)] = row
                targets[b, : len(row) - 1] = row[1:]
            batches.append((ids.to(self.device), targets.to(self.device)))
        return batches


@functools.cache
def trained_tokenizer() -> Tokenizer:
    return Tokenizer.train(load_corpus().values(), VOCABULARY)


def some_lines(characters: int) -> list[str]:
    """Lines of the shipped texts in a drawn order, with so many characters at least."""
    lines = [line for text in load_corpus().values() for line in text.splitlines() if line.strip()]
    random.Random(0).shuffle(lines)
    sums = list(itertools.accumulate(map(len, lines)))
    return lines[: bisect.bisect_left(sums, characters) + 1]


def write_lines(folder: Path, lines: Sequence[str]) -> Path:
    path = folder / "corpus.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# --- shards ---------------------------------------------------------------------------------------


class ShardsCell(PartCell):
    promise = f"at least {SHARD_RATE / 1e6:g} MB a second and processor"

    @property
    def axes(self) -> dict[str, Any]:
        return {"vocabulary": VOCABULARY}

    def holds(self, samples: Mapping[str, Sample]) -> bool:
        return self.size / samples[OURS].median >= SHARD_RATE * len(os.sched_getaffinity(0))

    @property
    def size(self) -> int:
        return COPIES * sum(len(text.encode()) for text in load_corpus().values())

    def measure(self, seconds: float, peers: Sequence[str] | None = None) -> Row:
        tokenizer = trained_tokenizer()
        lines = [line for text in load_corpus().values() for line in text.splitlines()] * COPIES
        with tempfile.TemporaryDirectory() as folder:
            path = write_lines(Path(folder), lines)

            def ours() -> None:
                with tempfile.TemporaryDirectory() as target:
                    prepare(path, Causal(tokenizer), target, documents="line")

            entries: dict[str, Entry] = {OURS: {"right": True}, BARE: {"ceiling": True}}
            bare = Candidate(BARE, lambda: tokenizer.encode_many(lines))
            row, samples = self.run(entries, [Candidate(OURS, ours), bare], seconds)
        self.rate(row, samples, self.size, BARE)
        return row


# --- checkpoint -----------------------------------------------------------------------------------


class CheckpointCell(PartCell):
    sizes = ("model",)
    promise = f"at most {CHECKPOINT_SHARE:.0%} of the default interval"

    def holds(self, samples: Mapping[str, Sample]) -> bool:
        minutes = Checkpoints("unused").every_minutes
        assert minutes is not None
        return samples[OURS].median <= CHECKPOINT_SHARE * 60 * minutes

    def measure(self, seconds: float, peers: Sequence[str] | None = None) -> Row:
        model = fastattn.GPT(config_of(self.model)).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        history = History(steps=[Step(1, 1.0, 1e-3, 1.0, 1, 1.0)])
        scaler = torch.amp.GradScaler(self.device, enabled=False)
        state = TrainingState(model, [optimizer], None, scaler, history)
        with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
            checkpoints.save(state, {})
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files)

            def ours() -> None:
                history.steps[-1] = replace(history.steps[-1], step=state.step + 1)
                checkpoints.save(state, {})

            def one_file() -> None:
                with open(Path(folder) / "file", "wb") as file:
                    file.write(memoryview(content))
                    os.fsync(file.fileno())

            content = numpy.random.default_rng(0).bytes(size)
            entries: dict[str, Entry] = {OURS: {"right": True}, FILE: {"ceiling": True}}
            candidates = [Candidate(OURS, ours), Candidate(FILE, one_file)]
            row, samples = self.run(entries, candidates, seconds)
        self.rate(row, samples, size, FILE)
        entries[OURS]["note"] = f"{size / 2**20:.0f} MiB: the model twice and the optimiser"
        return row


# --- the script -----------------------------------------------------------------------------------

CELLS: Mapping[str, type[PartCell]] = {
    PACKING: PackingCell,
    SHARDS: ShardsCell,
    CHECKPOINT: CheckpointCell,
}
AXES: Mapping[str, Axis] = {
    "part": Axis("of a run", kind=str, choices=PARTS),
    "model": Axis("size of GPT-2", kind=str, choices=tuple(gpt_train.SIZES)),
    "batch": Axis("sequences of a step"),
    "seqlen": Axis("tokens of each"),
}


def make(*, device: str, part: str, model: str, batch: int, seqlen: int) -> Any:
    common: dict[str, Any] = {
        "op": "train", "direction": part, "device": device, "dtype": "float32", "model": model,
        "batch": batch, "seqlen": seqlen,
    }  # fmt: skip
    if part in CELLS:
        return CELLS[part](against={}, target=CELLS[part].promise, **common)
    return StepCell(
        dropout=0.0, against={OURS: gpt_train.accelerated, TRANSFORMERS: gpt_train.transformers},
        target=f"accelerated at least {FASTER_STEP} times as fast as transformers", **common,
    )  # fmt: skip


grid = grids(model=["small"], batch=[2], seqlen=[128])
QUICK = [grid(part=list(PARTS))]
FULL = [
    grid(part=[STEP], model=["gpt2"], batch=[1, 2], seqlen=[128, 256]),
    grid(part=[PACKING], batch=[4], seqlen=[256]),
    grid(part=[SHARDS]),
    grid(part=[CHECKPOINT], model=["gpt2"]),
]
PRESETS = {
    (device, name): parts
    for device in ("cpu", "cuda")
    for name, parts in (("quick", QUICK), ("full", FULL))
}
METHOD = {
    "errors": "a step: as in gpt_train; else none",
    "tokens_per_second": "padding is no token",
    "gbps": "text in UTF-8 of shards, files of a checkpoint",
}
SUBJECT = Subject(
    "train", __doc__, AXES, PRESETS, make, seconds={"cpu": 2.0, "cuda": 4.0}, method=METHOD
)

if __name__ == "__main__":
    raise SystemExit(main(SUBJECT))
