"""Builds the kernels of csrc/ for the CPU, on the emulator's headers, and loads them.

`python tests/emulator/library.py` builds what has changed and prints the library's path. Objects
and the library lie in build/emulator/.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulator"

sys.path.append(str(ROOT / "csrc"))

import builder  # noqa: E402


def load() -> Any:
    """Build, load for this process, and return torch.ops.fastattn_cuda, which runs on the CPU.

    Raises:
        builder.BuildError: g++ refuses a source; the message is its output.
    """
    import torch

    from fastattn import extension

    extension.use(build())
    return torch.ops.fastattn_cuda


def sources(root: Path = ROOT) -> list[str]:
    """The kernels' sources and the emulator's own, relative to `root`."""
    found = (path.relative_to(root) for path in root.glob("csrc/**/*"))
    code = (path for path in found if path.suffix in (".cu", ".cpp"))
    return sorted(
        path.as_posix()
        for path in code
        if "emulator" not in path.parts or path.parent == Path("csrc/emulator")
    )


def build_programs(programs: Sequence[str], name: str) -> Path:
    """A library of its own with sources, relative to ROOT, that are not the package's.

    Raises:
        builder.BuildError: g++ refuses a source.
    """
    machine = [source for source in sources() if source.startswith("csrc/emulator/")]
    return _build([*programs, *machine], ROOT, BUILD.with_name(f"emulator-{name}"), name)


def build(root: Path = ROOT, folder: Path = BUILD) -> Path:
    """The library's path. Processes that ask at once build once.

    Raises:
        builder.BuildError: g++ refuses a source.
    """
    return _build(sources(root), root, folder, "fastattn_emulator")


def _build(files: Sequence[str], root: Path, folder: Path, name: str) -> Path:
    library = f"lib{name}.so"
    linker = ["g++", "-shared", "-pthread", "-Wl,-z,defs", "-Wl,--no-as-needed"]
    linker += ["-L", str(_torch() / "lib"), "-ltorch", "-ltorch_cpu"]
    with locked(folder):
        builder.build(
            compiler(), files, root, folder, linker=linker, library=library,
            version=importlib.metadata.version("torch"), say=_say,
        )  # fmt: skip
    return folder / library


def compiler() -> list[str]:
    return [
        *("g++", "-x", "c++", "-std=c++17", "-O1", "-g1", "-Wall", "-fPIC", "-fvisibility=hidden"),
        *("-pthread", "-I", "csrc/emulator", "-I", "csrc", "-isystem", str(_torch() / "include")),
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *('-DFASTATTN_ARCHS="emulator"', "-DFASTATTN_TOOLKIT=0"),
    ]


def _torch() -> Path:
    """torch's folder; finding it takes no import of it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(f"emulator: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(build())
    except builder.BuildError as error:
        sys.exit(str(error))
