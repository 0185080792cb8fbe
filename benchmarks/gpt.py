"""GPT-2 on one device: transformers with sdpa, the same accelerated, fastattn.GPT, equal weights.

A training step is forward, backward and AdamW on next-token prediction; generation is greedy with
a cache. On a GPU training runs under bfloat16 autocast and generation with bfloat16 weights.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import checkout  # noqa: F401
import torch
from harness import OURS, compare, reason, synchronize
from timing import Candidate, difference, interleave, ratio
from torch import Tensor, nn

import fastattn

PEER = "transformers"
ACCELERATED = "accelerated"
COMPILED = "compiled transformers"


@dataclass(frozen=True)
class Job:
    """Sizes: of the model, of a training batch, of a prompt and what follows it."""

    model: dict[str, int]
    batch: int
    seqlen: int
    prompts: int
    prompt: int
    new_tokens: int


GPT2 = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 256, "n_positions": 64}


def build(job: Job, *, device: str = "cpu", dropout: float = 0.0) -> dict[str, nn.Module]:
    """The three models in float32, with equal weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        **job.model,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        theirs = GPT2LMHeadModel(config)
    # Random weights may well say "end of text"; all are to go on to the last token.
    theirs.generation_config.eos_token_id = None
    accelerated = copy.deepcopy(theirs)
    fastattn.accelerate(accelerated)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = fastattn.GPT.from_pretrained(folder, device=device)
    return {OURS: ours, ACCELERATED: accelerated, PEER: theirs}


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def training_step(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    """One step on the tokens `ids` (batch, seqlen + 1)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    model.train()

    def step() -> None:
        with autocast(ids.device.type):
            if isinstance(model, fastattn.GPT):
                loss = model(inputs, targets)[1]
            else:
                loss = model(input_ids=inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def generation(model: nn.Module, prompt: Tensor, new_tokens: int) -> Callable[[], Tensor]:
    """Greedy continuation of `prompt` (batch, tokens) by `new_tokens`."""
    model.eval()
    if isinstance(model, fastattn.GPT):
        return lambda: model.generate(prompt, max_new_tokens=new_tokens, eos_token_id=())
    mask = torch.ones_like(prompt)
    return lambda: model.generate(
        prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )


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


# --- what gpu_check measures --------------------------------------------------------------------

JOB = Job(GPT2, batch=8, seqlen=1024, prompts=1, prompt=64, new_tokens=64)
BATCHED = dataclasses.replace(JOB, prompts=16)
TINY_JOB = Job(TINY, batch=2, seqlen=16, prompts=1, prompt=4, new_tokens=4)


@dataclass(frozen=True, kw_only=True)
class GPTCell:
    """One work of one job. `limit` is the time after which it must be stuck, in seconds."""

    device: str
    work: str
    job: Job
    compiled: bool = False

    @property
    def limit(self) -> float:
        return 240.0 if self.compiled else 150.0

    @property
    def title(self) -> str:
        job = self.job
        size = f"layers={job.model['n_layer']} width={job.model['n_embd']}"
        if self.work == "training step":
            sizes = f"{size} batch={job.batch} seqlen={job.seqlen}"
        else:
            sizes = f"{size} prompts={job.prompts} prompt={job.prompt} new={job.new_tokens}"
        return f"gpt {self.work} {sizes}" + (" with torch.compile" if self.compiled else "")

    def measure(self, seconds: float = 10.0) -> dict[str, object]:
        with quiet():
            models = build(self.job, device=self.device)
            if self.work == "training step":
                entries = self._training(models, seconds)
            else:
                entries = self._generation(models, seconds)
        row = {"title": self.title, "op": "gpt", "direction": self.work, "axes": vars(self.job)}
        row |= {"dtype": "bfloat16" if self.device == "cuda" else "float32"}
        row |= {"reference": "float32", "peers": entries}
        return row | {"right": entries[OURS].get("right", False)}

    def _training(self, models: dict[str, nn.Module], seconds: float) -> dict[str, dict]:
        job = self.job
        vocabulary = job.model["vocab_size"]
        few = torch.randint(vocabulary, (1, min(128, job.seqlen)), device=self.device)
        with torch.no_grad():
            exact = logits_of(models[PEER].eval(), few).double()
            with autocast(self.device):
                eager = logits_of(models[PEER], few)
        ids = torch.randint(vocabulary, (job.batch, job.seqlen + 1), device=self.device)
        if self.compiled:
            backend = "inductor" if self.device == "cuda" else "aot_eager"
            models[COMPILED] = copy.deepcopy(models[PEER])
            models[COMPILED].compile(backend=backend, dynamic=False)
        entries: dict[str, dict] = {}
        calls: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            try:
                entry = {}
                if name != COMPILED:
                    with torch.no_grad(), autocast(self.device):
                        got = logits_of(model.eval(), few)
                    entry["errors"] = errors = compare((got,), (exact,), (eager,))
                    entry["right"] = all(error["within"] for error in errors)
                step = training_step(model, ids)
                entries[name] = entry | self._first(step)
                calls[name] = step
            except Exception as failure:
                entries[name] = self._failed(name, failure)
        self._time(calls, entries, job.batch * job.seqlen, seconds)
        return entries

    def _generation(self, models: dict[str, nn.Module], seconds: float) -> dict[str, dict]:
        job = self.job
        prompt = torch.randint(
            job.model["vocab_size"], (job.prompts, job.prompt), device=self.device
        )
        tokens = {n: generation(m, prompt, job.new_tokens)() for n, m in models.items()}
        entries: dict[str, dict] = {}
        calls: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            same = torch.equal(tokens[name], tokens[PEER])
            if self.device == "cuda":
                model.to(torch.bfloat16)
            try:
                call = generation(model, prompt, job.new_tokens)
                entries[name] = {"float32_tokens_equal": same, "right": same} | self._first(call)
                calls[name] = call
                calls[f"{name}, one token"] = generation(model, prompt, 1)
            except Exception as failure:
                entries[name] = self._failed(name, failure)
        samples = self._time(calls, entries, job.prompts * job.new_tokens, seconds)
        for name in entries:
            if name in samples and job.new_tokens > 1:
                steps = difference(samples[name], samples[f"{name}, one token"])
                entries[name]["decode_step"] = steps.as_dict(1e6 / (job.new_tokens - 1), "_us")
        return entries

    def _first(self, call: Callable[[], object]) -> dict[str, float]:
        """What the first call takes, captures and compilations included, and its memory."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        call()
        synchronize(self.device)
        first = {"first_call_seconds": time.perf_counter() - start}
        if self.device == "cuda":
            first["peak_bytes_above_models"] = torch.cuda.max_memory_allocated() - before
        return first

    def _failed(self, name: str, failure: Exception) -> dict[str, str]:
        synchronize(self.device)
        return {"error" if name == OURS else "refused": reason(failure)}

    def _time(
        self,
        calls: dict[str, Callable[[], object]],
        entries: dict[str, dict],
        tokens: int,
        seconds: float,
    ) -> dict[str, object]:
        samples = interleave(
            [Candidate(name, call) for name, call in calls.items()],
            device=self.device,
            rounds=9,
            batch_seconds=0.0,
            seconds=seconds,
        )
        for name in entries:
            if name in samples:
                entries[name] |= samples[name].as_dict()
                entries[name]["tokens_per_second"] = tokens / samples[name].median
                if name != OURS and OURS in samples:
                    entries[name]["times_ours"] = ratio(samples[name], samples[OURS]).as_dict()
        return samples


def training_cells(device: str) -> Iterator[GPTCell]:
    job = JOB if device == "cuda" else TINY_JOB
    yield GPTCell(device=device, work="training step", job=job)


def generation_cells(device: str) -> Iterator[GPTCell]:
    for job in (JOB, BATCHED) if device == "cuda" else (TINY_JOB,):
        yield GPTCell(device=device, work="generation", job=job)


def compiled_cells(device: str) -> Iterator[GPTCell]:
    job = JOB if device == "cuda" else TINY_JOB
    yield GPTCell(device=device, work="training step", job=job, compiled=True)
