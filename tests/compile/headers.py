"""Compile csrc/ with nvcc against the headers of several releases of torch.

    python tests/compile/headers.py                   # the oldest supported, the installed, the newest
    python tests/compile/headers.py 2.11.0 2.12.1     # these

One library serves every torch from setup.py's TORCH_FLOOR on, so the headers of each have to take it:
the file that registers the ops, one with a kernel, and the conformance programs. Headers that are not
installed are those of the wheel that pip downloads, once, into build/headers/RELEASE/.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import setup as build  # noqa: E402

SOURCES = ("csrc/library.cpp", "csrc/layer_norm/forward.cu", "tests/conformance/programs.cu")
ARCHITECTURE = "80"
HEADERS = ROOT / "build" / "headers"
OLDEST = "{}.{}.0".format(*build.TORCH_FLOOR)
INSTALLED = importlib.metadata.version("torch")


def newest() -> str:
    """The release of torch that pip would install."""
    report = pip("install", "--dry-run", "--ignore-installed", "--report", "-", "torch")
    version: str = json.loads(report)["install"][0]["metadata"]["version"]
    return version


def headers(release: str) -> Path:
    """The folder that holds `include` of a release of torch."""
    if release == INSTALLED:
        return build.find_torch()[0]
    folder = HEADERS / release
    if not folder.exists():
        HEADERS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=HEADERS) as scratch:
            pip("download", "--dest", scratch, f"torch=={release}")
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                found = [name for name in archive.namelist() if name.startswith("torch/include/")]
                archive.extractall(scratch, found)
            (Path(scratch) / "torch").rename(folder)
    return folder


def pip(command: str, *arguments: str) -> str:
    options = ("--disable-pip-version-check", "--quiet", "--no-deps")
    run = [sys.executable, "-m", "pip", command, *options, *arguments]
    return subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout


def compile_against(release: str) -> None:
    """Raises BuildError, with what the compiler said."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        raise build.builder.BuildError("nvcc was not found (looked in CUDA_HOME and PATH)")
    compiler = build.compile_command(ARCHITECTURE, nvcc, headers(release))
    folder = HEADERS / f"objects-{release}"
    build.builder.build(compiler, SOURCES, ROOT, folder, version=release)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", help="of torch")
    releases = parser.parse_args().releases or (OLDEST, INSTALLED, newest())
    failed = 0
    for release in dict.fromkeys(releases):
        began = time.monotonic()
        try:
            compile_against(release)
            print(f"torch {release}: compiled, {time.monotonic() - began:.0f} s", flush=True)
        except build.builder.BuildError as error:
            failed += 1
            print(f"torch {release}: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
