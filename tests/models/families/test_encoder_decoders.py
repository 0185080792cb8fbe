"""T5, BART and Marian against transformers', both ways by way of a folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastattn
from fastattn.models import EncoderDecoder, EncoderDecoderConfig
from fastattn.models.families import FAMILIES
from fastattn.models.folder.layout import layout
from oracle import assert_close_to_reference

T5: dict[str, Any] = {
    "vocab_size": 97, "d_model": 48, "d_kv": 10, "d_ff": 60, "num_layers": 3,
    "num_decoder_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0,
    # So that sentences of some twenty tokens reach every bucket.
    "relative_attention_num_buckets": 12, "relative_attention_max_distance": 20,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 97, "d_model": 48, "encoder_layers": 3, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 60,
    "decoder_ffn_dim": 60, "max_position_embeddings": 40, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.15,
    "forced_eos_token_id": None,
}  # fmt: skip

# The first of each family is its usual form.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {}),
    "t5, gated silu, one layer": (
        "t5", {"feed_forward_proj": "gated-silu", "num_layers": 1, "num_decoder_layers": 1}
    ),
    "t5 1.1": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("bart", {}),
    "bart, asymmetric, scaled": (
        "bart",
        {
            "decoder_attention_heads": 2, "decoder_ffn_dim": 28, "scale_embedding": True,
            "activation_function": "relu",
        },
    ),
    "marian": ("marian", {"scale_embedding": True, "activation_function": "swish"}),
    "marian, relu": ("marian", {"activation_function": "relu", "decoder_start_token_id": 0}),
}  # fmt: skip
USUAL = ["t5", "t5 1.1", "bart", "marian"]


def _theirs(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of transformers, in eval mode; norms and biases random too."""
    torch.manual_seed(seed)
    kind, own = CASES[name]
    cls: Any = type(transformers.AutoConfig.for_model(kind))
    config = cls(**{**(T5 if kind == "t5" else BART), **own, **changes})
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    if own.get("tie_word_embeddings") is False:  # transformers ties T5's until a file has the head
        model.lm_head.weight = torch.nn.Parameter(0.15 * torch.randn(97, 48))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "layers" in key or "block" in key:  # else the embedding outweighs them all
                parameter.mul_(2.0)
        if kind != "t5":
            model.final_logits_bias.normal_(std=0.1)
    return model


def _read(model: Any, folder: Path) -> EncoderDecoder:
    model.save_pretrained(folder)
    ours = fastattn.models.load(folder)
    assert type(ours) is EncoderDecoder and not ours.training
    return ours


def _batch() -> dict[str, torch.Tensor]:
    """Source and labels, with padding before and after the source's tokens."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, 97, (3, 33), generator=generator)
    labels = torch.randint(3, 97, (3, 25), generator=generator)
    labels[:, ::4] = -100
    mask = torch.ones_like(source)
    mask[0, :4] = mask[1, 20:] = mask[2, :2] = mask[2, 30:] = 0
    return {"input_ids": source, "labels": labels, "attention_mask": mask}


def _ours(model: EncoderDecoder, batch: dict[str, torch.Tensor]) -> Any:
    return model(
        batch["input_ids"], targets=batch["labels"], attention_mask=batch["attention_mask"]
    )


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    """transformers' folder gives its logits and loss, and ours gives the same model there."""
    original = _theirs(name)
    ours = _read(original, tmp_path / "theirs")
    batch = _batch()
    with torch.no_grad():
        expected = original(**batch)
        logits, loss = _ours(ours, batch)
        torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    assert ours.family == CASES[name][0]
    ours.save_pretrained(tmp_path / "ours", max_shard_size=100_000)
    back, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(back) is type(original) and not any(info.values()), info
    first, second = original.state_dict(), back.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    with torch.no_grad():
        assert torch.equal(back(**batch).logits, expected.logits)
    again = fastattn.models.load(tmp_path / "ours")
    assert again.config == ours.config


def test_decoder_padding(tmp_path: Path) -> None:
    """Of the decoder's input, before the tokens: what they see is what transformers' see."""
    original = _theirs("t5")
    ours = _read(original, tmp_path)
    batch = _batch()
    inputs = torch.randint(3, 97, (3, 9))
    mask = torch.ones_like(inputs)
    mask[0, :4] = mask[1, 3:5] = 0
    with torch.no_grad():
        got = ours(
            batch["input_ids"],
            inputs,
            attention_mask=batch["attention_mask"].bool(),
            decoder_attention_mask=mask,
        )
        expected = original(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=inputs,
            decoder_attention_mask=mask,
        ).logits
    seen = mask.bool()
    torch.testing.assert_close(got[seen], expected[seen], atol=1e-4, rtol=0)


