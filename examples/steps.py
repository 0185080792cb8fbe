"""The commands of an example: each is printed as a shell would take it, and run in this process."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from fastattn.cli import main

CONFIGS = Path(__file__).parent / "configs"


def arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The folder and the size that every example asks for."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the data and the runs; goes on if it exists")
    parser.add_argument(
        "--small", action="store_true", help="the extracts in examples/data, a few steps: a trial"
    )
    return parser.parse_args(argv)


def fastattn(*words: object, lines: Sequence[str] = ()) -> str:
    """Run `fastattn WORDS`, which reads `lines`, and return what it printed.

    Raises:
        SystemExit: it failed.
    """
    command = [str(word) for word in words]
    print(f"\n$ fastattn {shlex.join(command)}", flush=True)
    printed, typed = io.StringIO(), io.StringIO("".join(f"{line}\n" for line in lines))
    with contextlib.redirect_stdout(printed), mock.patch("sys.stdin", typed):
        code = main(command)
    text = printed.getvalue()
    print(text.rstrip(), flush=True)
    if code:
        raise SystemExit(code)
    return text


def scores(folder: Path, data: str, *words: object) -> dict[str, float]:
    """The measures by `fastattn evaluate` of a folder's model."""
    measured = json.loads(fastattn("evaluate", folder, *words, "--data", data, "--json"))
    return measured["scores"]
