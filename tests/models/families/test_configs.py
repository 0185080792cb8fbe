"""What config.json of each family means, and what is refused instead of passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models.families.cases import LLAMA3, SMALL, theirs
from safetensors.torch import load_file, save_file

import fastattn
from fastattn import GPT, GPTConfig
from fastattn.models.families import FAMILIES

DECODERS = [kind for kind, family in FAMILIES.items() if family.config_class is GPTConfig]
LAYERS = {
    "num_hidden_layers": 12, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
NO_KIND = {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")}

LONG = {"short_factor": [1.25] * 8, "long_factor": [2.5] * 8}
FIRST = "original_max_position_embeddings"


@pytest.mark.parametrize("kind", DECODERS)
def test_a_silent_file_means_transformers_defaults(kind: str) -> None:
    defaults = type(transformers.AutoConfig.for_model(kind))().to_dict()
    got, expected = (FAMILIES[kind].read_config(data) for data in ({}, defaults))
    assert got.resolved() == expected.resolved()


# As the files were before transformers 5.
OLD: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 5e5, "rope_scaling": None}),
    ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_theta": 5e5, "rope_scaling": {**NO_KIND, "rope_type": "llama3"}}),
    ("llama", {"num_key_value_heads": None, "head_dim": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 7}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 7}),
    (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    ("qwen3", {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("mistral", {"rope_theta": 1e6, "sliding_window": None}),
    ("gemma2", {"rope_theta": 1e5, "hidden_act": "gelu"}),
    ("gemma3_text", {"rope_theta": 1e5, "rope_local_base_freq": 500.0}),
    ("gemma3_text", {"sliding_window_pattern": 3}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("phi3", {"rope_theta": 1e5, "partial_rotary_factor": 0.75, "rope_scaling": None}),
    ("phi3", {"rope_scaling": {**LONG, "type": "longrope"}}),
    ("phi3", {"rope_scaling": {**LONG, "type": "longrope"}, FIRST: 8}),
    ("phi3", {"rope_scaling": {**LONG, "type": "su", FIRST: 8}, FIRST: 8}),
    ("olmo2", {"rope_theta": 5e5}),
]


@pytest.mark.parametrize(("kind", "old"), OLD, ids=str)
def test_older_files(kind: str, old: dict[str, Any]) -> None:
    """They mean what transformers makes of them."""
    data = {**LAYERS, "head_dim": 16, **old}
    new = type(transformers.AutoConfig.for_model(kind)).from_dict(json.loads(json.dumps(data)))
    got, expected = (FAMILIES[kind].read_config(each) for each in (data, new.to_dict()))
    assert got.resolved() == expected.resolved()


@pytest.mark.parametrize("kind", DECODERS)
def test_a_file_goes_round(kind: str) -> None:
    family = FAMILIES[kind]
    config = family.read_config({})
    written = json.loads(json.dumps(family.write_config(config)))
    assert family.read_config(written).resolved() == config.resolved()


REFUSED: list[tuple[str | None, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "must be one of .*dynam"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, '"linear" needs factor'),
    ("llama", {"rope_scaling": "linear"}, "\"rope_parameters\" must be an object, got 'linear'"),
    ("llama", {"rope_theta": "1e6"}, "rope_theta must be a number"),
    ("llama", {"partial_rotary_factor": 0.5}, '"partial_rotary_factor" must be 1, got 0.5'),
    ("llama", {"quantization_config": {"bits": 4}}, '"quantization_config" is .*accelerate'),
    ("llama", {"pretraining_tp": 2}, '"pretraining_tp" is 2, and Llama has only 1 here'),
    ("llama", {"hidden_act": "mish"}, "activation_function must be one of"),
    ("llama", {"num_key_value_heads": 3}, "n_kv_head must divide n_head"),
    ("mistral", {"layer_types": ["full_attention"]}, '"layer_types" is .*Mistral has only None'),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must have n_layer = 32 entries"),
    ("qwen2", {"layer_types": ["linear_attention"] * 32}, "layer_types must be None or have"),
    ("gemma2", {"use_bidirectional_attention": True}, '"use_bidirectional_attention" is True'),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, '"attn_logit_softcapping" is 50.0'),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 1.0}}, "for each type of layer"),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        '"sliding_attention" must not be scaled',
    ),
    ("phi3", {"rope_scaling": {"type": "linear"}}, "\"rope_type\" is 'linear', and Phi 3 has only"),
    ("phi3", {"rope_scaling": {"type": "su"}}, '"longrope" needs short_factor, long_factor'),
    ("gpt2", {"add_cross_attention": True}, '"add_cross_attention" is True, and GPT-2 has only'),
    ("gpt2", {"activation_function": "mish"}, "activation_function must be one of"),
    ("gpt2", {"n_head": 5}, "n_head must divide n_embd"),
    ("gpt2", {"n_layer": "3"}, "n_layer must be an integer, got '3'"),
    ("gpt2", {"n_embd": None}, "n_embd must be an integer, got None"),
    ("mamba", {}, "\"model_type\" must be one of .*'llama'.* got 'mamba'.*accelerate"),
    (None, {}, '"model_type" must be one of .*got None'),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=str)
def test_what_is_not_computed_is_refused(
    kind: str | None, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **changes}))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        fastattn.models.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"gated": False, "mlp_bias": True}, None),
        ({"embedding_scale": 3.0, "norm": "offset_rms_norm"}, None),
        ({"sliding_window": 9}, "mistral"),
        ({"qk_norm": "head", "head_size": 16}, "qwen3"),
        ({"norm_placement": "output", "qk_norm": "all"}, "olmo2"),
        ({"partial_rotary_factor": 0.5}, "phi3"),
        ({"qkv_bias": True}, "qwen2"),
        ({"rope_scaling": {**NO_KIND, "rope_type": "llama3"}}, "llama"),
    ],
    ids=str,
)
def test_a_model_made_here_is_of_the_first_family_that_fits(
    changes: dict[str, Any], kind: str | None, small: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever the config says, transformers computes the same; or an error says why not."""
    modern = {
        "positions": "rotary", "norm": "rms_norm", "gated": True, "activation_function": "silu",
        "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    }  # fmt: skip
    model = GPT(GPTConfig(**{**small, **modern, **changes})).eval()
    if kind is None:
        option = next(iter(changes))
        with pytest.raises(ValueError, match=f"the nearest, [A-Z].*has none for .*{option}="):
            model.save_pretrained(tmp_path / "ours")
        return
    model.save_pretrained(tmp_path / "ours")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded.config.model_type == kind
    tokens = torch.randint(0, 97, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), loaded(tokens).logits, atol=1e-4, rtol=0)
    assert fastattn.models.load(tmp_path / "ours").config.resolved() == model.config.resolved()


