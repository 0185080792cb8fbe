"""The texts that ship: there, clean, and under a stated licence."""

from __future__ import annotations

import importlib.resources
import re
import unicodedata

from fastattn.training import load_corpus
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
