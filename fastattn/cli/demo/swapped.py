"""The demo's last parts: models of transformers, accelerated, verified and timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.cli.demo.comparison import Comparison, Works, accelerated, line, medians
from fastattn.models import GPT
from fastattn.training.optional import require


def show(
    folder: Path,
    batch: tuple[torch.Tensor, torch.Tensor],
    new_tokens: int,
    seconds: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Comparison:
    """Accelerate transformers' model in `folder` and hold it against the original.

    Args:
        batch: inputs and targets, token ids (B, T) on `device`. Generation continues the first
            row's first quarter.
        new_tokens: how many tokens to generate.
        seconds: how long to time each kind of work, about.

    Raises:
        RuntimeError: a module fails its proof.
    """
    transformers = require("transformers", "hf", "the demo")
    original = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False
    )
    original = original.to(device).eval()
    original.generation_config.eos_token_id = None  # all run to the same length
    model, swapped = accelerated(original)
    proven = fastattn.verify(model)
    line(
        "verified",
        f"{len(proven.swapped)} modules, outputs and gradients: as close to float64 as the "
        "original's",
    )
    inputs, targets = batch
    prompt = inputs[:1, : max(1, inputs.shape[1] // 4)]
    gpt = GPT.from_pretrained(folder, dtype=dtype, device=device).eval()
    generators: dict[str, Callable[[], torch.Tensor]] = {
        "original": partial(_generate, original, prompt, new_tokens),
        "accelerated": partial(_generate, model, prompt, new_tokens),
        "fastattn.GPT": partial(gpt.generate, prompt, max_new_tokens=new_tokens, eos_token_id=()),
    }
    theirs, *ours = (generate() for generate in generators.values())
    same = all(torch.equal(theirs, tokens) for tokens in ours)
    with torch.no_grad():
        difference = (_logits(model, inputs) - _logits(original, inputs)).abs().max().item()
    dtype_name = str(dtype).removeprefix("torch.")
    line("logits", f"{difference:.1e} from the original's at most, in {dtype_name}")
    line("greedy", f"{new_tokens} tokens, {'identical' if same else 'NOT identical'} for all three")

    works: dict[str, Works] = {
        "forward": {
            "original": torch.no_grad()(partial(_logits, original, inputs)),
            "accelerated": torch.no_grad()(partial(_logits, model, inputs)),
        },
        f"generate {new_tokens}": generators,
        "training step": {  # last, because it changes the weights
            "original": _training_step(original, inputs, targets),
            "accelerated": _training_step(model, inputs, targets),
        },
    }
    line(
        "speed", "median milliseconds of interleaved runs, and how many times the original's speed"
    )
    times: dict[str, dict[str, float]] = {}
    for work, candidates in works.items():
        times[work] = medians(candidates, device, seconds)
        base = times[work]["original"]
        cells = [
            f"{name} {value * 1e3:.1f} ({base / value:.2f}x)"
            for name, value in times[work].items()
            if name != "original"
        ]
        print(f"     {work:<14} original {base * 1e3:.1f}, {', '.join(cells)}", flush=True)
    return Comparison(type(original).__name__, dtype_name, str(device), swapped, same, times)


def save_gpt2(folder: Path, like: Path) -> None:
    """A GPT-2 of transformers, of the size of the model in `like`, with random weights."""
    transformers = require("transformers", "hf", "the demo")
    size = GPT.from_pretrained(like).config
    config = transformers.GPT2Config(
        vocab_size=size.vocab_size,
        n_positions=size.n_positions,
        n_embd=size.n_embd,
        n_layer=size.n_layer,
        n_head=size.n_head,
        initializer_range=0.2,  # far from uniform, so that greedy tokens say something
        bos_token_id=size.bos_token_id,
        eos_token_id=size.eos_token_id,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def _logits(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=inputs, use_cache=False).logits
    return logits


def _generate(model: Any, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens


def _training_step(
    model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        logits = _logits(model, inputs).float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run
