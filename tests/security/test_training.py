"""What training reads of a stranger: checkpoints, prepared data, texts, settings.

Each test runs in a process whose memory and time are bounded (tests/bounded.py).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bounded
import mutations
import numpy
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from training.small import CONFIG

from fastattn import models
from fastattn.training import History
from fastattn.training.checkpoints import Checkpoints, durable
from fastattn.training.data import formats
from fastattn.training.data.sources import find_files, read_records
from fastattn.training.data.storage import Examples, checksums
from fastattn.training.distributed.processes import Processes
from fastattn.training.objectives.causal import Causal
from fastattn.training.objectives.span_corruption import SpanCorruption
from fastattn.training.runs import building, toml
from fastattn.training.steps.state import TrainingState

DOCUMENTED = (ValueError, FileNotFoundError)
FINGERPRINT = {"run": 1, "training": {"steps": CONFIG.steps}}
DRAWS = [15, pytest.param(300, marks=pytest.mark.long)]


def fuzz(cases: st.SearchStrategy[Any], draws: int, check: Callable[[Any], Any]) -> None:
    # Threads that check sums have a stack and an arena each.
    with warnings.catch_warnings(action="ignore"):
        mutations.fuzz(cases, draws, check, memory=2**30)


# --- checkpoints ----------------------------------------------------------------------------------


def state() -> TrainingState:
    """A run of a few parameters, after a step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainingState(model, [optimizer], None, scaler, History())


def go_on(folder: Path) -> None:
    """Restore the checkpoint, and take a step with what it gave."""
    restored = state()
    with Checkpoints(folder) as checkpoints:
        if checkpoints.restore(restored, FINGERPRINT, CONFIG):
            restored.optimizers[0].step()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state(), FINGERPRINT)
    go_on(folder)
    return folder / "step-000000"


def sealed(path: Path) -> None:
    """The manifest that a stranger writes to what he changed."""
    (path / durable.MANIFEST).unlink()
    durable.seal(path, Processes("auto"))


def go_on_with(checkpoint: Path, place: Path, name: str, content: bytes) -> None:
    """`go_on` from a copy whose file `name` has another content, sealed."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(checkpoint.parent, place)
    (place / checkpoint.name / name).write_bytes(content)
    if name != durable.MANIFEST:
        sealed(place / checkpoint.name)
    go_on(place)


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_json_of_a_checkpoint(checkpoint: Path, tmp_path: Path, name: str, draws: int) -> None:
    whole = json.loads((checkpoint / name).read_bytes())

    def check(value: Any) -> None:
        go_on_with(checkpoint, tmp_path / "copy", name, mutations.text_of(value))

    fuzz(mutations.changed_json(whole), draws, check)


@pytest.mark.parametrize("draws", DRAWS)
def test_tensors_of_a_checkpoint(checkpoint: Path, tmp_path: Path, draws: int) -> None:
    name = "tensors.safetensors"
    whole = (checkpoint / name).read_bytes()

    def check(content: bytes) -> None:
        go_on_with(checkpoint, tmp_path / "copy", name, content)

    fuzz(mutations.changed(whole), draws, check)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("weight.weight", "weight.weight of the checkpoint must have the shape"),
        ("optimizer.weight.exp_avg", "exp_avg of the checkpoint must have the shape"),
        ("optimizer.nothing.exp_avg", "KeyError"),
        (None, "the checkpoint lacks weight.weight"),
    ],
)
def test_tensors_of_another_shape_never_reach_a_step(
    checkpoint: Path, tensor: str | None, message: str
) -> None:
    """A fused step reads as many values as the parameter has: one too few is another's memory."""
    path = checkpoint / "tensors.safetensors"
    tensors = load_file(path)
    if tensor is None:
        del tensors["weight.weight"]
    else:
        tensors[tensor] = torch.zeros(1, 3)
    save_file(tensors, path)
    sealed(checkpoint)
    with pytest.raises(ValueError, match=message):
        go_on(checkpoint.parent)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "model/../../../outside"])
def test_a_manifest_that_leaves_the_folder(checkpoint: Path, name: str) -> None:
    (checkpoint.parent.parent / "outside").write_text("x")
    path = checkpoint / durable.MANIFEST
    entries = json.loads(path.read_text())
    path.write_text(json.dumps({**entries, name: {"size": 1, "sha256": "0"}}))
    damage = durable.damage(checkpoint, Processes("auto"))
    assert damage is not None and "which is not in the folder" in damage


def test_a_manifest_that_names_a_pipe(checkpoint: Path) -> None:
    entries = json.loads((checkpoint / durable.MANIFEST).read_text())
    (checkpoint / "state.json").unlink()
    os.mkfifo(checkpoint / "state.json")
    entries["state.json"]["size"] = 0
    (checkpoint / durable.MANIFEST).write_text(json.dumps(entries))
    found = bounded.run(durable.damage, checkpoint, Processes("auto"), memory=2**30, seconds=20)
    assert found == "state.json is no file"


