"""The texts that ship: there, clean, and under a stated licence."""

from __future__ import annotations

import importlib.resources
import random
import re
import unicodedata

import pytest

from fastattn.training import load_corpus, split_text
from fastattn.training.data.corpus import CORPUS_FILES


def test_both_languages_are_there_in_size() -> None:
    corpus = load_corpus()
    assert list(corpus) == ["english", "chinese"]
    for text in corpus.values():
        assert 150_000 < len(text.encode()) < 400_000
    chinese = re.findall(r"[\u4e00-\u9fff]", corpus["chinese"])
    assert len(chinese) > 0.8 * len(corpus["chinese"])
    assert corpus["english"].isascii()
    assert corpus["english"].startswith("In the beginning God created the heaven and the earth.\n")


def test_the_text_is_clean() -> None:
    for name, text in load_corpus().items():
        assert text.endswith("\n") and "\r" not in text and "\ufffd" not in text, name
        controls = {c for c in text if unicodedata.category(c).startswith("C")} - {"\n"}
        assert not controls, (name, controls)
        assert not re.search(r"https?:|www\.|@|\d{5}", text), name
        lines = [line for line in text.splitlines() if line]
        assert all(line == line.strip() for line in lines), name
        if name == "chinese":
            assert len(set(lines)) == len(lines)


def test_source_and_licence_of_each_file_are_stated() -> None:
    folder = importlib.resources.files("fastattn.training") / "corpus"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert {entry.name for entry in folder.iterdir()} == {*CORPUS_FILES, "README.md"}
    for name in CORPUS_FILES:
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
        assert re.search("public domain|MIT", row), row
    # The MIT licence asks for its own text to be in every copy.
    assert "Copyright (c) 2013-2014 isnowfy" in readme
    assert "The above copyright notice and this permission notice shall be included" in readme
    reviews = len(load_corpus()["chinese"].splitlines())
    assert f"| {reviews:,} short reviews" in readme


@pytest.mark.parametrize("seed", range(20))
def test_split_is_contiguous_at_a_line_and_close_to_the_fraction(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join("x" * draw.randrange(40) + "\n" for _ in range(100))
    fraction = draw.uniform(0.05, 0.95)
    training, validation = split_text(text, fraction)
    assert training + validation == text
    assert training.endswith("\n")
    assert 0 <= len(validation) - fraction * len(text) <= 41  # at most one line more


def test_what_cannot_be_split_is_refused() -> None:
    for text in ("", "\n\n\n", "one line without an end", "one line\n"):
        with pytest.raises(ValueError, match=r"too few to keep 0\.1 of it for validation"):
            split_text(text)
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="validation_fraction must be in"):
            split_text("a\nb\n", fraction)
