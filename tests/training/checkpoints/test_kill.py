"""A run that is killed at any moment goes on to the bits of one that never was (killed.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[3]


def _killed(folder: Path, *arguments: str) -> list[str]:
    """The lines that killed.py prints, which are checked."""
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines.pop() == "0 wrong"
    assert all(line.endswith("the same bits") for line in lines)
    return lines


def test_a_run_killed_at_a_random_moment_or_in_a_save_goes_on(tmp_path: Path) -> None:
    """The operations: of the first save, and of a later one that also removes an older one."""
    lines = _killed(tmp_path, "--moments", "2", "--operations", "20", "170")
    assert len(lines) == 4 and sum("codes [-9, 0]" in line for line in lines) >= 2


@pytest.mark.long
def test_twenty_random_moments(tmp_path: Path) -> None:
    lines = _killed(tmp_path, "--moments", "20", "--seed", "1")
    print(*lines, sep="\n")
    assert len(lines) == 20 and sum("codes [-9, 0]" in line for line in lines) >= 10


@pytest.mark.long
def test_every_operation_of_a_save(tmp_path: Path) -> None:
    """The fourth one, with what it removes."""
    operations = [str(number) for number in range(135, 185)]
    lines = _killed(tmp_path, "--operations", *operations)
    assert len(lines) == 50 and all("codes [-9, 0]" in line for line in lines)
