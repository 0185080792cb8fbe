"""`accelerate` on small random models of many architectures: nothing is wrong, most is swapped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from integrations.huggingface import breadth
from integrations.huggingface.architectures import ARCHITECTURES, OTHERS, build, inputs
from integrations.huggingface.test_attention_families import assert_equal

import fastattn
from fastattn.integrations import swap
from oracle import assert_all_close_to_reference

# One for each way in which a module is recognised or called; the others are the long grid.
SHORT = {
    "llama",  # rotary embeddings, a gated MLP
    "gpt_oss",  # in the place of "eager", sinks
    "bert",  # an MLP of two modules
    "bart",  # one that is written into the layer, attention to an encoder
    "bloom",  # one with a residual
    "gemma4",  # keys and values of another layer
    "llama4",  # rotary embeddings as complex numbers
    "swin",  # windows
    "falcon",  # F.scaled_dot_product_attention
    "nanoGPT",
}


def outputs(result: Any) -> list[torch.Tensor]:
    names = ("logits", "last_hidden_state", "text_embeds", "image_embeds")
    if isinstance(result, torch.Tensor):
        return [result]
    return [result[name] for name in names if isinstance(result.get(name), torch.Tensor)]


def run(model: torch.nn.Module, name: str, device: str) -> dict[str, torch.Tensor]:
    """Outputs where they are defined, and the gradient of every weight."""
    given, defined = inputs(name, device)
    dtype = next(model.parameters()).dtype
    given = {n: x.to(dtype) if x.is_floating_point() else x for n, x in given.items()}
    if "input_ids" in given:
        given["use_cache"] = False
    found = outputs(model(**given))
    found = [x if defined is None else x[defined] for x in found]
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in found]
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(found, weights)
    result = {f"output {i}": x.detach() for i, x in enumerate(found)}
    return result | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def exact(model: torch.nn.Module, name: str, device: str) -> dict[str, torch.Tensor] | None:
    """The same in float64; None for models that have no such thing.

    Some hide keys by the least float64, which is an infinity to their softmax, in float32.
    """
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):  # grouped products take no float64
        model.set_experts_implementation("eager")
    try:
        result = run(model, name, device)
    except RuntimeError as error:
        assert "dtype" in str(error)  # a part that computes in float32 whatever the model is in
        return None
    return result if all(x.isfinite().all() for x in result.values()) else None


def greedy(model: torch.nn.Module, name: str, device: str) -> torch.Tensor | None:
    """The tokens that a generator continues with."""
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return None
    given, _ = inputs(name, device)
    given = {
        n: x for n, x in given.items() if n in ("input_ids", "attention_mask", "input_features")
    }
    return model.generate(**given, do_sample=False, max_new_tokens=6, pad_token_id=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        n if n in SHORT else pytest.param(n, marks=pytest.mark.long)
        for n in (*ARCHITECTURES, *OTHERS)
    ],
)
def test_accelerated(name: str, device: str) -> None:
    """Outputs, all gradients and greedy tokens as before; swapped is what docs/swap.md says."""
    model = build(name, device)
    expected, theirs = exact(model, name, device), run(model, name, device)
    tokens = greedy(model, name, device)
    report = fastattn.accelerate(model)
    ours = run(model, name, device)
    assert report.swapped and ours.keys() == theirs.keys()
    if expected is None:
        grads = [{n: x for n, x in y.items() if "output" not in n} for y in (ours, theirs)]
        assert_equal(ours["output 0"], grads[0], theirs["output 0"], grads[1])
    else:
        # A gradient may be zero in exact arithmetic (of a gate that chooses one expert).
        terms = max(float(x.abs().max()) for x in expected.values() if x.numel())
        triples = {key: (value, theirs[key], expected[key]) for key, value in ours.items()}
        assert_all_close_to_reference(triples, terms=terms)
    if tokens is not None:
        assert torch.equal(greedy(model, name, device), tokens)
    page = breadth.PAGE.read_text(encoding="utf-8")
    if breadth.versions() in page and f"| {name} |" in page and device == "cpu":
        row = breadth.row(name, breadth.counted(model, report))
        assert row in page, "python tests/integrations/huggingface/breadth.py --write"
    fastattn.restore(model)
    assert not any(isinstance(module, swap.Swapped) for module in model.modules())
