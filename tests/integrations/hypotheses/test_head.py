"""Heads of language models: the loss and all gradients without logits, which can still be read."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.integrations.deferred import DeferredLogits
from fastattn.integrations.hypotheses.head import HeadSwap

VOCABULARY, BATCH, SEQLEN = 8192, 2, 64  # 2^20 logits


class Plain(torch.nn.Module):
    """A language model as many write it, with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(VOCABULARY, 32)
        self.positions = torch.nn.Embedding(128, 32)
        self.proj = torch.nn.Linear(32, 32)
        self.lm_head = torch.nn.Linear(32, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        at = torch.arange(ids.shape[1], device=ids.device)
        logits = self.lm_head(self.proj(self.wte(ids) + self.positions(at)))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


@pytest.fixture
def plain(device: str) -> Plain:
    torch.manual_seed(0)
    return Plain().to(device)


@pytest.fixture
def ids(device: str) -> torch.Tensor:
    return torch.randint(VOCABULARY, (BATCH, SEQLEN), device=device)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_plain_code(plain: Plain, ids: torch.Tensor) -> None:
    expected = plain(ids, ids)
    theirs = gradients(plain, expected[1])
    report = fastattn.accelerate(plain)
    assert "lm_head" in [entry.name for entry in report.swapped]
    assert isinstance(plain.lm_head, torch.nn.Linear) and isinstance(plain.lm_head, HeadSwap)
    logits, loss = plain(ids, ids)
    ours = gradients(plain, loss)
    assert isinstance(logits, DeferredLogits) and logits._read is None
    torch.testing.assert_close(loss, expected[1])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(logits + 0, expected[0])
    fastattn.verify(plain, (ids, ids))
    for made in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert isinstance(made.lm_head, HeadSwap)
        fastattn.restore(made)
        assert type(made.lm_head) is torch.nn.Linear


def test_few_logits_are_made_at_once(plain: Plain, ids: torch.Tensor) -> None:
    fastattn.accelerate(plain)
    assert type(plain(ids[:, -1:])[0]) is torch.Tensor
    with torch.inference_mode():
        assert type(plain(ids)[0]) is torch.Tensor


def test_only_heads(plain: Plain) -> None:
    plain.other = torch.nn.Linear(32, VOCABULARY // 2)
    fastattn.accelerate(plain)
    assert not isinstance(plain.other, HeadSwap) and not isinstance(plain.proj, HeadSwap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_under_autocast(plain: Plain, ids: torch.Tensor, dtype: torch.dtype) -> None:
    model = copy.deepcopy(plain)
    fastattn.accelerate(model)
    losses = []
    for trained in (plain, model):
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
        for _ in range(3):
            with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
                _, loss = trained(ids, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=0)


def test_torch_compile_sees_the_original(plain: Plain, ids: torch.Tensor) -> None:
    fastattn.accelerate(plain)
    expected = plain(ids, ids)[1]
    logits, loss = torch.compile(plain, fullgraph=True, backend="aot_eager")(ids, ids)
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(loss, expected)


def test_per_sample_gradients(plain: Plain, ids: torch.Tensor) -> None:
    fastattn.accelerate(plain)
    parameters = {n: p.detach() for n, p in plain.named_parameters()}

    def loss(parameters: Any, row: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.func.functional_call(plain, parameters, (row[None], row[None]))[
            1
        ]
        return found

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    whole = gradients(plain, plain(ids, ids)[1])
    torch.testing.assert_close(each["proj.weight"].mean(0), whole["proj.weight"])


FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 2}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "gemma2, capped": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 16}),
    "cohere, scaled": ("CohereForCausalLM", "CohereConfig", {}),
    "granite, scaled": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 8.0}),
    "bert, masked": ("BertForMaskedLM", "BertConfig", {}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "decoder_start_token_id": 0},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    "bart": ("BartForConditionalGeneration", "BartConfig", {"d_model": 32}),
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_items", [None, 37])
def test_families_of_transformers(
    family: str, num_items: int | None, ids: torch.Tensor, device: str
) -> None:
    transformers = pytest.importorskip("transformers")
    name, config, settings = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**SIZES, **settings, vocab_size=VOCABULARY)
    model = getattr(transformers, name)(made).to(device).eval()
    labels = ids.clone()
    labels[0, 5:9] = -100
    batch = {"input_ids": ids, "labels": labels}
    if num_items is not None and family not in ("bert, masked", "t5", "bart"):
        batch["num_items_in_batch"] = num_items
    expected = model(**batch)
    theirs = gradients(model, expected.loss)
    report = fastattn.accelerate(
        model, only=[n for n, m in model.named_modules() if m is head(model)]
    )
    assert len(report.swapped) == 1
    out = model(**batch)
    ours = gradients(model, out.loss)
    assert type(out.logits) is DeferredLogits and out.logits._read is None
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.logits + 0, expected.logits, rtol=1e-5, atol=1e-5)


def head(model: Any) -> torch.nn.Module:
    found: torch.nn.Module = model.get_output_embeddings()
    return found
