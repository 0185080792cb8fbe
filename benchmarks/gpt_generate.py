"""gpt_generate: greedy generation with a cache by fastattn, transformers and gpt-fast's recipe.

One call is timed: the prompts' prefill, then a step for each further token.
`decode_step_us` is that call less one for a single token inside a round, over the steps between;
the first call is the cold start, compilations and captures included (kernels that this process has
compiled for an earlier row are warm). Unequal prompts have lengths from a quarter of `--prompt` to
all of it, and are padded on the left.

All peers have the same random weights, in the row's dtype. Before they are timed, each one's tokens
are compared in float32 with transformers' at the same weights: unequal prompts with what each one
gives by itself. A peer whose tokens differ is shown as wrong.

A step must read the weights, so rates are in bytes of them (positions and the cache left out), read
once for every new token of the batch; the ceiling is a copy of as many bytes, which reads and
writes them, in the same rounds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import torch
from gpt_models import (
    ACCELERATED,
    LLAMAS,
    SIZES,
    TRANSFORMERS,
    ModelCell,
    Models,
    config_of,
    each,
    no_slower,
    parameters,
)
from harness import OURS, synchronize, timed_interleaved
from peer import Refused
from schema import Entry, Row
from script import Axis, Subject, boolean, grids, main
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.timing import Candidate, Sample, difference, ratio

GENERATION = "generation"
CHECKED = 32  # new tokens that are compared
ONE_TOKEN = ", one token"
FASTER = 1.2
TARGET = f"ours {FASTER} times as fast as transformers"


# --- peers ----------------------------------------------------------------------------------------


# Greedy: prompts (B, T), padded on the left, their mask (B, T) or None where there is no padding,
# and how many tokens to add -> those, (B, n).
Writer = Callable[[Tensor, "Tensor | None", int], Tensor]


def ours(models: Models, batch: int, capacity: int) -> Writer:
    model = models.ours

    def generate(ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count, eos_token_id=())
        return out[:, ids.shape[1] :]

    return generate


def _by_transformers(model: Any, **options: Any) -> Writer:
    model.eval()

    def generate(ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
        mask = torch.ones_like(ids) if mask is None else mask
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0,
            **options,
        )  # fmt: skip
        return out[:, ids.shape[1] :]

    return generate


def transformers(models: Models, batch: int, capacity: int) -> Writer:
    """Its default cache, which grows."""
    return _by_transformers(models.transformers())


def accelerated(models: Models, batch: int, capacity: int) -> Writer:
    model = models.transformers()
    fastattn.accelerate(model)
    return _by_transformers(model)


def static(models: Models, batch: int, capacity: int) -> Writer:
    return _by_transformers(
        models.transformers(), cache_implementation="static", disable_compile=True
    )


def static_compiled(models: Models, batch: int, capacity: int) -> Writer:
    """By transformers' own torch.compile."""
    if models.device == "cpu":
        raise Refused("transformers compiles generation on GPUs only")
    return _by_transformers(models.transformers(), cache_implementation="static")


def gpt_fast(models: Models, batch: int, capacity: int, compile: bool = False) -> Writer:
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


PEERS: Mapping[str, Callable[[Models, int, int], Writer]] = {
    OURS: ours,
    ACCELERATED: accelerated,
    TRANSFORMERS: transformers,
    "transformers static": static,
    "gpt-fast": gpt_fast,
}
COMPILED: Mapping[str, Callable[[Models, int, int], Writer]] = {
    "transformers static": static_compiled,
    "gpt-fast": functools.partial(gpt_fast, compile=True),
}


