"""Print versions, devices, the extension, and which backend each op would use, and why.

With --prove, first every kernel that can run here computes small problems, which are compared with
float64; the verdicts are remembered, and a kernel that fails is not chosen (fastattn/proving.py).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastattn
from fastattn import extension, measured, proving, verdicts
from fastattn.backends import (
    ENVIRONMENT_VARIABLE,
    NAMES,
    TRITON_ON_CPU,
    Explanation,
    explanation_of,
)
from fastattn.cli import proofs
from fastattn.ops.common import ptxas

PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "safetensors")
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prove", action="store_true", help="prove all kernels on the devices")


def run(arguments: argparse.Namespace) -> int:
    """Print the whole report; 1 if a proof failed, else 0."""
    code = proofs.prove(_available()) if arguments.prove else 0
    for title, lines in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("settings", _settings()),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")
        print()
    print("backends")
    for device in _available():
        for line in (*_backends(device), *_failures(device)):
            print(f"  {line}")
    return code


def _versions() -> Iterator[str]:
    versions = {"fastattn": fastattn.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"] = torch.__version__  # with its build: +cpu, +cu130
    width = max(map(len, versions))
    for name, version in versions.items():
        yield f"{name:<{width}}  {version}"


def _devices() -> Iterator[str]:
    yield f"CPU        {platform.machine()}, {torch.get_num_threads()} threads"
    yield f"CUDA       {torch.version.cuda or 'this torch is built without CUDA'}"
    if torch.version.cuda is not None:
        yield f"driver     {_driver()}"
    if not torch.cuda.is_available():
        yield "GPU        none that torch can use"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        yield f"GPU {index}      {gpu.name}, capability {gpu.major}.{gpu.minor}, {memory:.0f} GiB"
        for line in _assembler(10 * gpu.major + gpu.minor):
            yield f"ptxas      {line}"
        yield f"measured   {_measured(gpu.name)}"
    yield f"extension  {extension.status()}"


def _assembler(architecture: int) -> Iterator[str]:
    """The ptxas that would assemble Triton's kernels for a GPU, and a warning if it should not."""
    try:
        yield f"{ptxas.in_use(architecture)}"
    except (ImportError, RuntimeError) as error:
        yield f"none: {error}"
        return
    if (warning := ptxas.warning(architecture)) is not None:
        yield f"WARNING: {warning}"


def _measured(gpu: str) -> str:
    """What the user's table has of a GPU."""
    if rows := measured.of_user(gpu):
        return f"{len(rows)} rows of {max(row.date for row in rows.values())}, by `fastattn tune`"
    path = measured.path_of(gpu)
    of_others = path is not None and path.exists()
    return f"{'only by other kernels' if of_others else 'nothing'}: `fastattn tune` measures"


def _driver() -> str:
    """The kernel module's version, as the driver itself writes it."""
    try:
        with open("/sys/module/nvidia/version", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "not known: there is no /sys/module/nvidia/version"


def _settings() -> Iterator[str]:
    for name in (ENVIRONMENT_VARIABLE, proving.VARIABLE, "TRITON_INTERPRET", TRITON_ON_CPU):
        value = os.environ.get(name)
        yield f"{name:<22}  {'not set' if value is None else repr(value)}"


def _available() -> list[torch.device]:
    """The CPU and every GPU, GPUs of the same name once."""
    gpus = {
        torch.cuda.get_device_name(index): torch.device("cuda", index)
        for index in reversed(range(torch.cuda.device_count()))
    }
    return [torch.device("cpu"), *gpus.values()]


def _calls(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Callable[..., Any], Any]]:
    """Each op with typical inputs; they are described, never computed on."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    q, x = empty(2, 512, 8, 64), empty(2, 512, 512)
    yield fastattn.attention, ((q, q, q), {"causal": True})
    yield fastattn.layer_norm, ((x, empty(512), empty(512)), {})
    yield fastattn.rms_norm, ((x, empty(512)), {})
    weights = (empty(2048, 512), empty(2048), empty(512, 2048), empty(512))
    yield fastattn.ffn, ((x, *weights), {})


def _failures(device: torch.device) -> Iterator[str]:
    """The families of kernels that failed their proof, with the figures, of every op."""
    for family, told in verdicts.failures(device):
        yield f"not used on {device}, its proof failed: {family}: {told}"


def _backends(device: torch.device) -> Iterator[str]:
    """The ops' backends on `device`; dtypes with the same answer share an entry."""
    answers: dict[str, dict[tuple[Any, ...], tuple[list[str], Explanation]]] = {}
    for dtype in DTYPES[device.type]:
        for op, (args, kwargs) in _calls(dtype, device):
            try:
                explanation = explanation_of(op, *args, **kwargs)
            except ValueError as error:  # the environment variable names no backend
                yield f"no op can run: {error}"
                return
            key = (explanation.backend, explanation.source, *explanation.reasons.values())
            found = answers.setdefault(explanation.op, {})
            found.setdefault(key, ([], explanation))[0].append(str(dtype).removeprefix("torch."))
    for op_name, groups in answers.items():
        for dtypes, explanation in groups.values():
            runs = explanation.backend or "none"
            yield f"{op_name} on {device}, {' '.join(dtypes)}: {runs} ({explanation.source})"
            width = max(map(len, NAMES))
            for name, reason in explanation.reasons.items():
                if reason is not None:
                    yield f"    {name:<{width}}  {reason}"
