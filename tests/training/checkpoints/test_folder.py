"""Checkpoints: what is kept, what is refused, and what survives a full disk and damage."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from training.small import (
    HELD_OUT,
    OBJECTIVE,
    STREAM,
    model,
    same,
    stopping,
    trained,
    weights,
    windows,
    with_changes,
)

import fastattn
from fastattn.training import Checkpoints, History, Windows, loop, train
from fastattn.training.checkpoints import durable
from fastattn.training.distributed.processes import Processes

pytest.importorskip("safetensors")
Whole = tuple[History, dict[str, torch.Tensor]]
SHORT = with_changes(steps=8, evaluation_interval=100)


def _steps(folder: Path) -> list[int]:
    return Checkpoints(folder).steps()


def _run(folder: Path, config: Any = SHORT, **how: Any) -> tuple[History, torch.nn.Module]:
    """A run with dropout, with a checkpoint every two steps."""
    subject = model(dropout=0.1)
    checkpoints = Checkpoints(folder, every_steps=2, **how.pop("checkpoints", {}))
    return trained(subject, config, checkpoints=checkpoints, **how), subject


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The record and the weights of a run that nothing stopped."""
    history, subject = _run(tmp_path_factory.mktemp("whole"))
    return history, weights(subject)


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    losses = iter([9.0, 5.0, 1.0, 2.0, 3.0, 4.0])

    class Planned(type(OBJECTIVE)):  # type: ignore[misc]
        def measure(self, model: Any, batches: Any) -> dict[str, float]:
            return {"loss": next(losses)}

    subject = model()
    train(
        subject, Planned(OBJECTIVE.tokenizer), windows(), with_changes(steps=15, evaluation_interval=3),
        validation=windows(HELD_OUT), checkpoints=Checkpoints(tmp_path, every_steps=4, keep=2),
    )  # fmt: skip
    assert _steps(tmp_path) == [6, 12, 15]  # the best of 1.0, which no interval asked for


def test_intervals_are_of_steps_or_of_minutes_by_a_clock_that_does_not_jump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "time", lambda: 1 / 0)
    saved: list[int] = []

    class Counting(Checkpoints):
        def save(self, state: Any, fingerprint: Any) -> None:
            saved.append(state.step)
            super().save(state, fingerprint)

    def pass_time(history: History) -> None:
        nonlocal now
        now += 70

    trained(
        model(), with_changes(steps=9), validation=None, on_progress=pass_time,
        checkpoints=Counting(tmp_path, every_minutes=3.0),
    )  # fmt: skip
    assert saved == [0, 3, 6, 9]


def test_a_checkpoint_has_a_folder_to_load(tmp_path: Path) -> None:
    """Its files are plain: no pickle."""
    _, subject = _run(tmp_path)
    folder = tmp_path / "step-000008"
    loaded = fastattn.models.load(folder / "model")
    assert same(weights(loaded), weights(subject))
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == state["fingerprint"]["training"]["steps"] == 8

    class Plain(torch.nn.Module):  # has no save_pretrained
        def __init__(self) -> None:
            super().__init__()
            self.gpt = torch.nn.ModuleList([model()])
            self.again = self.gpt[0].wte

        def forward(self, **arguments: Any) -> Any:
            return self.gpt[0](**arguments)

    plain = Plain()
    trained(plain, SHORT, checkpoints=Checkpoints(tmp_path / "plain"))
    from safetensors.torch import load_file

    read = load_file(tmp_path / "plain" / "step-000008" / "model" / "model.safetensors")
    for name, value in read.items():
        assert torch.equal(value, plain.state_dict()[name])


@pytest.mark.parametrize(("stop", "optimizer"), [(1, "adamw"), (6, "adamw"), (6, "muon")])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    stop: int, optimizer: str, tmp_path: Path
) -> None:
    """From another model, another place of the generators, and with what a killed save left."""
    config = with_changes(
        steps=8, evaluation_interval=4, ema_decay=0.9, accumulation=2, optimizer=optimizer
    )
    expected, subject = _run(tmp_path / "whole", config)
    stopped, _ = _run(tmp_path / "parted", config, on_progress=stopping(stop))
    assert stopped.interrupted and _steps(tmp_path / "parted")[-1] == stop
    left = tmp_path / "parted" / ".unfinished-step-000009"
    left.mkdir()
    (left / "state.json").write_text("{")
    again = model(seed=5, dropout=0.1)
    torch.rand(3)
    seen: list[int] = []
    history = trained(
        again, config, checkpoints=Checkpoints(tmp_path / "parted", every_steps=2),
        on_progress=lambda h: seen.append(len(h.steps)),
    )  # fmt: skip
    assert history == expected and not history.interrupted
    assert same(weights(again), weights(subject))
    assert seen[0] == stop and not left.exists()
    # And once more, when there is nothing left to do.
    last = model(seed=6, dropout=0.1)
    assert trained(last, config, checkpoints=Checkpoints(tmp_path / "parted")) == expected
    assert same(weights(last), weights(subject))