# --- folders that are not what they say --------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs("llama").save_pretrained(tmp_path)
    return tmp_path


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "qwen3", "architectures": None, "head_dim": 12},
            r"Qwen 3 that config.json describes:(.|\n)*q_norm.weight is missing",
        ),
        (
            {"model_type": "phi3", "architectures": None},
            r"qkv_proj.weight is missing(.|\n)*q_proj.weight is unexpected",
        ),
        (
            {"model_type": "gpt2", "architectures": None},
            r'"n_layer" of config.json is 12, but the weights have 0',
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, '"architectures" must be one of'),
        ({"architectures": 3}, '"architectures" must be one of .* got 3'),
        ({"num_hidden_layers": 4}, r'"num_hidden_layers" of config.json is 4.*have 3 layers'),
        ({"num_hidden_layers": 10**9}, r"is 1000000000, more than 16384"),
        ({"vocab_size": 96}, r"embed_tokens.weight must have the shape \(96, 48\)"),
        (
            {"num_key_value_heads": 4},
            r"0.self_attn.k_proj.weight must have the shape \(48, 48\), got \(24, 48\)",
        ),
        ({"head_dim": 10**12}, r"q_proj.weight must have the shape"),
        ({"vocab_size": 10**15}, r"embed_tokens.weight must have the shape"),
        ({"attention_bias": True}, r"layers.0.self_attn.v_proj.bias is missing"),
        ({"tie_word_embeddings": True}, r"lm_head.weight differs from embed_tokens.weight"),
    ],
    ids=str,
)
def test_weights_of_another_config(folder: Path, changes: dict[str, Any], message: str) -> None:
    _edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        fastattn.models.load(folder)


def test_the_model_without_the_head(tmp_path: Path) -> None:
    """A file without the prefix "model.", whose head is the embedding."""
    original = theirs("llama", tie_word_embeddings=True)
    original.model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    spare = {"layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}  # of older files
    save_file({**load_file(file), **spare}, file)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaModel"]
    tokens = torch.randint(0, 97, (2, 20))
    with torch.no_grad():
        got, expected = fastattn.models.load(tmp_path)(tokens), original(tokens).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_prompt_beyond_the_context(folder: Path) -> None:
    model = GPT.from_pretrained(folder)
    with pytest.raises(ValueError, match="at most n_positions = 64 tokens"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="n_positions"):
        model.generate([[5] * 60], max_new_tokens=10)


def test_a_casted_model_is_the_same_model(folder: Path) -> None:
    """The rotary frequencies stay float32, wherever the model goes."""
    whole, cast = (GPT.from_pretrained(folder, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    for model in (cast, whole.to(torch.bfloat16)):
        assert {b.dtype for b in model.buffers()} == {torch.float32}
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 20))
    with torch.no_grad():
        assert torch.equal(cast(tokens), whole(tokens))
