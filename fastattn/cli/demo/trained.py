"""The demo's first part: a tokenizer and a small GPT: trained, saved, read back, sampled from.

The GPT is built as current models are (RMSNorm, rotary positions, norms of q and k, SwiGLU): fewer
steps bring it further than GPT-2's architecture. Its folder is a Qwen 3's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fastattn.cli.demo.comparison import line
from fastattn.cli.train.progress import SAMPLING, Progress, Samples
from fastattn.models import GPT, GPTConfig
from fastattn.training import (
    Causal,
    Tokenizer,
    TrainingConfig,
    Windows,
    bits_per_byte,
    load_corpus,
    split_text,
    tokenize,
    train,
)
from fastattn.training.steps.optimizers import muon_is_fast
from fastattn.training.steps.precision import bfloat16_is_fast

PROMPTS = ("And God said unto", "And it came to pass", "酒店的房间", "这本书")
DROPOUT = 0.1  # the text is read eight times


@dataclass(frozen=True)
class Size:
    """How large the demo is."""

    characters: int | None  # of each text; None is all
    vocab_size: int
    layers: int
    heads: int
    width: int
    context: int
    batch_size: int
    steps: int
    new_tokens: int
    seconds: float  # to time each kind of work


FULL = Size(None, 1024, 3, 3, 192, 128, 8, steps=1000, new_tokens=48, seconds=2.0)
QUICK = Size(20_000, 512, 2, 2, 64, 32, 4, steps=20, new_tokens=8, seconds=0.1)


@dataclass(frozen=True)
class Trained:
    """The model and the measurements, for the other parts.

    Attributes:
        batch: inputs and targets of held-out text, (4, context) each.
        bits_per_byte: of the held-out part of each text.
    """

    batch: tuple[torch.Tensor, torch.Tensor]
    bits_per_byte: dict[str, float]


def configuration(size: Size, steps: int | None, seed: int, device: torch.device) -> TrainingConfig:
    """How to train: with Muon and in bfloat16 where they are fast, else AdamW, float32."""
    steps = size.steps if steps is None else steps
    muon = muon_is_fast(device)
    return TrainingConfig(
        steps=steps,
        batch_size=size.batch_size,
        context=size.context,
        optimizer="muon" if muon else "adamw",
        precision="bfloat16" if bfloat16_is_fast(device) else "float32",
        learning_rate=4e-3 if muon else 2e-3,
        final_learning_rate=0.0,
        warmup_steps=min(20, steps // 2),
        evaluation_interval=max(1, steps // 5),
        evaluation_tokens=16384,
        seed=seed,
    )


def show(folder: Path, size: Size, config: TrainingConfig, device: torch.device) -> Trained | None:
    """Train, save and sample; None if Ctrl-C ended the training.

    Raises:
        RuntimeError: the saved model gives other logits when it is read back.
    """
    corpus = {name: text[: size.characters] for name, text in load_corpus().items()}
    parts = {name: split_text(text) for name, text in corpus.items()}
    start = time.perf_counter()
    tokenizer = Tokenizer.train([training for training, _ in parts.values()], size.vocab_size)
    seconds = time.perf_counter() - start
    split = tokenize(tokenizer, parts)
    texts = ", ".join(f"{name} {len(text):,} characters" for name, text in corpus.items())
    line("text", f"{texts}; a tenth of each held out")
    line("tokenizer", f"byte-level BPE, {tokenizer.vocab_size} tokens, trained in {seconds:.1f} s")

    model = GPT(
        GPTConfig(
            vocab_size=tokenizer.vocab_size,
            n_positions=size.context,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            n_inner=size.width * 8 // 3,
            activation_function="silu",
            gated=True,
            norm="rms_norm",
            qk_norm="head",
            positions="rotary",
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            embd_pdrop=DROPOUT,
            attn_pdrop=0.0,
            resid_pdrop=DROPOUT,
            bos_token_id=tokenizer.end_of_text,
            eos_token_id=tokenizer.end_of_text,
        )
    ).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    line("model", f"{size.layers} layers, {size.width} wide, {parameters:,} parameters")

    windows, held_out_windows = (
        Windows(stream, size.batch_size, size.context, config.seed)
        for stream in (split.training, split.validation)
    )
    optimizer = "Muon and AdamW" if config.optimizer == "muon" else "AdamW"
    tokens = f"{config.batch_size} x {config.context} tokens"
    line("training", f"{config.steps} steps of {tokens}, {optimizer}")
    progress = Progress(config.steps, tuple)
    objective = Causal(tokenizer)
    with contextlib.closing(progress):
        history = train(
            model, objective, windows, config, validation=held_out_windows, on_progress=progress
        )
    # Dropout has done its work, and a Qwen 3's config has no place for it.
    model.config = dataclasses.replace(model.config, embd_pdrop=0.0, resid_pdrop=0.0)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    history.save(folder / "history.json")
    history.plot(folder / "loss.png")
    if history.interrupted:
        print(f"   interrupted after {len(history.steps)} steps; saved in {folder}")
        return None
    line(
        "trained",
        f"{len(history.steps)} steps, {history.training_tokens:,} tokens in "
        f"{history.training_seconds:.0f} s: {history.tokens_per_second:,.0f} tokens/s",
    )

    gpt = GPT.from_pretrained(folder, device=device).eval()
    arguments = Windows(split.validation, 4, size.context, seed=1).batch(0).to(device).arguments
    batch = arguments["input_ids"], arguments["targets"]
    with torch.no_grad():
        if not torch.equal(model.eval()(batch[0]), gpt(batch[0])):
            raise RuntimeError("the saved model gives other logits when it is read back")
    line("saved", f"in {folder}; read back, its logits are identical")
    bits = {
        name: bits_per_byte(gpt, tokenizer, held_out, size.context)
        for name, (_, held_out) in parts.items()
    }
    measured = ", ".join(f"{name} {value:.2f}" for name, value in bits.items())
    line("held out", f"bits per byte: {measured}")

    how = f"temperature {SAMPLING['temperature']}, top-p {SAMPLING['top_p']}"
    line("samples", f"{how}; the prompts in brackets")
    for text in Samples(gpt, tokenizer, PROMPTS, size.new_tokens, size.context)():
        print(text)
    return Trained(batch, bits)
