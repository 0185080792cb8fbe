"""Shared by both parts of the GPU check: a file of results, a verdict, an exit code."""

from __future__ import annotations

import enum
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkout import ROOT
from environment import environment
from schema import write_json

CODE = ("benchmarks", "csrc", "fastattn", "tests")  # folders
SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".json", ".py", ".toml")


class Exit(enum.IntEnum):
    RIGHT = 0
    WRONG = 1
    COULD_NOT_BEGIN = 2
    LEFT_OUT = 3
    MISSED = 4


@dataclass
class Verdict:
    """The judgement of a part.

    Attributes:
        wrong: wrong results, and whatever did not build, broke or could not begin.
        missed: targets of speed and memory that were missed; the results are right.
        left_out: left out for lack of time.
    """

    wrong: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def exit(self) -> Exit:
        if self.wrong:
            return Exit.WRONG
        if self.missed:
            return Exit.MISSED
        return Exit.LEFT_OUT if self.left_out else Exit.RIGHT


def together(exits: Sequence[Exit]) -> Exit:
    """The worst of them."""
    worst_first = (Exit.WRONG, Exit.COULD_NOT_BEGIN, Exit.MISSED, Exit.LEFT_OUT, Exit.RIGHT)
    return min(exits, key=worst_first.index)


class Report:
    """The results of a part so far, on disk after every `save`.

    Attributes:
        out: the folder of results.
        data: the file's content.
        goes_on: whether an earlier run of the same code on the same device left its results here.
    """

    def __init__(
        self, out: Path, part: str, device: str, minutes: float, commit: str | None, start: float
    ) -> None:
        self.out = out
        self.path = out / f"gpu_{part}.json"
        self.start, self.end = start, start + 60 * minutes
        self.data: dict[str, Any] = {
            "schema": f"fastattn gpu {part} 1",
            "environment": environment(device, commit=commit),
            "code": fingerprint(),
            "minutes": minutes,
            "verdict": None,
        }
        self.goes_on = _same(self.path, self.data)
        self.save()

    def left(self) -> float:
        """Seconds until the end of the part."""
        return self.end - time.monotonic()

    def save(self) -> None:
        write_json(self.path, self.data)

    def finish(self, said: Verdict) -> Exit:
        """Write the verdict down and print it."""
        self.data["verdict"] = {"exit_code": said.exit, **asdict(said)}
        self.data["seconds"] = round(time.monotonic() - self.start, 1)
        self.save()
        print(f"== {self.data['seconds']:.0f} s; results in {self.path}")
        for word, names in asdict(said).items():
            for name in names:
                print(f"   {word.replace('_', ' ')}: {name}")
        told = said.exit.name.lower().replace("_", " ")
        print(f"== exit code {said.exit}: {told}", flush=True)
        if said.left_out:
            print("   the same command again goes on from here")
        return said.exit


def _same(path: Path, data: dict[str, Any]) -> bool:
    """Whether the file is of the same code, device and packages."""
    try:
        old = json.loads(path.read_text())
        ours, theirs = data["environment"], old["environment"]
        return all(old[name] == data[name] for name in ("schema", "code")) and all(
            ours[name] == theirs[name] for name in ("device", "packages")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fingerprint() -> str:
    """A digest of the code that is checked: of what the files hold, whatever git says of them."""
    digest = hashlib.sha256()
    folders = (path for name in CODE for path in (ROOT / name).rglob("*"))
    for path in sorted([*ROOT.glob("*"), *folders]):
        if path.suffix in SUFFIXES and "results" not in path.parts:  # benchmarks write those
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
