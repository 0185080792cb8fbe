"""No circles where import-linter does not look: in benchmarks/ and in csrc/emulator/."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported(path: Path) -> set[str]:
    """The modules that a script imports, inside functions and for types too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return names


def test_benchmarks() -> None:
    scripts = {path.stem: path for path in ROOT.glob("benchmarks/*.py")}
    graph = {name: imported(path) & scripts.keys() for name, path in scripts.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_emulator() -> None:
    """A .cpp and the .h of its name are one place."""
    graph = defaultdict(set)
    for path in ROOT.glob("csrc/emulator/**/*.*"):
        place = path.relative_to(ROOT / "csrc").with_suffix("").as_posix()
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M):
            # `device/` is the emulator's own: it stands in for csrc/device.
            name = f"emulator/{name}" if name.startswith("device/") else name
            graph[place].add(name.partition(".")[0])
        graph[place].discard(place)
    TopologicalSorter(graph).prepare()
