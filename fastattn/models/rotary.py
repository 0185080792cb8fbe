"""The rotary embeddings of a model whose types of layers may have different ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from fastattn import nn


class RotaryConfig(Protocol):
    """What `GPTConfig` and `EncoderConfig` say of them."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_positions(self) -> int: ...
    @property
    def positions(self) -> str: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> Mapping[str, Any] | tuple[tuple[str, Any], ...] | None: ...
    @property
    def rope_local_theta(self) -> float | None: ...
    @property
    def rotary_dim(self) -> int: ...
    def layer_type(self, layer: int) -> str: ...


def rotary_embeddings(
    config: RotaryConfig, device: torch.device | str | None
) -> torch.nn.ModuleDict:
    """The angles for each type of layer that there is; empty where positions are not rotary."""
    if config.positions != "rotary":
        return torch.nn.ModuleDict()
    scaling = None if config.rope_scaling is None else dict(config.rope_scaling)
    if scaling is not None and scaling["rope_type"] == "longrope" and not scaling.get("factor"):
        scaling["factor"] = config.n_positions / scaling["original_max_position_embeddings"]
    full = config.rope_theta, scaling
    local = full if config.rope_local_theta is None else (config.rope_local_theta, None)
    return torch.nn.ModuleDict(
        {
            kind: nn.RotaryEmbedding(config.rotary_dim, theta, scaled, device=device)
            for kind, (theta, scaled) in (("full_attention", full), ("sliding_attention", local))
            if kind in map(config.layer_type, range(config.n_layer))
        }
    )
