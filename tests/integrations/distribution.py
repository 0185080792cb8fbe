"""What the processes of test_distribution.py do: a step of an accelerated model of transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from integrations import tiny
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastattn


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss and the gradients of all processes, by the names of the plain model."""
    loss.backward()
    found = {"loss": whole(loss.detach())}
    return found | {name: whole(p.grad) for name, p in model.named_parameters()}


def whole(x: Any) -> Tensor:
    tensor: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return tensor


def plain(dtype: torch.dtype) -> dict[str, Tensor]:
    model, ids = tiny.make("llama").train().to(dtype), tiny.tokens(4, 12)
    return gradients(model, model(input_ids=ids, labels=ids).loss)


def data_parallel(rank: int, how: str, order: str) -> dict[str, Tensor]:
    """Under DDP or FSDP2, accelerated before or after; each process has half of the batch."""
    model: Any = tiny.make("llama").train()
    if order == "before":
        assert fastattn.accelerate(model).swapped
    state = torch.get_rng_state()
    if how == "ddp":
        wrapped: Any = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    if order == "after":
        report = fastattn.accelerate(wrapped)
        if how == "ddp":
            assert report.swapped
        else:
            assert not report.swapped
            reasons = [entry.reason or "" for entry in report.left if "Norm" in entry.class_name]
            assert reasons and all("sharded" in reason for reason in reasons), reasons
    assert torch.equal(torch.get_rng_state(), state)
    ids = tiny.tokens(4, 12)[2 * rank : 2 * rank + 2]
    found = gradients(model, wrapped(input_ids=ids, labels=ids).loss)
    dist.all_reduce(found["loss"])
    found["loss"] /= 2
    fastattn.restore(wrapped)
    assert type(model.model.norm).__name__ == "LlamaRMSNorm"
    return found


def tensor_parallel(rank: int, folder: str, attention: str) -> dict[str, Tensor]:
    """Under transformers' own tensor parallelism, which comes with the weights."""
    import transformers

    import fastattn.integrations.huggingface

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", attn_implementation=attention
    )
    assert model.config._attn_implementation == attention
    report = fastattn.accelerate(model.train())
    assert {entry.class_name for entry in report.swapped} == {"LlamaRMSNorm"}
    reasons = {entry.class_name: entry.reason or "" for entry in report.left}
    assert "is a DTensor (sharded" in reasons["LlamaMLP"]
    assert "is a DTensor (sharded" in reasons["LlamaAttention"]
    ids = tiny.tokens(4, 12)
    return gradients(model, model(input_ids=ids, labels=ids).loss)


def all_of(rank: int, folder: str) -> dict[str, dict[str, Tensor]]:
    found = {
        f"{how}, accelerated {order}": data_parallel(rank, how, order)
        for how in ("ddp", "fsdp2")
        for order in ("before", "after")
    }
    for attention in ("sdpa", "fastattn"):
        found[f"tensor parallel, {attention}"] = tensor_parallel(rank, folder, attention)
    return found
