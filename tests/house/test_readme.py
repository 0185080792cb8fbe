"""Every Python block of the README runs as it stands, each in a namespace of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def first_call(block: str) -> str:
    """What the block shows, for the test's name."""
    found = re.search(r"fastattn\.(?!nn|integrations)(\w+)|(\w+)\(.*attn_implementation", block)
    return (found.group(1) or "attn_implementation") if found else "block"


def test_readme_has_blocks() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("block", BLOCKS, ids=first_call)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a block may save a model
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {})


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (Path(__file__).parents[2] / target).is_file(), target
