"""The training loop: accumulated gradients, clipped; schedule, validation, checkpoints, speed.

    history = train(model, Causal(tokenizer), batches, TrainingConfig(steps=300))

The model is whatever the objective can call, the data are batches by their number: step s of a run
reads the same batches and draws the same dropout whenever it is made. So a run that was killed goes
on from its last checkpoint to the very bits that it would have had. The loop knows nothing of
progress bars, formats of data or commands.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from fastattn.models.folder.layout import Weights
from fastattn.nn.mode import in_mode
from fastattn.training.checkpoints import Checkpoints
from fastattn.training.contract import Batch, Batches, Objective
from fastattn.training.distributed.agreement import check_settings, check_tensors
from fastattn.training.distributed.evaluation import observations
from fastattn.training.distributed.parallel import Parallel
from fastattn.training.distributed.share import Share
from fastattn.training.distributed.tensor import canonical, localised
from fastattn.training.fingerprints import batches_digest, model_fingerprint
from fastattn.training.history import Evaluation, History, Step
from fastattn.training.privacy.gradients import PrivateGradients
from fastattn.training.steps.average import Average
from fastattn.training.steps.config import TrainingConfig
from fastattn.training.steps.gradients import clip_gradients
from fastattn.training.steps.optimizers import optimizers_of
from fastattn.training.steps.precision import autocast, loss_scaler
from fastattn.training.steps.randomness import generators_kept, seed_batch
from fastattn.training.steps.recomputation import recomputed_blocks
from fastattn.training.steps.state import TrainingState


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: torch.nn.Module,
    objective: Objective,
    training: Batches,
    config: TrainingConfig,
    *,
    validation: Batches | None = None,
    checkpoints: Checkpoints | None = None,
    parallel: Parallel | None = None,
    privacy: PrivateGradients | None = None,
    weights: Weights | None = None,
    on_progress: Callable[[History], None] | None = None,
) -> History:
    """Train `model` in place, on its own device, and return the record.

    Trained are the parameters that require a gradient. Meanwhile the model is in train mode; of a
    model that is in it already, the modules that are in eval mode stay so. Afterwards each module
    has its own mode again, and the weights are the last ones, or with `config.ema_decay` their
    average.

    The same model, data, config and number of threads give the same bits on a CPU. With
    `checkpoints` a run goes on from the last one in its folder, and also one that was killed at any
    moment and is called again ends with the same bits. All that is drawn, as for dropout, follows
    from `config.seed` and the batch's number; torch's, Python's and numpy's global generators are
    afterwards as they were. Ctrl-C ends the run: the model stays usable, with the steps made so
    far, and the record says `interrupted`.

    Args:
        objective: gives the loss of a batch and the measures of a validation.
        training: step s (from 1) reads the batches (s - 1) * accumulation to s * accumulation - 1.
        config: how.
        validation: measured before the first step, in between and after the last.
        checkpoints: where to save, and to go on from.
        parallel: how the run is divided among processes, all of which call this with equal models,
            data and config. Afterwards the model is divided still.
        privacy: makes the gradients of each step differentially private; evaluations then have
            the score "epsilon".
        weights: of a model on the meta device, which `parallel` divides: each is whole in a process
            only for a moment.
        on_progress: called after each step and each validation with the record so far, and first of
            all where a run goes on.

    Raises:
        ValueError: nothing is there to train, no target of a step counts, or the folder's
            checkpoints are of another run.
        FloatingPointError: the loss or the gradient is no longer finite; the message says at which
            step, and in which batch. The weights are those of the step before.
        OSError: a checkpoint cannot be written.
        RuntimeError: another run has the folder of the checkpoints, or another process ended.
    """
    parallel = parallel or Parallel()
    parallel.check(config, objective)
    device = parallel.device or _device(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of model requires a gradient, so that nothing would be trained: unfreeze "
            "some of them with requires_grad_(True)"
        )
    if privacy is not None:
        privacy.check(training, config, parallel.processes.count)
    trained = TrainingState.weights_of(model)
    if weights is None:
        check_tensors(parallel.processes, trained, "at the start")
    identity = {
        # Of the model before it is divided: a run may go on with another number of processes.
        "model": model_fingerprint(model, trained),
        "objective": objective.fingerprint(),
        "training": vars(config),
        **({"privacy": privacy.fingerprint()} if privacy is not None else {}),
        **(checkpoints.fingerprint if checkpoints is not None else {}),
        "first batch": batches_digest([training.batch(0)]),
    }
    check_settings(parallel.processes, identity)
    del trained
    called = parallel.placed(model, config, weights)
    state = TrainingState(
        model,
        optimizers_of(model, config),
        Average(model, config.ema_decay) if config.ema_decay else None,
        loss_scaler(device, config.precision),
        History(),
        functools.partial(canonical, model),
        functools.partial(localised, model),
    )
    history = state.history
    tell = on_progress or (lambda _: None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(generators_kept(device))
        if not model.training:
            stack.enter_context(in_mode(model, training=True))
        if config.activation_checkpointing:
            stack.enter_context(recomputed_blocks(model))
        if checkpoints is not None:
            parallel.processes.together(lambda: stack.enter_context(checkpoints))
            if checkpoints.restore(state, identity, config):
                tell(history)
        first, updating = state.step, False
        try:
            for step in range(first, config.steps + 1):
                if step > first:
                    start = time.perf_counter()
                    if privacy is not None:
                        share = privacy.share(step)
                        loss, norm = privacy.leave(model, share)
                    else:
                        share = Share.of(step, training, config, parallel)
                        loss, norm = _gradients(state, called, objective, share, config, parallel)
                    if not _finite(loss, norm, state.scaler):
                        raise FloatingPointError(_trouble(step, loss, norm, share, checkpoints))
                    rate = config.learning_rate_at(step)
                    with _interrupts_deferred():
                        updating = True
                        _update(state, step, rate, norm)
                        seconds = time.perf_counter() - start
                        history.add(Step(step, loss, rate, norm, share.tokens, seconds))
                        updating = False
                    tell(history)
                if validation is not None and _validation_due(step, config, history):
                    with state.evaluated():
                        measures = evaluate(model, objective, validation, config, device, parallel)
                    if privacy is not None:
                        measures["epsilon"] = privacy.epsilon(step)
                    history.evaluations.append(Evaluation(step, measures.pop("loss"), measures))
                    tell(history)
                if checkpoints is not None and parallel.agreed(
                    _checkpoint_due(checkpoints, state, config)
                ):
                    when = f"after step {step}"
                    check_tensors(parallel.processes, state.tensors(), when)
                    checkpoints.save(state, identity)
            if checkpoints is not None:
                checkpoints.wait()
        except KeyboardInterrupt:
            if parallel.mesh is not None:
                raise  # the others are not at the same step
            if checkpoints is not None:
                if not updating and not checkpoints.has(state.step):
                    checkpoints.save(state, identity)
                checkpoints.wait()
            history.interrupted = True
        finally:
            model.zero_grad(set_to_none=True)
    if state.average is not None:
        state.average.install()
    return history


def _gradients(
    state: TrainingState,
    called: torch.nn.Module,
    objective: Objective,
    share: Share,
    config: TrainingConfig,
    parallel: Parallel,
) -> tuple[float, float]:
    """Leave the clipped gradients of the mean over all targets of a step in the parameters.

    Returns that mean, and the norm of the gradients before they were clipped.
    """
    device = parallel.device or _device(state.model)
    total = torch.zeros((), device=device)
    for i, ((number, batch), weight) in enumerate(zip(share.batches, share.weights)):
        seed_batch(config.seed, number, parallel.place)
        last = i == len(share.batches) - 1
        with parallel.unsynchronised(called, last):
            with autocast(device, config.precision):
                loss = objective.loss(called, batch.to(device)) * weight
            state.scaler.scale(loss * parallel.averaged).backward()
        total += loss.detach()
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    norm = clip_gradients(state.model.parameters(), config.max_gradient_norm)
    # .item() waits for the device, so that the clock is honest.
    return parallel.summed(total.item())[0], norm.item()


def _update(state: TrainingState, step: int, rate: float, norm: float) -> None:
    """Move the weights; not where the gradients of a scaled loss overflowed."""
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        if math.isfinite(norm):
            optimizer.step()
    state.scaler.update()
    if state.average is not None:
        state.average.update(step)
    state.model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block: half an update could not be saved."""
    # Only the main thread is interrupted, and only it may set a handler.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def note(number: int, frame: object) -> None:
        nonlocal came
        came = True

    former = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        # None is a handler that Python did not set and cannot set again.
        signal.signal(signal.SIGINT, signal.default_int_handler if former is None else former)
    if came:
        signal.raise_signal(signal.SIGINT)


