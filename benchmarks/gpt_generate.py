"""gpt_generate: greedy generation with a cache by fastattn, transformers and gpt-fast's recipe.

What is timed is one call: the prompts' prefill, then a step for each further token.
`decode_step_us` is that call less one for a single token inside a round, over the steps between;
the first call is the cold start, compilations and captures included (kernels that this process has
compiled for an earlier row are warm). Unequal prompts have lengths from a quarter of `--prompt` to
all of it, and are padded on the left.

All peers have the same random weights, in the row's dtype. Before they are timed, each one's tokens
are compared in float32 with transformers' at the same weights: unequal prompts with what each gives
alone. A peer whose tokens differ is shown as wrong.

A step must read the weights, so rates are in bytes of them (positions and the cache left out), read
once for every new token of the batch; the ceiling is a copy of as many bytes, which reads and
writes them, in the same turns.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import torch
from harness import OURS, synchronize, timed_by_turns
from peers_gpt import (
    ACCELERATED,
    GENERATE,
    GENERATE_COMPILED,
    SIZES,
    TRANSFORMERS,
    ModelCell,
    Models,
    Writer,
    each,
    no_slower,
    parameters,
    write_transformers,
)
from schema import Entry, Row
from script import Axis, Grid, Subject, boolean, main
from timing import Candidate, Sample, difference, ratio
from torch import Tensor

GENERATION = "generation"
CHECKED = 32  # new tokens that are compared
ONE_TOKEN = ", one token"
FASTER = 1.2
TARGET = f"ours {FASTER} times as fast as transformers"


@dataclass(frozen=True, kw_only=True)
class GenerateCell(ModelCell):
    """`new_tokens` for each of `prompts` prompts of `prompt` tokens."""

    prompts: int
    prompt: int
    new_tokens: int
    unequal: bool

    bound = "copy"
    reference = "float32"

    @property
    def axes(self) -> dict[str, Any]:
        names = ("model", "prompts", "prompt", "new_tokens", "unequal", "compile")
        return {name: getattr(self, name) for name in names}

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
        self.rate(entries, timed_by_turns(self, candidates, seconds, row))
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
        """What transformers gives in float32: (prompts, tokens), unequal prompts one by one."""
        count = min(CHECKED, self.new_tokens)
        write = write_transformers(models, self.prompts, self.prompt + count)
        if not self.unequal:
            return write(ids, None, count)
        alone = [row[None, self.prompt - length :] for row, length in zip(ids, self.lengths)]
        return torch.cat([write(prompt, None, count) for prompt in alone])

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


AXES: Mapping[str, Axis] = {
    "model": Axis("size of GPT-2", kind=str, choices=tuple(SIZES)),
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
    dtype: str,
    compile: bool,
) -> GenerateCell | None:
    """The cell of one value for each axis; None for what is too long, or one prompt unequal."""
    if prompt + new_tokens > SIZES[model]["n_positions"] or (unequal and prompts == 1):
        return None
    promise = TARGET if unequal else f"{TARGET}, accelerated no slower within noise"
    return GenerateCell(
        op="gpt",
        direction=GENERATION,
        device=device,
        dtype=dtype,
        against={**GENERATE, **(GENERATE_COMPILED if compile else {})},
        target=promise if device == "cpu" and not compile else None,
        model=model,
        prompts=prompts,
        prompt=prompt,
        new_tokens=new_tokens,
        unequal=unequal,
        compile=compile,
    )


def grid(**axes: Sequence[Any]) -> Grid:
    """The axes named, the others at what is common."""
    common: dict[str, Sequence[Any]] = {
        "model": ["gpt2"], "prompts": [1], "prompt": [64], "new_tokens": [64],
        "unequal": [False], "dtype": ["bfloat16"], "compile": [False],
    }  # fmt: skip
    return {**common, **axes}


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
