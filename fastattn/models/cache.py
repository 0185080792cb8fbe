"""The keys and values of the tokens that a model has seen, kept for the tokens to come.

Shapes: B batch, S capacity, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.models.config import GPTConfig
from fastattn.models.encoder_decoder_config import EncoderDecoderConfig
from fastattn.nn import KeyValueCache
from fastattn.nn.stored_cache import LARGEST as STORED
from fastattn.ops.common import modes


def dtype_of_caches(weight: Tensor) -> torch.dtype:
    """Of a model's keys and values: autocast's, or its weights'."""
    autocast = modes.autocast_dtype(weight.device.type)
    return weight.dtype if autocast is None or weight.dtype == torch.float64 else autocast


class KVCache:
    """Room for ``capacity`` tokens of each of ``batch_size`` sequences, allocated once.

    Every sequence lies compactly from slot 0 on, so that a token's slot is its position:

        slot            0  1  2  3  4  5  6  7
        sequence 0      a  b  c  d  e  .  .  .      length 5
        sequence 1      f  g  .  .  .  .  .  .      length 2

    Each grows at its own end, by any number of tokens, all by the same. `set_lengths` cuts each to
    a length of its own (prompts padded on the right, whose padding no causal query has seen).

        cache = KVCache(model.config, batch_size=2, capacity=64)
        model(prompts, cache=cache)          # (2, T), fills the slots 0..T-1
        model(next_tokens, cache=cache)      # (2, 1), at slot T

    The lengths are in a tensor, and every step is the same operations on the same memory, so that a
    CUDA graph can replay it. Unused slots may hold anything.

    8-bit numbers take half of the memory of 16-bit ones. A sequence's first call fixes the scales
    of its key heads, so let it be the prompt (`fastattn/nn/stored_cache.py`).

    Args:
        config: of the model.
        batch_size: B.
        capacity: S; at most ``config.n_positions`` of them can be used.
        kv_heads: H; default the config's. A process that shares the layers has fewer.
        device, dtype: of the keys and values: the model's, or the dtype of autocast; or int8 or
            float8_e4m3fn.

    Attributes:
        lengths: (B,) int64, the tokens of each sequence.
        longest: tokens of the longest sequence, for the host. The replay of a graph does not count
            them.
        layers: one `fastattn.nn.KeyValueCache` a layer.
    """

    def __init__(
        self,
        config: GPTConfig | EncoderDecoderConfig,
        batch_size: int,
        capacity: int,
        *,
        kv_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("batch_size", batch_size), ("capacity", capacity)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        heads = config.kv_heads if kv_heads is None else kv_heads
        shape = (batch_size, capacity, heads, config.head_dim)
        self.batch_size = batch_size
        self.capacity = capacity
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.longest = 0
        self._short = config.short_positions if isinstance(config, GPTConfig) else None
        self.layers = []
        for _ in range(config.n_layer):
            keys, values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
            scales: tuple[Tensor, ...] = ()
            if dtype in STORED:
                scales = torch.zeros(2, batch_size, heads, device=device).unbind()
            self.layers.append(KeyValueCache(keys, values, self.lengths, None, *scales))

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Cut sequence b to ``lengths[b]`` tokens.

        Raises ValueError unless there is a length for each sequence, from 0 to the tokens held,
        and on their side of the length at which the model's rotary frequencies change.
        """
        if len(lengths) != self.batch_size:
            raise ValueError(
                f"lengths must have one entry for each of {self.batch_size} sequences, "
                f"got {len(lengths)}"
            )
        if min(lengths) < 0 or max(lengths) > self.longest:
            raise ValueError(
                f"lengths must be from 0 to the {self.longest} tokens that the cache holds, "
                f"got {list(lengths)}"
            )
        if self._short is not None and min(lengths) <= self._short < self.longest and any(lengths):
            raise ValueError(
                f"lengths must be above {self._short}, or all 0: the cache holds sequences of "
                f"{self.longest} tokens, whose keys were turned by other rotary frequencies, "
                f"got {list(lengths)}"
            )
        self.lengths.copy_(torch.tensor(lengths, device="cpu"))
        self.longest = max(lengths)

    def reorder(self, rows: Tensor, start: int = 0, stop: int | None = None) -> None:
        """Sequence b goes on as sequence ``rows[b]`` (B,) did.

        Only the slots from ``start`` to ``stop`` (None: `longest`) are copied: the caller knows
        that the others are the same already, as those of a prompt that several beams share.
        """
        slots = slice(start, self.longest if stop is None else stop)
        here = torch.arange(self.batch_size, device=rows.device)
        if rows.is_cpu:  # where it costs nothing to ask
            here = here[rows != here]
            rows = rows[here]
        for layer in self.layers:
            for kept in (layer.keys, layer.values):
                kept[here, slots] = kept[rows, slots]
            for scale in _scales(layer):
                scale[here] = scale[rows]
        self.lengths[here] = self.lengths[rows]

    def fill(self, source: KVCache, rows: Tensor) -> None:
        """Sequence b becomes ``source``'s sequence ``rows[b]`` (B,)."""
        self._check_alike(source)
        for layer, given in zip(self.layers, source.layers, strict=True):
            layer.keys[:, : source.longest] = given.keys[rows, : source.longest]
            layer.values[:, : source.longest] = given.values[rows, : source.longest]
            for scale, its in zip(_scales(layer), _scales(given), strict=True):
                scale.copy_(its[rows])
        self.lengths.copy_(source.lengths[rows])
        self.longest = source.longest

    def place(self, source: KVCache, rows: Tensor) -> None:
        """Sequence ``rows[b]`` becomes ``source``'s sequence b; the others stay."""
        self._check_alike(source)
        for layer, given in zip(self.layers, source.layers, strict=True):
            layer.keys[rows, : source.longest] = given.keys[:, : source.longest]
            layer.values[rows, : source.longest] = given.values[:, : source.longest]
            for scale, its in zip(_scales(layer), _scales(given), strict=True):
                scale[rows] = its
        self.lengths[rows] = source.lengths
        self.longest = max(self.longest, source.longest)

    def _check_alike(self, source: KVCache) -> None:
        ours, given = self.layers[0].keys.dtype, source.layers[0].keys.dtype
        if ours != given and (ours in STORED or given in STORED):
            raise ValueError(f"source must hold {ours} as this cache does; it holds {given}")

    def reset(self) -> None:
        """Forget all tokens, and the scales that they fixed; the memory stays."""
        for layer in self.layers:
            for scale in _scales(layer):
                scale.zero_()
        self.lengths.zero_()
        self.longest = 0

    def begin(self, seqlen: int) -> Tensor:
        """Make ready for ``seqlen`` more tokens of each sequence; their positions, (B, seqlen).

        The positions hold until `end`, which counts on in the same memory.

        Raises ValueError if there is no room for them.
        """
        if self.longest + seqlen > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} tokens and holds {self.longest}: "
                f"{seqlen} more do not fit; build it with a larger capacity"
            )
        positions = self.lengths.unsqueeze(1)
        if seqlen == 1:
            return positions
        return positions + torch.arange(seqlen, device=positions.device)

    def end(self, seqlen: int) -> None:
        """Count the ``seqlen`` tokens that every layer has appended since `begin`."""
        self.longest += seqlen
        self.lengths += seqlen


def _scales(layer: KeyValueCache) -> list[Tensor]:
    """Those of k and v; none but of 8-bit numbers."""
    return [scale for scale in (layer.k_scale, layer.v_scale) if scale is not None]


class EncoderDecoderCache(KVCache):
    """The decoder's `KVCache`, with the keys and values of the source.

    Attributes:
        contexts: one `fastattn.nn.KeyValueCache` a layer, (B, S, heads, head_dim), only read.
    """

    contexts: list[KeyValueCache]
