"""A run from its settings to a model in a folder: data, tokenizer, model, training, the end.

    run = Run.of(toml.read("config.toml"))
    with joined(run.model.device, run.distributed) as processes:
        with opened(run, processes) as checkpoints:
            prepared = prepare(run, checkpoints, Parallel(processes, run.distributed))
            history = fit(prepared)

The output folder then has

    run.toml          the settings, all of them; `fastattn train` reads it too
    tokenizer/
    examples/         the data, tokenised
    checkpoints/      `fastattn.training.checkpoints`
    noise.key         the seed of a private run's noise: a secret, as all else but model/
    metrics.jsonl     a line for each step and each validation
    tensorboard/      if asked for
    loss.png
    model/            the end: model and tokenizer, for `fastattn.models.load` or transformers
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastattn.files import folder_written_beside, local_path, write_text
from fastattn.models import GPTConfig
from fastattn.models.folder.layout import Weights
from fastattn.training.checkpoints import Checkpoints, save_model
from fastattn.training.contract import Objective
from fastattn.training.data.order import Packed, Shuffled
from fastattn.training.data.preparation import prepare as prepare_examples
from fastattn.training.data.sources import read_records
from fastattn.training.data.storage import Examples
from fastattn.training.distributed.parallel import Parallel
from fastattn.training.distributed.processes import Processes
from fastattn.training.fingerprints import difference
from fastattn.training.history import History, JsonLines, TensorBoard
from fastattn.training.loop import train
from fastattn.training.privacy.card import card
from fastattn.training.privacy.gradients import PrivateGradients
from fastattn.training.privacy.sampling import Key, Sampled
from fastattn.training.runs import adapters, building, toml
from fastattn.training.runs.settings import LENGTHS, Run
from fastattn.training.tokenizer import Tokenizer

SETTINGS, TOKENIZER, CHECKPOINTS = "run.toml", "tokenizer", "checkpoints"
METRICS, BOARD, CURVE, MODEL = "metrics.jsonl", "tensorboard", "loss.png", "model"
KEY = "noise.key"
_EXTENDED = (
    ', whose [model] folder may be this one\'s "model": train that on. More steps in one folder '
    'need a schedule that is the same so far: "constant", or "wsd" before its decay'
)
OnProgress = Callable[[History], None]


@dataclass(frozen=True)
class Prepared:
    """All that `train` takes, made of a run's settings.

    Attributes:
        examples: to train on.
        training, validation: batches of them, and of those to validate, if there are any.
        checkpoints: of the output folder.
        parallel: this process's part of it all.
        privacy: of a private run.
        weights: of a model on the meta device, which `train` divides.
    """

    run: Run
    objective: Objective
    model: torch.nn.Module
    examples: Examples
    training: Packed | Shuffled | Sampled
    validation: Packed | Shuffled | None
    checkpoints: Checkpoints
    parallel: Parallel
    privacy: PrivateGradients | None = None
    weights: Weights | None = None


@contextlib.contextmanager
def opened(run: Run, processes: Processes | None = None) -> Iterator[Checkpoints]:
    """The output folder, the run's for the block, with the run's settings in it.

    Of several `processes`, which all call it, rank 0 locks and writes.

    Raises:
        ValueError: it holds checkpoints of another run, and the message names the setting; or
            files, but no run.
        OSError: it cannot be made or written to.
        RuntimeError: another process trains in it.
    """
    processes = processes or Processes(run.model.device)
    with contextlib.ExitStack() as stack:
        checkpoints = processes.lead_first(lambda: _opened(run, processes, stack))
        yield checkpoints


def _opened(run: Run, processes: Processes, stack: contextlib.ExitStack) -> Checkpoints:
    folder = local_path("folder", run.output.folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"[output] folder {folder} is a file: give a folder")
    known = (CHECKPOINTS, SETTINGS)
    if folder.is_dir() and not (folder / SETTINGS).is_file():
        others = sorted(path.name for path in folder.iterdir() if path.name not in known)
        if others:
            raise ValueError(
                f"[output] folder {folder} holds {others[0]!r} and no run: give a new one"
            )
    checkpoints = Checkpoints(
        folder / CHECKPOINTS,
        every_steps=run.output.checkpoint_steps,
        every_minutes=run.output.checkpoint_minutes,
        keep=run.output.keep,
        asynchronous=run.output.asynchronous,
        save_model=_saver(run, folder),
        processes=processes,
    )
    stack.enter_context(checkpoints)
    _settle(run, folder, checkpoints)
    return checkpoints


def prepare(
    run: Run,
    checkpoints: Checkpoints,
    parallel: Parallel | None = None,
    on_data: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Tokenizer, examples, batches and model: what is in the folder already is not made again.

    Args:
        parallel: of several processes, which all call it: rank 0 makes the data.
        on_data: called now and then while data are tokenised, as `data.prepare`'s on_progress.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: whatever the parts raise.
    """
    parallel = parallel or Parallel()
    if run.output.samples and parallel.sharded:
        raise ValueError(
            "[output] samples need the whole model in each process: with shard or tensor above 1 "
            "leave them out"
        )
    processes = parallel.processes
    objective, examples, held_out = processes.lead_first(lambda: _data(run, checkpoints, on_data))

    def prepared() -> Prepared:
        training: Packed | Shuffled | Sampled
        privacy: PrivateGradients | None = None
        if run.privacy.enabled:
            key = _key(run, checkpoints.folder.parent / KEY)
            config = run.training
            training = Sampled(examples, objective, config.batch_size, config.context, key)
            privacy = PrivateGradients(run.privacy, training, config)
            privacy.check(training, config, processes.count)
        else:
            training = _batches(run, objective, examples)
        validation = None if held_out is None else _batches(run, objective, held_out, smaller=True)
        model, weights = _model(run, objective, parallel)
        parallel.check(run.training, objective)
        return Prepared(
            run, objective, model, examples, training, validation, checkpoints, parallel, privacy,
            weights,
        )  # fmt: skip

    return processes.together(prepared)


