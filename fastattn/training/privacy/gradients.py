"""DP-SGD (Abadi et al. 2016, arXiv:1607.00133): the gradient of a step, clipped and with noise.

    g_i   the gradient of example i's mean loss, all trained parameters as one vector
    c_i   g_i * min(1, C / |g_i|)                           C = [training] max_gradient_norm
    g     (sum of c_i + noise_multiplier * C * N(0, 1)) / batch_size

The divisor is the mean size of a batch, which is no secret, and not the number of examples that
joined this one, which is. The optimiser goes on from g as from any gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch, Batches, loss_of
from fastattn.training.distributed.share import Share
from fastattn.training.privacy.budget import PrivacyConfig
from fastattn.training.privacy.sampling import NOISE, Sampled
from fastattn.training.steps.config import TrainingConfig
from fastattn.training.steps.precision import autocast
from fastattn.training.steps.randomness import seed_batch


class PrivateGradients:
    """How a private run makes its gradients, and how much of its budget is spent.

    Attributes:
        noise_multiplier: of `PrivacyConfig`, or the one that its epsilon asks for.
    """

    def __init__(self, settings: PrivacyConfig, batches: Sampled, config: TrainingConfig) -> None:
        """
        Args:
            batches: that `train` reads, too.

        Raises:
            ValueError: a setting of `config` excludes privacy, `delta` is too large for so many
                examples, or no noise gives the epsilon.
            ImportError: opacus is not installed.
        """
        _check(config)
        if settings.delta >= 1 / len(batches.examples):
            raise ValueError(
                f"[privacy] delta must be below 1 / examples = {1 / len(batches.examples):.3g}, "
                f"got {settings.delta:g}: with a larger one a whole example may be disclosed"
            )
        self.settings = settings
        self.batches = batches
        self.config = config
        self.noise_multiplier = settings.noise(batches.rate, config.steps)
        self.epsilon(config.steps)  # so that what raises does so now

    def epsilon(self, steps: int) -> float:
        """That of the weights after so many steps, and of all weights before them together."""
        return self.settings.spent(self.noise_multiplier, self.batches.rate, steps)

    def fingerprint(self) -> dict[str, Any]:
        """What another run would have otherwise, as JSON."""
        return {
            "noise_multiplier": self.noise_multiplier,
            "rate": self.batches.rate,
            "examples_at_once": self.settings.examples_at_once,
            "key": self.batches.key.fingerprint,
        }

    def check(self, training: Batches, config: TrainingConfig, processes: int) -> None:
        """Raise ValueError where `train` was given others than these were made of."""
        if training is not self.batches or config != self.config:
            raise ValueError("privacy was made of other batches or of another config than these")
        if processes > 1:
            raise ValueError(
                f"[privacy] trains in one process, and there are {processes}: start it without "
                "torchrun"
            )

    def share(self, step: int) -> Share:
        """The batch of a step, counted from 1, which may be empty."""
        batch = self.batches.batch(step - 1)
        return Share([(step - 1, batch)], [1.0], batch.tokens)

    def leave(self, model: torch.nn.Module, share: Share) -> tuple[float, float]:
        """Leave the gradients of a step in the trained parameters.

        The noise follows from the batch's number and the key, dropout from `config.seed`.

        Returns:
            The mean of the examples' losses, which is not private (0 if there is none), and the
            norm of the gradient with its noise.
        """
        ((number, batch),) = share.batches
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        device = next(iter(trained.values())).device
        seed_batch(self.config.seed, number)
        sums, losses = self._clipped(model, trained, batch.to(device))
        bound = self.config.max_gradient_norm
        random = self.batches.key.generator(NOISE, number)
        for name, parameter in trained.items():
            # On the CPU, so that it is the same noise on any device.
            noise = torch.from_numpy(random.standard_normal(parameter.shape, dtype="float32"))
            noisy = sums[name] + noise.to(parameter.device) * (bound * self.noise_multiplier)
            parameter.grad = (noisy / self.batches.batch_size).to(parameter.dtype)
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return (losses.mean().item() if len(losses) else 0.0), norm.item()

    def _clipped(
        self, model: torch.nn.Module, trained: dict[str, torch.nn.Parameter], batch: Batch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The sums of the examples' clipped gradients, in float32, and the losses (B,)."""
        sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
        device = next(iter(trained.values())).device
        losses = [torch.zeros(0, device=device)]
        for chunk in _chunks(batch, self.settings.examples_at_once):
            with autocast(device, self.config.precision):
                gradients, chunk_losses = example_gradients(model, trained, chunk)
            norms = torch.stack([g.float().flatten(1).norm(dim=1) for g in gradients.values()])
            scales = (self.config.max_gradient_norm / (norms.norm(dim=0) + 1e-6)).clamp(max=1.0)
            for name, gradient in gradients.items():
                sums[name] += torch.einsum("b,b...->...", scales, gradient.float())
            losses.append(chunk_losses.float())
        return sums, torch.cat(losses)


def example_gradients(
    model: torch.nn.Module, trained: dict[str, torch.nn.Parameter], arguments: dict[str, Any]
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of each example's loss by itself, {name: (B, *shape)}, and the losses (B,).

    A weight that several modules share has one gradient, the sum of their parts.

    Args:
        trained: by their names in the model.
        arguments: of the model: tensors (B, ...), a row for each example, and other values.
    """
    others = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
    rows = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}

    def loss(weights: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        given = {name: value.unsqueeze(0) for name, value in row.items()}
        return loss_of(functional_call(model, weights, (), {**given, **others}))

    weights = {name: parameter.detach() for name, parameter in trained.items()}
    # "different": each example draws dropout of its own.
    each = vmap(grad_and_value(loss), in_dims=(None, 0), randomness="different")
    gradients, losses = each(weights, rows)
    return gradients, losses


def _chunks(batch: Batch, size: int) -> Iterator[dict[str, Any]]:
    """The batch's arguments, so many rows at a time, and as wide as their targets."""
    count = max((len(v) for v in batch.arguments.values() if isinstance(v, Tensor)), default=0)
    for first in range(0, count, size):
        chunk = {
            name: value[first : first + size] if isinstance(value, Tensor) else value
            for name, value in batch.arguments.items()
        }
        if "targets" in chunk:  # of a causal model, which reads nothing for what is after the last
            width = int((chunk["targets"] != IGNORED).any(dim=0).nonzero().max()) + 1
            chunk |= {name: chunk[name][:, :width] for name in ("input_ids", "targets")}
        yield chunk


def _check(config: TrainingConfig) -> None:
    for name, accepted, why in (
        ("accumulation", 1, "[privacy] examples_at_once bounds the memory of a step"),
        ("activation_checkpointing", False, "[privacy] examples_at_once bounds the memory"),
    ):
        if getattr(config, name) != accepted:
            raise ValueError(f"[training] {name} must be {accepted!r} for [privacy]: {why}")
    if not math.isfinite(config.max_gradient_norm):
        raise ValueError(
            "[training] max_gradient_norm must be finite for [privacy]: it bounds each example's "
            "share of a step"
        )
    if config.precision == "float16":
        raise ValueError(
            '[training] precision must be "float32" or "bfloat16" for [privacy]: float16 scales '
            "the loss, and with it the gradients that are clipped"
        )
