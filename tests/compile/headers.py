"""Compile csrc/ with nvcc against the headers of the oldest and of the newest supported torch.

    python tests/compile/headers.py                   # 2.10.0, the installed one, pip's newest
    python tests/compile/headers.py 2.11.0 2.12.1     # these releases

One library serves every torch from setup.py's TORCH_FLOOR on, so each of their headers has to take
it: the file that registers the ops, one with a kernel, and the conformance programs. Headers come out
of the wheel that pip downloads, once, into build/headers/RELEASE/.
"""

from __future__ import annotations

import argparse
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


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--no-deps"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def newest() -> str:
    """The release of torch that pip would install."""
    options = ("--dry-run", "--ignore-installed", "--quiet", "--report", "-")
    return json.loads(pip("install", *options, "torch"))["install"][0]["metadata"]["version"]


def headers(release: str) -> Path:
    """The folder that holds `include` of a release of torch."""
    folder = HEADERS / release
    if not folder.exists():
        HEADERS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=HEADERS) as scratch:
            pip("download", "--quiet", "--dest", scratch, f"torch=={release}")
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                wanted = [x for x in archive.namelist() if x.startswith("torch/include/")]
                archive.extractall(scratch, wanted)
            (Path(scratch) / "torch").rename(folder)
    return folder


def compile_against(folder: Path, name: str) -> None:
    """Raises BuildError, which holds what the compiler said."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        raise build.incremental.BuildError("nvcc was not found (looked in CUDA_HOME, PATH)")
    compiler = build.compile_command(ARCHITECTURE, nvcc, folder)
    objects, jobs = HEADERS / f"{name}-objects", build.incremental.cores()
    began = time.monotonic()
    build.incremental.compile_all(
        compiler, SOURCES, ROOT, objects, jobs, say=lambda line: None, version=name
    )
    print(f"torch {name}: {' '.join(SOURCES)} compiled, {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", help="of torch; default: oldest, installed, newest")
    given = parser.parse_args().releases
    failed = 0
    for name in given or (OLDEST, "installed", newest()):
        folder = build.find_torch()[0] if name == "installed" else headers(name)
        try:
            compile_against(folder, name)
        except build.incremental.BuildError as error:
            failed += 1
            print(f"torch {name}: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
