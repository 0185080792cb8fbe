"""accelerate on transformers' GPT-2: what is swapped, and that nothing else can be noticed."""

from __future__ import annotations

import copy
import hashlib
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.tiny import classes
from transformers import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
from transformers.pytorch_utils import Conv1D

import fastattn
from fastattn.integrations import Report, swap
from oracle import assert_close_to_reference

HEADS = [
    GPT2Model,
    GPT2LMHeadModel,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2ForQuestionAnswering,
]


def counts(report: Report) -> dict[str, int]:
    """Of the classes, but for the head (tests/integrations/hypotheses/test_head.py)."""
    return Counter(entry.class_name for entry in report.swapped if entry.name != "lm_head")


def reasons(report: Report) -> dict[str, str]:
    return {entry.name: entry.reason or "" for entry in report.left}


def results(model: PreTrainedModel, tokens: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
    """First output, and the gradient of every weight under a fixed loss."""
    model.zero_grad()
    given = {
        name: x.to(model.dtype) if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    out = model(tokens, use_cache=False, **given)
    first = out.last_hidden_state if "last_hidden_state" in out else out[0]
    weights = torch.linspace(-1, 1, first.numel(), dtype=torch.float64).to(first.device)
    (first * weights.reshape(first.shape).to(first.dtype)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": first.detach(), **gradients}


def assert_as_exact(model: PreTrainedModel, tokens: torch.Tensor, **inputs: Any) -> None:
    """Accelerate a copy of `model` and hold it, outputs and gradients, to the numeric rule."""
    ours = copy.deepcopy(model)
    assert fastattn.accelerate(ours).swapped
    exact = copy.deepcopy(model).double()
    expected = results(exact, tokens, **inputs)
    theirs = results(model, tokens, **inputs)
    found = results(ours, tokens, **inputs)
    assert found.keys() == theirs.keys() == expected.keys()
    assert len(found) > 25
    for name in found:
        assert_close_to_reference(found[name], theirs[name], expected[name], name=name)


class TestWhatIsSwapped:
    @pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
    def test_every_head(self, make_gpt2: Any, tokens: torch.Tensor, cls: type) -> None:
        model = make_gpt2(cls)
        plain = classes(model)
        with torch.no_grad():
            expected = model(tokens)
        report = fastattn.accelerate(model)
        assert counts(report) == {"LayerNorm": 5, "GPT2Attention": 2, "GPT2MLP": 2}
        capable = {"triton", "torch"} if tokens.is_cuda else {"torch"}
        assert {entry.backend for entry in report.swapped} <= capable
        prefix = "" if cls is GPT2Model else "transformer."
        assert reasons(report)[f"{prefix}wte"] == "fastattn has nothing for this class"
        with torch.no_grad():
            found = model(tokens)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
        fastattn.restore(model)
        assert classes(model) == plain
        with torch.no_grad():
            torch.testing.assert_close(model(tokens)[0], expected[0], rtol=0, atol=0)

    def test_the_fused_ops_run(self, make_gpt2: Any, tokens: torch.Tensor) -> None:
        """A backend that no op has shows in which module each op is called."""
        model = make_gpt2()
        fastattn.accelerate(model)
        block = model.transformer.h[0]
        x = torch.randn(1, 4, 48, device=tokens.device)
        for module in (block.ln_1, block.attn, block.mlp):
            module(x)
            with fastattn.use_backend("cuda"), pytest.raises(fastattn.UnsupportedError):
                module(x)

    def test_eager_attention_is_left_alone(self, make_gpt2: Any, tokens: torch.Tensor) -> None:
        model = make_gpt2(attn_implementation="eager", reorder_and_upcast_attn=True)
        expected = model(tokens, output_attentions=True)
        report = fastattn.accelerate(model)
        assert counts(report) == {"LayerNorm": 5, "GPT2MLP": 2}
        assert "attn_implementation='eager'" in reasons(report)["transformer.h.0.attn"]
        found = model(tokens, output_attentions=True)
        torch.testing.assert_close(found.attentions, expected.attentions)
        model.set_attn_implementation("sdpa")  # the fix that the reason names
        assert counts(fastattn.accelerate(model)) == {"GPT2Attention": 2}

    @pytest.mark.parametrize(
        "name", ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh",
                 "gelu", "gelu_python", "relu", "silu", "swish"],
    )  # fmt: skip
    def test_activations(self, make_gpt2: Any, tokens: torch.Tensor, name: str) -> None:
        model = make_gpt2(activation_function=name)
        x = torch.randn(2, 5, 48, device=tokens.device)
        expected = model.transformer.h[0].mlp(x)
        assert counts(fastattn.accelerate(model))["GPT2MLP"] == 2
        torch.testing.assert_close(model.transformer.h[0].mlp(x), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["quick_gelu", "gelu_10", "mish", "relu2", "tanh"])
    def test_other_activations_are_left_alone(self, make_gpt2: Any, name: str) -> None:
        report = fastattn.accelerate(make_gpt2(activation_function=name))
        assert counts(report) == {"LayerNorm": 5, "GPT2Attention": 2}
        assert "its activation" in reasons(report)["transformer.h.1.mlp"]

    def test_inside_inference_mode(self, make_gpt2: Any) -> None:
        with torch.inference_mode():
            report = fastattn.accelerate(make_gpt2())
        assert counts(report) == {"LayerNorm": 5, "GPT2Attention": 2, "GPT2MLP": 2}

    def test_one_proof_for_each_configuration(
        self, make_gpt2: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proven: list[str] = []
        mismatch = fastattn.integrations.swap.mismatch

        def counted(module: torch.nn.Module, original: type, *rest: Any) -> str | None:
            proven.append(original.__name__)
            return mismatch(module, original, *rest)

        monkeypatch.setattr(fastattn.integrations.swap, "mismatch", counted)
        fastattn.accelerate(make_gpt2(n_layer=4))
        # A hypothesis in two dtypes.
        expected = {"GPT2Attention": 2, "GPT2MLP": 2, "LayerNorm": 1, "Linear": 2}
        assert Counter(proven) == expected
        proven.clear()
        # Here every layer scales its scores otherwise.
        fastattn.accelerate(make_gpt2(n_layer=4, scale_attn_by_inverse_layer_idx=True))
        assert proven.count("GPT2Attention") == 2 * 4


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "changes",
        [{}, {"n_inner": 40, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}],
        ids=["default", "scaling"],
    )
    def test_outputs_and_gradients(
        self, make_gpt2: Any, tokens: torch.Tensor, dtype: torch.dtype, changes: dict[str, Any]
    ) -> None:
        # Smaller weights: bfloat16 through a whole network is a matter of luck otherwise.
        model = make_gpt2(GPT2Model, initializer_range=0.1, **changes).to(dtype)
        assert_as_exact(model, tokens)

    def test_packed_sequences_that_sdpa_overlooks(
        self, make_gpt2: Any, tokens: torch.Tensor
    ) -> None:
        """With a cache it makes no mask of position_ids, and cu_seq_lens it never reads."""
        model = make_gpt2()
        places = torch.cat([torch.arange(9), torch.arange(12)])[None].to(tokens)
        starts = torch.tensor([0, 9, 21], dtype=torch.int32, device=tokens.device)
        for given in ({"position_ids": places}, {"cu_seq_lens_q": starts, "use_cache": False}):
            expected = model(tokens[:1], **given).logits
            ours = copy.deepcopy(model)
            fastattn.accelerate(ours)
            found = ours(tokens[:1], **given).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_cross_attention(self, make_gpt2: Any, tokens: torch.Tensor) -> None:
        model = make_gpt2(GPT2Model, add_cross_attention=True)
        encoded = torch.randn(3, 9, 48, device=tokens.device, dtype=torch.float64)
        mask = torch.ones(3, 9, dtype=torch.long, device=tokens.device)
        mask[2, 6:] = 0
        swapped = counts(fastattn.accelerate(copy.deepcopy(model)))
        assert swapped == {"LayerNorm": 7, "GPT2Attention": 4, "GPT2MLP": 2}
        for attention_mask in (None, mask):
            encoder = {"encoder_hidden_states": encoded, "encoder_attention_mask": attention_mask}
            assert_as_exact(model, tokens, **encoder)

    def test_dropout_drops(self, make_gpt2: Any, tokens: torch.Tensor) -> None:
        model = make_gpt2(GPT2Model, attn_pdrop=0.3, resid_pdrop=0.3)
        fastattn.accelerate(model)
        x = torch.randn(2, 9, 48, device=tokens.device)
        for module in (model.h[0].mlp, model.h[0].attn):
            out = module(x)
            still = out if isinstance(out, torch.Tensor) else out[0]
            dropped = module.train()(x)
            dropped = dropped if isinstance(dropped, torch.Tensor) else dropped[0]
            share = (dropped == 0).float().mean().item()
            assert 0.2 < share < 0.4
            assert (still == 0).float().mean().item() < 0.01

    def test_autocast(self, make_gpt2: Any, tokens: torch.Tensor) -> None:
        model = make_gpt2()
        with torch.autocast(tokens.device.type, torch.bfloat16):
            expected = model(tokens, labels=tokens)
            fastattn.accelerate(model)
            found = model(tokens, labels=tokens)
        assert found.logits.dtype == expected.logits.dtype
        exact = copy.deepcopy(model)
        fastattn.restore(exact)
        reference = exact.double()(tokens).logits
        assert_close_to_reference(found.logits, expected.logits, reference, name="logits")
        found.loss.backward()
        assert model.transformer.wte.weight.grad.isfinite().all()


class TestNothingElseChanges:
    def test_tensors_names_and_config(self, make_gpt2: Any) -> None:
        model = make_gpt2()
        config = copy.deepcopy(model.config)
        state = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
        names = [name for name, _ in model.named_modules()]
        fastattn.accelerate(model)
        assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == state
        assert [name for name, _ in model.named_modules()] == names
        assert model.config == config
        assert model.config._attn_implementation == "sdpa"
        attention = model.transformer.h[0].attn
        assert attention.__dict__["config"] is model.config
        assert attention.config.n_embd == model.config.n_embd
        block = model.transformer.h[0]
        assert isinstance(block.attn, GPT2Attention)
        assert isinstance(block.mlp, GPT2MLP)
        assert isinstance(block.ln_1, torch.nn.LayerNorm)
        assert model.lm_head.weight is model.transformer.wte.weight

    def test_the_config_of_a_module_is_live(self, make_gpt2: Any) -> None:
        model = make_gpt2()
        fastattn.accelerate(model)
        attention = model.transformer.h[0].attn
        attention.config.note = "written through"
        assert model.config.note == "written through"
        twin = copy.deepcopy(attention.config)
        assert (twin.note, twin._attn_implementation) == ("written through", "fastattn")
        twin.note = "of the copy"
        assert model.config.note == "written through"
        other = GPT2Config(n_embd=8)
        attention.config = other
        assert attention.config.n_embd == 8
        assert attention.__dict__["config"] is other

    def test_models_that_share_a_config(self, make_gpt2: Any, tokens: torch.Tensor) -> None:
        model = make_gpt2()
        twin = GPT2LMHeadModel(model.config)
        fastattn.accelerate(model)
        assert type(twin.transformer.h[0].attn) is GPT2Attention
        assert twin.transformer.h[0].attn.config._attn_implementation == "sdpa"

    def test_save_pretrained_writes_the_same_bytes(self, make_gpt2: Any, tmp_path: Path) -> None:
        def digests(model: PreTrainedModel, folder: Path) -> dict[str, str]:
            model.save_pretrained(folder)
            return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}

        model = make_gpt2()
        before = digests(model, tmp_path / "before")
        fastattn.accelerate(model)
        assert digests(model, tmp_path / "after") == before
        assert "model.safetensors" in before
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "after")
        assert type(loaded.transformer.h[0].mlp) is GPT2MLP

    def test_hooks_fire_and_see_the_same(self, make_gpt2: Any, tokens: torch.Tensor) -> None:
        model = make_gpt2()
        seen: list[tuple[str, torch.Tensor]] = []
        for name in ("ln_1", "attn", "attn.c_attn", "attn.c_proj", "mlp", "mlp.dropout"):
            model.transformer.h[0].get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: seen.append(
                    (name, (out if isinstance(out, torch.Tensor) else out[0]).detach())
                )
            )
        model(tokens)
        expected = list(seen)
        seen.clear()
        fastattn.accelerate(model)
        assert seen == []
        model(tokens)
        assert [name for name, _ in seen] == [name for name, _ in expected]
        for (name, found), (_, value) in zip(seen, expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4, msg=name)

    def test_hidden_states_are_captured(self, make_gpt2: Any, tokens: torch.Tensor) -> None:
        model = make_gpt2()
        expected = model(tokens, output_hidden_states=True).hidden_states
        fastattn.accelerate(model)
        found = model(tokens, output_hidden_states=True).hidden_states
        assert len(found) == len(expected) == 3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_the_user_may_set_another_implementation(
        self, make_gpt2: Any, tokens: torch.Tensor
    ) -> None:
        model = make_gpt2()
        fastattn.accelerate(model)
        with pytest.raises(ValueError, match="output_attentions: fastattn never forms"):
            model(tokens, output_attentions=True)
        model.set_attn_implementation("eager")
        assert len(model(tokens, output_attentions=True).attentions) == 2
        left = reasons(fastattn.verify(model))
        assert left["transformer.h.1.attn"].startswith("runs as the original: its config says")

    def test_copies(self, make_gpt2: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
        model = make_gpt2()
        plain = classes(model)
        fastattn.accelerate(model)
        expected = model(tokens).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert classes(twin) == classes(model)
            torch.testing.assert_close(twin(tokens).logits, expected, rtol=0, atol=0)
            assert twin.transformer.h[0].attn.__dict__["config"] is twin.config
            assert twin.lm_head.weight is twin.transformer.wte.weight
            fastattn.restore(twin)
            assert classes(twin) == plain

    def test_a_pickle_opens_in_another_process(
        self, make_gpt2: Any, tokens: torch.Tensor, tmp_path: Path
    ) -> None:
        model = make_gpt2().cpu()
        fastattn.accelerate(model)
        torch.save((model, tokens.cpu(), model(tokens.cpu()).logits), tmp_path / "model.pt")
        code = (
            f"import torch; model, tokens, expected = torch.load({str(tmp_path / 'model.pt')!r}, "
            "weights_only=False); torch.testing.assert_close(model(tokens).logits, expected); "
            "print(type(model.transformer.h[0].attn).__name__)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "FastGPT2Attention"


class LowRank(torch.nn.Module):
    """A wrapper as adapters put it in the place of a layer."""

    def __init__(self, layer: Conv1D) -> None:
        super().__init__()
        self.layer = layer
        self.weight = layer.weight  # adapters forward it: no proof that the layer is plain
        self.bias = layer.bias
        self.delta = torch.nn.Parameter(torch.full((layer.nx, layer.nf), 0.01))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.delta.to(x.device)


class TestWhatIsPutInside:
    """A fused MLP passes its projections by: whatever must not be passed by is respected."""

    def test_before_accelerate(self, make_gpt2: Any) -> None:
        model = make_gpt2()
        model.transformer.h[0].mlp.c_fc = LowRank(model.transformer.h[0].mlp.c_fc)
        model.transformer.h[1].mlp.act.register_forward_hook(lambda *_: None)
        report = fastattn.accelerate(model)
        assert counts(report) == {"LayerNorm": 5, "GPT2Attention": 2}
        assert "transformer.h.0.mlp" not in reasons(report)  # no MLP that is known: its parts are
        assert reasons(report)["transformer.h.0.mlp.c_proj"] == swap.UNKNOWN
        assert reasons(report)["transformer.h.1.mlp"].startswith("act is a NewGELUActivation")

    def test_after_accelerate(self, make_gpt2: Any, tokens: torch.Tensor) -> None:
        model = make_gpt2()
        plain = copy.deepcopy(model)
        fastattn.accelerate(model)
        calls: list[str] = []
        for m in (model, plain):
            first, second = m.transformer.h[0].mlp, m.transformer.h[1].mlp
            first.c_proj = LowRank(first.c_proj)
            second.c_fc.register_forward_hook(lambda *_: calls.append("c_fc"))
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)
        assert calls == ["c_fc", "c_fc"]
        report = fastattn.verify(model)
        assert counts(report) == {"LayerNorm": 5, "GPT2Attention": 2}
        left = reasons(report)
        assert left["transformer.h.0.mlp"].startswith("runs as the original: c_proj is a LowRank")
        assert left["transformer.h.1.mlp"].startswith("runs as the original: c_fc is a Conv1D")

    def test_adapters_around_the_attention(self, make_gpt2: Any, tokens: torch.Tensor) -> None:
        """Attention runs its own forward, so its projections may be anything."""
        model = make_gpt2()
        attention = model.transformer.h[0].attn
        attention.c_attn = LowRank(attention.c_attn)
        expected = model(tokens).logits
        assert counts(fastattn.accelerate(model))["GPT2Attention"] == 2
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


class TestTorchFeatures:
    @pytest.mark.parametrize(
        "training", [pytest.param(False, marks=pytest.mark.long), True], ids=["eval", "train"]
    )
    def test_compiles_in_one_graph(
        self, make_gpt2: Any, tokens: torch.Tensor, training: bool
    ) -> None:
        torch.compiler.reset()
        model = make_gpt2().train(training)
        fastattn.accelerate(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

        def run(module: torch.nn.Module) -> tuple[torch.Tensor, ...]:
            model.zero_grad()
            logits = module(tokens, use_cache=False).logits
            logits.square().mean().backward()
            return logits, *(p.grad.clone() for p in model.parameters())

        torch.testing.assert_close(run(compiled), run(model), rtol=1e-4, atol=1e-4)

    @pytest.mark.long  # test_transformer_block.py has one of ours, test_rotary.py an attention
    def test_a_block_alone_compiles_in_one_graph(
        self, make_gpt2: Any, tokens: torch.Tensor
    ) -> None:
        torch.compiler.reset()
        model = make_gpt2(GPT2Model)
        fastattn.accelerate(model)
        x = torch.randn(2, 9, 48, device=tokens.device)
        compiled = torch.compile(model.h[0], fullgraph=True, backend="aot_eager", dynamic=True)
        for length in (9, 7, 5):
            torch.testing.assert_close(compiled(x[:, :length]), model.h[0](x[:, :length]))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(
        self, make_gpt2: Any, tokens: torch.Tensor, reentrant: bool
    ) -> None:
        model = make_gpt2(attn_pdrop=0.1, resid_pdrop=0.1).train()
        fastattn.accelerate(model)

        def gradients() -> list[torch.Tensor]:
            torch.manual_seed(3)
            model.zero_grad()
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            return [p.grad.clone() for p in model.parameters()]

        expected = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(gradients(), expected)
