"""A run of each objective from its tables to the folder of its model, ours and transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.training import Tokenizer
from fastattn.training.objectives import OBJECTIVES
from fastattn.training.runs.run import Prepared, fit, opened, prepare
from fastattn.training.runs.settings import Run

ENCODER = DECODER = GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
SMALL = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
SENTENCES = [f"The {i}th quick brown fox 今天天气很好 jumps {i * 7 % 11} times." for i in range(24)]


def record(i: int) -> dict[str, Any]:
    """A record that has a field for every objective."""
    text, words = SENTENCES[i], SENTENCES[i].split()
    return {
        "text": text,
        "label": ("even", "odd")[i % 2],
        "source": text,
        "target": text[::-1],
        "tokens": words,
        "tags": ["B-X" if word == "fox" else "O" for word in words],
        "question": "which fox?",
        "context": text,
        "answers": {"text": ["quick brown"], "answer_start": [text.index("quick brown")]},
        "messages": [
            {"role": "user", "content": "which fox?"},
            {"role": "assistant", "content": text},
        ],
    }


def tables(place: Path, objective: dict[str, Any], **model: Any) -> dict[str, dict[str, Any]]:
    data = place / "data.jsonl"
    data.write_text("".join(json.dumps(record(i)) + "\n" for i in range(len(SENTENCES))), "utf-8")
    return {
        "model": model,
        "tokenizer": {"vocab_size": 400},
        "data": {"training": str(data), "validation_fraction": 0.2},
        "objective": objective,
        "training": {"steps": 2, "batch_size": 2, "context": 48, "evaluation_interval": 2},
        "output": {"folder": str(place / "out"), "best": False},
    }


def trained(config: dict[str, dict[str, Any]]) -> Prepared:
    run = Run.of(config)
    with opened(run) as checkpoints:
        prepared = prepare(run, checkpoints)
        history = fit(prepared)
    assert [step.step for step in history.steps] == [1, 2]
    assert history.evaluations[-1].step == 2
    return prepared


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {"config": DECODER}),
    "chat": ({}, {"config": DECODER}),
    "classification": ({"labels": ["even", "odd"]}, {"config": ENCODER}),
    "masked": ({"whole_words": True}, {"config": ENCODER}),
    "question_answering": ({"overlap": 8, "longest_question": 10}, {"config": ENCODER}),
    "sequence_to_sequence": ({}, {"preset": "bart-base", "config": SMALL}),
    "span_corruption": ({}, {"preset": "t5-v1_1-small", "config": SMALL | {"head_size": 8}}),
    "token_classification": ({"labels": ["O", "B-X", "I-X"]}, {"config": ENCODER}),
}


@pytest.mark.parametrize("name", CASES)
def test_each_objective(tmp_path: Path, name: str) -> None:
    objective, model = CASES[name]
    prepared = trained(tables(tmp_path, {"name": name, **objective}, **model))
    loaded = fastattn.models.load(tmp_path / "out" / "model")
    assert type(loaded).__name__ == OBJECTIVES[name].model_class
    for key, tensor in prepared.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    tokenizer = Tokenizer.load(tmp_path / "out" / "model")
    assert tokenizer.roles == prepared.objective.tokenizer.roles
    if "labels" in objective:
        assert list(loaded.config.label_names) == objective["labels"]
    if name == "chat":
        assert (
            tokenizer.chat_template
            and tokenizer.token_to_id("<|im_end|>") in loaded.config.eos_token_id
        )


def test_distillation(tmp_path: Path) -> None:
    trained(tables(tmp_path, {"name": "causal"}, config=DECODER))
    teacher = str(tmp_path / "out" / "model")
    config = tables(tmp_path, {"name": "distillation", "teacher": teacher}, config=DECODER)
    config["tokenizer"] = {"folder": teacher}
    config["output"]["folder"] = str(tmp_path / "student")
    prepared = trained(config)
    assert fastattn.models.load(tmp_path / "student" / "model").config == prepared.model.config


def test_an_encoder_gets_another_head(tmp_path: Path) -> None:
    """Classes after masked language modelling, and other classes after that."""
    masked = trained(tables(tmp_path, {"name": "masked"}, config=ENCODER)).model
    for labels in (["even", "odd"], ["odd", "even", "none"]):
        folder = str(tmp_path / "out" / "model")
        objective = {"name": "classification", "labels": labels}
        config = tables(tmp_path, objective, folder=folder)
        config["tokenizer"] = {}
        config["training"]["learning_rate"] = config["training"]["final_learning_rate"] = 1e-30
        config["output"]["folder"] = str(tmp_path / str(len(labels)))
        model = trained(config).model
        assert model.config.label_names == tuple(labels)
        assert torch.equal(model.encoder.wte.weight, masked.encoder.wte.weight)
        assert model.classifier.weight.shape == (len(labels), 16)


BERT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
CAUSAL = {"name": "causal"}
CLASSES = {"name": "classification", "labels": ["even", "odd"]}


@pytest.mark.parametrize(
    ("cls", "config", "objective", "rank"),
    [
        ("GPT2LMHeadModel", GPT2, CAUSAL, 0),
        ("GPT2LMHeadModel", GPT2, CAUSAL, 2),
        pytest.param("BertForMaskedLM", BERT, CLASSES, 0, marks=pytest.mark.long),
        pytest.param("BertForMaskedLM", BERT, CLASSES, 2, marks=pytest.mark.long),
    ],
)
def test_transformers(
    tmp_path: Path, cls: str, config: dict[str, Any], objective: dict[str, Any], rank: int
) -> None:
    """A folder of transformers is accelerated, trained, and is one again; with LoRA too."""
    transformers = pytest.importorskip("transformers")
    if rank:
        pytest.importorskip("peft")
    made = getattr(transformers, cls)
    folder = tmp_path / "theirs"
    roles = {role: f"<|{role}|>" for role in ("cls", "sep", "pad", "mask")}
    tokenizer = Tokenizer.train(SENTENCES, 400, special_tokens=roles)
    tokenizer.save(folder)
    size = {"vocab_size": tokenizer.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    original = made(made.config_class(**config, **size))
    original.save_pretrained(folder)

    model = {"folder": str(folder), "library": "transformers", "lora_rank": rank}
    run = tables(tmp_path, objective, **model)
    run["tokenizer"] = {}
    prepared = trained(run)
    names = [name for name, p in prepared.model.named_parameters() if p.requires_grad]
    assert bool(rank) == any("lora_" in name for name in names)
    if rank and "labels" in objective:
        assert {name for name in names if "lora_" not in name} >= {"classifier.weight"}
    auto = getattr(transformers, OBJECTIVES[objective["name"]].auto_class)
    loaded = auto.from_pretrained(tmp_path / "out" / "model")
    inputs = {"input_ids": torch.tensor([tokenizer.encode(SENTENCES[0])])}
    with torch.no_grad():
        ours = prepared.model.eval()(**inputs).logits
        theirs = loaded.eval()(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model").pad_token
        == "<|pad|>"
    )
    if rank and "labels" not in objective:
        before, after = original.state_dict(), loaded.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and all(".h.0." in name for name in changed)


def test_lora(tmp_path: Path) -> None:
    """Only the linear layers of the blocks change; they are plain ones when they are saved."""
    pytest.importorskip("peft")
    before = trained(tables(tmp_path, CAUSAL, config=DECODER)).model.state_dict()
    config = tables(tmp_path, CAUSAL, folder=str(tmp_path / "out" / "model"), lora_rank=3)
    config["tokenizer"] = {}
    config["output"]["folder"] = str(tmp_path / "adapted")
    trained(config)
    after = fastattn.models.load(tmp_path / "adapted" / "model").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    linear = ("in_proj.weight", "out_proj.weight", "linear1.weight", "linear2.weight")
    assert changed == {name for name in after if name.endswith(linear)}
    config["model"]["lora_targets"] = ["no_such_layer"]
    config["output"]["folder"] = str(tmp_path / "none")
    with pytest.raises(ValueError, match=r"lora_targets \('no_such_layer',\): "):
        trained(config)


def test_dropout_that_a_family_lacks_is_not_saved(tmp_path: Path) -> None:
    qwen3 = {
        "norm": "rms_norm", "positions": "rotary", "gated": True, "activation_function": "silu",
        "qkv_bias": False, "out_bias": False, "mlp_bias": False, "qk_norm": "head",
        "resid_pdrop": 0.2,
    }  # fmt: skip
    model = trained(tables(tmp_path, {"name": "causal"}, config=DECODER | qwen3)).model
    assert model.config.resid_pdrop == 0.2
    loaded = fastattn.models.load(tmp_path / "out" / "model")
    assert loaded.config.resid_pdrop == 0.0
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.state_dict().items())
