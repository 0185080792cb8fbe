"""The answer of `accelerate` and `verify`: one entry per module, printed as a short table."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastattn.integrations.trial import Trial


@dataclass(frozen=True)
class Entry:
    """One module of the model.

    Attributes:
        name: as in `model.named_modules()`, "" for the model itself.
        class_name: the name of its class before any swap.
        backend: the fastattn backend that ran its probe; None for a module left alone.
        reason: why it was left alone; None for a swapped module.
    """

    name: str
    class_name: str
    backend: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """Every module that runs on fastattn, and every one left alone with the reason.

    Modules that are part of a listed one (the projections of an attention) and mere containers
    are not listed apart. `str(report)` is a table in which the entries of repeated layers share a
    line, after it that of the trial.

    Attributes:
        untimed: of the swapped ones those that the batch given to `accelerate` did not time, with
            the reason.
        trial: what the batch showed that was given to `verify`.
    """

    swapped: tuple[Entry, ...]
    left: tuple[Entry, ...]
    trial: Trial | None = None
    untimed: tuple[Entry, ...] = ()

    def __str__(self) -> str:
        if not self.swapped:
            lines = [f"fastattn: nothing swapped, {len(self.left)} modules left alone"]
        else:
            lines = [f"fastattn: {len(self.swapped)} modules swapped, {len(self.left)} left alone"]
        rows = [("swapped", *row) for row in _grouped(self.swapped)]
        rows += [("left", *row) for row in _grouped(self.left)]
        rows += [("untimed", *row) for row in _grouped(self.untimed)]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)]
            lines.append("  " + "  ".join([*cells, row[4]]).rstrip())
        if self.trial is not None:
            lines.append(str(self.trial))
        return "\n".join(lines)


def _grouped(entries: tuple[Entry, ...]) -> list[tuple[str, str, str, str]]:
    """(class, count, backend, names and reason) for each class and outcome, in order."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry in entries:
        key = (entry.class_name, entry.backend or "", entry.reason or "")
        groups.setdefault(key, []).append(entry.name)
    rows = []
    for (class_name, backend, reason), names in groups.items():
        # Layers differ only by their number: transformer.h.0.attn, transformer.h.1.attn, ...
        patterns = dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in names)
        where = names[0] if len(names) == 1 else ", ".join(patterns)
        text = where or "(the model itself)"
        rows.append((class_name, str(len(names)), backend, f"{text}: {reason}" if reason else text))
    return rows