def _data(
    run: Run, checkpoints: Checkpoints, on_data: Callable[[int, int], None] | None
) -> tuple[Objective, Examples, Examples | None]:
    """The objective with its tokenizer, the examples to train on, and those to validate on."""
    folder, data = checkpoints.folder.parent, run.data
    tokenizer = _tokenizer(run, folder / TOKENIZER)
    objective = run.objective.cls(tokenizer, run.objective.settings, run.model.library)
    if not (folder / TOKENIZER).is_dir():
        with folder_written_beside(folder / TOKENIZER, "tokenizer.json", bool) as beside:
            tokenizer.save(beside)  # with what the objective has added, as a chat template

    def examples_of(paths: str | tuple[str, ...]) -> Examples:
        return prepare_examples(
            paths, objective, folder, documents=data.documents, on_progress=on_data
        )

    examples, held_out = examples_of(data.training), None
    if data.validation is not None:
        held_out = examples_of(data.validation)
    elif data.validation_fraction:
        examples, held_out = examples.split(data.validation_fraction)
    checkpoints.fingerprint |= {
        "tokenizer": tokenizer.fingerprint,
        "data": {
            "training": examples.fingerprint,
            "validation": None if held_out is None else held_out.fingerprint,
        },
    }
    return objective, examples, held_out


def _model(
    run: Run, objective: Objective, parallel: Parallel
) -> tuple[torch.nn.Module, Weights | None]:
    """The model, which has room for the run's sequences; one that is to be divided is on the meta
    device where it can be, with its weights.
    """
    torch.manual_seed(run.training.seed)
    found = building.deferred(run.model, objective) if parallel.sharded else None
    if found is not None:
        model, weights = found
    else:
        # Weights that are to be divided are made in the memory of the CPU.
        device = building.device_named("cpu" if parallel.sharded else parallel.processes.device)
        model, weights = building.model(run.model, objective, device), None
    if objective.packs:
        building.check_length(model, "[training] context", run.training.context)
    for name in LENGTHS:
        if (length := getattr(objective.settings, name, None)) is not None:
            building.check_length(model, f"[objective] {name}", length)
    return model, weights


def fit(prepared: Prepared, on_progress: Sequence[OnProgress] = ()) -> History:
    """Train, from the last checkpoint on if there is one, and write the folder "model".

    Raises:
        FloatingPointError, OSError, ValueError: as `train`.
    """
    run, checkpoints, leads = prepared.run, prepared.checkpoints, prepared.parallel.processes.leads
    folder = checkpoints.folder.parent
    callbacks: list[OnProgress] = [*on_progress]
    if leads:
        callbacks.insert(0, JsonLines(folder / METRICS))
    if leads and run.output.tensorboard:
        callbacks.insert(0, TensorBoard(folder / BOARD))

    def progress(history: History) -> None:
        for callback in callbacks:
            callback(history)

    history = train(
        prepared.model,
        prepared.objective,
        prepared.training,
        run.training,
        validation=prepared.validation,
        checkpoints=checkpoints,
        parallel=prepared.parallel,
        privacy=prepared.privacy,
        weights=prepared.weights,
        on_progress=progress,
    )
    if leads:
        history.plot(folder / CURVE)
    if leads and not history.interrupted:
        best = history.best if run.output.best else None
        step = history.steps[-1].step if best is None else best.step
        _copy(checkpoints.path(step) / MODEL, folder / MODEL)
        if prepared.privacy is not None:
            write_text(folder / MODEL / "README.md", card(prepared.privacy, run.training.steps))
    return history


