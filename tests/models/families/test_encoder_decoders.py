"""T5, BART and Marian against transformers', both ways by way of a folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models.families.encoder_decoder_cases import CASES, USUAL, batch_of_padded, theirs
from safetensors.torch import load_file, save_file

import fastattn
from fastattn.models import EncoderDecoder, EncoderDecoderConfig
from fastattn.models.families import FAMILIES
from fastattn.models.folder.layout import layout
from oracle import assert_all_close_to_reference, assert_close_to_reference


def _read(model: Any, folder: Path) -> EncoderDecoder:
    model.save_pretrained(folder)
    ours = fastattn.models.load(folder)
    assert type(ours) is EncoderDecoder and not ours.training
    return ours


def _ours(model: EncoderDecoder, batch: dict[str, torch.Tensor]) -> Any:
    return model(
        batch["input_ids"], targets=batch["labels"], attention_mask=batch["attention_mask"]
    )


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    """transformers' folder gives its logits and loss, and ours gives the same model there."""
    original = theirs(name)
    ours = _read(original, tmp_path / "theirs")
    batch = batch_of_padded()
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
    original = theirs("t5")
    ours = _read(original, tmp_path)
    batch = batch_of_padded()
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
    eager = theirs(name, attn_implementation="eager")
    if dtype == torch.bfloat16:  # needs a model that does not amplify rounding without bounds
        for key, parameter in eager.named_parameters():
            if "layers" in key or "block" in key:
                parameter.data *= 0.5
    eager = eager.to(dtype)
    ours = _read(eager, tmp_path)
    exact = copy.deepcopy(eager).double()
    batch = batch_of_padded()
    logits, loss = _ours(ours, batch)
    measured, referred = eager(**batch), exact(**batch)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    assert_close_to_reference(logits, measured.logits, referred.logits, name="logits")
    mine = _gradients(ours, loss)
    measure, reference = _gradients(eager, measured.loss), _gradients(exact, referred.loss)
    family = FAMILIES[CASES[name][0]].of(ours.config)
    compared, found = 0, {}
    for how in layout(ours, family):
        if how.names[0] not in reference:
            assert how.names == ("final_logits_bias",) and how.ours[0] not in mine
            continue
        # Of q, k and v together: that of k's bias is 0 but for roundings.
        stored, *others = (
            torch.cat([gradients[key] for key in keys])
            for gradients, keys in ((mine, how.ours), (measure, how.names), (reference, how.names))
        )
        found[how.ours[0]] = (stored, *others)
        compared += len(how.names)
    assert compared == len(reference)
    assert_all_close_to_reference(found)


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 4, "length_penalty": 0.7},
    "beams, no stop before all": {"num_beams": 3, "early_stopping": "never", "repetition_penalty": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", USUAL)
def test_generate_is_transformers(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Token for token, of sources of unequal lengths, together and alone."""
    original = theirs(name)
    ours = _read(original, tmp_path)
    source, lengths = batch_of_padded()["input_ids"], [33, 8, 20]
    mask = (torch.arange(33) < torch.tensor(lengths)[:, None]).long()
    sources = [row[:length].tolist() for row, length in zip(source, lengths, strict=True)]
    got = ours.generate(sources, max_new_tokens=14, **settings)
    expected = original.generate(
        source, attention_mask=mask, max_new_tokens=14, do_sample=False, **settings
    )
    assert torch.equal(got, expected)
    assert torch.equal(
        ours.generate(source, attention_mask=mask, max_new_tokens=14, **settings), got
    )
    alone = ours.generate(sources[1:2], max_new_tokens=14, **settings)[0]
    assert torch.equal(alone, got[1, : len(alone)])


def test_a_summariser_generates_as_its_authors_would(tmp_path: Path) -> None:
    """What bart-large-cnn's generation_config.json says, of beams, forced and repeated tokens."""
    original = theirs("bart")
    authors: dict[str, Any] = {
        "num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "early_stopping": True,
        "min_length": 6, "max_length": 15, "forced_bos_token_id": 1, "forced_eos_token_id": 2,
    }  # fmt: skip
    original.generation_config = transformers.GenerationConfig(
        **authors, decoder_start_token_id=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    ours = _read(original, tmp_path)
    source = batch_of_padded()["input_ids"]
    got = ours.generate(source)
    assert torch.equal(got, original.generate(source, attention_mask=torch.ones_like(source)))
    assert (got[:, 1] == 1).all()
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(got, back.generate(source, attention_mask=torch.ones_like(source)))


@pytest.mark.parametrize("name", USUAL)
@torch.no_grad()
def test_the_cache_gives_what_the_whole_gives(name: str, tmp_path: Path) -> None:
    """Any tokens, in parts of several; then sequences of unequal lengths, one token at a time."""
    original = theirs(name)
    ours = _read(original, tmp_path)
    source, lengths = batch_of_padded()["input_ids"], torch.tensor([33, 8, 20])
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
    theirs("t5").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["scale_decoder_outputs"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    head = torch.randn(97, 48) if has_head else None
    _change(tmp_path, {"tie_word_embeddings": theirs_tied}, **{"lm_head.weight": head})
    ours = fastattn.models.load(tmp_path)
    original = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    batch = batch_of_padded()
    with torch.no_grad():
        logits, _ = _ours(ours, batch)
        torch.testing.assert_close(logits, original(**batch).logits, atol=1e-4, rtol=0)
    assert ours.config.tie_word_embeddings != has_head


def test_a_model_without_its_head(tmp_path: Path) -> None:
    """facebook/bart-base is one: names without the prefix, no bias of the logits."""
    original = theirs("bart")
    original.final_logits_bias.zero_()
    original.model.save_pretrained(tmp_path)
    ours = fastattn.models.load(tmp_path)
    batch = batch_of_padded()
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
    theirs(name).save_pretrained(tmp_path)
    _change(tmp_path, config, **tensors)
    with pytest.raises(ValueError, match=message):
        fastattn.models.load(tmp_path)


def test_another_class_is_no_encoder_decoder(tmp_path: Path) -> None:
    theirs("t5").save_pretrained(tmp_path)
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
    logits, _ = _ours(ours, batch_of_padded())
    torch.testing.assert_close(logits, back(**batch_of_padded()).logits, atol=1e-4, rtol=0)
