"""Block-sparse masks: which tiles of the score matrix exist, as lists of kept tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch

Predicate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class BlockMask:
    """A mask of (batch, heads, seqlen_q, seqlen_k) in tiles; tiles that are not kept cost nothing.

    For every row of tiles, `indices[offsets[b, h, m] : offsets[b, h, m + 1]]` are the kept tiles'
    columns (compressed sparse rows). `partial` at the same place is the number of the kept tile's
    pattern in `patterns`; number 0 is a tile that is seen whole.

    Attributes:
        block_size: (block_q, block_k), powers of two from 16.
        seqlens: (seqlen_q, seqlen_k) that it was made for; None if it was made of lists.
        offsets: (batch or 1, heads or 1, tiles_q + 1), int32, tiles_q = ceil(seqlen_q / block_q).
        indices: (kept,), int32, ascending within a row of tiles.
        partial: (kept,), int32, 0 for a tile that is seen whole.
        patterns: (1 + different partial tiles, block_q, block_k), boolean; patterns[0] is all True.
        tensors: the seven tensors that the kernels read: offsets, indices, partial, patterns, and
            offsets, indices, partial of the transposed matrix, by which the backward walks.
    """

    def __init__(
        self,
        offsets: torch.Tensor,
        indices: torch.Tensor,
        block_size: int | tuple[int, int],
        tiles_k: int,
        *,
        partial: torch.Tensor | None = None,
        patterns: torch.Tensor | None = None,
        seqlens: tuple[int, int] | None = None,
    ) -> None:
        """From lists of kept tiles. Waits for the device: make one mask for many calls.

        Args:
            offsets, indices, partial, patterns: as the attributes; `partial` and `patterns` default
                to tiles that are seen whole.
            block_size: (block_q, block_k), or one number for both.
            tiles_k: columns of tiles, ceil(seqlen_k / block_k).
            seqlens: (seqlen_q, seqlen_k) that the patterns are for; None: any with these tiles.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        self.block_size = _block_size(block_size)
        self.tiles_k = tiles_k
        self.seqlens = seqlens
        offsets = offsets.to(torch.int32).contiguous()
        indices = indices.to(torch.int32).contiguous()
        if offsets.dim() != 3:
            raise ValueError(
                "offsets must have the shape (batch or 1, heads or 1, tiles_q + 1); "
                f"got {tuple(offsets.shape)}"
            )
        if (partial is None) != (patterns is None):
            raise ValueError("partial and patterns belong together: give both or neither")
        if partial is None or patterns is None:
            partial = torch.zeros_like(indices)
            patterns = torch.ones(1, *self.block_size, dtype=torch.bool, device=indices.device)
        if tuple(patterns.shape[1:]) != self.block_size or patterns.dtype != torch.bool:
            raise ValueError(
                f"patterns must be boolean (n, {self.block_size[0]}, {self.block_size[1]}); "
                f"got {patterns.dtype} {tuple(patterns.shape)}"
            )
        if not len(patterns) or not patterns[0].all():
            raise ValueError("patterns[0] must be all True, the pattern of a tile seen whole")
        flat = offsets.flatten().tolist()
        if flat and (min(flat) < 0 or max(flat) > indices.numel()):
            raise ValueError(
                f"offsets must lie in [0, {indices.numel()}], the number of indices; "
                f"got {min(flat)} to {max(flat)}"
            )
        if (offsets.diff(dim=-1) < 0).any():
            raise ValueError("offsets must not decrease along the rows of tiles")
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= tiles_k):
            raise ValueError(
                f"indices must lie in [0, {tiles_k}), the columns of tiles; "
                f"got {int(indices.min())} to {int(indices.max())}"
            )
        partial, patterns = partial.to(torch.int32).contiguous(), patterns.contiguous()
        in_range = (partial >= 0) & (partial < len(patterns))
        if partial.shape != indices.shape or not in_range.all():
            raise ValueError(
                f"partial must have the shape {tuple(indices.shape)} of indices and number the "
                f"{len(patterns)} patterns; got {tuple(partial.shape)}"
            )
        kept, number = _grid(offsets, indices, partial, tiles_k)
        if int(kept.sum()) != int(offsets.diff(dim=-1).sum()) or not _ascending(offsets, indices):
            raise ValueError(
                "indices must ascend within each row of tiles, each tile once: sort them"
            )
        transposed = _lists(kept.transpose(-1, -2), number.transpose(-1, -2))
        self.tensors = (offsets, indices, partial, patterns, *transposed)

    @property
    def offsets(self) -> torch.Tensor:
        return self.tensors[0]

    @property
    def indices(self) -> torch.Tensor:
        return self.tensors[1]

    @property
    def partial(self) -> torch.Tensor:
        return self.tensors[2]

    @property
    def patterns(self) -> torch.Tensor:
        return self.tensors[3]

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    @classmethod
    def from_predicate(
        cls,
        predicate: Predicate,
        batch: int,
        heads: int,
        seqlen_q: int,
        seqlen_k: int,
        *,
        block_size: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The mask of a rule on positions, exact to the element.

            sliding = BlockMask.from_predicate(lambda b, h, i, j: (i - j).abs() < 256, 1, 1, n, n)

        Args:
            predicate: (b, h, i, j) -> boolean, True where query i sees key j in head h of sequence
                b; it gets index tensors that broadcast against each other. Called row of tiles by
                row of tiles, so that the whole matrix is never in memory.
            batch, heads: 1 where the rule does not depend on them.
            block_size: (block_q, block_k), or one number for both.
            device: of the mask; default: torch's default device.
        """
        block_q, block_k = _block_size(block_size)
        if min(batch, heads) < 1 or min(seqlen_q, seqlen_k) < 0:
            raise ValueError(
                "batch and heads must be at least 1, the lengths at least 0; got "
                f"batch={batch}, heads={heads}, seqlen_q={seqlen_q}, seqlen_k={seqlen_k}"
            )
        tiles_q, tiles_k = -(-seqlen_q // block_q), -(-seqlen_k // block_k)
        seqlens = seqlen_q, seqlen_k
        b = torch.arange(batch, device=device)[:, None, None, None]
        h = torch.arange(heads, device=device)[:, None, None]
        j = torch.arange(tiles_k * block_k, device=device)
        kept, whole, patterns = [], [], []
        for m in range(tiles_q):
            i = torch.arange(m * block_q, (m + 1) * block_q, device=device)[:, None]
            # The rule is not asked past the ends, where the kernels see nothing anyway.
            outside = (i >= seqlen_q) | (j >= seqlen_k)
            seen = predicate(b, h, i.clamp(max=seqlen_q - 1), j.clamp(max=max(seqlen_k - 1, 0)))
            seen = torch.as_tensor(seen, dtype=torch.bool, device=j.device) | outside
            seen = seen.expand(batch, heads, block_q, tiles_k * block_k)
            tiles = seen.unflatten(-1, (tiles_k, block_k)).transpose(-2, -3)  # (b, h, n, q, k)
            outside = outside.unflatten(-1, (tiles_k, block_k)).transpose(0, 1)
            kept.append((tiles & ~outside).flatten(-2).any(-1))
            whole.append(tiles.flatten(-2).all(-1))
            patterns.append(tiles[kept[-1] & ~whole[-1]])
        shape = (batch, heads, tiles_q, tiles_k)
        if not tiles_q:
            nothing = torch.zeros(shape, dtype=torch.bool, device=device)
            offsets, indices, _ = _lists(nothing, nothing.long())
            return cls(offsets, indices, (block_q, block_k), tiles_k, seqlens=seqlens)
        is_kept, is_whole = torch.stack(kept, 2), torch.stack(whole, 2)
        # Numbered in the order in which they were collected: by row of tiles first.
        is_partial = (is_kept & ~is_whole).permute(2, 0, 1, 3)
        number = torch.zeros(is_partial.shape, dtype=torch.int64, device=is_kept.device)
        table = torch.ones(1, block_q, block_k, dtype=torch.bool, device=is_kept.device)
        found = torch.cat(patterns)
        if len(found):
            different, same_as = found.unique(dim=0, return_inverse=True)
            number[is_partial] = 1 + same_as
            table = torch.cat([table, different])
        offsets, indices, partial = _lists(is_kept, number.permute(1, 2, 0, 3))
        return cls(
            offsets, indices, (block_q, block_k), tiles_k, partial=partial, patterns=table,
            seqlens=seqlens,
        )  # fmt: skip

    def to_dense(self, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
        """The mask as (batch or 1, heads or 1, seqlen_q, seqlen_k), boolean."""
        return dense(self.tensors, *self.block_size, seqlen_q, seqlen_k)

    def __repr__(self) -> str:
        rows = self.offsets.shape[-1] - 1
        total = self.offsets.shape[0] * self.offsets.shape[1] * rows * self.tiles_k
        return (
            f"BlockMask(block_size={self.block_size}, tiles={rows} x {self.tiles_k}, "
            f"kept={self.indices.numel()} of {total}, partial patterns={len(self.patterns) - 1})"
        )


def dense(
    tensors: tuple[torch.Tensor, ...], block_q: int, block_k: int, seqlen_q: int, seqlen_k: int
) -> torch.Tensor:
    offsets, indices, partial, patterns = tensors[:4]
    columns = -(-seqlen_k // block_k)
    kept, number = _grid(offsets, indices, partial, columns)
    i = torch.arange(seqlen_q, device=offsets.device)[:, None]
    j = torch.arange(seqlen_k, device=offsets.device)
    seen = kept[:, :, i // block_q, j // block_k]
    return seen & patterns[number[:, :, i // block_q, j // block_k], i % block_q, j % block_k]


def _ascending(offsets: torch.Tensor, indices: torch.Tensor) -> bool:
    """Whether each index is above the one before it, but for the first ones of the rows."""
    if indices.numel() < 2:
        return True
    place = torch.arange(1, indices.numel(), device=indices.device)
    listed = (place >= offsets.min()) & (place < offsets.max())
    first = torch.isin(place, offsets)
    return bool(((indices.diff() > 0) | first | ~listed).all())


def _block_size(block_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(sides) != 2 or any(not isinstance(n, int) or n < 16 or n & (n - 1) for n in sides):
        raise ValueError(
            "block_size must be one or two powers of two, each at least 16, e.g. 128 or (64, 128); "
            f"got {block_size!r}"
        )
    return sides[0], sides[1]


def _grid(
    offsets: torch.Tensor, indices: torch.Tensor, partial: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept, pattern number), each (batch|1, heads|1, tiles_q, columns), of lists of kept tiles."""
    counts = offsets.diff(dim=-1)  # (batch|1, heads|1, tiles_q)
    place = torch.arange(columns, device=offsets.device)
    kept = torch.zeros(*counts.shape, columns, dtype=torch.bool, device=offsets.device)
    number = torch.zeros(kept.shape, dtype=torch.int64, device=offsets.device)
    if not indices.numel() or not columns:
        return kept, number
    listed = place < counts[..., None]
    entry = (offsets[..., :-1, None] + place).clamp(max=indices.numel() - 1)
    # Unlisted places write to a column of their own, which is cut off.
    column = torch.where(listed, indices[entry].long(), columns)
    kept = torch.nn.functional.pad(kept, (0, 1)).scatter(-1, column, True)[..., :columns]
    number = torch.nn.functional.pad(number, (0, 1)).scatter(-1, column, partial[entry].long())
    return kept, number[..., :columns]


def _lists(
    kept: torch.Tensor, number: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(offsets, indices, partial) of kept tiles, the inverse of `_grid`."""
    counts = kept.sum(-1)  # (batch|1, heads|1, rows)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    offsets = torch.cat([ends[..., :1] - counts[..., :1], ends], -1)
    if not counts.shape[-1]:
        offsets = counts.new_zeros(*counts.shape[:-1], 1)
    indices = kept.nonzero()[:, -1]
    return offsets.to(torch.int32), indices.to(torch.int32), number[kept].to(torch.int32)
