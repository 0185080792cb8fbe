"""Whom models are compared with: one small function per peer, all with the same weights.

`Models` holds the weights. A function of `TRAIN` makes a `Learner` of them, which predicts and has
a loss, one of `GENERATE` a `Writer`, which continues prompts; the `*_COMPILED` ones, which stand in
for those of the same name, take seconds to compile.

Shapes: B batch, T tokens, C width, H heads, D head_dim, S slots of a cache, V vocabulary.
"""

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
from harness import OURS, Cell, chosen, failed
from peers import Refused
from schema import Entry, Row
from show import is_tie
from timing import Sample, ratio
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.models.config import PRESETS

TRANSFORMERS, ACCELERATED = "transformers", "accelerated"

GPT2 = {"vocab_size": 50257, "n_positions": 1024}
SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 250, "n_positions": 64},
    "small": {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "n_positions": 512},
    **{name: {**size, **GPT2} for name, size in PRESETS.items()},
}
VOCABULARY_MULTIPLE = 64  # what nanoGPT pads the vocabulary to: 50257 -> 50304
CACHE_MULTIPLE = 8  # what gpt-fast pads its cache to
DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0

# Seconds after which a cell must be stuck, by device and whether somebody compiles.
PATIENCE = {
    ("cuda", False): 240.0,
    ("cuda", True): 600.0,
    ("cpu", False): 900.0,
    ("cpu", True): 1800.0,
}


