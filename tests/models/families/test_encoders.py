"""BERT, RoBERTa and ModernBERT against transformers': outputs, losses, gradients, folders."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.encoders import (
    FAMILIES,
    HEADS,
    VOCAB,
    labels_for,
    make_pair,
    outputs,
    padded,
    parameter_pairs,
)

import fastattn.models
from oracle import assert_close_to_reference

SIDES = ("none", "right", "left", "both")
# Each family once with each head and once with each side, but not all of all.
CASES = [
    (family, head, SIDES[(i + j) % len(SIDES)])
    for i, family in enumerate(FAMILIES)
    for j, head in enumerate(HEADS)
]


def _visible(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of each position only those that count."""
    return x[mask.bool()] if x.shape[:2] == mask.shape else x


@pytest.mark.parametrize(("family", "head", "side"), CASES)
def test_outputs_and_losses_equal_transformers(
    family: str, head: str, side: str, tmp_path: Path
) -> None:
    ours, theirs = make_pair(tmp_path, family, head)
    inputs = padded(theirs.config, side)
    with torch.no_grad():
        mine, other = outputs(ours, inputs), outputs(theirs, inputs)
        assert mine.keys() == other.keys()
        for name, value in other.items():
            one, two = (_visible(x, inputs["attention_mask"]) for x in (mine[name], value))
            torch.testing.assert_close(one, two, atol=1e-4, rtol=0, msg=name)
        if head == "Model":
            return
        inputs |= labels_for(head, theirs.config, inputs["attention_mask"])
        loss, expected = outputs(ours, inputs)["loss"], outputs(theirs, inputs)["loss"]
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "ForMaskedLM"),
        ("roberta", "ForSequenceClassification"),
        ("modernbert", "ForTokenClassification"),
        ("modernbert", "ForMaskedLM"),
        ("bert-relu", "ForQuestionAnswering"),
    ],
)
def test_outputs_and_gradients_hold_the_rule(
    family: str, head: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    # bfloat16 needs a model that does not amplify rounding without bounds.
    ours, theirs = make_pair(tmp_path, family, head, dtype=dtype, initializer_range=0.05)
    exact = copy.deepcopy(theirs).double()
    inputs = padded(theirs.config, "both")
    results = []
    for model in (ours, theirs, exact):
        with torch.no_grad():
            results.append(outputs(model, inputs))
    for name, reference in results[2].items():
        mine, eager, reference = (_visible(r[name], inputs["attention_mask"]) for r in results)
        assert_close_to_reference(mine, eager, reference, name=name)
    inputs |= labels_for(head, theirs.config, inputs["attention_mask"])
    for model in (ours, theirs, exact):
        # transformers' losses are in the logits' dtype; ours are float32, so that theirs is too
        with torch.enable_grad():
            outputs(model, inputs)["loss"].backward()
    pairs = zip(parameter_pairs(ours, theirs), parameter_pairs(ours, exact), strict=True)
    for (name, mine, eager), (_, _, reference) in pairs:
        assert_close_to_reference(mine, eager, reference, name=name)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize(
    ("count", "kind"),
    [
        (3, None),
        (3, "floats"),
        (1, None),
        (3, "regression"),
        (3, "multi_label_classification"),
        (3, "single_label_classification"),
    ],
)
def test_losses_of_classification(
    family: str, count: int, kind: str | None, tmp_path: Path
) -> None:
    problem = None if kind == "floats" else kind
    ours, theirs = make_pair(
        tmp_path, family, "ForSequenceClassification", num_labels=count, problem_type=problem
    )
    inputs = padded(theirs.config, "right")
    batch = len(inputs["input_ids"])
    if kind in ("floats", "multi_label_classification"):
        labels = torch.randint(0, 2, (batch, count)).float()
    elif count == 1:
        labels = torch.randn(batch)
    elif kind == "regression":
        labels = torch.randn(batch, count)
    else:
        labels = torch.randint(0, count, (batch,))
        labels[1] = -100
    with torch.no_grad():
        loss = ours(**inputs, labels=labels).loss
        torch.testing.assert_close(loss, theirs(**inputs, labels=labels).loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert-mean"])
@pytest.mark.parametrize("head", HEADS)
def test_saved_folders_are_transformers(family: str, head: str, tmp_path: Path) -> None:
    ours, theirs = make_pair(tmp_path / "theirs", family, head, id2label={0: "no", 1: "yes"})
    ours.save_pretrained(tmp_path / "ours")
    before, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert before.config.id2label == {0: "no", 1: "yes"}
    assert before.config.architectures == [type(theirs).__name__]
    inputs = padded(theirs.config, "right")
    with torch.no_grad():
        again = outputs(before.eval(), inputs)
        for name, value in outputs(theirs, inputs).items():
            assert torch.equal(value, again[name]), name
    twin = fastattn.models.load(tmp_path / "ours")
    assert type(twin) is type(ours) and twin.config == ours.config
    for (name, one), (_, two) in zip(ours.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_positions_of_the_callers_own(family: str, tmp_path: Path) -> None:
    ours, theirs = make_pair(tmp_path, family, "Model")
    inputs = padded(theirs.config, "none")
    inputs["position_ids"] = torch.randint(2, 24, inputs["input_ids"].shape)
    with torch.no_grad():
        mine, other = outputs(ours, inputs), outputs(theirs, inputs)
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, atol=1e-4, rtol=0)


def test_a_config_of_transformers_4(tmp_path: Path) -> None:
    """Keys that transformers 5 has replaced: thetas beside each other, one global layer in so many."""
    ours, _ = make_pair(tmp_path, "modernbert", "Model")
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    for key in ("layer_types", "rope_parameters"):
        del data[key]
    path.write_text(
        json.dumps(
            {
                **data,
                "global_rope_theta": 160000.0,
                "local_rope_theta": 10000.0,
                "global_attn_every_n_layers": 3,
            }
        )
    )
    assert fastattn.models.load(tmp_path).config == ours.config


def test_old_and_spare_names_of_bert(tmp_path: Path) -> None:
    """As in bert-base-uncased: gamma and beta, the rest of the pretraining, positions, aliases."""
    from safetensors.torch import load_file, save_file

    ours, theirs = make_pair(tmp_path, "bert", "ForMaskedLM")
    path = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(path).items()
    }
    old["cls.predictions.decoder.weight"] = theirs.bert.embeddings.word_embeddings.weight.clone()
    old["cls.predictions.decoder.bias"] = theirs.cls.predictions.bias.detach().clone()
    old["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    old["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    old["bert.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(old, path, metadata={"format": "pt"})
    ids = torch.randint(6, VOCAB, (2, 9))
    assert torch.equal(fastattn.models.load(tmp_path)(ids).logits, ours(ids).logits)
    old["cls.predictions.decoder.bias"] += 1
    save_file(old, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cls.predictions.decoder.bias differs from"):
        fastattn.models.load(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bert", {"is_decoder": True}, '"is_decoder" is True'),
        ("bert", {"position_embedding_type": "relative_key"}, '"position_embedding_type" is'),
        ("bert", {"tie_word_embeddings": False}, '"tie_word_embeddings" is False'),
        ("bert", {"hidden_act": "tanh"}, "activation_function must be one of"),
        ("bert", {"num_attention_heads": 5}, "n_head must divide n_embd"),
        ("bert", {"vocab_size": 98}, r"word_embeddings.weight must have the shape \(98, 32\)"),
        ("bert", {"num_hidden_layers": 2}, '"num_hidden_layers" of config.json is 2'),
        ("bert", {"architectures": ["BertForNextSentencePrediction"]}, '"architectures" must be'),
        ("bert", {"architectures": ["BertForTokenClassification"]}, "classifier.weight is missing"),
        ("roberta", {"pad_token_id": None}, "needs a pad_token_id"),
        ("modernbert", {"mlp_dropout": 0.1}, '"mlp_dropout" is 0.1'),
        ("modernbert", {"layer_types": ["full_attention"]}, "must have n_layer = 3 entries"),
        ("modernbert", {"rope_scaling": {"type": "linear", "factor": 2}}, '"rope_scaling" of all'),
        ("modernbert", {"id2label": {"1": "yes"}}, '"id2label" must number its labels'),
    ],
    ids=str,
)
def test_folders_that_are_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_pair(tmp_path, family, "Model")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        fastattn.models.load(tmp_path)
