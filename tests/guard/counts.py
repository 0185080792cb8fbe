"""The table of counts, counts.json: what the package launches, saves, computes and compiles.

A GPU is not needed, and no number depends on how fast a machine is. The tests count again and
compare with the table, so that no change of a number goes unnoticed. As a program:

    python tests/guard/counts.py            # count, and print what differs from the table
    python tests/guard/counts.py --write    # and write the table again

The sections:

    kernels launched            by the steps of steps.py, in the triton backend, by kernel
    operators dispatched        by PyTorch in the same steps, those inside of our ops too: what the
                                host does, and on a GPU what is launched beside our kernels; of one
                                torch version
    bytes saved for backward    in the same steps: storages, each once, beside inputs and parameters
    compiled kernels            that typical calls take, at one length and at ten, by feature
                                (specialisations.py)
    machine code, sm_90, sm_80  of the kernels in which the time goes (`hot` in
                                tests/compile/offline.py): their resources, and the instructions of
                                one turn of the main loop in its unmasked form; of one triton
                                version
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

TABLE = Path(__file__).with_name("counts.json")
COMMAND = "python tests/guard/counts.py --write"

Section = dict[str, Any]  # of sections, numbers, and words that describe


def _room(name: str) -> Any:
    """One that imports Triton, which the program below has to be before."""
    return importlib.import_module(name)


def _machine_code(grid: str, architecture: int) -> Section:
    section: Section = {}
    for record in _room("compile.offline").report(grid, architecture):
        loop = dict(record["loop"])
        section.setdefault(record["call"], {})[record["kernel"]] = {
            "tile": record["tile"],
            "registers": record["registers"],
            "bytes spilled": record["spills"],
            "shared memory": record["shared"],
            "counted": loop.pop("of"),
            **loop,
        }
    return section


SECTIONS: dict[str, Callable[[], Section]] = {
    "kernels launched": lambda: _room("guard.steps").launches(),
    "operators dispatched": lambda: _room("guard.steps").operators(),
    "bytes saved for backward": lambda: _room("guard.steps").saved_bytes(),
    "compiled kernels": lambda: _room("guard.specialisations").report(),
    "machine code, sm_90": lambda: _machine_code("hot", 90),
    "machine code, sm_80": lambda: _machine_code("hottest", 80),
}
# Sections that hold for one version of a package.
VERSIONED = {
    "operators dispatched": "torch",
    "machine code, sm_90": "triton",
    "machine code, sm_80": "triton",
}
# Sections that list what there is, so that what is missing counts as 0.
SPARSE = ("kernels launched", "operators dispatched")
# All other numbers are the better the smaller they are.
NEITHER_BETTER_NOR_WORSE = ("tensor core",)


def versions() -> dict[str, str]:
    import torch
    import triton

    of_torch = ".".join(torch.__version__.split(".")[:2])
    return {"torch": of_torch, "triton": triton.__version__.split("+")[0]}


def outdated(section: str, table: Section) -> str | None:
    """Why a section of the table cannot be compared with the packages that are installed."""
    package = VERSIONED.get(section)
    if package is None:
        return None
    written, installed = table["versions"][package], versions()[package]
    if written == installed:
        return None
    return f"counted with {package} {written}, here is {installed}; to count again: {COMMAND}"


# --- comparison -----------------------------------------------------------------------------------


def differences(old: Any, new: Any, *path: str) -> Iterator[str]:
    """A line for every number, or word, that differs; `path` leads to both, the section first."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        for name in names:
            present = old.get(name, new.get(name))
            absent = 0 if isinstance(present, int) and path[0] in SPARSE else None
            yield from differences(old.get(name, absent), new.get(name, absent), *path, name)
    elif old != new:
        yield f"{' / '.join(path)}: {_change(path[-1], old, new)}"


def _change(name: str, old: Any, new: Any) -> str:
    if old is None:
        return f"is new: {new}"
    if new is None:
        return f"is gone: {old}"
    if isinstance(old, int) and isinstance(new, int) and name not in NEITHER_BETTER_NOR_WORSE:
        verdict = "worse" if new > old else "better"
        return f"{old} -> {new} ({verdict}{f' by {abs(new - old) / old:.1%}' if old else ''})"
    return f"{old} -> {new} (changed)"


def message(lines: list[str]) -> str:
    return "\n".join(
        [
            f"{len(lines)} of the counts are not those of {TABLE.name}:",
            *(f"  {line}" for line in lines),
            f"If that is what you want, write them: {COMMAND}",
        ]
    )


# --- the file -------------------------------------------------------------------------------------

WIDTH = 100


def formatted(table: Section) -> str:
    """JSON with the innermost level filled into lines."""
    return "\n".join(_lines(table, "")) + "\n"


def _lines(values: Section, indent: str) -> Iterator[str]:
    yield "{"
    inner = indent + "  "
    for number, (name, value) in enumerate(values.items()):
        comma = "," if number + 1 < len(values) else ""
        key = f"{inner}{json.dumps(name)}: "
        if any(isinstance(x, dict) for x in value.values()):
            first, *rest = _lines(value, inner)
            yield key + first
            yield from rest[:-1]
            yield rest[-1] + comma
        else:
            yield from _filled(key + "{", value, inner, "}" + comma)
    yield indent + "}"


def _filled(start: str, values: dict[str, Any], indent: str, end: str) -> Iterator[str]:
    items = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    whole = start + ", ".join(items) + end
    if len(whole) <= WIDTH:
        yield whole
        return
    yield start
    line = indent + "  "
    for number, item in enumerate(items):
        item += "," if number + 1 < len(items) else ""
        if len(line) + len(item) > WIDTH:
            yield line.rstrip()
            line = indent + "  "
        line += item + " "
    yield line.rstrip()
    yield indent + end


def load() -> Section:
    return json.loads(TABLE.read_text())


def count() -> Section:
    return {"versions": versions(), **{name: section() for name, section in SECTIONS.items()}}


def main(arguments: list[str]) -> int:
    """Whether the table is another one now, or should be."""
    old, new = load() if TABLE.exists() else {}, count()
    lines = [
        line for section in new for line in differences(old.get(section, {}), new[section], section)
    ]
    print(message(lines) if lines else f"The counts are those of {TABLE.name}.")
    if arguments == ["--write"]:
        TABLE.write_text(formatted(new))
        return 0
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
