"""Whole models of many families: attn_implementation "fastattn" against their own "eager" code."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from integrations.huggingface.architectures import inputs, make

from fastattn.integrations.huggingface import NAME
from fastattn.integrations.huggingface import attention as face

# What must have reached the op besides the mask, by family.
REACHES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama", "llama, packed", "qwen2", "mistral", "olmoe", "gemma3", "gemma4", "llama4",
         "deepseek_v32", "gpt2", "bert", "roberta", "modernbert", "opt", "splinter", "vit", "bart",
         "whisper"), (),
    ),
    **dict.fromkeys(("doge", "pegasus_x", "bigbird_pegasus", "t5", "mt5"), ("bias",)),
    **dict.fromkeys(("gpt_oss", "mimo_v2_flash"), ("sink",)),
    "gemma2": ("softcap",), "inkling2": ("return_lse", "bias"), "deepseek_v4": ("sink", "bias"),
}  # fmt: skip


def run(
    model: torch.nn.Module, given: dict[str, torch.Tensor], defined: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(**given, **({} if "pixel_values" in given else {"use_cache": False}))
    out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    out = out if defined is None else out[defined]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    (out * weights).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads


def assert_equal(
    found: torch.Tensor,
    found_grads: dict[str, torch.Tensor],
    expected: torch.Tensor,
    expected_grads: dict[str, torch.Tensor],
) -> None:
    """float32 on both sides (the models round inside): the error on the scale of the whole."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found_grads.keys() == expected_grads.keys()
    scale = max(grad.abs().max() for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        floor = 1e-4 * grad.abs().max() + 1e-6 * scale
        assert (found_grads[name] - grad).abs().max() <= floor, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", REACHES)
def test_as_eager(family: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, defined = inputs(family, device)
    used: set[str] = set()
    original = face.attention

    def spy(*tensors: torch.Tensor, **kwargs: Any) -> Any:
        used.update(name for name, x in kwargs.items() if isinstance(x, torch.Tensor) or x)
        return original(*tensors, **kwargs)

    monkeypatch.setattr(face, "attention", spy)
    expected, expected_grads = run(make(family, "eager", device), given, defined)
    assert not used
    found, found_grads = run(make(family, NAME, device), given, defined)
    assert {*REACHES[family]} <= used
    assert used, "the family does not dispatch through AttentionInterface"

    assert_equal(found, found_grads, expected, expected_grads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "given"),
    [
        *itertools.product(("llama", "gpt_oss"), ("position_ids", "cu_seq_lens", "both")),
        *itertools.product(("opt", "bert"), ("position_ids", "both")),  # add them to embeddings
        ("modernbert", "cu_seq_lens"),  # its layers are not given position_ids
    ],
)
def test_packed_sequences_are_kept_apart(
    family: str, given: str, tokens: torch.Tensor, device: str
) -> None:
    """Each as it is alone. gpt_oss and the last three tell their masks nothing of position_ids."""
    lengths, row = (9, 12), tokens[:1]
    packed: dict[str, Any] = {}
    if given != "cu_seq_lens":
        packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    if given != "position_ids":
        starts = torch.tensor([0, 9, 21], dtype=torch.int32, device=device)
        packed |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        packed |= {"max_length_q": 12, "max_length_k": 12}
    alone, model = make(family, "eager", device), make(family, NAME, device)

    def result(model: torch.nn.Module, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out = model(ids, **kwargs)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state

    expected = torch.cat([result(alone, part) for part in row.split(lengths, 1)], 1)
    found = result(model, row, **packed)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    if (family, given) == ("gpt_oss", "position_ids"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = result(compiled, row, use_cache=False, **packed)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_padding_inside_of_a_text(family: str, tokens: torch.Tensor, device: str) -> None:
    """As after a first turn that was padded on the right: its positions are no restart."""
    mask = torch.ones_like(tokens)
    mask[0, 7:9] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    found, expected = (
        make(family, name, device)(tokens, attention_mask=mask, position_ids=positions).logits
        for name in (NAME, "eager")
    )
    worst = (found - expected)[mask.bool()].abs().max()
    assert worst <= 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gemma4", "t5"])
def test_generates_as_eager(family: str, device: str) -> None:
    given, _ = inputs(family, device)
    given.pop("decoder_input_ids", None)
    texts = [
        make(family, name, device).generate(
            **given, do_sample=False, max_new_tokens=9, pad_token_id=1
        )
        for name in ("eager", NAME)
    ]
    assert torch.equal(*texts)


@pytest.mark.filterwarnings("ignore")
def test_gemma4_that_keeps_few_logits(tokens: torch.Tensor, device: str) -> None:
    """It drops queries behind the mask's back: without a mask, the first keys would be seen."""
    expected, found = (
        make("gemma4", name, device)(tokens, logits_to_keep=3).logits for name in ("eager", NAME)
    )
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(name, marks=pytest.mark.long) for name in ("gpt_oss", "t5"))],
)
def test_compiles_in_one_graph(family: str, device: str) -> None:
    given, _ = inputs(family, device)
    model = make(family, NAME, device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = (m(**given, use_cache=False).logits for m in (compiled, model))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_static_cache(family: str, device: str) -> None:
    given, _ = inputs(family, device)
    model = make(family, NAME, device)
    options = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 1}
    growing = model.generate(**given, **options)
    static = model.generate(**given, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, growing)
