"""The keys and values of the tokens that a model has seen, kept for the tokens to come.

Shapes: B batch, S capacity, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.models.config import GPTConfig


class KVCache:
    """Room for ``capacity`` tokens of each of ``batch_size`` sequences, allocated once.

    Every sequence lies compactly from slot 0 on, so that a token's slot is its position:

        slot            0  1  2  3  4  5  6  7
        sequence 0      a  b  c  d  e  .  .  .      length 5
        sequence 1      f  g  .  .  .  .  .  .      length 2

    It begins *uniform*: all sequences grow alike, by any number of tokens, and attention reads
    plain slices. `set_lengths` cuts each sequence to a length of its own (prompts padded on the
    right, whose padding no causal query has seen); from there on they grow by one token at a
    time, each at its own end, and attention is told the lengths.

        cache = KVCache(model.config, batch_size=2, capacity=64)
        model(prompts, cache=cache)          # (2, T), fills the slots 0..T-1
        model(next_tokens, cache=cache)      # (2, 1), at slot T

    A *static* cache tells them in tensors alone: with `set_lengths` done, the same operations on
    the same memory serve every step, which is what a CUDA graph can replay. Attention then gets
    all the slots and the lengths, instead of the slots in use.

    Args:
        config: of the model.
        batch_size: B.
        capacity: S; at most ``config.n_positions`` of them can be used.
        static: see above.
        device, dtype: of the keys and values: the model's.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        capacity: int,
        *,
        static: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("batch_size", batch_size), ("capacity", capacity)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        shape = (batch_size, capacity, config.n_head, config.head_dim)
        self.batch_size = batch_size
        self.capacity = capacity
        self.static = static
        self.layers = [
            LayerCache(
                self,
                torch.empty(shape, device=device, dtype=dtype),
                torch.empty(shape, device=device, dtype=dtype),
            )
            for _ in range(config.n_layer)
        ]
        # Tokens of the longest sequence. A replayed graph does not pass here and leaves it behind.
        self.longest = 0
        self.uniform = True
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)  # unless uniform
        self.sequences = torch.arange(batch_size, device=device)
        self.key_lengths: Tensor | None = None  # what attention is told in the step at hand

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Cut sequence b to ``lengths[b]`` tokens, and grow each at its own end from here on.

        Raises ValueError unless there is a length for each sequence, from 0 to the tokens held.
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
        self.lengths.copy_(torch.tensor(lengths))
        self.longest = max(lengths)
        self.uniform = False

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.longest = 0
        self.uniform = True
        self.key_lengths = None

    def begin(self, seqlen: int) -> Tensor:
        """Make ready for ``seqlen`` more tokens; their positions, (seqlen,) or (B, seqlen).

        The positions hold until `end`, which counts on in the same memory.

        Raises ValueError if there is no room for them, or if there is more than one for sequences
        of unequal lengths.
        """
        if self.uniform:
            if self.longest + seqlen > self.capacity:
                raise ValueError(
                    f"the cache has room for {self.capacity} tokens and holds {self.longest}: "
                    f"{seqlen} more do not fit; build it with a larger capacity"
                )
            return torch.arange(self.longest, self.longest + seqlen, device=self.sequences.device)
        if seqlen != 1:
            raise ValueError(
                f"sequences of unequal lengths grow by one token at a time, got {seqlen}"
            )
        if not self.static and self.longest >= self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} tokens and is full; "
                "build it with a larger capacity"
            )
        self.key_lengths = self.lengths + 1
        return self.lengths.unsqueeze(1)

    def end(self, seqlen: int) -> None:
        """Count the ``seqlen`` tokens that every layer has appended since `begin`."""
        self.longest += seqlen
        if not self.uniform:
            self.lengths += 1


class LayerCache:
    """One layer's part of a `KVCache`: a `fastattn.nn.KeyValueCache`."""

    def __init__(self, cache: KVCache, keys: Tensor, values: Tensor) -> None:
        self.cache = cache
        self.keys = keys  # (B, S, H, D)
        self.values = values  # (B, S, H, D)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append ``k`` and ``v`` (B, seqlen, H, D); all that shall be seen, and its lengths."""
        cache = self.cache
        if cache.uniform:
            start, end = cache.longest, cache.longest + k.shape[1]
            self.keys[:, start:end] = k
            self.values[:, start:end] = v
            return self.keys[:, :end], self.values[:, :end], None
        self.keys[cache.sequences, cache.lengths] = k[:, 0]
        self.values[cache.sequences, cache.lengths] = v[:, 0]
        if cache.static:
            return self.keys, self.values, cache.key_lengths
        end = cache.longest + 1
        return self.keys[:, :end], self.values[:, :end], cache.key_lengths