# --- data -----------------------------------------------------------------------------------------


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Prepared data, as `prepare` writes them: three examples."""
    folder = tmp_path / "examples"
    folder.mkdir()
    arrays = {
        "input_ids": numpy.arange(9, dtype="<u2"),
        "examples": numpy.array([[0, 2], [1, 5], [2, 9]], dtype="<i8"),
    }
    files = {}
    for name, array in arrays.items():
        path = folder / f"{name}.bin"
        path.write_bytes(array.tobytes())
        files[name] = {
            "dtype": array.dtype.str, "count": array.size, "checksums": checksums(path)
        }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"files": files}))
    assert [example["input_ids"].tolist() for example in Examples(folder)] == [
        [0, 1], [2, 3, 4], [5, 6, 7, 8],
    ]  # fmt: skip
    return folder


@pytest.mark.parametrize("draws", DRAWS)
def test_index_of_examples(examples: Path, draws: int) -> None:
    whole = json.loads((examples / "index.json").read_bytes())

    def check(value: Any) -> None:
        (examples / "index.json").write_bytes(mutations.text_of(value))
        for example in Examples(examples):
            assert sum(map(len, example.values())) <= 9 + 6

    fuzz(mutations.changed_json(whole), draws, check)


def test_dtypes_of_examples_are_integers(examples: Path) -> None:
    """An object's bytes would be taken for addresses."""
    path = examples / "index.json"
    whole = json.loads(path.read_bytes())
    for dtype in ("O", "<f8", "S9", "V2", "<u2,<u2", "<U1", "M8[s]"):
        whole["files"]["input_ids"]["dtype"] = dtype
        path.write_text(json.dumps(whole))
        with pytest.raises(ValueError, match=r"index.json is damaged: it cannot be read"):
            Examples(examples)


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("end", [".txt", ".jsonl", ".txt.gz", ".jsonl.gz"])
def test_records(tmp_path: Path, end: str, draws: int) -> None:
    text = '{"text": "今天 the fox", "n": [1, 2.5, null]}\n\n{"text": ""}\n'.encode() * 3
    whole = gzip.compress(text, mtime=0) if end.endswith(".gz") else text
    path = tmp_path / f"data{end}"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        for documents in ("file", "line", "paragraph"):
            with contextlib.suppress(*DOCUMENTED):
                list(read_records(path, documents))  # type: ignore[arg-type]

    fuzz(mutations.changed(whole), draws, check)


@pytest.mark.parametrize("documents", ["file", "line", "paragraph"])
@pytest.mark.parametrize("line", [b"a" * 2**20, b"a" * 1023 + b"\n"], ids=["one line", "lines"])
def test_a_small_file_that_unpacks_to_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: Any, line: bytes
) -> None:
    """64 MiB of a file of 64 KiB, where a record may have 4 MiB: lines pass, a record does not."""
    monkeypatch.setattr(formats, "LONGEST_LINE", 2**22)
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(2**26 // len(line)):
            file.write(line)
    assert path.stat().st_size < 2**19

    def read() -> str | int:
        try:
            return sum(1 for _ in read_records(path, documents))
        except ValueError as error:
            return str(error)

    found = bounded.run(read, memory=2**26, seconds=60)
    if documents == "line" and line.endswith(b"\n"):
        assert found == 2**16
    else:
        assert "a record of a compressed file may have at most 4194304 bytes" in str(found)


def test_paragraphs_of_a_large_packed_file_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "LONGEST_LINE", 1000)
    path = tmp_path / "many.txt.gz"
    path.write_bytes(gzip.compress(b"\n\n".join([b"a" * 300 + b"\n" + b"b" * 300] * 50)))
    assert len(list(read_records(path, "paragraph"))) == 50


def test_folders_that_contain_themselves(tmp_path: Path) -> None:
    """Two links to where they are would name 2^40 folders."""
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path)

    def read() -> None:
        with pytest.raises(ValueError, match="links lead to this folder twice"):
            find_files(tmp_path)

    bounded.run(read, memory=2**26, seconds=20)


# --- new models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "sizes", "message"),
    [
        (Causal, {"vocab_size": 10**12}, "GiB of memory"),
        (Causal, {"n_layer": 10**9}, "n_layer is 1000000000, more than"),
        (Causal, {"n_embd": 2**40, "n_head": 2**20}, "no model has these sizes|GiB of memory"),
        (Causal, {"n_inner": 2**50}, "GiB of memory"),
        (SpanCorruption, {"encoder_layers": 10**9}, "encoder_layers is 1000000000, more than"),
    ],
)
def test_a_new_model_is_no_larger_than_the_memory(
    objective: Any, sizes: dict[str, int], message: str
) -> None:
    model = getattr(models, objective.model_class)
    small = {"vocab_size": 300}

    def make() -> None:
        with pytest.raises(ValueError, match=message):
            building._check_size(model, model.config_class(**{**small, **sizes}))

    bounded.run(make, memory=2**27, seconds=20)


# --- settings and records of runs -----------------------------------------------------------------

RUN = b"""
[run]
folder = "runs/a"
[data]
paths = ["a/*.txt", "b.jsonl"]
[training]
steps = 100
learning_rate = 1e-3
betas = [0.9, 0.99]
"""


@pytest.mark.parametrize("draws", DRAWS)
def test_run_toml(tmp_path: Path, draws: int) -> None:
    path = tmp_path / "run.toml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        toml.written({"run": toml.read(path)})

    fuzz(mutations.changed(RUN), draws, check)


@pytest.mark.parametrize(
    "content", [b"a = " + b"[" * 5000, b"a = " + b"{b = " * 5000, b"[" + b"a." * 20000 + b"a]\n"]
)
def test_toml_that_is_nested_deeply(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run.toml: .*(nested too deeply|in one another|at line)"):
        toml.read(path)


@pytest.mark.parametrize("draws", DRAWS)
def test_history(tmp_path: Path, draws: int) -> None:
    path = tmp_path / "history.json"
    History().save(path)
    whole = json.loads(path.read_bytes())

    def check(value: Any) -> None:
        path.write_bytes(mutations.text_of(value))
        History.load(path)

    fuzz(mutations.changed_json(whole), draws, check)


def test_the_mutations_change_something() -> None:
    """Else nothing here is a test."""
    seen = set()

    @mutations.drawn(mutations.changed(RUN), 50)
    def draw(content: bytes) -> None:
        seen.add(content)

    draw()
    assert len(seen - {RUN}) > 25
