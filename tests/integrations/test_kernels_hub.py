"""fastattn as a local repository of Hugging Face's kernels."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import pytest
import torch
from integrations import tiny

import fastattn
from fastattn.integrations import kernels_hub
from fastattn.integrations.kernels_hub import layers
from oracle import assert_close_to_reference

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


MODELS = transformers.models


def llama_mlp(act: str = "silu") -> torch.nn.Module:
    config = transformers.LlamaConfig(**{**tiny.DECODER, "hidden_act": act})
    return MODELS.llama.modeling_llama.LlamaMLP(config)


def gpt2_mlp() -> torch.nn.Module:
    return MODELS.gpt2.modeling_gpt2.GPT2MLP(96, transformers.GPT2Config(**tiny.GPT2))


def clip_mlp(act: str = "gelu") -> torch.nn.Module:
    config = transformers.CLIPVisionConfig(hidden_size=48, intermediate_size=64, hidden_act=act)
    return MODELS.clip.modeling_clip.CLIPMLP(config)


def llama_norm() -> torch.nn.Module:
    return MODELS.llama.modeling_llama.LlamaRMSNorm(48)


CASES: dict[str, tuple[Callable[[], torch.nn.Module], type[torch.nn.Module]]] = {
    "LayerNorm": (lambda: torch.nn.LayerNorm(48), layers.LayerNorm),
    "RMSNorm": (llama_norm, layers.RMSNorm),
    "RMSNormZeroCentered": (
        lambda: MODELS.gemma.modeling_gemma.GemmaRMSNorm(48),
        layers.RMSNormZeroCentered,
    ),
    "SwiGLUMLP": (llama_mlp, layers.SwiGLUMLP),
    "GeGLUMLP": (lambda: llama_mlp("gelu_pytorch_tanh"), layers.GeGLUMLP),
    "GPT2MLP": (gpt2_mlp, layers.GPT2MLP),
    "MLP": (clip_mlp, layers.MLP),
}


def kernelized(module: torch.nn.Module, layer: type[torch.nn.Module]) -> torch.nn.Module:
    """A copy with the layer's forward, put there as `kernels` does it."""
    twin = copy.deepcopy(module)
    twin.forward = MethodType(layer.forward, twin)
    return twin


def random_(module: torch.nn.Module, device: str) -> torch.nn.Module:
    return tiny.random_(module).to(device).eval()


