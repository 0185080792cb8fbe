"""Compiles sources in parallel and links them: with ninja only what has changed, without it all.

setup.py builds the extension with it by nvcc, tests/emulator/library.py the emulator by g++.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


class BuildError(RuntimeError):
    """A source does not compile, or the library does not link; the message holds the output."""


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build(
    compiler: Sequence[str],
    sources: Sequence[str],
    root: Path,
    folder: Path,
    *,
    linker: Sequence[str] = (),
    library: str = "",
    jobs: int | None = None,
    version: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Bring the objects of `sources`, which are relative to `root`, and the library up to date.

    Args:
        compiler, linker: programs and their options; inputs and outputs are added.
        folder: of the objects and of the library.
        library: its file name; no library is linked if there is none.
        jobs: processes at once; one a core unless given.
        version: of what is no file of `root`, e.g. the compiler; another one compiles all again.
        say: told each line of output as it comes.

    Raises:
        BuildError: something does not build. The rest has been built.
    """
    objects = [folder / f"{source}.o" for source in sources]
    steps = [  # output, inputs, command
        (out, [source], [*compiler, "-MMD", "-MF", f"{out}.d", "-c", source, "-o", str(out)])
        for out, source in zip(objects, sources)
    ]
    if library:
        output = folder / library
        steps.append((output, objects, [*linker, *map(str, objects), "-o", str(output)]))
    plan = f"builddir = {folder}\nrule run\n command = $run # {version}\n"
    plan += " description = $out\n deps = gcc\n"
    for out, inputs, command in steps:
        plan += f"build {_path(out)}: run {' '.join(map(_path, inputs))}\n depfile = {out}.d\n"
        plan += f" run = {shlex.join(command).replace('$', '$$')}\n"
        out.parent.mkdir(parents=True, exist_ok=True)
    file = folder / "build.ninja"
    if not file.exists() or file.read_text() != plan:
        file.write_text(plan)

    # pip puts `ninja` beside python, also in an environment that is not activated.
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if (ninja := shutil.which("ninja", path=places)) is not None:
        _run([ninja, "-f", str(file), "-k", "0", "-j", str(jobs or cores())], root, say)
    elif not _newer(
        [out for out, _, _ in steps],
        [file, *root.glob("csrc/**/*.*"), *map(root.joinpath, sources)],
    ):
        with concurrent.futures.ThreadPoolExecutor(jobs or cores()) as pool:
            running = [pool.submit(_run, step[2], root, say) for step in steps[: len(objects)]]
        if errors := [str(job.exception()) for job in running if job.exception() is not None]:
            raise BuildError("\n".join(errors))
        for _, _, command in steps[len(objects) :]:
            _run(command, root, say)
    return objects


def _run(command: Sequence[str], root: Path, say: Callable[[str], None]) -> None:
    try:
        process = subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    printed = []
    with process:
        for line in process.stdout:
            printed.append(line.rstrip())
            say(printed[-1])
    if process.returncode:
        # ninja names what it could not build.
        failed = [m[1] for line in printed if (m := re.match(r"FAILED: (?:\[.*\] )?(.*)", line))]
        names = ", ".join(name.strip() for name in failed) or command[-1]
        raise BuildError(
            f"{names} cannot be built: {Path(command[0]).name} exited with {process.returncode}\n"
            + "\n".join(printed)
        )


def _newer(outputs: Sequence[Path], inputs: Sequence[Path]) -> bool:
    """Whether every output is there and newer than every input."""
    if not all(path.exists() for path in outputs):
        return False
    last = max(path.stat().st_mtime_ns for path in inputs)
    return all(path.stat().st_mtime_ns > last for path in outputs)


def _path(path: object) -> str:
    """As ninja reads it in a `build` line."""
    return re.sub(r"([$ :])", r"$\1", str(path))
