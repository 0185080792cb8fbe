"""docs/security.md names a test for each promise, and no code reads what can run when it is read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
# Ways to read a file, or a text, that may run code in it.
RUN = re.compile(
    r"pickle\.loads?|torch\.load|marshal\.|shelve\.|yaml\.(unsafe_)?load\b|joblib|allow_pickle"
)


def test_the_page_names_tests() -> None:
    assert len(set(NAMED)) >= 30
    rows = [
        line
        for line in PAGE.splitlines()
        if line.startswith("| ") and not line.startswith("| promise")
    ]
    assert rows and all("`tests/" in row for row in rows)


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_each_test_that_the_page_names_is_there(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    names = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert name in names


def test_nothing_that_is_read_can_run() -> None:
    """And weights that transformers reads are asked for as safetensors, without remote code."""
    for path in ROOT.glob("fastattn/**/*.py"):
        text = path.read_text(encoding="utf-8")
        assert not RUN.search(text), path
        if path.is_relative_to(ROOT / "fastattn" / "models"):
            continue  # these are our own readers
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr != "from_pretrained" or ast.unparse(node.func.value) == "GPT":
                continue
            said = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
            spread = "**source" in ast.unparse(node) and '"trust_remote_code": False' in text
            assert spread or said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