def test_only_what_is_trained_is_saved_to_go_on(tmp_path: Path) -> None:
    """As with LoRA: the rest is the caller's, who makes it again."""
    from safetensors.torch import load_file

    subjects = model(), model()
    for number, subject in enumerate(subjects):
        subject.requires_grad_(False)
        subject.norm_f.weight.requires_grad_(True)
        how = {"on_progress": stopping(4)} if number else {}
        trained(subject, SHORT, checkpoints=Checkpoints(tmp_path / str(number)), **how)
    saved = load_file(tmp_path / "1" / "step-000004" / "tensors.safetensors")
    assert {name for name in saved if "optimizer" not in name} == {"weight.norm_f.weight"}
    again = model()
    again.requires_grad_(False)
    again.norm_f.weight.requires_grad_(True)
    trained(again, SHORT, checkpoints=Checkpoints(tmp_path / "1"))
    assert same(weights(again), weights(subjects[0]))


def test_lora_by_peft_goes_on_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> torch.nn.Module:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["wte", "linear1"], lora_dropout=0.1)
        return peft.get_peft_model(_Plain(model()), config)

    class _Plain(torch.nn.Module):
        def __init__(self, gpt: torch.nn.Module) -> None:
            super().__init__()
            self.gpt = gpt

        def forward(self, **arguments: Any) -> Any:
            return self.gpt(**arguments)

    whole, parted, again = adapted(), adapted(), adapted()
    trained(whole, SHORT)
    trained(parted, SHORT, checkpoints=Checkpoints(tmp_path), on_progress=stopping(4))
    trained(again, SHORT, checkpoints=Checkpoints(tmp_path))
    assert same(weights(again), weights(whole))
    assert (tmp_path / "step-000008" / "model" / "adapter_model.safetensors").is_file()


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, whole: Whole) -> None:
    _run(tmp_path, on_progress=stopping(6))
    assert _steps(tmp_path) == [0, 4, 6]
    os.truncate(tmp_path / "step-000006" / "state.json", 20)
    with pytest.warns(UserWarning, match=r"passing over .*step-000006: state\.json has 20 bytes"):
        history, again = _run(tmp_path)
    assert history == whole[0] and same(weights(again), whole[1])
    assert (tmp_path / "damaged-step-000006").is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"config": with_changes(steps=8, evaluation_interval=100, weight_decay=0.2)},
         "training.weight_decay is 0.1 there and 0.2 here"),
        ({"checkpoints": {"fingerprint": {"tokenizer": "b"}}}, "tokenizer is 'a' there and 'b' here"),
    ],
)  # fmt: skip
def test_checkpoints_of_another_run_are_refused(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    how = {"checkpoints": {"fingerprint": {"tokenizer": "a"}}, "on_progress": stopping(2)}
    _run(tmp_path, **how)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"has checkpoints of another run: {told}. Set it back"):
        _run(tmp_path, **{**how, **change})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("schedule", "stop"), [("constant", None), ("wsd", 5)])
def test_more_steps_go_on_to_the_bits_of_a_longer_run(
    schedule: str, stop: int | None, tmp_path: Path
) -> None:
    """A finished run, and one that was stopped before its rate fell."""
    short, long = (
        with_changes(steps=steps, schedule=schedule, evaluation_interval=2) for steps in (6, 8)
    )
    expected, subject = _run(tmp_path / "long", long)
    _run(tmp_path / "short", short, on_progress=None if stop is None else stopping(stop))
    history, again = _run(tmp_path / "short", long)
    assert history == expected and same(weights(again), weights(subject))


