"""Where a measurement was made: everything that a reader needs to judge or repeat it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch
from checkout import ROOT
from schema import Cuda, Environment

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "numpy", "flash-attn", "flash-attn-3",
    "flash-attn-4", "xformers", "liger-kernel", "quack-kernels", "nvidia-cudnn-frontend",
)  # fmt: skip
GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit")
ROW_FIELDS = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.active")


def environment(device: str, *, commit: str | None = None) -> Environment:
    """Device, driver, versions, threads, commit and date.

    Args:
        device: "cpu" or "cuda".
        commit: the commit measured, where the checkout itself cannot tell.
    """
    measured = commit or _git("rev-parse", "HEAD") or ""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": measured,
        "modified": commit is None and bool(_git("status", "--porcelain", "--", ".", *UNMEASURED)),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processors": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "cuda": _cuda() if device == "cuda" else None,
    }


# A run itself, or the report on it, writes these into the checkout.
UNMEASURED = (":!benchmarks/results", ":!docs", ":!*.md")


def _cuda() -> Cuda:
    properties = torch.cuda.get_device_properties()
    return {
        "toolkit": torch.version.cuda or "",
        "cudnn": torch.backends.cudnn.version(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "sdpa_order": _sdpa_order(),
        "busy": others(),
        "nvidia_smi": nvidia_smi(GPU_FIELDS),
    }


def _sdpa_order() -> list[str]:
    """F.scaled_dot_product_attention's backends in the order in which this torch takes them."""
    from torch.nn.attention import _cur_sdpa_kernel_backends

    return [backend.name.lower() for backend in _cur_sdpa_kernel_backends(with_priority=True)]


def nvidia_smi(fields: tuple[str, ...]) -> dict[str, str] | None:
    """The report of the driver's tool on this GPU; None where there is no tool."""
    out = _nvidia_smi(f"--query-gpu={','.join(fields)}")
    if not out:
        return None
    return dict(zip(fields, (field.strip() for field in out.split(",")), strict=False))


def others() -> list[str]:
    """Other processes that compute on this GPU, as far as the driver shows them."""
    out = _nvidia_smi("--query-compute-apps=pid,name,used_memory") or ""
    return [line for line in out.splitlines() if line.split(",")[0].strip() != str(os.getpid())]


def _nvidia_smi(query: str) -> str | None:
    index = str(torch.cuda.current_device())
    return _output("nvidia-smi", f"--id={index}", query, "--format=csv,noheader")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(ROOT), *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
