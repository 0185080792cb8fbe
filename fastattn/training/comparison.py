"""An accelerated Hugging Face GPT-2 beside the original: differences and speeds, measured.

Both models are read from the same folder. A number counts as right by the rule that fastattn's
kernels are tested with: against the same model in float64, the accelerated one makes at most twice
the original's maximal error and 1.5 times its root mean square, up to a few units in the last
place. The rule is held over the logits, and over all gradients at once, each tensor's error divided
by its largest entry, so that a small tensor counts as much as a large one.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastattn.integrations import Report, accelerate
from fastattn.models import GPT
from fastattn.rule import MAX_FACTOR, RMS_FACTOR, ULPS
from fastattn.training.optional import require

LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Difference:
    """How far the results of the two models are apart, and from float64.

    Attributes:
        name: "logits" or "gradients".
        absolute: max|accelerated - original|.
        error, original_error: max|... - float64|, relative to the tensor's largest entry.
        holds: whether the rule holds.
    """

    name: str
    absolute: float
    error: float
    original_error: float
    holds: bool


@dataclass(frozen=True)
class Speed:
    """Median seconds of the same work by two models, timed by turns.

    Attributes:
        name: the work, and what ran it instead of the original.
        original, ours: median seconds.
        rounds: how many times each was timed.
    """

    name: str
    original: float
    ours: float
    rounds: int

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.original / self.ours


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured, for one dtype on one device."""

    dtype: torch.dtype
    device: torch.device
    report: Report
    differences: tuple[Difference, ...]
    speeds: tuple[Speed, ...]

    @property
    def holds(self) -> bool:
        """Whether the rule holds for all differences."""
        return all(difference.holds for difference in self.differences)

    def as_dict(self) -> dict[str, Any]:
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "report": asdict(self.report),
            "differences": [asdict(difference) for difference in self.differences],
            "speeds": [asdict(speed) | {"ratio": speed.ratio} for speed in self.speeds],
        }


def compare(
    folder: str | os.PathLike[str],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    new_tokens: int = 64,
    seconds: float = 4.0,
) -> Comparison:
    """Accelerate the GPT-2 in `folder` and measure it against the original.

    Args:
        folder: a Hugging Face GPT-2 folder without dropout.
        inputs, targets: token ids (B, T), int64; `targets` are the next tokens. Generation
            continues the first row's first quarter.
        dtype, device: of both models.
        new_tokens: how many tokens to generate.
        seconds: how long to time each kind of work, about.

    Raises:
        ImportError: transformers is not installed.
    """
    transformers = require("transformers", "hf", "the comparison with transformers")

    def load() -> Any:
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(device)
        model.generation_config.eos_token_id = None  # all run to the same length
        return model.eval()

    original, ours = load(), load()
    report = accelerate(ours)
    inputs, targets = inputs.to(device), targets.to(device)

    exact = _results(copy.deepcopy(original).double(), inputs, targets)
    theirs, mine = _results(original, inputs, targets), _results(ours, inputs, targets)
    gradients = [name for name in exact if name != "logits"]
    differences = (
        difference("logits", mine, theirs, exact, ["logits"]),
        difference("gradients", mine, theirs, exact, gradients),
    )

    gpt = GPT.from_pretrained(folder, dtype=dtype, device=device).eval()
    prompt = inputs[:1, : max(1, inputs.shape[1] // 4)]
    works: list[tuple[str, dict[str, Callable[[], object]]]] = [
        (
            "forward",
            {"original": _forward(original, inputs), "accelerated": _forward(ours, inputs)},
        ),
        (
            f"generate {new_tokens} tokens",
            {
                "original": _transformers_generate(original, prompt, new_tokens),
                "accelerated": _transformers_generate(ours, prompt, new_tokens),
                "fastattn.GPT": lambda: gpt.generate(prompt, max_new_tokens=new_tokens),
            },
        ),
        (  # last, because it changes the weights
            "training step",
            {
                "original": _training_step(original, inputs, targets),
                "accelerated": _training_step(ours, inputs, targets),
            },
        ),
    ]
    speeds = []
    for work, candidates in works:
        times = time_by_turns(candidates, device, seconds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        speeds += [
            Speed(f"{work}, {name}", medians["original"], medians[name], len(times[name]))
            for name in candidates
            if name != "original"
        ]
    return Comparison(dtype, device, report, differences, tuple(speeds))


def difference(
    name: str,
    ours: Mapping[str, torch.Tensor],
    original: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    tensors: Sequence[str],
) -> Difference:
    """Hold the rule over the named tensors together.

    Args:
        exact: the same results in float64.
    """
    absolute = 0.0
    our_errors, original_errors = [], []
    for key in tensors:
        reference = exact[key]
        scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
        absolute = max(absolute, (ours[key].double() - original[key].double()).abs().max().item())
        our_errors.append(((ours[key].double() - reference) / scale).flatten())
        original_errors.append(((original[key].double() - reference) / scale).flatten())
    our_error, original_error = torch.cat(our_errors), torch.cat(original_errors)
    atol = ULPS * torch.finfo(ours[tensors[0]].dtype).eps
    maximum, original_maximum = our_error.abs().max().item(), original_error.abs().max().item()
    rms = our_error.square().mean().sqrt().item()
    original_rms = original_error.square().mean().sqrt().item()
    # NaN fails both comparisons.
    holds = (
        maximum <= MAX_FACTOR * original_maximum + atol and rms <= RMS_FACTOR * original_rms + atol
    )
    return Difference(name, absolute, maximum, original_maximum, holds)


def time_by_turns(
    works: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each call, one value a round, the order reversed every second round.

    Each is called twice beforehand. Rounds go on for `seconds`, at least `LEAST_ROUNDS`.
    """

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for work in works.values():
        work()
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    end, rounds = clock() + seconds, 0
    while rounds < LEAST_ROUNDS or clock() < end:
        names = list(works) if rounds % 2 == 0 else list(works)[::-1]
        for name in names:
            start = clock()
            works[name]()
            times[name].append(clock() - start)
        rounds += 1
    return times


def _loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
    """(logits (B, T, vocabulary), mean loss in the logits' precision, at least float32)."""
    logits = model(input_ids=inputs, use_cache=False).logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return logits, torch.nn.functional.cross_entropy(wide.flatten(0, 1), targets.flatten())


def _results(
    model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The logits under "logits", and each parameter's gradient under the parameter's name."""
    logits, loss = _loss(model, inputs, targets)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return {"logits": logits.detach(), **dict(zip(names, gradients, strict=True))}


def _forward(model: torch.nn.Module, inputs: torch.Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return model(input_ids=inputs, use_cache=False).logits

    return run


def _training_step(
    model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor
) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        _, loss = _loss(model, inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def _transformers_generate(
    model: Any, prompt: torch.Tensor, new_tokens: int
) -> Callable[[], object]:
    mask = torch.ones_like(prompt)
    return lambda: model.generate(
        prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