@pytest.mark.parametrize(("schedule", "steps"), [("cosine", 10), ("wsd", 10), ("constant", 7)])
def test_steps_that_make_another_run_are_refused(schedule: str, steps: int, tmp_path: Path) -> None:
    config = with_changes(steps=8, schedule=schedule, evaluation_interval=100)
    _run(tmp_path, config)
    with pytest.raises(ValueError, match=rf"training.steps is 8 there and {steps} here. Set it"):
        _run(tmp_path, dataclasses.replace(config, steps=steps))


def test_another_model_and_other_data_are_refused(tmp_path: Path) -> None:
    trained(model(), SHORT, checkpoints=Checkpoints(tmp_path), on_progress=stopping(2))
    for subject, data, told in (
        (model(n_inner=64), windows(), "model.config.n_inner is None there and 64 here"),
        (model(), Windows(STREAM.flip(0), 4, 16), "first batch is '.*' there and '.*' here"),
    ):
        before = weights(subject)
        with pytest.raises(ValueError, match=told):
            train(subject, OBJECTIVE, data, SHORT, checkpoints=Checkpoints(tmp_path))
        assert same(before, weights(subject))
    frozen = model()
    frozen.norm_f.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model.trained.norm_f.bias is only there"):
        trained(frozen, SHORT, checkpoints=Checkpoints(tmp_path))


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    """In this process or another; the lock goes with the process, however it ends."""
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import fcntl, sys\n"
         f"f = open({str(tmp_path / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
         "print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RuntimeError, match=r"another run is training in .*: wait for it or"):
            _run(tmp_path)
        holder.kill()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(RuntimeError, match="another run is training"):
            _run(tmp_path)
        trained(model(), SHORT, checkpoints=checkpoints)  # that holds it already
        with pytest.raises(RuntimeError, match="another run is training"):
            _run(tmp_path)
    _run(tmp_path / "other")


@pytest.mark.parametrize("when", ["fsync", "rename", "write_text"])
def test_a_full_disk_loses_nothing(
    when: str, tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is a line that says where to go on; with room again the run goes on."""
    _run(tmp_path, on_progress=stopping(3))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr({"write_text": Path}.get(when, os), when, full)
        with pytest.raises(OSError, match=r"step 4 could not be written to .*No space.*000003\. M"):
            _run(tmp_path)
    assert not list(tmp_path.glob(".unfinished*"))
    assert durable.damage(tmp_path / "step-000003", Processes("cpu")) is None
    history, again = _run(tmp_path)
    assert history == whole[0] and same(weights(again), whole[1])


def test_a_file_that_cannot_grow_is_an_error_in_a_line(tmp_path: Path) -> None:
    """The error that safetensors raises is no OSError by itself."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"the checkpoint of step 0 could not be written .*none"):
            _run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _steps(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoints cannot be written to .*: give a folder that"):
        _run(tmp_path / "file" / "run", on_progress=lambda _: 1 / 0)


def test_a_model_that_cannot_be_saved_is_found_before_the_first_step(tmp_path: Path) -> None:
    def refuse(model: torch.nn.Module, folder: Path) -> None:
        raise ValueError("no place for dropout")

    seen: list[int] = []
    with pytest.raises(ValueError, match="no place for dropout"):
        _run(
            tmp_path, checkpoints={"save_model": refuse},
            on_progress=lambda h: seen.append(len(h.steps)),
        )  # fmt: skip
    assert set(seen) <= {0} and not list(tmp_path.glob(".unfinished*"))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("every_steps", 0, ValueError), ("every_steps", 1.5, TypeError),
        ("every_minutes", 0.0, ValueError), ("every_minutes", "1", TypeError),
        ("keep", 0, ValueError), ("folder", "", ValueError), ("folder", 3, TypeError),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        Checkpoints(**{"folder": "here", name: value})


def test_ctrl_c_in_an_update_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    real = loop._update

    def update(state: Any, step: int, *rest: Any) -> None:
        if step == 3:  # no multiple of the two steps between checkpoints
            signal.raise_signal(signal.SIGINT)
        real(state, step, *rest)

    monkeypatch.setattr(loop, "_update", update)
    # A process that a shell started in the background ignores the signal.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, former))
    handler = signal.getsignal(signal.SIGINT)
    history, _ = _run(tmp_path)
    assert history.interrupted and len(history.steps) == 3 and _steps(tmp_path)[-1] == 3
    assert signal.getsignal(signal.SIGINT) is handler
