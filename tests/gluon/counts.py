"""The table of mutants that the emulator finds, counts.json.

    python tests/gluon/counts.py                     # try them all again (minutes), and print
    python tests/gluon/counts.py --write             # and write the table
    python tests/gluon/counts.py --write forward     # only that subject's part

`planted` are the bugs of bugs.py: how many there are, and how many seed 0, as many seeds as there
are shapes, and 16 seeds find, with both detectors and with that of data only. `mechanical` are the
mutants of mutants.py, tried with 8 seeds. `survive` names those that none finds: each has to be
right by reading.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported; as the tests have it
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

TABLE = Path(__file__).with_name("counts.json")
PLANTED, MECHANICAL = 16, 8  # seeds


def load() -> dict[str, Any]:
    return json.loads(TABLE.read_text())  # type: ignore[no-any-return]


def planted(name: str, order: bool = True) -> dict[str, int]:
    """Bugs of a subject, and how many of them are found by how many seeds."""
    from gluon import mutants
    from gluon.subjects import SUBJECTS

    subject = SUBJECTS[name]
    sources = mutants.planted(subject).values()
    first = [mutants.first_seed(subject, x, PLANTED, order=order) for x in sources]
    found = {n: _below(first, n) for n in (1, subject.shapes, PLANTED)}
    return {"bugs": len(first), **{f"found by {n} seeds": x for n, x in found.items()}}


def mechanical(name: str) -> dict[str, Any]:
    """Mutants of a subject, how many are found, and those that are not."""
    from gluon import mutants
    from gluon.subjects import SUBJECTS

    subject = SUBJECTS[name]
    sources = mutants.mechanical(subject.path.read_text())
    first = {x: mutants.first_seed(subject, text, MECHANICAL) for x, text in sources.items()}
    found = {f"found by {n} seeds": _below(first.values(), n) for n in (1, MECHANICAL)}
    return {
        "mutants": len(first),
        **found,
        "survive": [x for x, seed in first.items() if seed is None],
    }


def _below(first: Iterable[int | None], seeds: int) -> int:
    return sum(seed is not None and seed < seeds for seed in first)


def count(name: str) -> dict[str, Any]:
    both, data = planted(name), planted(name, order=False)
    return {"planted": both, "planted, data only": data, "mechanical": mechanical(name)}


def main() -> None:
    from gluon.subjects import SUBJECTS

    names = [x for x in sys.argv[1:] if x != "--write"] or list(SUBJECTS)
    for name in names:
        part = {name: count(name)}
        print(json.dumps(part, indent=2), flush=True)
        if "--write" in sys.argv:
            table = {**(load() if TABLE.exists() else {}), **part}
            ordered = {x: table[x] for x in SUBJECTS if x in table}
            TABLE.write_text(json.dumps(ordered, indent=2) + "\n")


if __name__ == "__main__":
    main()
