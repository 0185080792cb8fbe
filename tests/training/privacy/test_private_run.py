"""`fastattn train` with [privacy]: what it prints, keeps and writes, and what it refuses."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.test_train import CONFIG
from training.privacy import private as p

from fastattn.cli import main
from fastattn.training.runs import toml
from fastattn.training.runs.run import opened, prepare
from fastattn.training.runs.settings import Run

pytest.importorskip("opacus")

PRIVATE = f"{CONFIG}[privacy]\nepsilon = 6.0\ndelta = 1e-3\n"
OVERRIDES = (
    "model.config.n_positions=24", "tokenizer.vocab_size=none", "tokenizer.folder=tokenizer",
    "data.training=texts.jsonl", "training.steps=4", "training.batch_size=3", "training.context=24",
    "training.evaluation_interval=2",
)  # fmt: skip
Train = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Train:
    monkeypatch.chdir(tmp_path)
    Path("config.toml").write_text(PRIVATE)
    lines = [json.dumps({"text": text}) for text in p.TEXTS]
    Path("texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    p.TOKENIZER.save("tokenizer")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["train", "config.toml", *OVERRIDES, *arguments])
        return code, *capsys.readouterr()

    return run


def test_a_private_run_says_its_epsilon_everywhere(fit: Train) -> None:
    code, out, err = fit()
    assert code == 0, err
    assert "examples are cut to 24 tokens" in out
    ends = [float(found) for found in re.findall(r"epsilon ([\d.]+) with delta 0.001", out)]
    assert len(ends) == 2 and ends[0] == ends[1]  # before and after
    assert 5.9 < ends[0] <= 6.0
    shown = [float(found) for found in re.findall(r"validation: .* epsilon ([\d.]+)", out)]
    assert len(shown) == 3 and shown[0] == 0 and shown[2] == pytest.approx(ends[0], abs=1e-3)
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    kept = [line["scores"]["epsilon"] for line in lines if line["kind"] == "evaluation"]
    assert kept == pytest.approx(shown, abs=1e-4)
    card = Path("out/model/README.md").read_text()
    assert f"epsilon {ends[0]:.3f} with delta 0.001" in card and "among 24." in card
    key = Path("out/noise.key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text() not in Path("out/run.toml").read_text()
    assert not list(Path("out/model").glob("*.key"))

    former = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])
    assert fit()[0] == 0  # nothing is left to do; the record stays
    assert json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1]) == former
    key.write_text("00")
    code, _, err = fit()
    assert code == 1 and "is no key of 32 hexadecimal digits" in err


def test_keys_are_drawn_and_kept_and_seeds_repeat(fit: Train) -> None:
    def key(folder: str, *more: str) -> str:
        noise = ("privacy.epsilon=none", "privacy.noise_multiplier=1")  # no search for it
        overrides = [*OVERRIDES, f"output.folder={folder}", *noise, *more]
        run = Run.of(toml.overridden(toml.read("config.toml"), overrides))
        with opened(run) as checkpoints:
            privacy = prepare(run, checkpoints).privacy
        assert privacy is not None
        fingerprint: str = privacy.fingerprint()["key"]
        return fingerprint

    first = key("a")
    assert first != key("b") and first == key("a")
    assert key("c", "privacy.seed=5") == key("d", "privacy.seed=5") != key("e", "privacy.seed=6")
    assert not Path("c/noise.key").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tokenizer.folder=none", "tokenizer.vocab_size=300"), "trains a tokenizer on the training"),
        (("--dry-run",), "--dry-run measures steps without"),
    ],
)  # fmt: skip
def test_refusals_in_a_line(fit: Train, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = fit(*arguments)
    assert code == 1 and message in err and err.count("\n") == 1
