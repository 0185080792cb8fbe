"""transformers' generate on an accelerated model: the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastattn


def padded(device: str) -> dict[str, torch.Tensor]:
    """Prompts of 3, 9 and 6 tokens, padded on the left with token 1."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(2, 97, (n,), generator=generator) for n in (3, 9, 6)]
    tokens = torch.stack([torch.nn.functional.pad(p, (9 - len(p), 0), value=1) for p in prompts])
    mask = torch.stack([(torch.arange(9) >= 9 - len(p)).long() for p in prompts])
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 20},
    ],
    ids=["greedy", "no cache", "static cache", "beams", "sampled"],
)
@pytest.mark.parametrize("batch", ["one", "left padded"])
def test_the_same_tokens(
    make_gpt2: Any, device: str, arguments: dict[str, Any], batch: str
) -> None:
    model = make_gpt2()
    inputs = padded(device)
    if batch == "one":
        inputs = {"input_ids": inputs["input_ids"][1:2], "attention_mask": None}
    # No eos: every row runs to the end.
    arguments = {**arguments, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 1}

    def generate() -> torch.Tensor:
        torch.manual_seed(7)
        found: torch.Tensor = model.generate(**inputs, **arguments)
        return found

    expected = generate()
    fastattn.accelerate(model)
    assert torch.equal(generate(), expected)
    assert expected.shape[1] == 33


def test_each_prompt_of_a_batch_as_if_alone(make_gpt2: Any, device: str) -> None:
    model = make_gpt2()
    fastattn.accelerate(model)
    inputs = padded(device)
    arguments = {
        "do_sample": False,
        "max_new_tokens": 16,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
    together = model.generate(**inputs, **arguments)
    for row, length in enumerate((3, 9, 6)):
        alone = model.generate(inputs["input_ids"][row : row + 1, 9 - length :], **arguments)
        assert torch.equal(together[row, 9 - length :], alone[0])


def test_a_prompt_in_two_parts(make_gpt2: Any, tokens: torch.Tensor) -> None:
    """More new queries than one on a filled cache."""
    model = make_gpt2()
    fastattn.accelerate(model)
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :8], use_cache=True)
        second = model(tokens[:, 8:], past_key_values=first.past_key_values)
    found = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
