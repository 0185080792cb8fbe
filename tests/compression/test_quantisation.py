"""Quantised models: every mode, of this package and transformers', before and after accelerate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastattn
from fastattn.compression import MODES, prune_weights, quantize
from fastattn.compression.quantisation import size
from fastattn.nn.int8_weight import Int8Weight

# The rms of the weights' rounding over that of the weights, and the error of the largest logit that
# the products add: none, x in 8 bits, x in bfloat16, none.
ROUNDING = {"int8": 0.008, "int8-dynamic": 0.012, "int4": 0.1, "fp8": 0.04}
PRODUCTS = {"int8": 1e-5, "int8-dynamic": 0.1, "int4": 0.1, "fp8": 1e-5}
LLAMA: dict[str, Any] = {
    "norm": "rms_norm", "positions": "rotary", "gated": True, "activation_function": "silu",
    "qkv_bias": False, "out_bias": False, "mlp_bias": False, "n_kv_head": 2,
}  # fmt: skip


def _gpt(**options: Any) -> fastattn.GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return fastattn.GPT(fastattn.GPTConfig(**{**sizes, "initializer_range": 0.2, **options})).eval()


def _tokens() -> torch.Tensor:
    return torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(1))


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def _values(weight: Any) -> torch.Tensor:
    """The numbers that a weight stands for: its products with unit vectors, where it has no name."""
    if isinstance(weight, Int8Weight) or type(weight).__name__ in ("Int8Tensor", "Float8Tensor"):
        return weight.dequantize()
    unit = torch.eye(weight.shape[1], dtype=weight.dtype)
    return torch.nn.functional.linear(unit, weight).t()


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_logits_of_each_mode(mode: str, options: dict[str, Any]) -> None:
    if mode != "int8":
        pytest.importorskip("torchao", reason="pip install torchao")
    model = _gpt(**options)
    if mode == "int4":
        model = model.bfloat16()
    rounded = copy.deepcopy(model)
    report = quantize(model, mode)
    for name in report.quantised:
        exact, weight = rounded.get_submodule(name), model.get_submodule(name).weight
        assert type(weight) is not torch.nn.Parameter
        values = _values(weight)
        error = (values - exact.weight).float()
        assert 0 < error.square().mean().sqrt() < ROUNDING[mode] * exact.weight.std()
        exact.weight.copy_(values)
    assert _error(model(_tokens()), rounded(_tokens())) < PRODUCTS[mode]
    # 4 linear layers a block, 5 with a gate; a tied head only in int8.
    assert len(report.quantised) == 2 * (5 if options else 4) + (mode == "int8")
    assert report.after < report.before and report.after == size(model)
    assert ("lm_head" in report.left) == (mode != "int8")
    assert f"{mode}: {len(report.quantised)} weights" in str(report)


@torch.no_grad()
def test_int8_saves_three_quarters_and_keeps_the_head_tied() -> None:
    model = _gpt(n_embd=256, n_positions=8)
    report = quantize(model, "int8")
    assert report.after < 0.3 * report.before
    assert model.lm_head.weight is model.wte.weight and isinstance(model.wte.weight, Int8Weight)
    assert list(report.left) == ["wpe"] and "wpe" in str(report)


@torch.no_grad()
def test_generation_with_a_cache_is_that_without() -> None:
    model = _gpt(**LLAMA)
    quantize(model, "int8")
    tokens = _tokens()
    for row, prompt in zip(model.generate(tokens, max_new_tokens=6, eos_token_id=()), tokens):
        for _ in range(6):
            prompt = torch.cat((prompt, model(prompt[None])[0, -1].argmax()[None]))
        assert row.tolist() == prompt.tolist()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, LLAMA, {"tie_word_embeddings": False}])
def test_saved_and_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    model = _gpt(**options)
    quantize(model, "int8")
    expected = model(_tokens())
    model.save_pretrained(tmp_path / "first")
    assert [p.suffix for p in sorted((tmp_path / "first").iterdir())] == [
        ".json", ".json", ".safetensors",
    ]  # fmt: skip
    back = fastattn.models.load(tmp_path / "first")
    assert torch.equal(back(_tokens()), expected)
    assert (back.lm_head.weight is back.wte.weight) == back.config.tie_word_embeddings
    back.save_pretrained(tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("first", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    half = fastattn.models.load(tmp_path / "first", dtype=torch.bfloat16)
    assert half(_tokens()).dtype == torch.bfloat16
    assert _error(half(_tokens()), expected) < 0.05


@torch.no_grad()
def test_rounded_as_it_is_read(tmp_path: Path) -> None:
    model = _gpt(**LLAMA)
    model.save_pretrained(tmp_path / "float")
    read = fastattn.models.load(tmp_path / "float", int8=True)
    quantize(model, "int8")
    assert torch.equal(read(_tokens()), model(_tokens()))
    assert not any(isinstance(p, Int8Weight) and p.requires_grad for p in read.parameters())


NAME = "blocks.0.attention.in_proj.weight"


def _assert_refused(
    folder: Path, changes: list[tuple[dict[str, torch.Tensor], str]], mode: str, other: str
) -> None:
    """A folder with each change; then without the weight `NAME`, and with another mode."""
    file, config = folder / "model.safetensors", folder / "config.json"
    whole = load_file(file)
    for change, says in changes:
        save_file({**whole, **change}, file)
        with pytest.raises(ValueError, match=says):
            fastattn.models.load(folder)
    save_file({key: x for key, x in whole.items() if key.partition(":")[0] != NAME}, file)
    with pytest.raises(ValueError, match=f"{NAME} is missing"):
        fastattn.models.load(folder)
    config.write_text(config.read_text().replace(mode, other))
    with pytest.raises(ValueError, match="quantization_config"):
        fastattn.models.load(folder)


def test_damaged_folders(tmp_path: Path) -> None:
    model = _gpt(**LLAMA)
    quantize(model, "int8")
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    changes = [
        ({NAME: whole[NAME][:, :-1].contiguous()}, f"{NAME} must have the shape"),
        ({NAME: whole[NAME].to(torch.int8)}, "I8"),
        ({"norm_f.weight": whole["norm_f.weight"].to(torch.uint8)}, "norm_f.weight must"),
        ({"stranger": torch.ones(2)}, "stranger is unexpected"),
    ]
    _assert_refused(tmp_path, changes, '"bits": 8', '"bits": 3')


def _torchaos(mode: str) -> Any:
    pytest.importorskip("torchao", reason="pip install torchao")
    model = _gpt(**LLAMA)
    if mode == "int4":
        model = model.bfloat16()
    quantize(model, mode)
    return model


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES[1:])
def test_torchaos_saved_and_loaded(mode: str, tmp_path: Path) -> None:
    model = _torchaos(mode)
    model.save_pretrained(tmp_path / "first")
    back = fastattn.models.load(tmp_path / "first")
    assert torch.equal(back(_tokens()), model(_tokens()))
    assert size(back) == size(model)
    assert not any(p.requires_grad for p in back.parameters() if hasattr(p, "tensor_data_names"))
    back.save_pretrained(tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("first", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match=r"; got dtype torch\.float16"):
        fastattn.models.load(tmp_path / "first", dtype=torch.float16)


def test_damaged_folders_of_torchaos(tmp_path: Path) -> None:
    _torchaos("int8-dynamic").save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    assert sum(key.startswith(f"{NAME}:") for key in whole) == 3
    changes = [
        ({f"{NAME}:scale": whole[f"{NAME}:scale"][:-1].clone()}, "must have the parts"),
        ({f"{NAME}:scale": whole[f"{NAME}:scale"].to(torch.int8)}, "must have the parts"),
        ({f"{NAME}:qdata": torch.zeros(2, dtype=torch.uint8)}, "has too few bytes for the shape"),
        ({f"{NAME}:other": torch.zeros(2, dtype=torch.uint8)}, "must have the parts"),
        ({"stranger:qdata": torch.zeros(2, dtype=torch.uint8)}, "stranger:qdata is unexpected"),
        ({NAME: torch.ones(2)}, "must have the parts|unexpected|shape"),
    ]
    _assert_refused(tmp_path, changes, '"int8-dynamic"', '"int3"')


def test_a_weight_that_no_mode_makes_is_not_saved(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    model = _gpt()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(ValueError, match="Save the model before it is quantised"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def _theirs() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("mode", ["int8", pytest.param("int8-dynamic", marks=pytest.mark.long)])
@torch.no_grad()
def test_before_and_after_accelerate(mode: str) -> None:
    """Both orders give the logits of transformers' own quantised model; the first swaps less."""
    if mode != "int8":
        pytest.importorskip("torchao", reason="pip install torchao")
    plain = _theirs()
    expected = plain(_tokens()).logits
    first, last = copy.deepcopy(plain), copy.deepcopy(plain)
    quantize(plain, mode)
    quantised = plain(_tokens()).logits
    assert 0 < _error(quantised, expected) < 0.1

    quantize(first, mode)
    swapped_after = fastattn.accelerate(first)
    swapped_before = fastattn.accelerate(last)
    quantize(last, mode)
    for model in (first, last):
        # The norms' rounding moves numbers of x to the next of 8 bits in "int8-dynamic".
        allowed = 1e-5 if mode == "int8" else 0.02
        assert _error(model(_tokens()).logits, quantised) < allowed
    assert len(swapped_after.swapped) > 0 and len(swapped_before.swapped) > 0


