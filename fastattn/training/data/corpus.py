"""The texts that ship with fastattn, and a text's parts to train on and to validate."""

from __future__ import annotations

import importlib.resources

from fastattn.nn.checks import check_within

CORPUS_FILES = ("english.txt", "chinese.txt")
VALIDATION_FRACTION = 0.1


def load_corpus() -> dict[str, str]:
    """The texts that ship with fastattn, by name: "english" and "chinese".

    Sources and licences are in corpus/README.md beside them.
    """
    folder = importlib.resources.files("fastattn.training") / "corpus"
    return {
        name.removesuffix(".txt"): (folder / name).read_text(encoding="utf-8")
        for name in CORPUS_FILES
    }


def split_text(text: str, validation_fraction: float = VALIDATION_FRACTION) -> tuple[str, str]:
    """Cut `text` in two at the end of a line: the first part is to train on, the rest to validate.

    The cut is contiguous, so no line of one part stands beside a line of the other.

    Args:
        validation_fraction: share of the characters, in (0, 1), that the second part has at least.

    Raises:
        ValueError: a fraction out of range, or a text with too few lines to give each part one.
    """
    check_within("validation_fraction", validation_fraction, "(0, 1)")
    cut = text.rfind("\n", 0, int(len(text) * (1 - validation_fraction))) + 1
    training, validation = text[:cut], text[cut:]
    if not training.strip() or not validation.strip():
        raise ValueError(
            f"text has {len(text)} characters in {len(text.splitlines())} lines, too few to keep "
            f"{validation_fraction:g} of it for validation: give more lines of text"
        )
    return training, validation
