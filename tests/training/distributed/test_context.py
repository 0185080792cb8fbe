"""Context parallelism: loss and gradients of a GPT on parts of its rows are one process's."""

from __future__ import annotations

import re
from typing import Any

import processes
import pytest
import torch
from training.distributed import context_tasks

from fastattn.nn import PackedSequences, SequencePart
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch
from fastattn.training.distributed.context import part_of

LLAMA: dict[str, Any] = {
    "n_kv_head": 2, "norm": "rms_norm", "positions": "rotary", "gated": True,
    "activation_function": "silu", "qkv_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    **LLAMA, "sliding_window": 4, "layer_types": ("sliding_attention", "full_attention"),
    "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0, "qk_norm": "head",
}  # fmt: skip
# Sequences of at most 8 tokens turn by the short factors, longer ones by the long ones.
LONG: dict[str, Any] = {
    **LLAMA,
    "rope_scaling": {
        "rope_type": "longrope", "short_factor": [1.0, 2.0, 1.5, 1.0],
        "long_factor": [4.0, 3.0, 6.0, 9.0], "original_max_position_embeddings": 8,
    },
}  # fmt: skip
CASES: dict[str, tuple[Any, ...]] = {
    "GPT-2, packed": ({}, "packed"),
    "GPT-2, rows": ({}, "rows"),
    "Llama, packed": (LLAMA, "packed"),
    "Llama, rows, recomputed": (LLAMA, "rows", True),
    "Gemma, packed": (GEMMA, "packed"),
    "longrope, packed": (LONG, "packed"),
    "longrope, rows": (LONG, "rows"),
    "bfloat16, packed": (LLAMA, "packed", False, True),
}


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(name: str) -> None:
    results = processes.run(2, context_tasks.held_to_the_rule, *CASES[name])
    batch = context_tasks.BATCHES[CASES[name][1]]()
    assert sum(counted for counted, _ in results) == batch.counted
    assert sum(tokens for _, tokens in results) == batch.tokens


def test_a_part_without_targets() -> None:
    results = processes.run(2, context_tasks.held_to_the_rule, {}, "few targets")
    assert [counted for counted, _ in results] == [3, 0]


@pytest.mark.long
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("name", CASES)
def test_on_more_processes(name: str, size: int) -> None:
    processes.run(size, context_tasks.held_to_the_rule, *CASES[name])


def test_what_gpt_refuses() -> None:
    packed = PackedSequences(torch.tensor([0, 7]), 7)
    long_one = torch.zeros(1, 50, dtype=torch.long)
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "type": ({"part": "half"}, "TypeError: part must be a fastattn.nn.SequencePart.* got str"),
        "group": ({"part": SequencePart(None, 8)}, "TypeError: group of part must be"),  # type: ignore[arg-type]
        "length": ({"part": 7}, "ValueError: length of part must be a multiple of 2"),
        "tokens": ({"part": 10}, "ValueError: input_ids must have 10 tokens .* got 8"),
        "logits": ({"part": 8, "logits_to_keep": 1}, "ValueError: part excludes cache and"),
        "packed": ({"part": 8, "packed": packed}, "ValueError: .* from 0 to the 8 tokens"),
        "dropout": ({"part": 8}, "ValueError: .*dropout=0.1.*attn_pdrop"),
        "positions": ({"part": 50, "input_ids": long_one}, "at most n_positions = 48 .* got 50"),
    }
    changes = [(name, change) for name, (change, _) in cases.items()]
    (said,) = processes.run(1, context_tasks.refusals, changes)
    for name, (_, message) in cases.items():
        assert re.search(message, said[name]), said[name]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", context_tasks.BATCHES)
def test_the_parts_are_the_batch(kind: str, size: int) -> None:
    batch = context_tasks.BATCHES[kind]()
    ids, targets = batch.arguments["input_ids"], batch.arguments["targets"]
    tokens = ids.shape[1]
    seen, counted = torch.full_like(ids, -1), 0
    for rank in range(size):
        part = part_of(batch, None, rank, size)  # type: ignore[arg-type]
        length = part.arguments["part"].length
        assert length % (2 * size) == 0 and 0 <= length - tokens < 2 * size
        piece = length // (2 * size)
        places = torch.arange(length).view(2 * size, piece)[[rank, 2 * size - 1 - rank]].flatten()
        here = places < tokens
        assert torch.equal(part.arguments["input_ids"][:, here], ids[:, places[here]])
        seen[:, places[here]] = 1
        counting = part.arguments["targets"] != IGNORED
        assert not counting[:, ~here].any()
        if part.counted:
            assert torch.equal(part.arguments["targets"][:, here], targets[:, places[here]])
            assert part.counted == counting.sum()
        else:
            assert counting.sum() == 1
        counted += part.counted
        if "packed" in batch.arguments:
            starts, longest = part.arguments["packed"]
            before = batch.arguments["packed"].cu_seqlens
            assert starts.tolist() == before.tolist() + [length] * (length > tokens)
            assert longest >= starts.diff().max()
    assert (seen == 1).all()
    assert counted == batch.counted


def test_other_batches_are_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    for arguments in (
        {"input_ids": ids, "labels": ids, "position_ids": ids},
        {"input_ids": ids, "targets": ids, "key_lengths": ids},
        {"input_ids": ids},
    ):
        with pytest.raises(ValueError, match=r"causal and chat.* context = 1"):
            part_of(Batch(arguments, 4, 4), None, 0, 2)  # type: ignore[arg-type]


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rows of 24 tokens .* training.context to a multiple of 10"
    ):
        part_of(context_tasks.rows(), None, 0, 5)  # type: ignore[arg-type]


def test_a_part_moves_with_its_batch() -> None:
    part = part_of(context_tasks.packed(), None, 0, 2).to(torch.device("meta"))  # type: ignore[arg-type]
    assert part.arguments["packed"].cu_seqlens.is_meta
    assert part.arguments["part"] == SequencePart(None, 44)  # type: ignore[arg-type]
