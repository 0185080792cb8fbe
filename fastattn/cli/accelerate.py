"""Accelerate a model of transformers, and show what was swapped, how exact and how fast it is.

    fastattn accelerate FOLDER                    the report, and both models on one batch
    fastattn accelerate gpt2 --text "Once upon"   a name on the Hugging Face hub; your own text
    fastattn accelerate FOLDER --train --dtype bfloat16 --device cuda
    fastattn accelerate FOLDER --gguf-file model.gguf

The model is of the class that its config names. The batch is the text, or random tokens or pixels
of the size that the config tells; a language model gets labels and so has a loss. Classes that are
slower on fastattn are left alone, with the figure. Nothing is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.cli import answers
from fastattn.training.optional import require

SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder with a model, or its name on the hub")
    parser.add_argument("--gguf-file", help="the file in the folder, for weights in GGUF")
    parser.add_argument("--text", help="the batch; without it tokens are random")
    parser.add_argument("--batch", type=int, default=2, help="rows of the batch (default: 2)")
    parser.add_argument("--seqlen", type=int, default=128, help="random tokens (default: 128)")
    answers.add_model(parser)
    parser.add_argument("--train", action="store_true", help="time forward and backward")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="modules to swap, as a.*.b")
    parser.add_argument("--exclude", nargs="+", metavar="NAME", default=[], help="and not to swap")
    parser.add_argument(
        "--swap-slower", action="store_true", help="also swap classes that are slower on the batch"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 0 if every proof holds."""
    answers.check_least(arguments, "batch", "seqlen")
    transformers = require("transformers", "hf", "fastattn accelerate")
    torch.manual_seed(SEED)
    source = {"pretrained_model_name_or_path": _place(arguments.model)}
    if arguments.gguf_file is not None:
        source["gguf_file"] = arguments.gguf_file
    model = _load(transformers, source, getattr(torch, arguments.dtype))
    model = model.to(arguments.device).train(arguments.train)
    if arguments.text is None:
        batch = _random(model, arguments.batch, arguments.seqlen)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        batch = dict(tokenizer([arguments.text] * arguments.batch, return_tensors="pt"))
    batch = {name: x.to(model.device) for name, x in _with_labels(model, batch).items()}
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in batch.items())
    print(f"{type(model).__name__}, {arguments.dtype}, {arguments.device}; {shapes}")
    report = fastattn.accelerate(
        model,
        only=arguments.only,
        exclude=arguments.exclude,
        batch=None if arguments.swap_slower else batch,
    )
    print(report)
    print(fastattn.verify(model, batch).trial)
    return 0


def _place(model: str) -> str:
    """The folder, or the name on the hub."""
    path = Path(model).expanduser()
    if not path.is_dir() and (path.is_absolute() or model.startswith((".", "~"))):
        raise FileNotFoundError(f"there is no folder {path}")
    return str(path) if path.is_dir() else model


def _load(transformers: Any, source: dict[str, str], dtype: torch.dtype) -> Any:
    """The model, of the class that its config names."""
    config = transformers.AutoConfig.from_pretrained(**source, trust_remote_code=False)
    (name, *_) = config.architectures or ["AutoModel"]
    cls = getattr(transformers, name, transformers.AutoModel)
    return cls.from_pretrained(**source, dtype=dtype, trust_remote_code=False, use_safetensors=True)


def _random(model: Any, batch: int, seqlen: int) -> dict[str, torch.Tensor]:
    """The model's main input."""
    name, config = model.main_input_name, model.config
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        shape = batch, getattr(vision, "num_channels", 3), height, width
        return {name: torch.randn(shape).to(model.dtype)}
    if name == "input_ids":
        text = config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None) or seqlen
        return {name: torch.randint(text.vocab_size, (batch, min(seqlen, longest)))}
    raise ValueError(
        f"no random input for {type(model).__name__}, whose main input is {name!r}: call "
        "fastattn.verify(model, batch) with a batch of yours"
    )


def _with_labels(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """And what a sequence-to-sequence model or a language model's loss needs."""
    ids = batch.get("input_ids")
    if ids is None:
        return batch
    name = type(model).__name__
    if name.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")):
        return {**batch, "labels": ids}
    return {**batch, "decoder_input_ids": ids} if model.config.is_encoder_decoder else batch
