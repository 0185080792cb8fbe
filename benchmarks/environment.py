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

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy")
GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "temperature.gpu")


def environment(device: str, *, commit: str | None = None) -> dict[str, object]:
    """Device, driver, versions, threads, commit and date, as plain data.

    Args:
        device: "cpu" or "cuda".
        commit: the commit measured, where the checkout itself cannot tell.
    """
    measured = commit or _git("rev-parse", "HEAD")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": measured,
        "modified": None if commit or not measured else bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": _cuda() if device == "cuda" else None,
    }


def _cuda() -> dict[str, object]:
    properties = torch.cuda.get_device_properties()
    return {
        "toolkit": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "nvidia_smi": _nvidia_smi(),
    }


def _nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks and power as the driver's tool reports them; None where there is no tool."""
    query = f"--query-gpu={','.join(GPU_FIELDS)}"
    index = str(torch.cuda.current_device())
    out = _output("nvidia-smi", f"--id={index}", query, "--format=csv,noheader")
    if out is None:
        return None
    return dict(zip(GPU_FIELDS, (field.strip() for field in out.split(",")), strict=False))


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
