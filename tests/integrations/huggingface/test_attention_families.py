"""Whole models of many families: attn_implementation "fastattn" against their own "eager" code."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers

from fastattn.integrations.huggingface import NAME
from fastattn.integrations.huggingface import attention as face

DECODER = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
}
ENCODER = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
T5 = {
    "vocab_size": 97, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6,
    "decoder_start_token_id": 0,
}  # fmt: skip
SPEECH = {
    "vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
MIXTURE = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}

# family -> (model, config, its settings, inputs, what must have reached the op besides the mask)
LEFT, RIGHT, ENCODED = "padded left", "padded right", "encoder and decoder"
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str, set[str]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, LEFT, set()),
    "llama, packed": ("LlamaForCausalLM", "LlamaConfig", DECODER, "packed", set()),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config",
              {k: v for k, v in DECODER.items() if k != "head_dim"}, LEFT, set()),
    "mistral": ("MistralForCausalLM", "MistralConfig",
                {**DECODER, "sliding_window": 6}, LEFT, set()),
    # names a window to layers that have none
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig",
              {**{k: v for k, v in DECODER.items() if k != "head_dim"}, "num_experts": 4,
               "num_experts_per_tok": 2, "sliding_window": 6}, "whole", set()),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config",
               {**DECODER, "sliding_window": 6, "attn_logit_softcapping": 0.5}, LEFT, {"softcap"}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig",
               {**DECODER, "sliding_window": 6}, LEFT, set()),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig",
               {**DECODER, "global_head_dim": 16, "sliding_window": 6,
                "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
                "num_hidden_layers": 4, "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2}, LEFT, set()),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig",
               {**DECODER, "intermediate_size_mlp": 64, "attention_chunk_size": 6,
                "num_local_experts": 2}, LEFT, set()),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig",
                {**DECODER, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, LEFT, {"sink"}),
    # head_dim of v differs; sinks only in the layers with a window
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", "MiMoV2FlashConfig",
                      {**DECODER, **MIXTURE, "num_attention_heads": 4, "v_head_dim": 4,
                       "sliding_window": 6}, LEFT, {"sink"}),
    # sinks that are made again for each query, and a relative bias
    "inkling2": ("Inkling2TextModel", "Inkling2TextConfig", DECODER, LEFT, {"return_lse", "bias"}),
    # the keys that a query sees, by index
    "deepseek_v32": ("DeepseekV32ForCausalLM", "DeepseekV32Config",
                     {**DECODER, **MIXTURE, "num_attention_heads": 4, "num_key_value_heads": 4,
                      "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                      "qk_nope_head_dim": 8, "v_head_dim": 12, "index_n_heads": 2,
                      "index_head_dim": 16, "index_topk": 5, "n_group": 1, "topk_group": 1,
                      "first_k_dense_replace": 1}, LEFT, set()),
    # writes compressed keys into an additive mask; sinks
    "deepseek_v4": ("DeepseekV4ForCausalLM", "DeepseekV4Config",
                    {**DECODER, **MIXTURE, "head_dim": 16, "num_attention_heads": 4,
                     "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "index_n_heads": 2,
                     "index_head_dim": 16, "index_topk": 2, "sliding_window": 6},
                    LEFT, {"sink", "bias"}),
    "doge": ("DogeForCausalLM", "DogeConfig", {**DECODER, "keep_window_size": 64}, LEFT, {"bias"}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 3,
              "bos_token_id": 0, "eos_token_id": 0}, LEFT, set()),
    "bert": ("BertModel", "BertConfig", ENCODER, RIGHT, set()),
    "roberta": ("RobertaModel", "RobertaConfig", ENCODER, RIGHT, set()),
    # a window to both sides
    "modernbert": ("ModernBertModel", "ModernBertConfig",
                   {**ENCODER, "local_attention": 8, "global_attn_every_n_layers": 2,
                    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0,
                    "sep_token_id": 0}, RIGHT, set()),
    "opt": ("OPTForCausalLM", "OPTConfig",
            {"vocab_size": 97, "hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 2,
             "num_attention_heads": 6, "max_position_embeddings": 64, "word_embed_proj_dim": 48},
            LEFT, set()),
    # dispatch, and count on the masks of "eager": no module says whether it is causal
    "splinter": ("SplinterModel", "SplinterConfig", ENCODER, "whole", set()),
    "pegasus_x": ("PegasusXForConditionalGeneration", "PegasusXConfig",
                  {**SPEECH, "vocab_size": 97, "num_global_tokens": 4, "block_size": 4,
                   "max_position_embeddings": 64}, ENCODED, {"bias"}),
    # the decoder dispatches, the encoder adds the mask to its own scores
    "bigbird_pegasus": ("BigBirdPegasusForConditionalGeneration", "BigBirdPegasusConfig",
                        {**SPEECH, "vocab_size": 97, "attention_type": "original_full",
                         "max_position_embeddings": 64}, ENCODED, {"bias"}),
    "vit": ("ViTModel", "ViTConfig",
            {**{k: v for k, v in ENCODER.items() if k not in ("vocab_size",
                                                              "max_position_embeddings")},
             "image_size": 16, "patch_size": 4}, "image", set()),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, ENCODED, {"bias"}),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5, ENCODED, {"bias"}),
    "bart": ("BartForConditionalGeneration", "BartConfig",
             {**SPEECH, "max_position_embeddings": 64, "forced_eos_token_id": 0}, ENCODED, set()),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                {**SPEECH, "num_mel_bins": 8, "max_source_positions": 20,
                 "max_target_positions": 32, "suppress_tokens": None,
                 "begin_suppress_tokens": None}, "sound", set()),
}  # fmt: skip


def inputs_of(kind: str, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Arguments of the model, and which of the outputs' positions are defined."""
    padding = torch.ones_like(tokens)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    if kind in (LEFT, RIGHT, ENCODED):
        padding[0, :5] = 0
        if kind != LEFT:
            padding = padding.flip(1)
    if kind == "whole":
        return {"input_ids": tokens}, everything
    if kind in (LEFT, RIGHT):
        return {"input_ids": tokens, "attention_mask": padding}, padding.bool()
    if kind == "packed":
        places = torch.cat([torch.arange(9), torch.arange(tokens.shape[1] - 9)]).to(tokens)
        return {"input_ids": tokens[:1], "position_ids": places[None]}, everything[:1]
    if kind == ENCODED:
        target = tokens[:, :9]
        given = {"input_ids": tokens, "attention_mask": padding, "decoder_input_ids": target}
        return given, everything[:, :9]
    if kind == "image":
        return {"pixel_values": torch.randn(3, 3, 16, 16, device=tokens.device)}, everything[:, :17]
    assert kind == "sound"
    given = {"input_features": torch.randn(3, 8, 40, device=tokens.device)}
    return {**given, "decoder_input_ids": tokens[:, :9]}, everything[:, :9]