# --- cells ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GenerateCell(ModelCell):
    """`new_tokens` for each of `prompts` prompts of `prompt` tokens."""

    prompts: int
    prompt: int
    new_tokens: int
    unequal: bool

    sizes = ("model", "prompts", "prompt", "new_tokens", "unequal")
    bound = "copy"
    reference = "float32"

    @property
    def weight_bytes(self) -> float:
        """That a step reads."""
        return float(parameters(self.model) * self.torch_dtype.itemsize)

    @property
    def bytes(self) -> float:
        """That a call reads: the prefill gives the first token."""
        return self.new_tokens * self.weight_bytes

    @property
    def lengths(self) -> list[int]:
        """Of the prompts."""
        if not self.unequal:
            return [self.prompt] * self.prompts
        least = max(1, self.prompt // 4)
        steps = self.prompts - 1
        return [self.prompt - (self.prompt - least) * i // steps for i in range(self.prompts)]

    def holds(self, samples: Mapping[str, Sample]) -> bool:
        ours, theirs = samples.get(OURS), samples.get(TRANSFORMERS)
        if ours is None or theirs is None or ratio(theirs, ours).median < FASTER:
            return False
        return self.unequal or no_slower(samples.get(ACCELERATED), theirs)

    def run(self, seconds: float) -> Row:
        models = Models(self.model, self.device)
        ids, mask = self.inputs_of(models)
        writers: dict[str, Writer] = {}

        def cold(name: str, make: Callable[[Models, int, int], Writer]) -> Entry:
            write = make(models, self.prompts, self.prompt + self.new_tokens)
            models.to(self.torch_dtype)
            start = time.perf_counter()
            write(ids, mask, self.new_tokens)
            synchronize(self.device)
            writers[name] = write
            return {"first_call_seconds": time.perf_counter() - start}

        def check(name: str, write: Writer) -> Entry:
            return entries[name] | self.compare(write(ids, mask, expected.shape[1]), expected)

        entries = each(self.against, cold, self.device)
        models.to(torch.float32)
        expected = self.expected(models, ids)
        entries |= each(writers, check, self.device)
        models.to(self.torch_dtype)
        entries[self.bound] = {"ceiling": True}

        weights = torch.randn(parameters(self.model), device=self.device, dtype=self.torch_dtype)
        target = torch.empty_like(weights)
        candidates = [Candidate(self.bound, lambda: target.copy_(weights))]
        for name in writers:
            if "right" in entries[name]:
                for said, count in (("", self.new_tokens), (ONE_TOKEN, 1)):
                    call = functools.partial(writers[name], ids, mask, count)
                    candidates.append(Candidate(name + said, call))
        row = self.row(entries)
        self.rate(entries, timed_interleaved(self, candidates, seconds, row))
        row["right"] = entries[OURS].get("right", False)
        return row

    def inputs_of(self, models: Models) -> tuple[Tensor, Tensor | None]:
        """The prompts, and where they are tokens if some are padded."""
        ids = models.random_ids(self.prompts, self.prompt)
        if not self.unequal:
            return ids, None
        mask = torch.ones_like(ids)
        for row, length in zip(mask, self.lengths):
            row[: self.prompt - length] = 0
        return ids * mask, mask

    def expected(self, models: Models, ids: Tensor) -> Tensor:
        """Tokens of transformers in float32, (prompts, tokens); unequal prompts one by one."""
        count = min(CHECKED, self.new_tokens)
        write = transformers(models, self.prompts, self.prompt + count)
        if not self.unequal:
            return write(ids, None, count)
        single = [row[None, self.prompt - length :] for row, length in zip(ids, self.lengths)]
        return torch.cat([write(prompt, None, count) for prompt in single])

    def compare(self, got: Tensor, expected: Tensor) -> Entry:
        if torch.equal(got, expected):
            return {"right": True}
        if got.shape != expected.shape:
            return {"right": False, "note": f"{tuple(got.shape)} tokens in float32"}
        differ = int((got != expected).sum())
        return {"right": False, "note": f"{differ} of {got.numel()} tokens differ in float32"}

    def rate(self, entries: Mapping[str, Entry], samples: Mapping[str, Sample]) -> None:
        """Write the rates, and their shares of the ceiling."""
        for name, entry in entries.items():
            if name not in samples:
                continue
            seconds = samples[name].median
            if name == self.bound:
                entry["gbps"] = 2 * self.weight_bytes / seconds / 1e9
                continue
            entry["gbps"] = self.bytes / seconds / 1e9
            entry["tokens_per_second"] = self.prompts * self.new_tokens / seconds
            if self.new_tokens > 1:
                steps = difference(samples[name], samples[name + ONE_TOKEN])
                scale = 1e6 / (self.new_tokens - 1)
                entry["decode_step_us"] = steps.as_dict(scale)  # type: ignore[typeddict-item]
        for entry in entries.values():
            if "gbps" in entry:
                entry["share"] = entry["gbps"] / entries[self.bound]["gbps"]


# --- the script -----------------------------------------------------------------------------------

AXES: Mapping[str, Axis] = {
    "model": Axis("size of GPT-2, or a Llama", kind=str, choices=(*SIZES, *LLAMAS)),
    "prompts": Axis("the batch"),
    "prompt": Axis("tokens of the longest prompt"),
    "new_tokens": Axis("for each prompt"),
    "unequal": Axis("prompts of different lengths, padded on the left", kind=boolean),
    "dtype": Axis("of the weights", kind=str, choices=("bfloat16", "float16", "float32")),
    "compile": Axis("have those compile that can; a minute to compile a row", kind=boolean),
}


def make(
    *,
    device: str,
    model: str,
    prompts: int,
    prompt: int,
    new_tokens: int,
    unequal: bool,
    compile: bool,
    **same: Any,
) -> GenerateCell | None:
    """The cell of one value for each axis; None for what is too long, or one prompt unequal."""
    if prompt + new_tokens > config_of(model).n_positions or (unequal and prompts == 1):
        return None
    promise = TARGET if unequal else f"{TARGET}, accelerated no slower within noise"
    return GenerateCell(
        op="gpt", direction=GENERATION, device=device, model=model, prompts=prompts,
        prompt=prompt, new_tokens=new_tokens, unequal=unequal, compile=compile,
        against={**PEERS, **(COMPILED if compile else {})},
        target=promise if device == "cpu" and not compile else None,
        **same,
    )  # fmt: skip


grid = grids(
    model=["gpt2"], prompts=[1], prompt=[64], new_tokens=[64], unequal=[False],
    dtype=["bfloat16"], compile=[False],
)  # fmt: skip
BOTH_WAYS = (False, True)
SMALL: dict[str, Sequence[Any]] = {"model": ["small"], "prompt": [16], "new_tokens": [16]}
CPU: dict[str, Sequence[Any]] = {"dtype": ["float32"]}
PRESETS = {
    ("cuda", "quick"): [
        grid(prompts=[1, 16]),
        grid(compile=[True]),
        grid(prompts=[16], unequal=[True]),
    ],
    ("cuda", "full"): [
        grid(prompts=[1, 16, 64], new_tokens=[128], compile=BOTH_WAYS),
        grid(prompts=[16, 64], new_tokens=[128], unequal=[True], compile=BOTH_WAYS),
        grid(prompts=[1, 16], prompt=[512], new_tokens=[128]),
        grid(model=["gpt2-medium", "gpt2-large"]),
        grid(dtype=["float16", "float32"]),
    ],
    ("cuda", "paper"): [
        grid(new_tokens=[256], compile=BOTH_WAYS),
        grid(prompts=[64], new_tokens=[128], unequal=[True], compile=BOTH_WAYS),
        grid(model=["gpt2-xl"], new_tokens=[128], compile=BOTH_WAYS),
    ],
    ("cpu", "quick"): [grid(**CPU, **SMALL), grid(**CPU, **SMALL, prompts=[4], unequal=[True])],
    ("cpu", "full"): [
        grid(**CPU, prompt=[32], new_tokens=[64]),
        grid(**CPU, **SMALL, prompts=[1, 8], unequal=BOTH_WAYS),
        grid(**CPU, **SMALL, compile=[True]),
        grid(**CPU, model=["smollm2-135m"], prompt=[32], new_tokens=[32]),
        grid(
            **CPU, model=["smollm2-135m"], prompt=[32], new_tokens=[32], prompts=[8], unequal=[True]
        ),
    ],
}
METHOD = {
    "errors": "greedy tokens in float32, token by token, against transformers with a dynamic cache",
    "bytes": "all weights, once for every new token",
}
SUBJECT = Subject(
    "gpt_generate",
    __doc__,
    AXES,
    PRESETS,
    make,
    seconds={"cpu": 1.5, "cuda": 8.0},
    method=METHOD,
)

if __name__ == "__main__":
    raise SystemExit(main(SUBJECT))