def results(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    gradients = torch.autograd.grad(out, (x, *module.parameters()), torch.cos(out.detach()))
    return [out.detach(), *gradients]


def test_every_layer_has_a_case() -> None:
    assert set(CASES) == set(kernels_hub.LAYERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_as_the_original(name: str, dtype: torch.dtype, device: str) -> None:
    make, layer = CASES[name]
    original = random_(make(), device).to(dtype)
    x = (torch.randn(3, 7, 48, device=device) + 2).to(dtype)
    exact = results(copy.deepcopy(original).double(), x.double())
    eager, found = results(original, x), results(kernelized(original, layer), x)
    for i, tensors in enumerate(zip(found, eager, exact, strict=True)):
        assert_close_to_reference(*tensors, name=str(i))


@pytest.mark.parametrize("name", CASES)
def test_ours_runs(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the original, which is what runs where ours cannot."""
    make, layer = CASES[name]
    original = random_(make(), device)
    monkeypatch.setattr(type(original), "forward", lambda *_: pytest.fail("the original ran"))
    kernelized(original, layer)(torch.randn(2, 48, device=device))


@pytest.mark.parametrize("name", CASES)
def test_compiles_in_one_graph(name: str, device: str) -> None:
    make, layer = CASES[name]
    module = kernelized(random_(make(), device), layer)
    x = torch.randn(2, 5, 48, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("name", CASES)
def test_what_kernels_asks_of_a_layer(name: str) -> None:
    """No state, no constructor, no other method, and a forward of the same arguments."""
    make, layer = CASES[name]
    assert issubclass(layer, torch.nn.Module)
    assert layer.__init__ is torch.nn.Module.__init__
    assert set(dir(layer)) - set(dir(torch.nn.Module)) <= {"can_torch_compile", "has_backward"}
    theirs = inspect.signature(type(make()).forward).parameters.values()
    ours = inspect.signature(layer.forward).parameters.values()
    assert [p.kind for p in ours] == [p.kind for p in theirs]


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (lambda: llama_mlp("relu2"), layers.SwiGLUMLP),
        (lambda: clip_mlp("quick_gelu"), layers.MLP),
    ],
    ids=["relu2", "quick_gelu"],
)
def test_another_activation_runs_the_original(
    make: Callable[[], torch.nn.Module], layer: type[torch.nn.Module], device: str
) -> None:
    original = random_(make(), device)
    x = torch.randn(2, 48, device=device)
    assert torch.equal(kernelized(original, layer)(x), original(x))


def test_a_hook_on_a_part_runs_the_original(device: str) -> None:
    module = kernelized(random_(llama_mlp(), device), layers.SwiGLUMLP)
    calls: list[int] = []
    module.up_proj.register_forward_hook(lambda *_: calls.append(1))
    module(torch.randn(2, 48, device=device))
    assert calls == [1]


def test_inputs_of_another_dtype_run_the_original(device: str) -> None:
    original = random_(llama_norm(), device)
    x = torch.randn(2, 48, device=device, dtype=torch.bfloat16)
    found, expected = kernelized(original, layers.RMSNorm)(x), original(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_dropout_drops(device: str) -> None:
    original = random_(gpt2_mlp(), device).train()
    original.dropout.p = 0.5
    zeros = kernelized(original, layers.GPT2MLP)(torch.randn(8, 48, device=device)) == 0
    assert 0.3 < zeros.float().mean() < 0.7


class TestTheFolder:
    def test_both_backends(self, tmp_path: Path) -> None:
        folder = kernels_hub.write(tmp_path / "new" / "repository")
        assert folder.is_absolute()
        for backend in ("cpu", "cuda"):
            variant = folder / "build" / f"torch-{backend}"
            metadata = json.loads((variant / "metadata.json").read_text("utf-8"))
            assert metadata["backend"] == {"type": backend}
            spec = importlib.util.spec_from_file_location("variant", variant / "__init__.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            assert module.layers is layers
            assert module.flash_attn_varlen_func is fastattn.flash_attn.flash_attn_varlen_func
            for name in kernels_hub.LAYERS:
                assert issubclass(getattr(module.layers, name), torch.nn.Module)

    def test_may_be_written_again(self, tmp_path: Path) -> None:
        assert kernels_hub.write(tmp_path) == kernels_hub.write(str(tmp_path))

    @pytest.mark.parametrize("name", ["a:b", "a=b"])
    def test_a_path_that_the_variable_cannot_hold(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(
            ValueError, match=r"separate entries of LOCAL_KERNELS; got .*name anoth"
        ):
            kernels_hub.write(tmp_path / name)
        assert not any(tmp_path.iterdir())

    def test_without_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "kernels", None)
        with pytest.raises(ImportError, match="pip install kernels"):
            kernels_hub.mapping()


SCRIPT = """
import sys
import kernels, torch
from integrations import tiny
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from fastattn.integrations import kernels_hub

kernels.replace_kernel_forward_from_hub(torch.nn.LayerNorm, "LayerNorm")
kernels.replace_kernel_forward_from_hub(LlamaMLP, "SwiGLUMLP")
kernels.replace_kernel_forward_from_hub(GPT2MLP, "GPT2MLP")
kernels.register_kernel_mapping(kernels_hub.mapping())
for name, whole in (("llama", 7), ("gpt2", 7), ("bert", 6)):
    model, ids = tiny.make(name), tiny.tokens(3, 21)
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    expected = model(ids, attention_mask=mask).logits
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    attention = {} if name == "gpt2" else {"attn_implementation": kernels_hub.REPOSITORY}
    model = type(model).from_pretrained(f"{sys.argv[1]}/{name}", use_kernels=True, **attention)
    found = model.eval()(ids, attention_mask=mask, use_cache=False).logits
    replaced = [
        m for m in model.modules()
        if "fastattn" in getattr(m.__dict__.get("forward"), "__module__", "")
    ]
    assert len(replaced) == whole, (name, len(replaced))
    assert attention.get("attn_implementation", "sdpa") == model.config._attn_implementation
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    print(name, "as before")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="of models on a CPU")
def test_by_transformers_offline(tmp_path: Path) -> None:
    """`use_kernels=True`: norms, MLPs and attentions of ours, and the same logits."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels")
    if not transformers.utils.import_utils.is_kernels_available():
        pytest.skip("transformers takes another version of kernels")
    folder = kernels_hub.write(tmp_path / "repository")
    environment = {
        **os.environ,
        "LOCAL_KERNELS": f"{kernels_hub.REPOSITORY}={folder}",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == [f"{n} as before" for n in ("llama", "gpt2", "bert")]
