"""Compile the CUDA C++ kernels with nvcc, for a GPU that is not there, and read the machine code.

    python tests/compile/cuda.py            # what differs from csrc/resources.json
    python tests/compile/cuda.py --write    # accept it

The table holds, for every kernel: registers, bytes that a thread spills, the instructions of its main
loop by class and those that a trip through it issues (sass.py says which loop and which trip that is).
Its numbers are those of one release of nvcc and of one architecture, both of which it names.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from compile import sass  # noqa: E402
from compile.offline import main_loop, tool  # noqa: E402

import setup as build  # noqa: E402

TABLE = ROOT / "csrc" / "resources.json"
OBJECTS = ROOT / "build" / "resources"
ARCHITECTURE = "80"


def release() -> str:
    """Of nvcc: 13.0."""
    command = [build.find_nvcc(), "--version"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def objects() -> list[Path]:
    """Every source of the extension, compiled; with ninja only what has changed."""
    nvcc, (torch_folder, _) = build.find_nvcc(), build.find_torch()
    compiler = build.compile_command(ARCHITECTURE, nvcc, torch_folder)
    return build.builder.build(
        compiler, build.find_sources(ROOT), ROOT, OBJECTS, version=release(), say=say
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def kernels(file: Path) -> dict[str, dict[str, Any]]:
    """Registers, spills and main loop of every kernel in an object, by its name in C++."""
    text = subprocess.run(
        [tool("cuobjdump"), "--dump-sass", "--dump-resource-usage", str(file)],
        capture_output=True, text=True,
    ).stdout  # an object without kernels is an error to cuobjdump  # fmt: skip
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    bodies = {
        part.split(maxsplit=1)[0]: sass.instructions(part) for part in text.split("Function : ")[1:]
    }
    return {
        readable(name): {
            "registers": int(registers),
            "spills": max(int(stack), int(local)),
            "loop": main_loop(bodies[name]),
            "trip": trip(bodies[name]),
        }
        for name, registers, stack, local in usage
    }


def trip(code: sass.Code) -> dict[str, int] | None:
    """Of the main loop; None if it has no tensor core instruction."""
    kinds = [sass.kind(x.opcode) for x in sass.trip(sass.main_loop(code))]
    if "mma" not in kinds:
        return None
    return {"instructions": len(kinds), "tensor core": kinds.count("mma")}


def readable(symbol: str) -> str:
    """A kernel's name without namespaces and parameters: forward<Traits<half_t, 64>>."""
    name = subprocess.run(
        ["c++filt", symbol], check=True, capture_output=True, text=True
    ).stdout.strip()
    for spelled, short in (
        ("__half", "half_t"),
        ("__nv_bfloat16", "bfloat16_t"),
        ("signed char", "int8_t"),
    ):
        name = re.sub(rf"\b{spelled}\b", short, name)
    name = re.sub(r"^void |\b\w+::|\((?:bool|int|[\w ]*anonymous[\w ]*)\)(?:::)?", "", name)
    depth = 0
    for at, letter in enumerate(name):  # the parameters begin at the first ( outside of < >
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def report() -> dict[str, Any]:
    found = {name: kernel for file in objects() for name, kernel in kernels(file).items()}
    return {
        "nvcc": release(),
        "architecture": f"sm_{ARCHITECTURE}",
        "kernels": dict(sorted(found.items())),
    }


def differences(table: dict[str, Any], found: dict[str, Any]) -> list[str]:
    before, now = table["kernels"], found["kernels"]
    lines = [f"{name}: new" for name in now.keys() - before.keys()]
    lines += [f"{name}: gone" for name in before.keys() - now.keys()]
    lines += [
        f"{name}: {before[name]} -> {now[name]}"
        for name in now.keys() & before.keys()
        if before[name] != now[name]
    ]
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write csrc/resources.json")
    args = parser.parse_args()
    found = report()
    if args.write:
        TABLE.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    lines = differences(json.loads(TABLE.read_text()), found)
    print("\n".join(lines) or "nothing differs")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