@functools.cache
def parameters(size: str) -> int:
    """N: all but the positions, which nobody multiplies with; a tied head counts once."""
    model = fastattn.GPT(fastattn.GPTConfig(**SIZES[size]), device="meta")
    return sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()


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
    """What `attempt` says of each peer; what one cannot do, or breaks, stays in its own entry."""
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
    """What a row of training and one of generation have in common: both run whole models."""

    model: str
    compile: bool

    rounds = 9

    @property
    def limit(self) -> float:  # type: ignore[override]
        return PATIENCE[self.device, self.compile]

    def measure(self, seconds: float, peers: Collection[str] | None = None) -> Row:
        gc.collect()
        torch._dynamo.reset()  # here, not between two peers: what was compiled is kept for a cell
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
    so a large model fits several times. Nothing is spoilt, since no step changes a weight.

    Attributes:
        ours: fastattn.GPT.
        plain: `PlainGPT`.
    """

    def __init__(self, size: str, device: str, dropout: float = 0.0) -> None:
        from transformers import GPT2Config

        self.size, self.device, self.dropout = size, device, dropout
        torch.manual_seed(0)
        self._config = functools.partial(
            GPT2Config,
            **SIZES[size],
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
        self._optimizers: dict[nn.Parameter, torch.optim.Optimizer] = {}
        self._made: list[nn.Module] = []
        self._first = self._transformers("sdpa", device)
        # A new GPT-2 repeats its last token whatever came before, and so hides most mistakes: its
        # blocks add little to the embeddings. These add much, as those of a trained one do.
        for weight in self._first.transformer.h.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[0] ** -0.5)

    def _transformers(self, attention: str, device: str) -> Any:
        from transformers import GPT2LMHeadModel

        with torch.device(device):
            model = GPT2LMHeadModel(self._config(attn_implementation=attention))
        # Random weights may well say "end of text"; all are to go on to the last token.
        model.generation_config.eos_token_id = None
        self._made.append(model)
        return model

    def transformers(self, attention: str = "sdpa") -> Any:
        """A GPT2LMHeadModel of its own on the common weights."""
        model = self._transformers(attention, "meta")
        weights = dict(self._first.named_parameters(remove_duplicate=False))
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
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
        model = PlainGPT(self._first, self.dropout)
        self._made.append(model)
        return model

    def random_ids(self, *shape: int) -> Tensor:
        return torch.randint(SIZES[self.size]["vocab_size"], shape, device=self.device)

    def to(self, dtype: torch.dtype) -> None:
        """The weights of all modules made so far in another dtype."""
        for model in self._made:
            model.to(dtype)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Fused AdamW, its decay for matrices alone.

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


# --- a GPT in plain PyTorch, as nanoGPT and gpt-fast write it -------------------------------------


class PlainGPT(nn.Module):
    """GPT-2 by F.scaled_dot_product_attention; the vocabulary is padded, the head tied.

    The padding's weights are 0. Caches are buffers of a fixed size, so that the one-token step
    works on the same memory every time.
    """

    def __init__(self, theirs: Any, dropout: float) -> None:
        super().__init__()
        config, source = theirs.config, theirs.transformer
        where = {"device": theirs.device}
        self.vocab_size = config.vocab_size
        padded = -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.wte = nn.Embedding(padded, config.n_embd, **where)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd, **where)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(PlainBlock(block, dropout) for block in source.h)
        self.norm = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, **where)
        self.head = nn.Linear(config.n_embd, padded, bias=False, **where)
        self.head.weight = self.wte.weight
        with torch.no_grad():
            self.wte.weight.zero_()[: self.vocab_size] = source.wte.weight
            self.wpe.weight.copy_(source.wpe.weight)
        self.norm.load_state_dict(source.ln_f.state_dict())

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) -> logits (B, T, V padded) and the loss."""
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def make_room(self, batch: int, capacity: int) -> None:
        slots = -(-capacity // CACHE_MULTIPLE) * CACHE_MULTIPLE
        for block in self.blocks:
            block.make_room(batch, slots)
        device = self.wte.weight.device
        causal = torch.ones(slots, slots, dtype=torch.bool, device=device).tril()
        self.register_buffer("causal", causal, persistent=False)  # (S, S)
        self.register_buffer("real", causal[-1:].repeat(batch, 1), persistent=False)  # (B, S)
        padding = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.register_buffer("padding", padding, persistent=False)

    def begin(self, mask: Tensor) -> None:
        """Say which of the first slots are padding: (B, T), 0 where one is."""
        self.real[:, : mask.shape[1]] = mask.bool()
        self.padding.copy_((mask == 0).sum(1, keepdim=True))

    def next(self, ids: Tensor, slots: Tensor) -> Tensor:
        """Put (B, T) tokens into the slots (T,); the most probable next one of each row, (B, 1)."""
        seen = self.causal[slots] & self.real[:, None, None]  # (B, 1, T, S)
        # Padding sees itself: a row that sees nothing would be NaN, and spoil what it is read by.
        seen = seen | (slots[:, None] == torch.arange(seen.shape[-1], device=slots.device))
        x = self.wte(ids) + self.wpe((slots - self.padding).clamp(min=0))
        for block in self.blocks:
            x = block(x, slots, seen)
        logits = self.head(self.norm(x[:, -1:]))[..., : self.vocab_size]
        return logits[:, -1].argmax(-1, keepdim=True)


class PlainBlock(nn.Module):
    def __init__(self, theirs: Any, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = theirs.attn.num_heads, dropout
        self.norm1, self.norm2 = (_norm(norm) for norm in (theirs.ln_1, theirs.ln_2))
        self.qkv, self.proj = _linear(theirs.attn.c_attn), _linear(theirs.attn.c_proj)
        self.up, self.down = _linear(theirs.mlp.c_fc), _linear(theirs.mlp.c_proj)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, slots: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        x = x + self.drop(self.proj(self.attend(self.qkv(self.norm1(x)), slots, seen)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")))

    def attend(self, qkv: Tensor, slots: Tensor | None, seen: Tensor | None) -> Tensor:
        """(B, T, 3 C) -> (B, T, C)"""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
        if slots is None:
            dropped = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropped)
        else:
            self.keys[:, :, slots] = k
            self.values[:, :, slots] = v
            out = F.scaled_dot_product_attention(q, self.keys, self.values, seen)
        return out.transpose(1, 2).flatten(2)

    def make_room(self, batch: int, slots: int) -> None:
        weight = self.proj.weight
        shape = (batch, self.heads, slots, weight.shape[0] // self.heads)  # (B, H, S, D)
        for name in ("keys", "values"):
            self.register_buffer(name, weight.new_zeros(shape), persistent=False)


def _norm(theirs: nn.LayerNorm) -> nn.LayerNorm:
    norm = nn.LayerNorm(theirs.normalized_shape, theirs.eps, device=theirs.weight.device)
    norm.load_state_dict(theirs.state_dict())
    return norm


def _linear(theirs: Any) -> nn.Linear:
    """transformers' Conv1D, which keeps its weight transposed."""
    rows, columns = theirs.weight.shape
    linear = nn.Linear(rows, columns, device=theirs.weight.device)
    with torch.no_grad():
        linear.weight.copy_(theirs.weight.t())
        linear.bias.copy_(theirs.bias)
    return linear


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """A model in training. `forward`: ids and targets (B, T) -> logits (B, T, >= V) and the loss.

    The targets are the tokens that follow: nothing is shifted.
    """

    model: nn.Module
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def compiled(learner: Learner) -> Learner:
    return Learner(learner.model, torch.compile(learner.forward, dynamic=False))


def training_step(
    models: Models, learner: Learner, ids: Tensor, dtype: torch.dtype
) -> Callable[[], object]:
    """Forward, backward, clipping and AdamW on the tokens (B, T + 1)."""
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    optimizer = models.optimizer(learner.model)
    learner.model.train()

    def step() -> None:
        with autocast(models.device, dtype):
            loss = learner.forward(inputs, targets)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(learner.model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def train_ours(models: Models) -> Learner:
    return Learner(models.ours, models.ours)


def train_transformers(models: Models, attention: str = "sdpa") -> Learner:
    model = models.transformers(attention)

    def forward(ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        out = model(input_ids=ids, labels=ids, shift_labels=targets, use_cache=False)
        return out.logits, out.loss

    return Learner(model, forward)


def train_accelerated(models: Models) -> Learner:
    learner = train_transformers(models)
    fastattn.accelerate(learner.model)
    return learner


def train_nanogpt(models: Models) -> Learner:
    """nanoGPT's recipe, which is all but the compilation: see `PlainGPT` and `training_step`."""
    return Learner(models.plain, models.plain)


TRAIN: Mapping[str, Callable[[Models], Learner]] = {
    OURS: train_ours,
    ACCELERATED: train_accelerated,
    TRANSFORMERS: train_transformers,
    "transformers eager": lambda models: train_transformers(models, "eager"),
    "nanogpt": train_nanogpt,
}
TRAIN_COMPILED: Mapping[str, Callable[[Models], Learner]] = {
    "nanogpt": lambda models: compiled(train_nanogpt(models)),
    "ours compiled": lambda models: compiled(train_ours(models)),
    "transformers compiled": lambda models: compiled(train_transformers(models)),
}


# --- generation -----------------------------------------------------------------------------------


# Greedy: prompts (B, T), padded on the left, their mask (B, T) or None where there is no padding,
# and how many tokens to add -> those, (B, n).
Writer = Callable[[Tensor, "Tensor | None", int], Tensor]


def write_ours(models: Models, batch: int, capacity: int) -> Writer:
    model = models.ours

    def generate(ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count, eos_token_id=())
        return out[:, ids.shape[1] :]

    return generate


def _write_transformers(model: Any, **options: Any) -> Writer:
    model.eval()

    def generate(ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
        mask = torch.ones_like(ids) if mask is None else mask
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0,
            **options,
        )  # fmt: skip
        return out[:, ids.shape[1] :]

    return generate


def write_transformers(models: Models, batch: int, capacity: int) -> Writer:
    """Its default cache, which grows."""
    return _write_transformers(models.transformers())


def write_accelerated(models: Models, batch: int, capacity: int) -> Writer:
    model = models.transformers()
    fastattn.accelerate(model)
    return _write_transformers(model)


def write_static(models: Models, batch: int, capacity: int) -> Writer:
    return _write_transformers(
        models.transformers(), cache_implementation="static", disable_compile=True
    )


def write_static_compiled(models: Models, batch: int, capacity: int) -> Writer:
    """By transformers' own torch.compile."""
    if models.device == "cpu":
        raise Refused("transformers compiles generation on GPUs alone")
    return _write_transformers(models.transformers(), cache_implementation="static")


def write_gpt_fast(models: Models, batch: int, capacity: int, compile: bool = False) -> Writer:
    """gpt-fast's recipe: a static cache, a prefill, then a one-token step, compiled if asked for.

    Compiled, attention is left to the compiler as the formula.
    """
    model = models.plain.eval()
    model.make_room(batch, capacity)
    step: Callable[[Tensor, Tensor], Tensor] = model.next
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    if compile:
        step = torch.compile(model.next, mode="reduce-overhead", fullgraph=True, dynamic=False)
        context = functools.partial(sdpa_kernel, SDPBackend.MATH)

    @torch.no_grad()
    def generate(ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
        model.begin(torch.ones_like(ids) if mask is None else mask)
        tokens = model.next(ids, torch.arange(ids.shape[1], device=ids.device))
        new = [tokens]
        slot = torch.tensor([ids.shape[1]], device=ids.device)
        with context():
            for _ in range(count - 1):
                tokens = step(tokens, slot).clone()  # a graph gives the same memory every time
                slot += 1
                new.append(tokens)
        return torch.cat(new, 1)

    return generate


GENERATE: Mapping[str, Callable[[Models, int, int], Writer]] = {
    OURS: write_ours,
    ACCELERATED: write_accelerated,
    TRANSFORMERS: write_transformers,
    "transformers static": write_static,
    "gpt-fast": write_gpt_fast,
}
GENERATE_COMPILED: Mapping[str, Callable[[Models, int, int], Writer]] = {
    "transformers static": write_static_compiled,
    "gpt-fast": functools.partial(write_gpt_fast, compile=True),
}
