"""Which parameters each optimiser has."""

from __future__ import annotations

from typing import Any

import torch
from training.small import model

from fastattn.training.steps.optimizers import block_matrices, decay_groups


def test_matrices_decay_and_vectors_do_not() -> None:
    subject = model()
    decayed, plain = decay_groups(subject, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    groups: Any = (decayed["params"], plain["params"])
    assert all(parameter.dim() >= 2 for parameter in groups[0])
    assert all(parameter.dim() == 1 for parameter in groups[1])
    # Every parameter once, the tied embedding included.
    assert len(groups[0]) + len(groups[1]) == len(list(subject.parameters()))
    subject.requires_grad_(False)
    assert [group["params"] for group in decay_groups(subject, 0.3)] == [[], []]


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    subject = model()
    names = {id(parameter): name for name, parameter in subject.named_parameters()}
    found = {names[id(parameter)] for parameter in block_matrices(subject)}
    for block in ("blocks.0", "blocks.1"):
        attention = {f"{block}.attention.in_proj.weight", f"{block}.attention.out_proj.weight"}
        ffn = {f"{block}.feed_forward.linear1.weight", f"{block}.feed_forward.linear2.weight"}
        assert attention | ffn <= found
    assert len(found) == 8
    subject.blocks[0].requires_grad_(False)
    assert len(block_matrices(subject)) == 4
    inside = torch.nn.ModuleList([torch.nn.Embedding(3, 4), torch.nn.Linear(4, 4)])
    assert block_matrices(inside) == {inside[1].weight}
