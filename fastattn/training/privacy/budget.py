"""How private a run is: its settings, and the accountant that turns noise into epsilon.

A mechanism M is (epsilon, delta)-differentially private (Dwork et al. 2006) if for all data D, all
D' with one example more or less, and all sets S of results

    P(M(D) in S) <= exp(epsilon) P(M(D') in S) + delta

The accountants are opacus' (Yousefpour et al. 2021, arXiv:2109.12298), for steps that each example
joins by a coin of its own (Poisson sampling) and whose sum of gradients gets Gaussian noise.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fastattn.nn.checks import check_choice, check_integer, check_seed, check_within
from fastattn.training.optional import require

PRV_EPSILON = 50  # far above it a process was killed for its memory


@dataclass(frozen=True)
class PrivacyConfig:
    """Differentially private training (DP-SGD); none of it without epsilon or noise_multiplier.

    Each example's gradient is scaled down to [training] max_gradient_norm, and noise is added to
    their sum. An example is a record, cut to the context; it joins a step by chance.

    Attributes:
        epsilon: the budget of the whole run, from which the noise follows.
        noise_multiplier: in place of epsilon: the noise's standard deviation, in units of
            max_gradient_norm.
        delta: the probability with which epsilon may not hold; below 1 / examples.
        accountant: "rdp" (Mironov et al. 2019), or "prv" (Gopi et al. 2021), whose bound is
            tighter and takes a second, for epsilon up to 50.
        examples_at_once: how many examples' gradients are in memory together.
        seed: of the sampling and the noise, a secret: who knows it can take the noise away. None
            draws 128 bits from the operating system, kept in the output folder's noise.key.

    Raises:
        TypeError, ValueError: a value does not fit; the message names it.
    """

    epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    accountant: Literal["rdp", "prv"] = "rdp"
    examples_at_once: int = 16
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("epsilon", "noise_multiplier"):
            value = getattr(self, name)
            if value is not None:
                check_within(name, value, "(0, inf)", "positive and finite")
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError("epsilon and noise_multiplier exclude each other: give one of them")
        check_within("delta", self.delta, "(0, 1)")
        check_choice("accountant", self.accountant, ("prv", "rdp"))
        if self.accountant == "prv" and self.epsilon is not None and self.epsilon > PRV_EPSILON:
            raise ValueError(_too_large(self.epsilon))
        check_integer("examples_at_once", self.examples_at_once, at_least=1)
        if self.seed is not None:
            check_seed("seed", check_integer("seed", self.seed))

    @property
    def enabled(self) -> bool:
        """Whether the run is private."""
        return self.epsilon is not None or self.noise_multiplier is not None

    def noise(self, rate: float, steps: int) -> float:
        """The noise multiplier: the given one, or the least found that keeps within epsilon.

        Args:
            rate: the probability with which an example joins a step.
            steps: of the whole run.

        Raises:
            ValueError: no noise is enough.
            ImportError: opacus is not installed.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        utils = require("opacus.accountants.utils", "privacy", "[privacy]")
        try:
            with _quietly():
                found: float = utils.get_noise_multiplier(
                    target_epsilon=self.epsilon,
                    target_delta=self.delta,
                    sample_rate=rate,
                    steps=steps,
                    accountant=self.accountant,
                )
        except ValueError as error:
            raise ValueError(
                f"[privacy] no noise gives epsilon {self.epsilon:g} with delta {self.delta:g} in "
                f"{steps} steps, each with {rate:g} of the examples: give fewer steps, smaller "
                "batches or a larger budget"
            ) from error
        return found

    def spent(self, noise: float, rate: float, steps: int) -> float:
        """The epsilon of so many steps, at this config's delta.

        Raises:
            ValueError: it is too large for the accountant.
            ImportError: opacus is not installed.
        """
        if not steps:
            return 0.0
        bound = self._spent("rdp", noise, rate, steps)
        if self.accountant == "rdp":
            return bound
        if bound > PRV_EPSILON:
            raise ValueError(_too_large(bound))
        return self._spent("prv", noise, rate, steps)

    def _spent(self, mechanism: str, noise: float, rate: float, steps: int) -> float:
        accountants = require("opacus.accountants", "privacy", "[privacy]")
        accountant = accountants.create_accountant(mechanism=mechanism)
        accountant.history = [(noise, rate, steps)]
        with _quietly():
            return float(accountant.get_epsilon(delta=self.delta))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without opacus' warnings: at the ends of its list of orders the bound holds, too, and is only
    not the tightest; and logarithms of 0 are meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _too_large(epsilon: float) -> str:
    return (
        f'[privacy] epsilon {epsilon:.3g} is too large for the accountant "prv", whose grid would '
        f'not fit into memory above {PRV_EPSILON}: take "rdp", or more noise'
    )
