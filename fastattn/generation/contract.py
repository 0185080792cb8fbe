"""What generation asks of a model, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.models.cache import KVCache


class LanguageModel(Protocol):
    """A decoder, or an encoder-decoder, with a cache of keys and values.

    An encoder-decoder also has ``encode(input_ids (B, S), attention_mask (B, S)) -> (B, S, C)``,
    and its `new_cache` takes ``encoded=`` those and ``encoded_lengths=`` (B,).
    """

    @property
    def config(self) -> Any:
        """Has vocab_size, n_positions, eos_token_id, pad_token_id; an encoder-decoder's also
        is_encoder_decoder, which is True, and decoder_start_token_id."""

    @property
    def device(self) -> torch.device: ...

    @property
    def new_cache(self) -> Callable[..., KVCache]:
        """``(batch_size, capacity) -> KVCache``, empty; for ``cache_dtype`` it takes ``dtype=``."""

    def features(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, C) of unchecked token ids (B, T), which the cache then holds."""

    @property
    def lm_head(self) -> torch.nn.Module:
        """Hidden states (..., C) -> logits (..., V)."""

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


def batch_context(config: Any) -> tuple[str, int | None]:
    """The most tokens of a sequence that others of any length may join, None for no limit, and the
    field that says so.

    It is n_positions; or short_positions, where longer sequences have other rotary frequencies
    (`GPTConfig.short_positions`), which the padding of a batch must not bring in.
    """
    short = getattr(config, "short_positions", None)
    return ("n_positions", config.n_positions) if short is None else ("short_positions", short)


def is_encoder_decoder(model: LanguageModel) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))
