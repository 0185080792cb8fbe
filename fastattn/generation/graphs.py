"""Decoding by CUDA graphs: one step captured by hand, then replayed for every token.

A decoding step of a small model is hundreds of kernels of a few microseconds each, which the host
launches more slowly than the GPU runs them. A graph launches them all at once. It replays the same
kernels on the same memory, so everything that changes from step to step is in tensors: the tokens,
the keys and values, and the sequences' lengths (a `KVCache`). What depends on the step in
other ways (sampling, the end of a sequence) stays outside.

Capturing a step takes about as long as running it twice; beyond the kernels themselves nothing is
compiled.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.generation.contract import LanguageModel
from fastattn.ops.common import modes

if TYPE_CHECKING:
    from fastattn.models.cache import KVCache

Step = Callable[[LanguageModel, Tensor, "KVCache"], Tensor]

# A cache's capacity is rounded up to it, so that prompts of many lengths share a graph.
BUCKET = 256
# How many graphs, each with a cache of its own, are kept for a model.
KEPT = 4


def captures(model: LanguageModel) -> bool:
    """Whether a model's steps are captured: on CUDA devices."""
    return model.device.type == "cuda"


class GraphDecoder:
    """A decoding step on static tensors: `capture` it once, after that each call replays it.

    Without `capture` a call runs the very same step eagerly, on any device.
    """

    def __init__(self, step: Step, model: LanguageModel, cache: Any) -> None:
        """``cache``: the model's, or of its kind."""
        self.cache = cache
        self._step = step
        # The graph holds the addresses of the weights, not the model, which may go before it does.
        self._model = weakref.ref(model)
        self._tokens = torch.zeros(cache.batch_size, dtype=torch.int64, device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def capture(self) -> GraphDecoder:
        """Record the step; the cache is empty before and after."""
        nothing = [0] * self.cache.batch_size
        with torch.cuda.device(self._tokens.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            self.cache.set_lengths(nothing)
            side.wait_stream(current)
            with torch.cuda.stream(side):  # compiles kernels, allocates workspaces
                self._run(self._tokens)
            current.wait_stream(side)
            self.cache.set_lengths(nothing)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                self._logits = self._run(self._tokens)
        self._graph = graph
        self.cache.reset()
        return self

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B,) the last tokens -> (B, V) the logits of the next, overwritten by the next call."""
        if self._graph is None:
            return self._run(tokens)
        self._tokens.copy_(tokens)
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _run(self, tokens: Tensor) -> Tensor:
        model = self._model()
        assert model is not None
        return self._step(model, tokens, self.cache)


# By model.
_kept: weakref.WeakKeyDictionary[Any, OrderedDict[tuple[object, ...], GraphDecoder]] = (
    weakref.WeakKeyDictionary()
)


@torch.inference_mode()
def decoder(
    step: Step, model: LanguageModel, batch_size: int, capacity: int, **stored: torch.dtype
) -> GraphDecoder:
    """A captured decoder with an empty cache for at least ``capacity`` tokens, kept for next time.

    Kept with the model: the last 4 graphs and their caches. Weights that were replaced or moved
    (not those changed in place) make a new one, and so does another dtype of autocast.
    ``stored`` has the ``dtype`` of a cache of 8-bit numbers.
    """
    capacity = min(-(-capacity // BUCKET) * BUCKET, model.config.n_positions)
    addresses = tuple(parameter.data_ptr() for parameter in model.parameters())
    dtypes = next(model.parameters()).dtype, modes.autocast_dtype(model.device.type)
    key = (batch_size, capacity, stored.get("dtype"), dtypes, addresses)
    kept = _kept.setdefault(model, OrderedDict())
    if key not in kept:
        for stale in [k for k in kept if k[-1] != addresses]:
            del kept[stale]
        cache = model.new_cache(batch_size, capacity, **stored)
        kept[key] = GraphDecoder(step, model, cache).capture()
        while len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    kept[key].cache.reset()
    return kept[key]
