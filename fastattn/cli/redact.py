"""Take personal data with a form of their own out of texts, before a model learns them.

    fastattn redact texts/*.txt dialogues.jsonl --out redacted
    fastattn redact reviews.jsonl --out redacted --kinds EMAIL PHONE --numbered
    fastattn redact reviews.jsonl --out redacted --report finds.jsonl

E-mail addresses, telephone numbers, cards, accounts, IP addresses, identity numbers, birth dates,
passwords and keys become <EMAIL>, <PHONE> and so on. Names, postal addresses and whatever else has
no form are not found: docs/privacy.md says what is and what is not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import TextIO

from fastattn.files import local_path, written_beside
from fastattn.training.privacy.patterns import KINDS
from fastattn.training.privacy.redaction import Find, redact_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="texts and lines of JSON")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for files of their names")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND",
        help=f"only these of {', '.join(KINDS)}",
    )  # fmt: skip
    parser.add_argument(
        "--numbered",
        action="store_true",
        help="<EMAIL_1>: the same value has the same number in a document",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="a line of JSON for each find: where, and not the value"
    )


def run(arguments: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        report: TextIO | None = None
        if arguments.report is not None:
            file = local_path("--report", arguments.report)
            if file.exists():
                raise ValueError(f"--report {file} is there already: give a new file")
            beside = stack.enter_context(written_beside(file))
            report = stack.enter_context(open(beside, "w", encoding="utf-8"))

        def note(place: str, found: Find) -> None:
            if report is not None:
                report.write(json.dumps({"place": place, **found._asdict()}) + "\n")

        counts = redact_files(
            arguments.paths,
            arguments.out,
            arguments.kinds,
            numbered=arguments.numbered,
            on_find=note,
        )
    for kind in arguments.kinds:
        print(f"{kind:<12}  {counts[kind]:,}")
    print("names, postal addresses and other data without a form were not looked for")
    return 0
