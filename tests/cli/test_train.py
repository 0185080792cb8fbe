"""`fastattn train`: a config to a model in a folder, resumed by the same command, and its errors."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.cli import main
from fastattn.cli.train.progress import Progress, duration
from fastattn.training import Tokenizer, loop
from fastattn.training.history import Evaluation, History, Step
from fastattn.training.objectives import OBJECTIVES
from fastattn.training.runs import toml
from fastattn.training.runs.settings import Run

CONFIG = """
[model.config]
n_embd = 16
n_layer = 1
n_head = 2
n_positions = 32
embd_pdrop = 0.1
[tokenizer]
vocab_size = 300
[data]
training = "texts.txt"
validation_fraction = 0.2
documents = "line"
[objective]
name = "causal"
[training]
steps = 6
batch_size = 2
context = 16
warmup_steps = 2
evaluation_interval = 3
[output]
folder = "out"
checkpoint_minutes = "none"
"""
TEXTS = "".join(
    f"The {i}th quick brown fox 今天天气很好 jumps {i * 7 % 11} times.\n" for i in range(40)
)
Train = Callable[..., tuple[int, str, str]]


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Train:
    """The command in a folder with a config and data; its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    Path("config.toml").write_text(CONFIG)
    Path("texts.txt").write_text(TEXTS, encoding="utf-8")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["train", "config.toml", *arguments])
        return code, *capsys.readouterr()

    return run


