"""Divide a training run over many GPUs: memory, messages and time of a step, by a stated model.

    fastattn plan --params 7B --gpus 64 --chip H100
    fastattn plan --model FOLDER --gpus 8 --chip A100 --length 8192
    fastattn plan --params 7B --gpus 64 --tensor 4        with a number of the split given
    fastattn plan --params 1.5B,7B --gpus 8,64,1024       a table of the best splits

All figures are modelled: nothing has been measured on a GPU. docs/scaling.md has the equations, and
predictions against what processes on a CPU allocate and send.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

from fastattn.chips import DEVICES
from fastattn.models import GPTConfig
from fastattn.models.config import PRESETS
from fastattn.models.folder import reading
from fastattn.training.distributed.layout import DIMENSIONS
from fastattn.training.distributed.planning import Job, Numbers, Plan, Shape, config_for, plans

TOKENS = 1 << 22  # of a step, by default
GIB = 2**30
SIZES = {
    "layers": "n_layer", "width": "n_embd", "heads": "n_head", "kv_heads": "n_kv_head",
    "inner": "n_inner", "vocabulary": "vocab_size",
}  # fmt: skip
HEADER = "| model | GPUs | replicate x shard x context x tensor | batch | checkpointing | "
HEADER += "memory | sent | step | tokens/s | MFU |\n|" + "---|" * 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--params",
        metavar="N",
        help="1.5B (GPT-2 XL), 7B, 70B (Llama 2), or another number in Llama's proportions",
    )
    model.add_argument(
        "--model", help=f"in place of it, a folder with a GPT, or one of {', '.join(PRESETS)}"
    )
    for name in SIZES:
        model.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    step = parser.add_argument_group("a step")
    step.add_argument("--length", type=int, help="tokens of a sequence; default: the model's")
    step.add_argument(
        "--sequences", type=int, help="of a step, on all GPUs; default: those of 4 Mi tokens"
    )
    step.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    step.add_argument("--ema", action="store_true", help="a moving average of the weights")
    gpus = parser.add_argument_group("the GPUs")
    gpus.add_argument("--gpus", required=True, metavar="N", help="how many, or several: 8,64,1024")
    gpus.add_argument("--chip", default="H100", help=f"{', '.join(DEVICES)}; default: H100")
    for name in DIMENSIONS:
        gpus.add_argument(f"--{name}", type=int, metavar="N", help="default: the best")
    gpus.add_argument(
        "--efficiency", type=float, default=0.5, help="share of the peak in products; default: 0.5"
    )
    gpus.add_argument(
        "--links", type=float, default=0.8, help="share of the bandwidth in messages; default: 0.8"
    )
    gpus.add_argument(
        "--usable", type=float, default=0.9, help="share of the memory for tensors; default: 0.9"
    )
    gpus.add_argument("--top", type=int, default=5, help="splits to print; default: 5")


def run(arguments: argparse.Namespace) -> int:
    """Print a plan, or a table of several; 1 where one plan was asked for and nothing fits."""
    sizes = [None] if arguments.params is None else arguments.params.split(",")
    counts = [_integer(text) for text in arguments.gpus.split(",")]
    jobs = [_job(arguments, size, count) for size in sizes for count in counts]
    if len(jobs) == 1:
        return _print_plan(jobs[0], arguments.params or arguments.model or "model", arguments.top)
    print(HEADER)
    for job, name in zip(jobs, [size for size in sizes for _ in counts]):
        best = plans(job)[0]
        cells = f"{name or arguments.model or 'model'} | {job.devices}"
        print(f"| {cells} | {_row(best) if best.fits else _lacking(best) + ' |' * 8}")
    return 0


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--gpus takes integers, as in 64 or 8,64,1024; got {text!r}") from None


def _job(arguments: argparse.Namespace, params: str | None, devices: int) -> Job:
    changes = {
        field: value
        for name, field in SIZES.items()
        if (value := getattr(arguments, name)) is not None
    }
    config = _config(arguments.model, params, changes)
    length = arguments.length or config.n_positions
    if length > config.n_positions and params is not None:
        config = dataclasses.replace(config, n_positions=length)
    sequences = arguments.sequences or max(1, TOKENS // length)
    return Job(
        Shape(config),
        devices,
        arguments.chip,
        length,
        sequences,
        Numbers(muon=arguments.optimizer == "muon", average=arguments.ema),
        arguments.efficiency,
        arguments.links,
        arguments.usable,
        fixed={name: size for name in DIMENSIONS if (size := getattr(arguments, name)) is not None},
    )


def _config(model: str | None, params: str | None, changes: dict[str, int]) -> GPTConfig:
    if (model is None) == (params is None):
        raise ValueError("give the model by one of --params 7B and --model FOLDER")
    if params is not None:
        return config_for(params, **changes)
    assert model is not None
    if model in PRESETS:
        return GPTConfig.preset(model, **changes)
    folder = reading.local_folder(model, None)
    _, config = reading.read_config(folder / "config.json")
    if not isinstance(config, GPTConfig):
        raise ValueError(f"{folder}: a plan is of a GPT, and this is a {type(config).__name__}")
    return dataclasses.replace(config, **cast(Any, changes))


def _print_plan(job: Job, name: str, top: int) -> int:
    print("modelled, not measured: nothing here has run on a GPU\n")
    for line in _assumed(job, name):
        print(line)
    found = plans(job)
    best = found[0]
    if not best.fits:
        sizes = ", ".join(f"{size}={getattr(best.split, size)}" for size in DIMENSIONS)
        fixed = _gib(best.memory.weights + best.memory.states)
        raise ValueError(
            f"{name} fits on {job.devices} {job.chip} in no split. The smallest, {sizes}, takes "
            f"{_lacking(best)}. Weights and optimiser states are {fixed} of it: take more GPUs or "
            "larger ones, or [distributed] offload = true, which keeps these on the CPU"
        )
    print(f"\n{HEADER}")
    fitting = [plan for plan in found if plan.fits]
    for plan in fitting[: max(1, top)]:
        print(f"| {name} | {job.devices} | {_row(plan)}")
    print(f"\n{len(fitting)} of {len(found)} splits fit. The first one:\n")
    for line in (*_described(best), *_reasons(found), "", *_tables(best)):
        print(line)
    return 0


def _assumed(job: Job, name: str) -> Iterator[str]:
    config, device = job.shape.config, DEVICES[job.chip]
    optimizer = "muon" if job.numbers.muon else "adamw"
    yield (
        f"model    {name}: {job.shape.parameters / 1e9:.2f}e9 parameters, {config.n_layer} layers, "
        f"width {config.n_embd}, {config.n_head} heads, {config.kv_heads} of keys, "
        f"vocabulary {config.vocab_size}"
    )
    yield (
        f"step     {job.sequences} sequences of {job.length} tokens; products in bfloat16, "
        f"weights in float32, {optimizer}"
    )
    yield (
        f"devices  {job.devices} {job.chip}, {device.machine} a machine; of each {job.usable:.0%} "
        f"of {_gib(device.memory)} and {job.efficiency:.0%} of {job.peak / 1e12:.0f} TFLOP/s"
    )
    yield (
        f"links    {job.links:.0%} of {device.inside / 1e9:.0f} GB/s inside a machine and of "
        f"{device.outside / 1e9:.0f} GB/s to another one, for each GPU"
    )


def _row(plan: Plan) -> str:
    split, seconds = plan.split, plan.seconds
    sizes = " x ".join(str(getattr(split, name)) for name in DIMENSIONS)
    return (
        f"{sizes} | {split.batch} | {'yes' if split.recompute else 'no'} | "
        f"{_gib(plan.memory.total)} | {sum(plan.sent.values()) / 1e9:.1f} GB | "
        f"{seconds.step:.3g} s | {plan.tokens_per_second:,.0f} | {plan.utilisation:.0%} |"
    )


def _lacking(plan: Plan) -> str:
    lacking = _gib(plan.memory.total - plan.job.room)
    return f"{_gib(plan.memory.total)} a GPU of {_gib(plan.job.room)}: {lacking} are short"


def _described(plan: Plan) -> Iterator[str]:
    parts = plan.memory._asdict()
    memory = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
    yield f"memory   {_gib(plan.memory.total)} of {_gib(plan.job.room)} a GPU: {memory}"
    sent = ", ".join(f"{cause} {size / 1e9:.1f} GB" for cause, size in plan.sent.items())
    yield f"sent     by a GPU in a step: {sent or 'nothing'}"
    times = plan.seconds._asdict()
    step = times.pop("step")
    spent = ", ".join(f"{cause} {time:.3g} s" for cause, time in times.items() if time)
    yield f"time     {step:.3g} s a step: {spent}; most messages overlap with products"


def _reasons(found: list[Plan]) -> Iterator[str]:
    """For each number of the first split, the best plan with another."""
    best = found[0]
    for name in DIMENSIONS:
        chosen = getattr(best.split, name)
        others = [plan for plan in found if getattr(plan.split, name) != chosen]
        if others:
            other = min(others, key=lambda plan: (not plan.fits, plan.seconds.step))
            split = " x ".join(str(getattr(other.split, size)) for size in DIMENSIONS)
            change = f"{other.seconds.step / best.seconds.step:.3f} of the time"
            fits = _gib(other.memory.total) if other.fits else "which does not fit"
            yield f"{name + '=' + str(chosen):<14}else at best {split}: {change}, {fits}"


def _tables(plan: Plan) -> Iterator[str]:
    """The tables of a config for `fastattn train`."""
    split, job = plan.split, plan.job
    yield "[distributed]"
    for name in DIMENSIONS:
        yield f"{name} = {getattr(split, name)}"
    yield "\n[training]"
    yield f"batch_size = {split.batch}"
    yield f"context = {job.length}"
    yield f"accumulation = {job.sequences // split.batch}    # batches of a step, on all GPUs"
    yield f"activation_checkpointing = {str(split.recompute).lower()}"
    yield 'precision = "bfloat16"'
    yield f'optimizer = "{"muon" if job.numbers.muon else "adamw"}"'


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
