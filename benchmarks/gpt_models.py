"""GPT-2 and a Llama for the benchmarks of whole models: sizes, one set of weights for all peers."""

from __future__ import annotations

import functools
import gc
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import checkout  # noqa: F401
import torch
from facts import is_tie
from harness import Cell, chosen, failed
from peer import Refused
from plain_gpt import PlainGPT
from schema import Entry, Row
from torch import Tensor, nn

import fastattn
from fastattn.models.config import PRESETS
from fastattn.models.families import FAMILIES
from fastattn.timing import Sample, ratio

TRANSFORMERS, ACCELERATED = "transformers", "accelerated"

GPT2 = {"vocab_size": 50257, "n_positions": 1024}
SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 250, "n_positions": 64},
    "small": {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "n_positions": 512},
    **{name: {**size, **GPT2} for name, size in PRESETS.items()},
}
# Llamas, for generation only: by config.json's keys.
LLAMAS: Mapping[str, Mapping[str, Any]] = {
    "tiny-llama": {
        "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 250,
        "max_position_embeddings": 64,
    },
    "smollm2-135m": {
        "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}  # fmt: skip
DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0

# Seconds after which a cell must be stuck, by device and whether somebody compiles.
PATIENCE = {
    ("cuda", False): 240.0,
    ("cuda", True): 600.0,
    ("cpu", False): 900.0,
    ("cpu", True): 1800.0,
}


@functools.cache
def config_of(size: str) -> fastattn.GPTConfig:
    """Of a name in `SIZES` or `LLAMAS`."""
    if size in LLAMAS:
        config: fastattn.GPTConfig = FAMILIES["llama"].read_config(LLAMAS[size])
        return config
    return fastattn.GPTConfig(**SIZES[size])


@functools.cache
def parameters(size: str) -> int:
    """N: all but the positions, which nobody multiplies with; a tied head counts once."""
    model = fastattn.GPT(config_of(size), device="meta")
    positions = 0 if model.wpe is None else model.wpe.weight.numel()
    return sum(p.numel() for p in model.parameters()) - positions


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' hints and progress bars out of the tables."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def autocast(device: str, dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)


def each(
    against: Mapping[str, Callable[..., Any]],
    attempt: Callable[[str, Callable[..., Any]], Entry],
    device: str,
) -> dict[str, Entry]:
    """The entry that `attempt` gives of each peer. A failure stays in the peer's own entry."""
    entries: dict[str, Entry] = {}
    for name, make in against.items():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                entries[name] = attempt(name, make)
            except Exception as failure:
                entries[name] = failed(name, failure, device, warned)
    return entries


@dataclass(frozen=True, kw_only=True)
class ModelCell(Cell):
    """A row that runs whole models: training or generation."""

    model: str

    rounds = 9

    @property
    def axes(self) -> dict[str, Any]:
        return {**super().axes, "compile": self.compile}

    @property
    def limit(self) -> float:  # type: ignore[override]
        return PATIENCE[self.device, self.compile]

    def measure(self, seconds: float, peers: Collection[str] | None = None) -> Row:
        gc.collect()
        torch._dynamo.reset()  # once a cell: peers of a cell share what was compiled
        against = chosen(self.against, peers, self.bound)
        judged = against.keys() >= {TRANSFORMERS, ACCELERATED}
        cell = replace(self, against=against, target=self.target if judged else None)
        with quiet():
            return cell.run(seconds)

    def run(self, seconds: float) -> Row:
        """The row, with all of `against`."""
        raise NotImplementedError


def no_slower(sample: Sample | None, theirs: Sample | None) -> bool:
    """Whether a sample takes no longer than theirs, or it is a tie within noise."""
    if sample is None or theirs is None:  # what did not run has kept no promise
        return False
    times = ratio(theirs, sample).as_dict()
    return times["median"] >= 1 or is_tie(times)  # type: ignore[arg-type]


class Models:
    """One set of random weights in float32, as modules of each kind.

    Modules that keep the weights in the same layout share them, gradients and optimiser included:
    so a large model fits several times. No step changes a weight.

    Attributes:
        ours: fastattn.GPT.
        plain: `PlainGPT`.
    """

    def __init__(self, size: str, device: str, dropout: float = 0.0) -> None:
        from transformers import GPT2Config, LlamaConfig

        self.size, self.device, self.dropout = size, device, dropout
        torch.manual_seed(0)
        tokens = {"bos_token_id": 0, "eos_token_id": 0}
        if size in LLAMAS:
            self._config = functools.partial(LlamaConfig, **LLAMAS[size], **tokens)
        else:
            drops = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
            self._config = functools.partial(GPT2Config, **SIZES[size], **drops, **tokens)
        self._optimizers: dict[nn.Parameter, torch.optim.Optimizer] = {}
        self._made: list[nn.Module] = []
        self._first = self._transformers("sdpa", device)
        # A new GPT-2 repeats its last token whatever came before, and so hides most mistakes: its
        # blocks add little to the embeddings. These add much, as those of a trained one do.
        inputs = 1 if size in LLAMAS else 0  # the dimension of a weight that multiplies them
        blocks = self._first.model.layers if size in LLAMAS else self._first.transformer.h
        for weight in blocks.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[inputs] ** -0.5)

    def _transformers(self, attention: str, device: str) -> Any:
        from transformers import AutoModelForCausalLM

        with torch.device(device):
            model = AutoModelForCausalLM.from_config(self._config(attn_implementation=attention))
        # Random weights may well say "end of text"; all are to go on to the last token.
        model.generation_config.eos_token_id = None
        self._made.append(model)
        return model

    def transformers(self, attention: str = "sdpa") -> Any:
        """A model of its own on the common weights."""
        model = self._transformers(attention, "meta")
        weights = dict(self._first.named_parameters(remove_duplicate=False))
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        if self.size in LLAMAS:  # its frequencies are no weights
            model.model.rotary_emb = self._first.model.rotary_emb
        return model

    @functools.cached_property
    def ours(self) -> fastattn.GPT:
        with tempfile.TemporaryDirectory() as folder:
            self._first.save_pretrained(folder)
            model = fastattn.GPT.from_pretrained(folder, device=self.device)
        self._made.append(model)
        return model

    @functools.cached_property
    def plain(self) -> PlainGPT:
        if self.size in LLAMAS:
            raise Refused("a GPT-2 only")
        model = PlainGPT(self._first, self.dropout)
        self._made.append(model)
        return model

    def random_ids(self, *shape: int) -> Tensor:
        return torch.randint(config_of(self.size).vocab_size, shape, device=self.device)

    def to(self, dtype: torch.dtype) -> None:
        """The weights of all modules made so far in another dtype."""
        for model in self._made:
            model.to(dtype)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Fused AdamW; only matrices decay.

        The learning rate is 0: a step takes as long, and leaves the weights as they are.
        """
        weights = list(model.parameters())
        if weights[0] not in self._optimizers:
            groups = [
                {"params": [p for p in weights if p.dim() >= 2], "weight_decay": DECAY},
                {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
            ]
            self._optimizers[weights[0]] = torch.optim.AdamW(
                groups, lr=0.0, betas=BETAS, fused=True
            )
        return self._optimizers[weights[0]]
