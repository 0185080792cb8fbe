"""The second part of the GPU check: how fast it is. Every subject of the benchmarks, by its value.

`<subject>-<preset>.json` has a subject's rows (schema.py), written after each one; a later run
keeps them and measures the rest.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import script
from gpu_report import Report, Verdict
from schema import SchemaError, read

MINUTES = 4.7  # with the start of Python and the last row less than five

# In order of value, with the seconds that the quick preset of each may take.
SUBJECTS = {
    "attention": 55,
    "decode": 20,
    "layer_norm": 26,
    "ffn": 24,
    "cross_entropy": 16,
    "gpt_train": 40,
    "gpt_generate": 31,
    "never_slower": 20,
    "memory": 14,
    "rotary": 12,
    "overhead": 12,
    "train": 12,
}


def check(
    report: Report, device: str, subjects: Sequence[str], preset: str, options: Sequence[str]
) -> Verdict:
    """Have every subject measured.

    A quick one has its seconds, and what those before it have left of theirs; another preset all
    the time, so that runs in parts finish one subject after the other.
    """
    report.data["preset"] = preset
    found = report.data["subjects"] = {}
    end = time.monotonic()
    for name in subjects:
        end = end + SUBJECTS[name] if preset == "quick" else report.end
        left = min(end, report.end) - time.monotonic()
        file = report.out / f"{name}-{preset}.json"
        entry: dict[str, Any] = {"file": file.name}
        found[name] = entry
        if left < 5:
            entry["skipped"] = "no time left to begin it"
        else:
            print(f"== {name}", flush=True)
            subject = importlib.import_module(name).SUBJECT
            arguments = ["--device", device, "--preset", preset, "--json", str(file), "--resume"]
            entry["exit_code"] = measure(
                subject, [*arguments, *options, "--minutes", f"{left / 60}"]
            )
            if file.exists():
                entry |= outcome(file)
        report.save()
    return verdict(report.data)


def measure(subject: script.Subject, arguments: Sequence[str]) -> int:
    """The exit code of a subject's script."""
    try:
        return script.main(subject, arguments)
    except SystemExit as refused:  # argparse: it could not begin
        return int(refused.code or 0)


def outcome(file: Path) -> dict[str, Any]:
    """A summary of a subject's file."""
    try:
        results = read(file)
    except SchemaError as failure:
        return {"error": str(failure)}
    rows = results["rows"]
    return {
        "rows": len(rows),
        "wrong": [row["title"] for row in rows if not row["right"]],
        "missed": [row["title"] for row in rows if row["right"] and row.get("holds") is False],
        "left_out": [skipped["title"] for skipped in results["skipped"]],
    }


def verdict(data: Mapping[str, Any]) -> Verdict:
    """All rows that are wrong, missed their target or were left out."""
    said = Verdict()
    for name, entry in data["subjects"].items():
        if "skipped" in entry:
            said.left_out.append(f"{name}: {entry['skipped']}")
        if "error" in entry or entry.get("exit_code") == 2:
            said.wrong.append(f"{name}: {entry.get('error', 'it could not begin')}")
        said.wrong += [f"{name}: {title}" for title in entry.get("wrong", ())]
        said.missed += [f"{name}: {title}" for title in entry.get("missed", ())]
        said.left_out += [f"{name}: {title}" for title in entry.get("left_out", ())]
    return said