def _finite(loss: float, norm: float, scaler: torch.amp.GradScaler) -> bool:
    """Whether training can go on: a scaled loss may overflow until its scale is small enough."""
    return math.isfinite(loss) and (math.isfinite(norm) or scaler.get_scale() > 1)


def _trouble(
    step: int, loss: float, norm: float, share: Share, checkpoints: Checkpoints | None
) -> str:
    batches = [batch for _, batch in share.batches]
    last = None if checkpoints is None else checkpoints.last
    return (
        f"step {step}: loss {loss}, gradient norm {norm}, in the batch "
        f"{batches_digest(batches)}; the weights are those of the step before"
        f"{f', the last good checkpoint is {last}' if last else ''}. Try a lower learning_rate."
    )


def _validation_due(step: int, config: TrainingConfig, history: History) -> bool:
    done = bool(history.evaluations) and history.evaluations[-1].step == step
    return not done and (step == config.steps or step % config.evaluation_interval == 0)


def _checkpoint_due(checkpoints: Checkpoints, state: TrainingState, config: TrainingConfig) -> bool:
    """At the ends of a run, at an interval, and at the best validation so far; once a step."""
    best = state.history.best
    ends = state.step in (0, config.steps)
    improved = best is not None and best.step == state.step
    due = ends or improved or checkpoints.due(state.step)
    return due and not checkpoints.has(state.step)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    objective: Objective,
    batches: Batches,
    config: TrainingConfig,
    device: torch.device | None = None,
    parallel: Parallel | None = None,
) -> dict[str, float]:
    """The measures of `objective`, with "loss", over each of the data's examples once.

    The model is in eval mode meanwhile; afterwards each module has its own mode again.

    Args:
        config: of it `precision` and `evaluation_tokens`, at which the data end.
        device: where the model computes; default that of its parameters.
        parallel: of a divided run: each group of processes reads a part of the data.
    """
    device, tokens = device or _device(model), config.evaluation_tokens
    with in_mode(model, training=False), autocast(device, config.precision):
        # Who measures otherwise reads all on each process.
        observes = type(objective).measure is Objective.measure
        if parallel is not None and parallel.readers > 1 and observes:
            found = observations(model, objective, batches, tokens, device, parallel)
            return objective.conclude(list(found))
        return objective.measure(model, _first(batches.once(), tokens, device))


def _first(batches: Iterable[Batch], tokens: int, device: torch.device) -> Iterator[Batch]:
    """Whole batches until they have `tokens` tokens; all of them where that is 0."""
    seen = 0
    for batch in batches:
        yield batch.to(device)
        seen += batch.tokens
        if tokens and seen >= tokens:
            return


def _device(model: torch.nn.Module) -> torch.device:
    for parameter in model.parameters():
        return parameter.device
    raise ValueError("model has no parameters: there is nothing to train or to evaluate")
