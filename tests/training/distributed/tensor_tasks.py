"""What the processes of test_tensor.py do; each function gets its rank first."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from training.distributed.tasks import whole

import fastattn
from fastattn.models import (
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    EncoderForMaskedLM,
    EncoderForSequenceClassification,
)
from fastattn.nn import feed_forward
from fastattn.training.distributed import modules, vocabulary
from fastattn.training.distributed.layout import DistributedConfig, meshes_of
from fastattn.training.distributed.tensor import canonical, localised, parallelize
from fastattn.training.steps.recomputation import recomputed_blocks

SIZES: dict[str, Any] = {
    "vocab_size": 37, "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 4,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "norm": "rms_norm", "positions": "rotary", "gated": True, "activation_function": "silu",
    "n_inner": 20, "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip
# Each with its reason: together they have every kind of module and every way of reading it.
GPTS: dict[str, dict[str, Any]] = {
    "gpt2": {},  # biases everywhere, a tied head, as many key heads as query heads
    "llama": {**LLAMA, "n_head": 8, "head_size": 6, "n_kv_head": 4},  # groups of two heads
    "qwen3": {**LLAMA, "qk_norm": "head", "qkv_bias": True, "head_bias": True},
    "gemma2": {
        **LLAMA, "norm": "offset_rms_norm", "norm_placement": "both", "embedding_scale": 4.9,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "tie_word_embeddings": True,
        "sliding_window": 5, "layer_types": ("sliding_attention", "full_attention"),
    },
    "olmo2": {**LLAMA, "norm_placement": "output", "qk_norm": "all"},  # a norm over all heads
    "qk_norm_without_rotation": {"qk_norm": "head", "norm": "rms_norm"},
}  # fmt: skip


def with_weights(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Weights that are the same, rounded to float32, in each dtype; no norm or bias as at first."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return model.to(dtype)


def gpt(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> fastattn.GPT:
    torch.manual_seed(3)
    model = fastattn.GPT(fastattn.GPTConfig(**{**SIZES, **GPTS[name], **changes}))
    return with_weights(model, dtype)


def batch(rows: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and targets, some of which do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(37, (2, rows, 11), generator=generator)
    return ids, targets.masked_fill(torch.rand(targets.shape, generator=generator) < 0.2, -100)


def results(model: torch.nn.Module, loss: Tensor, **others: Tensor) -> dict[str, Tensor]:
    """The loss and the gradients of one process or of all together."""
    loss.backward()
    found = {"loss": loss.detach(), **{name: x.detach() for name, x in others.items()}}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = whole(canonical(model, name, parameter.grad))
    return found


def tensor_mesh(count: int) -> Any:
    return meshes_of(DistributedConfig(tensor=count), "cpu")[0]["tensor"]


def gpt_results(model: fastattn.GPT, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    ids, targets = batch(rows, seed)
    with torch.no_grad():
        logits = model(ids)
        both, kept = model(ids, targets)
        assert torch.equal(both, logits)
    _, loss = model(ids, targets, keep_logits=False)
    return results(model, loss, logits=logits, kept=kept)


def gpts(rank: int, count: int, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {name: gpt_results(parallelize(gpt(name), tensor_mesh(count))) for name in names}


OTHERS = ("t5", "bart", "bert", "modernbert")


def other(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    if name in ("t5", "bart"):
        config = EncoderDecoderConfig(
            vocab_size=37, n_positions=24, d_model=24, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=20,
            decoder_ffn_dim=20,
            **(
                {"positions": "relative", "norm": "rms_norm", "norm_placement": "pre",
                 "bias": False, "attention_scale": 0.5, "gated": True, "logits_scale": 0.3,
                 "activation_function": "gelu_new"}
                if name == "t5" else
                {"positions": "learned", "position_offset": 2, "embedding_norm": True,
                 "logits_bias": True, "frozen_padding": True}
            ),
        )  # fmt: skip
        return with_weights(EncoderDecoder(config), dtype)
    sizes = {"vocab_size": 37, "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 4}
    if name == "bert":
        return with_weights(EncoderForMaskedLM(EncoderConfig(**sizes, n_inner=20)), dtype)
    config = EncoderConfig(
        **sizes, n_inner=20, positions="rotary", gated=True, norm_placement="pre",
        n_token_types=0, attention_bias=False, mlp_bias=False, norm_bias=False, pooler=False,
    )  # fmt: skip
    return with_weights(EncoderForSequenceClassification(config), dtype)


def other_results(model: Any) -> dict[str, Tensor]:
    ids, targets = batch()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    if isinstance(model, EncoderDecoder):
        logits = model(ids, ids, attention_mask=mask)
        _, loss = model(ids, targets=targets, attention_mask=mask, keep_logits=False)
    elif isinstance(model, EncoderForMaskedLM):
        logits = model(ids, mask).logits
        loss = model(ids, mask, labels=targets).loss
    else:
        logits, loss = model(ids, mask, labels=ids[:, 0] % 2)
    return results(model, loss, logits=logits)


def others(rank: int, count: int, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    mesh = tensor_mesh(count)
    return {name: other_results(parallelize(other(name), mesh)) for name in names}


def several(rank: int, jobs: tuple[tuple[Any, ...], ...]) -> list[Any]:
    """The results of (function, *args) each: starting processes costs more than most of them."""
    return [function(rank, *args) for function, *args in jobs]


def saved(rank: int, name: str, folder: str) -> list[bool]:
    """Writes a folder; whether weights turned to one process' order and back are the same bits."""
    model = parallelize(gpt(name), tensor_mesh(2))
    model.save_pretrained(folder)
    same = []
    for name, parameter in model.named_parameters():
        turned = canonical(model, name, parameter)
        same.append(torch.equal(localised(model, name, turned).to_local(), parameter.to_local()))
        same.append(torch.equal(canonical(model, name, whole(parameter)), whole(turned)))
    return same


