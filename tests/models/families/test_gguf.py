"""A Llama in a GGUF file: of random weights in every type of number, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families.cases import theirs

import fastattn
from fastattn import GPT

gguf = pytest.importorskip("gguf", reason="pip install gguf")

KEYS = {
    "block_count": 3, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 16,
}  # fmt: skip
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def _written(
    path: Path, model: Any, kind: str = "F32", architecture: str = "llama", **more: Any
) -> dict[str, torch.Tensor]:
    """Write ``model`` as llama.cpp does; returns the weights as they come back from their type."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**KEYS, "vocab_size": 97, **more}.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 5)
    exact = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        *path_of, layer, leaf = name.removeprefix("model.").split(".")
        number = f"blk.{path_of[1]}." if path_of else ""
        values = tensor.clone()
        if layer in ("q_proj", "k_proj"):  # pairs (c, c + D / 2) -> neighbours
            values = values.unflatten(0, (-1, 2, 8)).transpose(1, 2).flatten(0, 2)
        quant = gguf.GGMLQuantizationType["F32" if tensor.dim() == 1 else kind]
        data = gguf.quants.quantize(values.numpy(), quant)
        back = torch.from_numpy(gguf.quants.dequantize(data, quant).copy())
        if layer in ("q_proj", "k_proj"):
            back = back.unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2)
        exact[name] = back
        writer.add_tensor(f"{number}{NAMES[layer]}.{leaf}", data, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


@pytest.mark.parametrize(
    ("kind", "tied"), [("F32", False), ("F16", True), ("BF16", True), ("Q8_0", False), ("Q4_1", 1)]
)
def test_the_weights_of_a_file(tmp_path: Path, kind: str, tied: bool) -> None:
    model = theirs("llama", **SIZES, tie_word_embeddings=bool(tied))
    exact = _written(tmp_path / "a.gguf", model, kind)
    model.load_state_dict(exact, strict=False)
    ours = fastattn.models.load(tmp_path / "a.gguf")
    other = GPT.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float64)
    assert ours.config.tie_word_embeddings == bool(tied) and ours.config.eos_token_id == 5
    assert ours.wte.weight.dtype == torch.float32 and other.wte.weight.dtype == torch.float64
    tokens = torch.randint(0, 97, (2, 30))
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(other(tokens).float(), expected, atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(fastattn.models.load(tmp_path / "ours")(tokens), ours(tokens))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "another magic": lambda content: b"GGML" + content[4:],
    "cut in the metadata": lambda content: content[:200],
    "cut in the weights": lambda content: content[:-1000],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "a.gguf"
    _written(file, theirs("llama", **SIZES))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"a.gguf: damaged, or not a GGUF file"):
        GPT.from_pretrained(file)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = theirs("llama", **SIZES), tmp_path / "a.gguf"
    for options, message in (
        ({"architecture": "mamba"}, r"\"general.architecture\" must be 'llama', got 'mamba'"),
        ({"expert_count": 8}, r"'llama.expert_count' is 8, which Llama does not have"),
        ({"block_count": 4}, r'"num_hidden_layers" of config.json is 4.*3 layers'),
        ({"vocab_size": 96}, r"embed_tokens.weight must have the shape \(96, 64\)"),
    ):
        _written(file, model, **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            fastattn.models.load(file)
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        GPT.from_pretrained(tmp_path, gguf_file="b.gguf")
    with pytest.raises(ValueError, match="gguf_file must be the name of a file in the folder"):
        GPT.from_pretrained(tmp_path, gguf_file="../a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "fastattn\[gguf\]"'):
        GPT.from_pretrained(file)
