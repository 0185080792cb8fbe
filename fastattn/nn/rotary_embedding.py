"""The angles of rotary position embedding as a module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.nn.checks import check_integer, check_number

# What each kind of scaling needs, by the names of Hugging Face's configs.
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}  # fmt: skip

SCALARS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
)  # fmt: skip

# Those that have a number for each frequency.
PAIRWISE = ("short_factor", "long_factor")


class RotaryEmbedding(torch.nn.Module):
    """cos and sin of the angles by which `fastattn.rotary` turns queries and keys.

    Pair c of position t turns by t * theta^(-2c / rotary_dim) (Su et al. 2021, arXiv:2104.09864).
    A model that reads longer texts than it was first trained on scales these frequencies:

    - "linear": all divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595);
    - "llama3": only those whose wavelength is long for the first context, with a smooth transition
      (Llama 3.1);
    - "yarn": those that turn fewer than ``beta_slow`` times in the first context, none that turns
      more than ``beta_fast`` times, a ramp between; cos and sin times 0.1 ln(factor) + 1, or
      ``attention_factor`` (Peng et al. 2023, arXiv:2309.00071);
    - "longrope": each by a number of its own, of ``short_factor`` in a sequence that fits into the
      first context and of ``long_factor`` in a longer one; cos and sin times
      sqrt(1 + ln(factor) / ln(first context)), or ``attention_factor`` (Ding et al. 2024,
      arXiv:2402.13753).

    The frequencies are no part of the ``state_dict``, and stay float32 where the module is cast.

    Args:
        rotary_dim: how many elements of a head turn; even.
        theta: the base of the frequencies.
        scaling: None, or "rope_type" and its numbers by the names of Hugging Face's
            "rope_parameters": "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
            "short_factor", "long_factor".

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    inv_freq: Tensor

    def __init__(
        self,
        rotary_dim: int,
        theta: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if check_integer("rotary_dim", rotary_dim, at_least=2) % 2:
            raise ValueError(f"rotary_dim must be even, got {rotary_dim}")
        if check_number("theta", theta) <= 0:
            raise ValueError(f"theta must be positive, got {theta}")
        self.rotary_dim = rotary_dim
        self.theta = theta
        self.scaling = check_scaling(scaling)
        if theta == 1 and self.scaling.get("rope_type") == "yarn":
            raise ValueError("theta must not be 1 with yarn, which divides by its logarithm")
        for name in filter(self.scaling.__contains__, PAIRWISE):
            if (count := len(self.scaling[name])) != rotary_dim // 2:
                raise ValueError(
                    f"{name} of the scaling must have rotary_dim / 2 = {rotary_dim // 2} numbers, "
                    f"got {count}"
                )
        self.attention_factor = _attention_factor(self.scaling)
        self.register_buffer("inv_freq", None, persistent=False)
        self.reset_parameters(device)

    def reset_parameters(self, device: torch.device | str | None = None) -> None:
        """Compute the frequencies, on ``device`` or where they are."""
        if device is None and self.inv_freq is not None:
            device = self.inv_freq.device
        if device is not None and torch.device(device).type == "meta":  # has nothing to compute
            sides = (2,) if self._changes else ()
            self.inv_freq = torch.empty(*sides, self.rotary_dim // 2, device="meta")
            return
        exponents = torch.arange(0, self.rotary_dim, 2, device=device, dtype=torch.float32)
        frequencies = self.theta ** -(exponents / self.rotary_dim)
        self.inv_freq = _scaled(frequencies, self.theta, self.scaling)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RotaryEmbedding:
        """Move the frequencies; a cast to another dtype leaves them float32."""
        super()._apply(fn, recurse)
        self.reset_parameters()
        return self

    @property
    def _changes(self) -> bool:
        """Whether the frequencies depend on the length: (2, rotary_dim / 2), short and long."""
        return self.scaling.get("rope_type") == "longrope"

    def forward(self, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """positions (batch, seqlen) or (seqlen,), integers -> cos and sin, both float32
        (batch or 1, seqlen, rotary_dim / 2).

        ``lengths`` (seqlen,) are those of each position's sequence, where several lie in a row;
        None: a row is one sequence, up to its last position. Only "longrope" looks at them.
        """
        if positions.dim() == 1:
            positions = positions.unsqueeze(0)
        frequencies = self.inv_freq
        if self._changes:
            if lengths is None:
                lengths = positions.amax(-1, keepdim=True) + 1
            passes = lengths > self.scaling["original_max_position_embeddings"]
            frequencies = frequencies[passes.long()]
        angles = positions.unsqueeze(-1) * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos, sin

    def extra_repr(self) -> str:
        scaling = f", scaling={self.scaling}" if self.scaling else ""
        return f"{self.rotary_dim}, theta={self.theta}{scaling}"


def check_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """``scaling`` as a dict, empty where nothing is scaled; TypeError or ValueError for another."""
    if scaling is None:
        return {}
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling must be a mapping or None, got {type(scaling).__name__}")
    kind = scaling.get("rope_type", "default")
    if kind not in SCALINGS:
        raise ValueError(
            f'"rope_type" must be one of {", ".join(map(repr, SCALINGS))}, got {kind!r}'
        )
    if kind == "default":
        return {}
    missing = [name for name in SCALINGS[kind] if scaling.get(name) is None]
    if missing:
        raise ValueError(f'the scaling "{kind}" needs {", ".join(missing)}')
    if kind == "longrope":  # whose scale of cos and sin divides by the logarithm
        first = "original_max_position_embeddings"
        check_integer(f"{first} of the scaling", scaling[first], at_least=2)
    for name in filter(scaling.__contains__, SCALARS):
        value = scaling[name]
        if value is not None and not 0 < check_number(f"{name} of the scaling", value) < math.inf:
            raise ValueError(f"{name} of the scaling must be positive, got {value}")
    return {
        name: _check_factors(name, value) if name in PAIRWISE else value
        for name, value in scaling.items()
    }


def _check_factors(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} of the scaling must be a list of numbers, got {values!r}")
    for value in values:
        if not 0 < check_number(f"each {name} of the scaling", value) < math.inf:
            raise ValueError(f"each {name} of the scaling must be positive, got {value}")
    return tuple(values)


def _scaled(frequencies: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    kind = scaling.get("rope_type")
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    if kind == "yarn":
        return _yarn(frequencies, theta, scaling)
    if kind == "longrope":
        factors = scaling["short_factor"], scaling["long_factor"]
        return frequencies / torch.tensor(factors, device=frequencies.device)
    return frequencies


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: scaled, 1: as it was
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies


def _yarn(frequencies: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    count, first = len(frequencies), scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return count * math.log(first / (times * 2 * math.pi)) / math.log(theta)

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    pairs = torch.arange(count, device=frequencies.device, dtype=torch.float32)
    scaled = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return scaled * frequencies / scaling["factor"] + (1 - scaled) * frequencies


def _attention_factor(scaling: Mapping[str, Any]) -> float:
    """By what yarn and longrope multiply cos and sin, so that the scores keep their entropy."""
    kind = scaling.get("rope_type")
    if kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if kind == "longrope":
        if scaling.get("factor") is None:
            raise ValueError('the scaling "longrope" needs factor or attention_factor')
        first = scaling["original_max_position_embeddings"]
        return math.sqrt(1 + max(math.log(scaling["factor"]), 0.0) / math.log(first))

    def entropy(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0

    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return entropy(above) / entropy(below) if above and below else entropy(1.0)
