"""Keys and values in pages: sequences take them as they grow, and share those of equal beginnings.

Page p is the p-th of ``pages`` blocks of ``page_size`` slots in every layer's memory (Kwon et al.
2023, arXiv:2309.06180). A sequence's row of the block table names its pages in order:

    page            0      1      2      3      4
    slots         efgh   abcd   ijkl   .y..   abcx       (page_size 4)

    sequence 0    pages 1 0 2     tokens a b c d e f g h i j k l
    sequence 1    pages 1 0       the same beginning: the same full pages, held by both

Only full pages are shared, so that nothing is ever written to a page with two holders.

The scales of 8-bit numbers (`fastattn/nn/stored_cache.py`) are a sequence's. They lie by its first
page, and its pages are named after the tokens that fixed them: who shares a page has its scales.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.generation.contract import LanguageModel

if TYPE_CHECKING:
    from fastattn.nn import KeyValueCache


def page_name(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full page: a hash of its tokens and, by the name before it, of all before them.

    Cryptographic, since prompts come from strangers: one who could make two beginnings of the same
    name would get answers to another's prompt.
    """
    return hashlib.sha256(previous + array("q", tokens).tobytes()).digest()


class PagePool:
    """Who holds which page.

    A page that nobody holds any more keeps its keys and values, and can be found by its name, until
    it is taken for others: first those without a name, then the longest unused.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._holders = [0] * count
        self._unheld: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._names: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """How many pages `take` has."""
        return len(self._unheld)

    def is_held(self, page: int) -> bool:
        return self._holders[page] > 0

    def find(self, name: bytes) -> int | None:
        """The page with this name, held or not."""
        return self._pages.get(name)

    def take(self) -> int | None:
        """A page for new tokens, with one holder; None if all are held."""
        if not self._unheld:
            return None
        page, _ = self._unheld.popitem(last=False)
        name = self._names.pop(page, None)
        if name is not None:
            del self._pages[name]
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One holder more."""
        self._unheld.pop(page, None)
        self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less, of a sequence's pages: of a beginning its end is taken first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._unheld[page] = None
                if page not in self._names:
                    self._unheld.move_to_end(page, last=False)

    def publish(self, page: int, name: bytes) -> None:
        """Let `find` find a page that is full; of several with one name, the first."""
        if name not in self._pages and page not in self._names:
            self._pages[name] = page
            self._names[page] = name


class PagedMemory:
    """Every layer's pages, and one more, which takes the writes of padding.

    A model's cache of so many sequences of ``page_size`` tokens is just this memory.

    Attributes:
        scales: (2 layers, pages + 1, kv_heads), of keys and values in turn, of the sequences that
            begin with each page; None without 8-bit numbers.
    """

    def __init__(
        self, model: LanguageModel, pages: int, page_size: int, width: int, **stored: torch.dtype
    ) -> None:
        """``width``: the most pages of a sequence; ``stored``: the ``dtype`` of 8-bit numbers."""
        self.page_size = page_size
        self.width = width
        self.padding = pages
        self.layers: list[KeyValueCache] = model.new_cache(pages + 1, page_size, **stored).layers
        scales = [scale for layer in self.layers for scale in layer[4:] if scale is not None]
        self.scales = torch.stack(scales) if scales else None
        for layer in self.layers:
            layer.keys[pages].zero_()
            layer.values[pages].zero_()

    def cache(self, rows: int) -> PagedCache:
        return PagedCache(self, rows)


class PagedCache:
    """What a model's `features` needs of a cache, for ``batch_size`` sequences in pages.

    The interface of `fastattn.models.cache.KVCache`; lengths and block table are tensors of its
    own, which `place` sets, so that a CUDA graph can replay what a model does with them.

    Attributes:
        lengths: (batch_size,) int64, the tokens of each sequence.
        longest: tokens of the longest sequence, for the host.
        layers: one `fastattn.nn.KeyValueCache` a layer, with the block table.
    """

    def __init__(self, memory: PagedMemory, batch_size: int) -> None:
        device = memory.layers[0].keys.device
        self.batch_size = batch_size
        self.capacity = memory.width * memory.page_size
        self._padding = memory.padding
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.longest = 0
        self._table = torch.full(
            (batch_size, memory.width), memory.padding, dtype=torch.int32, device=device
        )
        self.layers = [
            layer._replace(lengths=self.lengths, block_table=self._table) for layer in memory.layers
        ]
        self._scales, self._kept_scales = None, memory.scales
        if memory.scales is not None:
            self._scales = torch.zeros_like(memory.scales[:, :1]).repeat(1, batch_size, 1)
            pairs = self._scales.unflatten(0, (-1, 2))
            self.layers = [
                layer._replace(k_scale=k, v_scale=v)
                for layer, (k, v) in zip(self.layers, pairs, strict=True)
            ]

    def place(self, lengths: Sequence[int], table: Tensor) -> None:
        """The sequences of the next call: their tokens so far, and their rows of the block table.

        There may be fewer than ``batch_size``; the others are empty and write to no page of theirs.
        """
        count = len(lengths)
        self.lengths[:count].copy_(torch.tensor(lengths, device="cpu"))
        self.lengths[count:] = 0
        self._table[:count].copy_(table)
        self._table[count:] = self._padding
        self.longest = max(lengths)
        if self._scales is not None and self._kept_scales is not None:
            kept = self._kept_scales[:, self._table[:, 0].long()]
            # An empty sequence's are to be fixed; the page has those of one before.
            self._scales.copy_(torch.where(self.lengths[:, None] > 0, kept, 0))

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """For the capture of a graph, whose sequences are padding."""
        self.lengths.copy_(torch.tensor(lengths, device="cpu"))
        self.longest = max(lengths)

    def reset(self) -> None:
        self.lengths.zero_()
        self.longest = 0

    def begin(self, seqlen: int) -> Tensor:
        """The positions of ``seqlen`` more tokens of each sequence, (batch_size, seqlen)."""
        assert self.longest + seqlen <= self.capacity
        return self.lengths.unsqueeze(1) + torch.arange(seqlen, device=self.lengths.device)

    def end(self, seqlen: int) -> None:
        """Count the tokens that every layer has appended since `begin`."""
        self.longest += seqlen
        self.lengths += seqlen
        if self._scales is not None and self._kept_scales is not None:
            self._kept_scales[:, self._table[:, 0].long()] = self._scales