def make(family: str, implementation: str, device: str) -> torch.nn.Module:
    """A random model, far from uniform attention, without dropout."""
    cls, config, settings, _, _ = FAMILIES[family]
    if not hasattr(transformers, cls):
        pytest.skip(f"transformers {transformers.__version__} has no {cls}")
    made = getattr(transformers, config)(**settings)
    model = getattr(transformers, cls)._from_config(made, attn_implementation=implementation)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(device).eval()


def run(
    model: torch.nn.Module, given: dict[str, torch.Tensor], defined: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(**given, **({} if "pixel_values" in given else {"use_cache": False}))
    out = (out.logits if hasattr(out, "logits") else out.last_hidden_state)[defined]
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
@pytest.mark.parametrize("family", FAMILIES)
def test_as_eager(
    family: str, tokens: torch.Tensor, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, _, kind, reaches = FAMILIES[family]
    given, defined = inputs_of(kind, tokens)
    used: set[str] = set()
    original = face.attention

    def spy(*tensors: torch.Tensor, **kwargs: Any) -> Any:
        used.update(name for name, x in kwargs.items() if isinstance(x, torch.Tensor) or x)
        return original(*tensors, **kwargs)

    monkeypatch.setattr(face, "attention", spy)
    expected, expected_grads = run(make(family, "eager", device), given, defined)
    assert not used
    found, found_grads = run(make(family, NAME, device), given, defined)
    assert reaches <= used
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
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gemma4", "t5"])
def test_generates_as_eager(family: str, tokens: torch.Tensor, device: str) -> None:
    given, _ = inputs_of(FAMILIES[family][3], tokens)
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
def test_compiles_in_one_graph(family: str, tokens: torch.Tensor, device: str) -> None:
    given, _ = inputs_of(FAMILIES[family][3], tokens)
    model = make(family, NAME, device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = (m(**given, use_cache=False).logits for m in (compiled, model))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_static_cache(family: str, tokens: torch.Tensor, device: str) -> None:
    given, _ = inputs_of(FAMILIES[family][3], tokens)
    model = make(family, NAME, device)
    options = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 1}
    growing = model.generate(**given, **options)
    static = model.generate(**given, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, growing)