def generated(rank: int, names: tuple[str, ...]) -> dict[str, list[list[int]]]:
    ids, _ = batch()
    found = {}
    for name in names:
        model = parallelize(gpt(name) if name in GPTS else other(name), tensor_mesh(2)).eval()
        found[name] = model.generate(ids, max_new_tokens=9).tolist()
    return found


def calls(rank: int) -> dict[str, int]:
    """How often the logits were gathered, for a loss and without one; the fused feed-forwards and
    the sums of a step of training."""
    model = parallelize(gpt("llama"), tensor_mesh(2))
    ids, targets = batch()
    with (
        mock.patch.object(modules, "joined", wraps=modules.joined) as joined,
        mock.patch.object(feed_forward, "ffn", wraps=feed_forward.ffn) as ffn,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums,
    ):
        _, loss = model(ids, targets, keep_logits=False)
        found = {"gathered": joined.call_count, "fused": ffn.call_count, "forward": sums.call_count}
        loss.backward()
        found["backward"] = sums.call_count - found["forward"]
        model(ids)
        return {**found, "gathered for logits": joined.call_count}


def dropped(rank: int) -> dict[str, Any]:
    """Of a model whose heads are all alike: what they give, and what follows from it."""
    model = gpt("gpt2", embd_pdrop=0.1, attn_pdrop=0.5, resid_pdrop=0.1)
    for block in model.blocks:
        weight, bias = block.attention.in_proj.weight.data, block.attention.in_proj.bias.data
        for kind in (*weight.view(3, 4, 6, 24), *bias.view(3, 4, 6)):
            kind.copy_(kind[:1].expand_as(kind).clone())
    parallelize(model, tensor_mesh(2))
    heads: list[Tensor] = []
    out_proj = model.blocks[0].attention.out_proj
    out_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0].detach().clone()))
    torch.manual_seed(5)
    ids, targets = batch()
    found = {}
    for name in ("plain", "recomputed"):
        torch.manual_seed(5)
        with recomputed_blocks(model) if name == "recomputed" else contextlib.nullcontext():
            _, loss = model(ids, targets, keep_logits=False)
            gradients = results(model, loss)
        model.zero_grad()
        found |= {f"{name} {key}": value for key, value in gradients.items()}
    found["after"] = torch.rand(3)
    return {**found, "heads": heads[0]}


def losses(rank: int, count: int, parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`vocabulary.linear_cross_entropy` and its gradients, of each case's arguments."""
    found = {}
    group = tensor_mesh(count).get_group()
    for name, case in parts.items():
        sizes = vocabulary.parts_of(len(case["weight"]), count)
        first = sum(sizes[:rank])
        x = case["x"].to(case["dtype"], copy=True).requires_grad_()
        rows = slice(first, first + sizes[rank])
        weight = case["weight"][rows].to(case["dtype"], copy=True).requires_grad_()
        bias = case["bias"][rows].to(case["dtype"], copy=True).requires_grad_()
        with mock.patch.object(vocabulary, "SCORES", case["scores"]):
            loss = vocabulary.linear_cross_entropy(
                x, weight, case["targets"], bias,
                first=first, group=group, softcap=case["softcap"],
            )  # fmt: skip
            loss.backward()
        found[name] = {"loss": loss.detach(), "x": x.grad, "weight": weight.grad, "bias": bias.grad}
    return found


def refused(rank: int) -> tuple[str, bool]:
    """The error of a model that cannot be divided, and whether it is as it was."""
    model = gpt("llama", n_head=6, n_kv_head=3)
    before = dict(model.named_parameters())
    classes = [type(module) for module in model.modules()]
    try:
        parallelize(model, tensor_mesh(2))
    except ValueError as error:
        after = dict(model.named_parameters())
        same = all(after[name] is before[name] for name in before)
        return str(error), same and [type(module) for module in model.modules()] == classes
    return "", False