def _settle(run: Run, folder: Path, checkpoints: Checkpoints) -> None:
    """Write the run's settings, unless the folder's checkpoints are of other ones."""
    file = folder / SETTINGS
    if file.is_file():
        # Through `Run`, which knows what a version before did not write.
        former, done = Run.of(toml.read(file)).tables(), checkpoints.steps()
        differs = _differs(former, run.tables())
        if differs is None:
            return
        if done and not _only_extends(former, run, done[-1]):
            raise ValueError(
                f"[output] folder {folder} has checkpoints of another run: {differs}. Set it back "
                "to go on, or give this run a folder of its own"
                f"{_EXTENDED if differs.startswith('training.steps ') else ''}"
            )
        if not done:
            shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    write_text(file, toml.written(run.tables()))


def _only_extends(former: dict[str, Any], run: Run, done: int) -> bool:
    """Whether the run is the former one with another number of steps, and may go on as that."""
    steps = former["training"]["steps"]
    same = {**former, "training": {**former["training"], "steps": run.training.steps}}
    return _differs(same, run.tables()) is None and run.training.extends(steps, done)


def _differs(former: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first setting that makes another run of it, with both values."""

    def deciding(tables: dict[str, Any]) -> dict[str, Any]:
        # As TOML has them; where a run writes to and runs on makes no other run of it.
        plain = toml.parsed(toml.written(tables))
        model = {key: value for key, value in plain["model"].items() if key != "device"}
        return {**plain, "model": model, "distributed": {}, "output": {}}

    return difference(deciding(former), deciding(now))


def _tokenizer(run: Run, folder: Path) -> Tokenizer:
    """The run's tokenizer: the one in `folder` if it is there, a trained one, or another's."""
    if folder.is_dir():
        return Tokenizer.load(folder)
    settings = run.tokenizer
    if settings.vocab_size is not None:
        records = read_records(run.data.training, run.data.documents)
        return building.trained_tokenizer(
            (sourced.record for sourced in records), settings, run.objective.cls
        )
    if (source := settings.folder or run.model.folder) is not None:
        return Tokenizer.load(source)
    raise ValueError(
        "[tokenizer] needs a folder, or a vocab_size to train one: the model is new and has none"
    )


def _batches(
    run: Run, objective: Objective, examples: Examples, smaller: bool = False
) -> Packed | Shuffled:
    """Batches of the run's size; `smaller` ones where there are fewer examples."""
    config = run.training
    if objective.packs:
        tokens = config.batch_size * config.context
        if smaller:
            tokens = min(tokens, int(examples.lengths.sum()))
        return Packed(examples, objective, tokens, config.context, config.seed)
    size = min(config.batch_size, len(examples)) if smaller else config.batch_size
    return Shuffled(examples, objective, size, config.seed)


def _key(run: Run, file: Path) -> Key:
    """The key of a private run: of its seed, of the folder, or a new one that is kept there."""
    if run.privacy.seed is not None:
        return Key(run.privacy.seed % 2**64)
    if not file.is_file():
        # Readable for its owner only, before anything is in it.
        with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as new:
            new.write(secrets.token_hex(16))
    text = file.read_text(encoding="ascii", errors="replace")
    if not re.fullmatch("[0-9a-f]{32}", text):
        raise ValueError(
            f"{file} is no key of 32 hexadecimal digits: restore it, or give the run a new folder"
        )
    return Key(int(text, 16))


def _saver(run: Run, folder: Path) -> Callable[[torch.nn.Module, Path], None]:
    """How a checkpoint's model is written: without adapters, with the tokenizer."""

    def save(model: torch.nn.Module, target: Path) -> None:
        plain = adapters.merged(model) if run.model.lora_rank else model
        try:
            save_model(plain, target)
        except ValueError:
            # Dropout is no part of the trained model, and not all families' configs have it.
            config = getattr(plain, "config", None)
            if not isinstance(config, GPTConfig):
                raise
            without: Any = copy.copy(plain)  # with the same parameters
            without.config = dataclasses.replace(
                config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
            )
            save_model(without, target)
        for file in (folder / TOKENIZER).iterdir():
            shutil.copyfile(file, target / file.name)

    return save


def _copy(source: Path, target: Path) -> None:
    """Put the files of `source` in the place of those of `target`."""

    def former(name: str) -> bool:
        return not name.startswith(".")  # the folder that is written beside begins so

    with folder_written_beside(target, "config.json", former) as beside:
        for file in source.iterdir():
            shutil.copyfile(file, beside / file.name)
