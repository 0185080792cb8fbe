"""`fastattn plan`: what it prints, its errors, and the tables of docs/scaling.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import fastattn
from fastattn.cli import main
from fastattn.training import TrainingConfig
from fastattn.training.distributed.layout import DistributedConfig
from fastattn.training.runs import toml

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
# A command in a block of its own, and the table after it.
TABLES = re.findall(r"^    (fastattn plan .*)\n\n((?:\|.*\n)+)", PAGE, re.MULTILINE)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "size", ["--params 7B --chip A100", "--params 350M --ema --optimizer muon", "--model gpt2"]
)
def test_it_prints_assumptions_splits_and_a_config(
    size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = plan(capsys, *size.split(), "--gpus", "16", "--sequences", "64", "--length", "512")
    assert "modelled, not measured" in out.splitlines()[0]
    assert "64 sequences of 512 tokens" in out and "16 " in out and "50%" in out
    tables = toml.parsed(out[out.index("[distributed]") :])
    layout = DistributedConfig(**tables["distributed"])
    assert len(layout.sizes(16)) == 4
    config = TrainingConfig(steps=1, **tables["training"])
    assert config.batch_size * config.accumulation == 64 and config.context == 512
    sizes = " x ".join(map(str, layout.sizes(16)))
    first = next(line for line in out.splitlines() if re.match(r"\|.*\d GiB", line))
    assert f"| {sizes} | {config.batch_size} |" in first
    assert re.search(rf"^shard={layout.shard} .*else at best", out, re.MULTILINE)


def test_a_folder_with_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = fastattn.GPTConfig(
        vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    fastattn.GPT(config).save_pretrained(tmp_path)
    out = plan(capsys, "--model", str(tmp_path), "--gpus", "4", "--sequences", "8")
    assert "2 layers, width 48, 4 heads" in out and "8 sequences of 64 tokens" in out


def test_sizes_in_place_of_those_of_the_number(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", "3", "--width", "256", "--heads", "4", "--kv-heads", "2"]
    out = plan(capsys, "--params", "7B", *sizes, "--gpus", "2", "--top", "1")
    assert "3 layers, width 256, 4 heads, 2 of keys" in out
    assert len(re.findall(r"^\| 7B", out, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--params 7x --gpus 8", "'7x' is no number"),
        ("--params 10M --gpus 8", "from 50M to 10T"),
        ("--params 7B --gpus eight", "--gpus takes integers"),
        ("--params 7B --gpus 1000000000000", "devices must be at most"),
        ("--params 7B --gpus 8 --usable 0", "usable must be in (0, 1]"),
        ("--params 7B --gpus 8 --heads 3", "n_head must divide n_embd"),
        ("--gpus 8", "one of --params 7B and --model"),
        ("--params 7B --model gpt2 --gpus 8", "one of --params 7B and --model"),
    ],
)
def test_bad_input_is_a_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments.split()]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err


def test_a_model_that_fits_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    """It says what is short and by how much; in a table the row says so."""
    assert main(["plan", "--params", "70B", "--gpus", "8", "--chip", "A100"]) == 1
    captured = capsys.readouterr()
    match = re.search(
        r"takes ([\d.]+) GiB a GPU of ([\d.]+) GiB: ([\d.]+) GiB are short", captured.err
    )
    assert match is not None and "[distributed]" not in captured.out
    needed, room, short = map(float, match.groups())
    assert short == pytest.approx(needed - room, abs=0.11) and short > 0
    assert "offload = true" in captured.err
    out = plan(capsys, "--params", "70B", "--gpus", "4,8")
    assert out.count("are short") == 2


def test_the_page_has_tables() -> None:
    assert len(TABLES) >= 3


@pytest.mark.parametrize(("command", "table"), TABLES, ids=[command for command, _ in TABLES])
def test_tables_of_the_page(command: str, table: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are what the command prints."""
    assert plan(capsys, *shlex.split(command)[2:]) == table
