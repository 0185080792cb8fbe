"""The package as a whole: cost and needs of its import, rules for all its files."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).parents[2]
OPTIONAL = ("transformers", "tokenizers", "safetensors", "rich", "matplotlib")


def python(code: str, *options: str) -> str:
    """The output of `code` in a fresh interpreter that sees this tree and keeps its bytecode."""
    command = [sys.executable, *options, "-c", code]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def own_files() -> Iterator[Path]:
    """Every text file that belongs to the project, without asking git: a copy may have none."""
    folders = ("fastattn", "tests", "benchmarks", "docs", "examples", "csrc", ".ci")
    candidates = [
        *ROOT.iterdir(),
        *(path for name in folders for path in ROOT.glob(f"{name}/**/*")),
    ]
    for path in candidates:
        if path.is_file() and path.suffix not in (".pyc", ".so", ".png"):
            yield path


def test_version_is_said_once() -> None:
    said = re.compile(r"""^version\s*=\s*["']\d""", re.MULTILINE)
    assert not said.search((ROOT / "pyproject.toml").read_text())
    assert not said.search((ROOT / "setup.py").read_text())
    for installed in importlib.metadata.distributions(name="fastattn"):
        assert installed.version == fastattn.__version__
    newest = re.search(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest.group(1) == fastattn.__version__


def test_every_public_name_is_there() -> None:
    for name in fastattn.__all__:
        assert getattr(fastattn, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        fastattn.atention  # noqa: B018


def test_an_import_loads_ops_and_modules_only() -> None:
    """Neither a kernel and its compiler, nor a model, nor a package beside torch and its own."""
    code = (
        "import sys, torch; before = set(sys.modules); import fastattn;"
        "print(*(set(sys.modules) - before))"
    )
    loaded = [name.split(".") for name in python(code).split()]
    assert {name[0] for name in loaded} <= {"fastattn", "torch", *sys.stdlib_module_names}
    own = [name for name in loaded if name[0] == "fastattn"]
    assert not {"cuda", "gluon", "tiles", "triton", "tuning"} & set(itertools.chain(*own))
    files = {"backends", "extension", "files", "measured", "proving", "rule", "user_cache"}
    files |= {"verdicts"}
    assert {name[1] for name in own if len(name) > 1} <= {"nn", "ops", *files}


def test_works_without_triton_and_without_the_extras() -> None:
    absent = ("triton", *OPTIONAL)
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}));"
        "import torch, fastattn;"
        "q = torch.randn(1, 5, 2, 8, requires_grad=True);"
        "out = fastattn.attention(q, q, q, causal=True); out.sum().backward();"
        "model = fastattn.GPT(fastattn.GPTConfig(vocab_size=7, n_positions=8, n_embd=8, n_layer=1,"
        " n_head=2, bos_token_id=0, eos_token_id=0));"
        "print(tuple(q.grad.shape), tuple(model(torch.tensor([[1, 2, 3]])).shape))"
    )
    assert python(code) == "(1, 5, 2, 8) (1, 3, 7)"


def test_says_which_extra_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['safetensors'] = None; import fastattn\n"
        "model = fastattn.GPT(fastattn.GPTConfig(vocab_size=7, n_positions=8, n_embd=8, n_layer=1,"
        " n_head=2, bos_token_id=0, eos_token_id=0))\n"
        f"try: model.save_pretrained({str(tmp_path / 'model')!r})\n"
        "except ImportError as error: print(error)"
    )
    assert re.search(r'pip install "fastattn\[(hf|train)\]"', python(code))
    assert not (tmp_path / "model").exists()


def test_no_path_of_a_machine() -> None:
    machine = re.compile(r"(?<![\w.\-/*])/(?:work|root|home|tmp|Users|mnt)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in own_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if machine.search(line)
    ]
    assert not found, "\n".join(found)


def test_linters_have_one_version_each() -> None:
    metadata = (ROOT / "pyproject.toml").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = re.search(r'"ruff==([\d.]+)"', metadata)
    assert pinned is not None
    assert f"rev: v{pinned.group(1)}" in hooks
