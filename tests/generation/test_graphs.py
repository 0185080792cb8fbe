"""Graphs: what is kept and reused anywhere, with a stand-in for CUDA; capture itself on a GPU.

That the step which they capture is right is tested with generation, anywhere.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastattn import GPT, GPTConfig
from fastattn.generation import decoding, graphs

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")


class _StandIn:
    """Of a CUDA graph: replays by running the captured step into the memory of its first result."""

    def capture(self, decoder: graphs.GraphDecoder, logits: torch.Tensor) -> None:
        self.decoder, self.logits = weakref.ref(decoder), logits

    def replay(self) -> None:
        decoder = self.decoder()
        assert decoder is not None
        before = decoder.cache.longest
        self.logits.copy_(decoder._run(decoder._tokens))
        decoder.cache.longest = before  # a replay does not count for the host


def _capture(decoder: graphs.GraphDecoder) -> graphs.GraphDecoder:
    """`GraphDecoder.capture` with its order of steps, but for CUDA's."""
    nothing = [0] * decoder.cache.batch_size
    decoder.cache.set_lengths(nothing)
    decoder._run(decoder._tokens)
    decoder.cache.set_lengths(nothing)
    graph = _StandIn()
    decoder._logits = decoder._run(decoder._tokens)
    graph.capture(decoder, decoder._logits)
    decoder._graph = graph  # type: ignore[assignment]
    decoder.cache.reset()
    return decoder


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=[pytest.mark.gpu, on_a_gpu])])
def model(
    request: pytest.FixtureRequest, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[GPT]:
    """A model that decodes by graphs."""
    if request.param == "stand-in":
        monkeypatch.setattr(graphs.GraphDecoder, "capture", _capture)
        monkeypatch.setattr(graphs, "captures", lambda model: True)
    yield GPT(GPTConfig(**small), device="cpu" if request.param == "stand-in" else "cuda").eval()


def _eager(
    model: GPT, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, **how: Any
) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "captures", lambda model: False)
        return model.generate(prompts, **{"max_new_tokens": 30, **how})


def test_replayed_equals_eager(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    for prompts in ([[1, 2, 3], [4]], [[5, 6], [7, 8]], [[9]], [[1, 2, 3], [4]]):
        got = model.generate(prompts, max_new_tokens=30)
        assert torch.equal(got, _eager(model, prompts, monkeypatch))


def test_beams_replayed_equal_eager(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read into the memory of the graph, and beams reordered in it."""
    prompts, how = [[1, 2, 3], [4]], {"max_new_tokens": 20, "num_beams": 3, "eos_token_id": 5}
    got = model.generate(prompts, **how)
    assert torch.equal(got, _eager(model, prompts, monkeypatch, **how))
    assert [key[0] for key in graphs._kept[model]] == [6]


def test_a_graph_is_captured_once(model: GPT) -> None:
    first = graphs.decoder(decoding.decode, model, 2, 20)
    assert graphs.decoder(decoding.decode, model, 2, 50) is first
    assert graphs.decoder(decoding.decode, model, 1, 50) is not first
    assert graphs.decoder(decoding.decode, model, 2, 20) is first


def test_weights_changed_in_place_count(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model.generate([[1, 2, 3]], max_new_tokens=30)
    model.reset_parameters()
    got = model.generate([[1, 2, 3]], max_new_tokens=30)
    assert not torch.equal(got, before)
    assert torch.equal(got, _eager(model, [[1, 2, 3]], monkeypatch))


def test_replaced_weights_make_a_new_graph(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    model.generate([[1, 2, 3]], max_new_tokens=30)
    model.norm_f.weight = torch.nn.Parameter(torch.randn_like(model.norm_f.weight))
    got = model.generate([[1, 2, 3]], max_new_tokens=30)
    assert torch.equal(got, _eager(model, [[1, 2, 3]], monkeypatch))


def test_only_a_few_are_kept(model: GPT) -> None:
    for batch_size in range(1, 8):
        graphs.decoder(decoding.decode, model, batch_size, 20)
    assert [key[0] for key in graphs._kept[model]] == [4, 5, 6, 7]


def test_capacity_ends_at_the_context(model: GPT) -> None:
    assert graphs.decoder(decoding.decode, model, 1, 20).cache.capacity == 64


def test_a_model_takes_its_graphs_with_it(model: GPT) -> None:
    copied = GPT(model.config, device=model.device).eval()
    copied.generate([[1]], max_new_tokens=5)
    assert copied in graphs._kept
    gone = weakref.ref(copied)
    del copied
    gc.collect()
    assert gone() is None
