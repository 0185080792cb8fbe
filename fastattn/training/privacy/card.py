"""Words on a private run for whoever reads its model's folder."""

from __future__ import annotations

from fastattn.training.privacy.gradients import PrivateGradients


def summary(privacy: PrivateGradients, steps: int) -> str:
    """The guarantee after so many steps, in a line."""
    return (
        f"epsilon {privacy.epsilon(steps):.3f} with delta {privacy.settings.delta:g}, by opacus' "
        f"accountant {privacy.settings.accountant!r}: {steps} steps, noise multiplier "
        f"{privacy.noise_multiplier:.4g}, {privacy.batches.rate:.4g} of the examples in a step"
    )


def card(privacy: PrivateGradients, steps: int) -> str:
    """A README.md that says what is promised, and what is not.

    Args:
        steps: of the whole run, whichever of them the model is of: it was chosen among all.
    """
    return f"""# A model trained with differential privacy

{summary(privacy, steps)}.

- Trained by DP-SGD (Abadi et al. 2016): the gradient of each example was scaled down to the norm
  {privacy.config.max_gradient_norm:g}, and Gaussian noise was added to the sum.
- The promise is of one record more or less among {len(privacy.batches.examples):,}. Who wrote
  several records has less.
- It is of these weights. It is not of the validation data, of the weights that the training began
  with, of the tokenizer, or of the losses and checkpoints in the folder of the run.
"""
