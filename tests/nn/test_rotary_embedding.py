"""RotaryEmbedding against transformers' own angles, and through casts, moves and copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from fastattn.nn import RotaryEmbedding

HEAD_DIM, THETA = 32, 5000.0
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 12.0,
        "beta_slow": 2.0,
        "attention_factor": 0.7,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.9,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
]
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1 + i / 16 for i in range(16)],
    "long_factor": [2 + i / 3 for i in range(16)],
}
SCALINGS += [{**LONGROPE, "factor": 4.0}, {**LONGROPE, "attention_factor": 0.7, "factor": None}]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s['rope_type']}-{len(s)}")
def test_angles_are_transformers(scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={**scaling, "rope_theta": THETA},
    )
    ours, theirs = RotaryEmbedding(HEAD_DIM, THETA, scaling), LlamaRotaryEmbedding(config)
    for end in (256, 64):  # below and above the first context
        positions = torch.randint(0, end, (3, 11))
        positions[:, 4] = end - 1
        expected = theirs(torch.zeros(3, 11, 1), positions)
        for one, other in zip(ours(positions), expected, strict=True):
            assert one.dtype == torch.float32 and one.shape == (3, 11, HEAD_DIM // 2)
            # each pair's angle twice there; float32's of large positions differ by a rounding
            torch.testing.assert_close(torch.cat((one, one), -1), other, atol=3e-5, rtol=0)


def test_positions_of_one_dimension_are_those_of_all_sequences() -> None:
    angles = RotaryEmbedding(8)
    for one, other in zip(angles(torch.arange(5)), angles(torch.arange(5)[None]), strict=True):
        assert one.shape == (1, 5, 4) and torch.equal(one, other)


@pytest.mark.parametrize(
    "scaling", [None, SCALINGS[2], SCALINGS[-1]], ids=["plain", "llama3", "longrope"]
)
def test_the_frequencies_survive_casts_moves_and_copies(scaling: dict[str, Any] | None) -> None:
    def make(device: str | None = None) -> RotaryEmbedding:
        return RotaryEmbedding(HEAD_DIM, THETA, scaling, device=device)

    positions = torch.tensor([1000, 77])
    expected = make()(positions)
    holder = torch.nn.Module()
    holder.angles = make()
    empty = make("meta")
    assert empty.inv_freq.is_meta
    for twin in (
        make().bfloat16(),
        make().double(),
        make().to(torch.float16),
        holder.half().angles,
        copy.deepcopy(make()),
        pickle.loads(pickle.dumps(make())),
        empty.to_empty(device=positions.device),
    ):
        assert twin.inv_freq.dtype == torch.float32
        assert all(map(torch.equal, twin(positions), expected))


def test_it_is_no_part_of_the_state_dict() -> None:
    angles = RotaryEmbedding(HEAD_DIM)
    assert not angles.state_dict() and not list(angles.parameters())
    angles.load_state_dict({})
    assert repr(angles) == "RotaryEmbedding(32, theta=10000.0)"


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((7,), ValueError, "rotary_dim must be even"),
        ((0,), ValueError, "rotary_dim must be at least 2"),
        ((8.0,), TypeError, "rotary_dim must be an integer"),
        ((8, -1.0), ValueError, "theta must be positive"),
        ((8, 1e4, "linear"), TypeError, "scaling must be a mapping"),
        ((8, 1e4, {"rope_type": "dynamic"}), ValueError, '"rope_type" must be one of'),
        ((8, 1e4, {**LONGROPE, "factor": 2}), ValueError, "short_factor .* 4 numbers, got 16"),
        (
            (32, 1e4, {**LONGROPE, "original_max_position_embeddings": 1}),
            ValueError,
            "original_max_position_embeddings of the scaling must be at least 2",
        ),
        ((32, 1e4, LONGROPE), ValueError, "needs factor or attention_factor"),
        ((32, 1e4, {**LONGROPE, "long_factor": [0.0] * 16}), ValueError, "each long_factor .* pos"),
        ((32, 1e4, {**LONGROPE, "long_factor": ["1"] * 16}), TypeError, "each long_factor of the"),
        ((32, 1e4, {**LONGROPE, "long_factor": 2.0}), TypeError, "long_factor .* must be a list"),
        ((8, 1e4, {"rope_type": "linear"}), ValueError, 'scaling "linear" needs factor'),
        ((8, 1e4, {"rope_type": "linear", "factor": 0}), ValueError, "factor of the scaling"),
        ((8, 1e4, {"rope_type": "llama3", "factor": 2}), ValueError, "needs low_freq_factor, high"),
    ],
    ids=str,
)
def test_constructor_refuses(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RotaryEmbedding(*args)