def weights(folder: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = fastattn.models.load(folder).state_dict()
    return state


def test_a_run_from_config_to_generation(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = train("output.samples=['The quick']", "output.sample_tokens=4")
    assert code == 0
    assert "model     GPT, " in out and "training  causal, 6 steps, " in out
    assert re.findall(r"^step (\d)  validation: loss [\d.]+  perplexity", out, re.M) == [
        "0",
        "3",
        "6",
    ]
    assert out.count("    [The quick]") == 3
    assert re.search(
        r"out/model: the model after step \d, whose validation loss was the lowest", out
    )
    entries = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    best = min((e for e in entries if e["kind"] == "evaluation"), key=lambda e: e["loss"])
    assert f"after step {best['step']}," in out
    assert Path("out/loss.png").read_bytes().startswith(b"\x89PNG")

    model = fastattn.models.load("out/model")
    assert model.config.n_embd == 16 and model.config.vocab_size == 300
    tokenizer = Tokenizer.load("out/model")
    assert model.config.eos_token_id == tokenizer.end_of_text
    assert main(["generate", "out/model", "The quick", "--max-new-tokens", "5"]) == 0
    assert "5 tokens" in capsys.readouterr().err


def test_the_same_command_goes_on(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("output.folder=whole")[0] == 0
    real = loop.seed_batch

    def interrupted(seed: int, number: int, *rest: int) -> None:
        if number == 4:
            raise KeyboardInterrupt
        real(seed, number, *rest)

    monkeypatch.setattr(loop, "seed_batch", interrupted)
    code, out, _ = train()
    assert code == 130 and "interrupted after 4 steps" in out
    assert "the same command goes on from out/checkpoints/step-000004" in out
    assert not Path("out/model").exists()
    monkeypatch.setattr(loop, "seed_batch", real)
    code, out, _ = train()
    assert code == 0 and "going on after step 4" in out
    code, again, _ = train()  # there is nothing left to do
    assert code == 0 and again.splitlines()[-1] == out.splitlines()[-1]
    expected = weights("whole/model")
    for name, tensor in weights("out/model").items():
        assert torch.equal(tensor, expected[name]), name


def test_a_dry_run_trains_nothing(train: Train) -> None:
    code, out, _ = train("--dry-run")
    assert code == 0
    head = [line.split()[0] for line in out.splitlines()]
    assert head == ["model", "data", "training", "memory", "time", "compute"]
    assert "weights " in out and "by one timed step" in out
    assert not Path("out/checkpoints/step-000000").exists() and not Path("out/model").exists()
    assert train("training.steps=1")[0] == 0  # the folder is free for another run


def test_a_changed_config_is_refused_with_its_key(train: Train) -> None:
    assert train("training.steps=4")[0] == 0
    before = sorted(Path("out").rglob("*"))
    code, _, err = train("training.steps=4", "training.learning_rate=0.5")
    assert code == 1 and err.count("\n") == 1
    assert "training.learning_rate is 0.001 there and 0.5 here" in err
    code, _, err = train("training.steps=5")
    assert code == 1 and "training.steps is 4 there and 5 here" in err and "train that on" in err
    Path("texts.txt").write_text(TEXTS[60:], encoding="utf-8")
    code, _, err = train("training.steps=4")
    assert code == 1 and "data.training is " in err
    assert [path for path in before if not path.exists()] == []


def test_more_steps_in_the_same_folder(train: Train) -> None:
    constant = "training.schedule=constant"
    assert train(constant, "training.steps=8", "output.folder=whole")[0] == 0
    assert train(constant, "training.steps=3")[0] == 0
    code, out, _ = train(constant, "training.steps=8")
    assert code == 0 and "going on after step 3" in out
    assert "steps = 8" in Path("out/run.toml").read_text(encoding="utf-8")
    expected = weights("whole/checkpoints/step-000008/model")
    found = weights("out/checkpoints/step-000008/model")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    code, _, err = train(constant, "training.steps=5")
    assert code == 1 and "training.steps is 8 there and 5 here" in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.step=3"], "[training] has no key 'step': did you mean 'steps'?"),
        (["training.steps=many"], "[training] steps must be an integer, got 'many'"),
        (["model.config.vocab_size=100"], "the tokenizer has 300 tokens"),
        (["training.context=64"], "[training] context is 64, and the model has 32 positions"),
        (["training.batch_size=1000"], "fewer than a batch has (16000)"),
        (["output.folder=texts.txt"], "[output] folder texts.txt is a file"),
        (["output.folder=."], "[output] folder . holds 'config.toml' and no run"),
        (["objective.name=masked", "tokenizer.vocab_size=none", "tokenizer.folder=plain"], "no 'mask' token"),
        (["output.folder=/proc/run"], "cannot be written to /proc/run/checkpoints"),
        (["training.learning_rate=1e38"], "the last good checkpoint is out/checkpoints/step-000000"),
        (["output.samples=['']"], "[output] samples: '' has 0 tokens"),
        (["model.folder=gpt", "model.config={}", "objective.name=masked"], "and gpt holds a GPT"),
    ],
)  # fmt: skip
def test_errors_are_a_line(train: Train, overrides: list[str], message: str) -> None:
    if "tokenizer.folder=plain" in overrides:
        Tokenizer.train([TEXTS], 300).save("plain")
    if "model.folder=gpt" in overrides:
        config = fastattn.GPTConfig(vocab_size=400, n_positions=32, n_embd=8, n_layer=1, n_head=1)
        fastattn.GPT(config).save_pretrained("gpt")
    code, _, err = train(*overrides)
    assert code == 1 and err.count("\n") == 1
    assert message in err, err


def test_help_has_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert "\n[training]\n" in out and "  learning_rate: a number; default 0.001\n" in out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Terminal())
    progress = Progress(40, lambda: ["    [a]b"], flops_per_token=3e9, peak_flops=6e12)
    history = History(evaluations=[Evaluation(0, 7.0)])
    progress(history)
    for step in range(1, 11):
        history.add(Step(step, 5.0, 1e-3, 1.0, tokens=500, seconds=0.5))
        progress(history)
    history.evaluations.append(Evaluation(10, 4.5, {"perplexity": 90.0}))
    progress(history)
    lines = sys.stdout.getvalue().replace("\n", "\r").split("\r")  # type: ignore[attr-defined]
    lines = [line.removeprefix("\033[K") for line in lines]
    assert "step 0/40" in lines and "step 0  validation: loss 7.0000" in lines
    bar = "step 10/40 [#####---------------]  loss 5.0000  1,000 tokens/s  MFU 50.0%  15 s left"
    assert bar in lines
    assert lines[-3:] == ["step 10  validation: loss 4.5000  perplexity 90.0000", "    [a]b", ""]


def test_progress_of_a_run_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    history = History(evaluations=[Evaluation(0, 7.0), Evaluation(2, 6.0)])
    for step in (1, 2):
        history.add(Step(step, 5.0, 1e-3, 1.0, tokens=500, seconds=0.5))
    progress = Progress(40, list)
    progress(history)
    history.evaluations.append(Evaluation(3, 5.0))
    progress(history)
    assert capsys.readouterr().out == "going on after step 2\nstep 3  validation: loss 5.0000\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (18_120, "5 h 2 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = [toml.parsed(block) for block in re.findall(r"^```toml\n(.*?)^```$", PAGE, re.M | re.S)]


def test_the_configs_of_the_page(tmp_path: Path) -> None:
    """The first is whole; the others are parts of one."""
    whole, *parts = BLOCKS
    assert PAGE.partition("```toml\n")[2].partition("```")[0].count("\n") <= 15
    for part in parts:
        run = Run.of(
            {**{key: whole[key] for key in ("data", "training", "output", "objective")}, **part}
        )
        assert run != Run.of(whole)


def test_the_page_names_every_objective() -> None:
    for name, objective in OBJECTIVES.items():
        assert re.search(rf"^\| `{name}` .* `{objective.model_class}` \|$", PAGE, re.M), name