@torch.no_grad()
def test_layers_that_are_left_alone() -> None:
    model = _gpt()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].attention.out_proj)
    expected = model(_tokens())
    report = quantize(model, "int8")
    assert "computed before each call" in report.left["blocks.0.attention.out_proj"]
    assert _error(model(_tokens()), expected) < 0.05
    assert "blocks.0.attention.out_proj" in str(report)
    with pytest.raises(ValueError, match="quantised or sharded"):
        quantize(model, "int8")  # all are


def test_int4_says_which_sizes_it_leaves() -> None:
    pytest.importorskip("torchao", reason="pip install torchao")
    with pytest.raises(ValueError, match=r"call model.bfloat16\(\) first"):
        quantize(_gpt(), "int4")
    report = quantize(_gpt(n_inner=100).bfloat16(), "int4")
    assert "100 input features are no multiple" in report.left["blocks.0.feed_forward.linear2"]
    assert "torchao cannot" in report.left["blocks.1.feed_forward.linear1"]  # rows of 16
    assert set(report.quantised) == {
        f"blocks.{i}.attention.{name}" for i in range(2) for name in ("in_proj", "out_proj")
    }


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"torch.nn.Module, got dict"):
        quantize({}, "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mode must be one of 'int8'.*got 'int2'"):
        quantize(_gpt(), "int2")
    with pytest.raises(ValueError, match=r"no torch.nn.Linear"):
        quantize(torch.nn.LayerNorm(4))
    model = _gpt()
    quantize(model)
    with pytest.raises(ValueError, match="before it is quantised"):
        prune_weights(model, 0.5)