def _gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", USUAL)
def test_gradients_hold_the_rule(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Logits and all gradients, against transformers' eager attention and its float64."""
    eager = _theirs(name, attn_implementation="eager")
    if dtype == torch.bfloat16:  # needs a model that does not amplify rounding without bounds
        for key, parameter in eager.named_parameters():
            if "layers" in key or "block" in key:
                parameter.data *= 0.5
    eager = eager.to(dtype)
    ours = _read(eager, tmp_path)
    exact = copy.deepcopy(eager).double()
    batch = _batch()
    logits, loss = _ours(ours, batch)
    measured, referred = eager(**batch), exact(**batch)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    assert_close_to_reference(logits, measured.logits, referred.logits, name="logits")
    mine = _gradients(ours, loss)
    measure, reference = _gradients(eager, measured.loss), _gradients(exact, referred.loss)
    family = FAMILIES[CASES[name][0]].of(ours.config)
    compared = 0
    for how in layout(ours, family):
        if how.names[0] not in reference:
            assert how.names == ("final_logits_bias",) and how.ours[0] not in mine
            continue
        # Of q, k and v together: that of k's bias is 0 but for roundings.
        stored, *theirs = (
            torch.cat([gradients[key] for key in keys])
            for gradients, keys in ((mine, how.ours), (measure, how.names), (reference, how.names))
        )
        assert_close_to_reference(stored, *theirs, name=how.ours[0])
        compared += len(how.names)
    assert compared == len(reference)


def _greedy(
    model: EncoderDecoder, source: torch.Tensor, lengths: torch.Tensor, steps: int
) -> torch.Tensor:
    mask = torch.arange(source.shape[1]) < lengths[:, None]
    cache = model.new_cache(
        len(source), steps, encoded=model.encode(source, mask), encoded_lengths=lengths
    )
    tokens = [torch.full((len(source), 1), model.config.decoder_start_token_id)]
    for _ in range(steps):
        logits = model.lm_head(model.features(tokens[-1], cache))
        tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("name", USUAL)
@torch.no_grad()
def test_greedy_tokens_are_transformers(name: str, tmp_path: Path) -> None:
    """With the caches, alone and with sources of other lengths, whose padding may hold anything."""
    original = _theirs(name, eos_token_id=None)
    ours = _read(original, tmp_path)
    source, lengths = _batch()["input_ids"], torch.tensor([33, 8, 20])
    got = _greedy(ours, source, lengths, 20)
    for row, length in enumerate(lengths.tolist()):
        one = source[row : row + 1, :length]
        expected = original.generate(one, max_new_tokens=20, do_sample=False, num_beams=1)
        assert torch.equal(got[row : row + 1], expected)
        assert torch.equal(_greedy(ours, one, torch.tensor([length]), 20), expected)


@pytest.mark.parametrize("name", USUAL)
@torch.no_grad()
def test_the_cache_gives_what_the_whole_gives(name: str, tmp_path: Path) -> None:
    """Any tokens, in parts of several; then sequences of unequal lengths, one token at a time."""
    original = _theirs(name)
    ours = _read(original, tmp_path)
    source, lengths = _batch()["input_ids"], torch.tensor([33, 8, 20])
    mask = torch.arange(33) < lengths[:, None]
    tokens = torch.randint(3, 97, (3, 19))
    expected = original(input_ids=source, attention_mask=mask, decoder_input_ids=tokens).logits
    cache = ours.new_cache(
        3, 24, encoded=ours.encode(source, mask), encoded_lengths=lengths
    )  # fmt: skip
    for layer in cache.layers:
        layer.keys.fill_(torch.nan), layer.values.fill_(torch.nan)
    for context in cache.contexts:  # after the end of each source
        context.keys[~mask], context.values[~mask] = torch.nan, torch.nan
    parts = [ours.lm_head(ours.features(part, cache)) for part in tokens.split([1, 7, 1, 6, 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=0)
    kept = torch.tensor([4, 15, 9])
    cache.set_lengths(kept.tolist())
    rows = torch.arange(3)
    for step in range(4):
        here = kept + step
        logits = ours.lm_head(ours.features(tokens[rows, here][:, None], cache))[:, 0]
        torch.testing.assert_close(logits, expected[rows, here], atol=1e-4, rtol=0)


# --- folders of older versions, and of other models ----------------------------------------------


def _change(folder: Path, config: dict[str, Any], **tensors: torch.Tensor | None) -> None:
    """Overwrite entries of config.json, and tensors of the file; None takes one away."""
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **config}))
    weights = {**load_file(folder / "model.safetensors"), **tensors}
    save_file(
        {key: tensor for key, tensor in weights.items() if tensor is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize("theirs_tied", [True, False])
@pytest.mark.parametrize("has_head", [True, False])
def test_t5_before_transformers_5(theirs_tied: bool, has_head: bool, tmp_path: Path) -> None:
    """One key said that the head is not tied, and that it is not scaled."""
    _theirs("t5").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["scale_decoder_outputs"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    head = torch.randn(97, 48) if has_head else None
    _change(tmp_path, {"tie_word_embeddings": theirs_tied}, **{"lm_head.weight": head})
    ours = fastattn.models.load(tmp_path)
    original = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    batch = _batch()
    with torch.no_grad():
        logits, _ = _ours(ours, batch)
        torch.testing.assert_close(logits, original(**batch).logits, atol=1e-4, rtol=0)
    assert ours.config.tie_word_embeddings != has_head


def test_a_model_without_its_head(tmp_path: Path) -> None:
    """facebook/bart-base is one: names without the prefix, no bias of the logits."""
    original = _theirs("bart")
    original.final_logits_bias.zero_()
    original.model.save_pretrained(tmp_path)
    ours = fastattn.models.load(tmp_path)
    batch = _batch()
    with torch.no_grad():
        logits, _ = _ours(ours, batch)
        torch.testing.assert_close(logits, original(**batch).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "config", "tensors", "message"),
    [
        ("bart", {"encoder_layerdrop": 0.1}, {}, '"encoder_layerdrop" is 0.1'),
        ("bart", {"tie_word_embeddings": False}, {}, '"tie_word_embeddings" is False'),
        ("bart", {"decoder_layers": 3}, {}, '"decoder_layers" of config.json is 3, .* have 2'),
        ("bart", {"activation_function": "tanh"}, {}, "activation_function must be one of"),
        ("marian", {"share_encoder_decoder_embeddings": False}, {}, "share_encoder_decoder_emb"),
        ("marian", {"decoder_vocab_size": 98}, {}, "got 98 and 97"),
        ("t5", {"feed_forward_proj": "gated-tanh"}, {}, "activation_function must be one of"),
        ("t5", {"is_encoder_decoder": False}, {}, '"is_encoder_decoder" is False'),
        ("t5", {"num_decoder_layers": 1}, {}, '"num_decoder_layers" of config.json is 1'),
        ("t5", {"feed_forward_proj": "gated-gelu"}, {}, "wi_0.weight is missing"),
        ("t5", {}, {"shared.weight": None}, "shared.weight is missing"),
        ("t5", {}, {"lm_head.weight": torch.ones(96, 48)}, "lm_head.weight must have the shape"),
        ("bart", {}, {"model.encoder.layers.0.fc3.weight": torch.ones(2)}, "fc3.* is unexpected"),
        ("bart", {}, {"final_logits_bias": torch.ones(97)}, "final_logits_bias must have the sh"),
        ("marian", {"max_position_embeddings": None}, {}, "n_positions must be an integer"),
    ],
)
def test_refuses(
    name: str,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor | None],
    message: str,
    tmp_path: Path,
) -> None:
    _theirs(name).save_pretrained(tmp_path)
    _change(tmp_path, config, **tensors)
    with pytest.raises(ValueError, match=message):
        fastattn.models.load(tmp_path)


def test_another_class_is_no_encoder_decoder(tmp_path: Path) -> None:
    _theirs("t5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"T5 is no GPT: fastattn.models.load reads it"):
        fastattn.GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("preset", "family"),
    [
        ("transformer-base", "marian"),
        ("t5-small", "t5"),
        ("t5-v1_1-small", "t5"),
        ("bart-base", "bart"),
    ],
)
@torch.no_grad()
def test_a_model_made_here_is_saved_as(preset: str, family: str, tmp_path: Path) -> None:
    config = EncoderDecoderConfig.preset(
        preset, vocab_size=97, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=20,
        decoder_ffn_dim=20,
    )  # fmt: skip
    ours = EncoderDecoder(config).eval()
    ours.save_pretrained(tmp_path)
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert back.config.model_type == family
    logits, _ = _ours(ours, _batch())
    torch.testing.assert_close(logits, back(**_batch()).logits, atol=1e-4, rtol=0)
