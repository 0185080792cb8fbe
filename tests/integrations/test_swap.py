"""The mechanism of accelerate, restore and verify, on PyTorch's own modules."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.tiny import classes, names, random_
from torch.nn.utils import parametrize, prune

import fastattn
from fastattn.integrations import swap, torch_nn
from fastattn.ops.linear.few_rows import mkl_is_slow


class Model(torch.nn.Module):
    """Norms at several depths, one class twice, one configuration twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(6, 16)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)) for _ in range(2)
        )
        self.norm = torch.nn.RMSNorm(16)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.drop(self.norm(x))


@pytest.fixture
def model(device: str) -> torch.nn.Module:
    return random_(Model().to(device))


@pytest.fixture
def x(device: str) -> torch.Tensor:
    return torch.randn(3, 6, device=device)


@pytest.fixture
def fresh_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that change what a class is swapped to."""
    monkeypatch.setattr(swap, "_replacements", {})


def snapshot(model: torch.nn.Module) -> list[dict[str, object]]:
    """Every attribute of every module, tensors and containers by identity."""
    return [
        {
            key: [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else value
            for key, value in module.__dict__.items()
        }
        for module in model.modules()
    ]


class TestAccelerate:
    def test_swaps_what_it_knows_and_lists_the_rest(
        self, model: torch.nn.Module, device: str
    ) -> None:
        report = fastattn.accelerate(model)
        assert names(report.swapped) == ["layers.0.0", "layers.1.0", "norm"]
        assert [e.class_name for e in report.swapped] == ["LayerNorm", "LayerNorm", "RMSNorm"]
        capable = {"triton", "torch"} if device == "cuda" else {"torch"}
        assert {e.backend for e in report.swapped} <= capable
        assert names(report.left) == ["embed", "layers.0.1", "layers.1.1", "drop"]
        reasons = {e.class_name: e.reason for e in report.left}
        assert reasons["Dropout"] == swap.UNKNOWN
        assert reasons["Linear"] is not None and "Linear differs from torch's" in reasons["Linear"]
        assert isinstance(model.norm, torch.nn.RMSNorm)
        assert isinstance(model.norm, fastattn.nn.RMSNorm)
        assert isinstance(model.layers[0][0], fastattn.nn.LayerNorm)

    def test_computes_the_same(self, model: torch.nn.Module, x: torch.Tensor) -> None:
        model.eval()
        expected = model(x)
        fastattn.accelerate(model)
        torch.testing.assert_close(model(x), expected)

    def test_changes_classes_alone(self, model: torch.nn.Module) -> None:
        before, were = snapshot(model), classes(model)
        fastattn.accelerate(model)
        assert snapshot(model) == before
        assert classes(model) != were
        fastattn.restore(model)
        assert snapshot(model) == before
        assert classes(model) == were

    def test_is_idempotent(self, model: torch.nn.Module) -> None:
        first = fastattn.accelerate(model)
        were = classes(model)
        second = fastattn.accelerate(model)
        assert second.swapped == ()
        again = [entry.name for entry in second.left if entry.reason == swap.ALREADY]
        assert again == names(first.swapped)
        assert classes(model) == were

    def test_the_model_itself_may_be_the_module(self) -> None:
        norm = torch.nn.LayerNorm(8)
        assert names(fastattn.accelerate(norm).swapped) == [""]
        assert isinstance(norm, fastattn.nn.LayerNorm)
        assert "(the model itself)" in str(fastattn.accelerate(norm))

    def test_a_module_under_two_names_is_swapped_once(self) -> None:
        norm = torch.nn.LayerNorm(8)
        report = fastattn.accelerate(torch.nn.Sequential(norm, torch.nn.ReLU(), norm))
        assert names(report.swapped) == ["0"]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_any_floating_dtype(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        assert len(fastattn.accelerate(model.to(dtype)).swapped) == 3

    def test_weights_may_be_frozen_zero_or_nan(self, model: torch.nn.Module) -> None:
        """The probe has weights of its own: a checkpoint may be loaded later."""
        model.requires_grad_(False)
        model.norm.weight.fill_(float("nan"))
        model.layers[0][0].weight.zero_()
        assert len(fastattn.accelerate(model).swapped) == 3

    @pytest.mark.parametrize(
        "context",
        [
            torch.no_grad(),
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16),
            torch.device("meta"),
        ],
        ids=["no_grad", "inference_mode", "autocast", "default_device"],
    )
    def test_inside_the_callers_modes(self, model: torch.nn.Module, context: object) -> None:
        with context:  # type: ignore[attr-defined]
            assert len(fastattn.accelerate(model).swapped) == 3

    def test_norm_without_weights(self) -> None:
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 4, dtype=torch.float64),
            torch.nn.LayerNorm((3, 4), elementwise_affine=False),
        )
        assert names(fastattn.accelerate(model).swapped) == ["1"]
        x = torch.randn(2, 3, 4, dtype=torch.float64)
        torch.testing.assert_close(model[1](x), torch.nn.functional.layer_norm(x, (3, 4)))

    def test_nothing_to_swap(self) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        report = fastattn.accelerate(model)
        assert report.swapped == ()
        assert names(report.left) == ["0", "1"]
        assert str(report).startswith("fastattn: nothing swapped")


class Louder(torch.nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def norm_with(**attributes: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        norm = torch.nn.LayerNorm(8)
        for name, value in attributes.items():
            setattr(norm, name, value)
        return norm

    return make


class Special(torch.nn.Parameter):
    pass


def parametrised() -> torch.nn.Module:
    norm = torch.nn.LayerNorm(8)
    parametrize.register_parametrization(norm, "weight", torch.nn.Softplus())
    return norm


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Louder(8), "no LayerNorm: output 0 is off in eval mode"),
        (parametrised, swap.UNKNOWN),
        (lambda: torch.nn.LayerNorm(8, device="meta"), "weight is on the meta device: load"),
        (lambda: fastattn.nn.LayerNorm(8), "already runs on fastattn"),
        (norm_with(forward=lambda x: x), "its forward has been replaced on the instance"),
        (norm_with(_hf_hook=object()), "offloaded by Hugging Face accelerate"),
        (
            norm_with(bias=torch.nn.Parameter(torch.ones(8).bfloat16())),
            "several kinds: torch.bfloat16 on cpu, torch.float32 on cpu",
        ),
        (
            norm_with(weight=torch.nn.Parameter(torch.ones(8).char(), requires_grad=False)),
            r"weight is quantised \(torch.int8\)",
        ),
        (
            norm_with(weight=Special(torch.ones(8))),
            r"weight is a Special \(sharded, quantised or not initialised\)",
        ),
    ],
)
def test_left_alone_with_the_reason(make: object, reason: str) -> None:
    model = torch.nn.Sequential(make(), torch.nn.LayerNorm(4))  # type: ignore[operator]
    before = type(model[0])
    report = fastattn.accelerate(model)
    assert names(report.swapped) == ["1"]
    assert report.left[0].name == "0"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.left[0].reason)
    fastattn.restore(model)
    assert type(model[0]) is before


class TestBadInput:
    @pytest.mark.parametrize("function", [fastattn.accelerate, fastattn.restore, fastattn.verify])
    @pytest.mark.parametrize("given", [None, "gpt2", torch.ones(2), torch.nn.LayerNorm])
    def test_no_module(self, function: object, given: object) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got"):
            function(given)  # type: ignore[operator]

    @pytest.mark.parametrize("argument", ["only", "exclude"])
    def test_names_must_be_several(self, model: torch.nn.Module, argument: str) -> None:
        with pytest.raises(TypeError, match=f"{argument} must be several names.*put it in"):
            fastattn.accelerate(model, **{argument: "norm"})

    @pytest.mark.parametrize("argument", ["only", "exclude"])
    def test_names_must_name_something(self, model: torch.nn.Module, argument: str) -> None:
        before = classes(model)
        with pytest.raises(ValueError, match=f"{argument}: 'nrom' matches no module"):
            fastattn.accelerate(model, **{argument: ["norm", "nrom"]})
        assert classes(model) == before


def test_exclude_takes_a_whole_branch(model: torch.nn.Module) -> None:
    report = fastattn.accelerate(model, exclude=["layers.1", "no*"])
    assert names(report.swapped) == ["layers.0.0"]
    excluded = [entry.name for entry in report.left if entry.reason == "excluded by the caller"]
    assert excluded == ["layers.1.0", "layers.1.1", "norm"]


@pytest.mark.parametrize(
    ("module", "part"),
    [
        (lambda: torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), "linear1"),
        (lambda: torch.nn.MultiheadAttention(16, 2), "out_proj"),
        (lambda: torch.nn.Sequential(*_mlp()), "0"),
        (lambda: torch.nn.Sequential(*_mlp()), "1"),
    ],
    ids=["encoder layer", "attention", "MLP's layer", "MLP's activation"],
)
def test_exclude_of_a_part_leaves_what_would_compute_it(module: Any, part: str) -> None:
    assert "whole" in [entry.name for entry in fastattn.accelerate(_Holding(module())).swapped]
    report = fastattn.accelerate(_Holding(module()), exclude=[f"whole.{part}"])
    assert "whole" not in [entry.name for entry in report.swapped]
    reasons = {entry.name: entry.reason for entry in report.left}
    assert reasons["whole"] == "a part of it is excluded by the caller"


class _Holding(torch.nn.Module):
    def __init__(self, whole: torch.nn.Module) -> None:
        super().__init__()
        self.whole = whole


def _mlp() -> list[torch.nn.Module]:
    return [torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)]


def test_only_takes_a_whole_branch_and_exclude_is_stronger(model: torch.nn.Module) -> None:
    report = fastattn.accelerate(model, only=["layers", "norm"], exclude=["layers.1"])
    assert names(report.swapped) == ["layers.0.0", "norm"]
    not_asked = [entry.name for entry in report.left if "only=" in (entry.reason or "")]
    assert not_asked == ["embed"]
    # A later call swaps more.
    assert names(fastattn.accelerate(model, only=["layers.1"]).swapped) == ["layers.1.0"]
    assert fastattn.accelerate(model, only=[]).swapped == ()


class Wrong(fastattn.nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input) * 1.001


class Failing(fastattn.nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        raise fastattn.UnsupportedError("not today")


class TestProofDecides:
    @pytest.mark.parametrize(
        ("mixin", "reason"),
        [
            (Wrong, r"output 0 is off in eval mode: max error .* against float64"),
            (Failing, "the replacement fails on random input: UnsupportedError: not today"),
        ],
    )
    def test_what_fails_is_left_alone(
        self,
        model: torch.nn.Module,
        fresh_classes: None,
        monkeypatch: pytest.MonkeyPatch,
        mixin: type,
        reason: str,
    ) -> None:
        row = dataclasses.replace(torch_nn.TABLE[torch.nn.LayerNorm], mixin=mixin)
        monkeypatch.setitem(torch_nn.TABLE, torch.nn.LayerNorm, row)
        report = fastattn.accelerate(model)
        assert names(report.swapped) == ["norm"]
        assert [type(layer[0]) for layer in model.layers] == [torch.nn.LayerNorm] * 2
        for entry in report.left[1], report.left[3]:
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(entry.reason)

    def test_a_backend_that_cannot_is_a_reason(self, model: torch.nn.Module) -> None:
        with fastattn.use_backend("cuda"):
            report = fastattn.accelerate(model)
        assert report.swapped == ()
        assert "UnsupportedError" in (report.left[1].reason or "")

    def test_verify_raises_when_the_proof_no_longer_holds(
        self, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fastattn.accelerate(model)
        forward = torch.nn.RMSNorm.forward
        monkeypatch.setattr(fastattn.nn.RMSNorm, "forward", lambda *args: 1.01 * forward(*args))
        with pytest.raises(RuntimeError, match=r"norm \(RMSNorm\): output 0 is off"):
            fastattn.verify(model)

    def test_verify_proves_the_model_as_it_is_now(self, model: torch.nn.Module) -> None:
        accelerated = fastattn.accelerate(model, exclude=["layers.0"])
        model.bfloat16()
        report = fastattn.verify(model)
        assert report.swapped == accelerated.swapped
        assert {entry.name: entry.reason for entry in report.left} == {
            "embed": "not accelerated",
            "layers.0.0": "not accelerated",
            "layers.0.1": "not accelerated",
            "layers.1.1": "not accelerated",
            "drop": swap.UNKNOWN,
        }

    def test_verify_of_a_plain_model_proves_nothing(self, model: torch.nn.Module) -> None:
        assert fastattn.verify(model).swapped == ()


def test_all_or_nothing(
    model: torch.nn.Module, fresh_classes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of three modules refuses its new class."""

    class Other(torch.nn.RMSNorm):
        __slots__ = ("layout_differs",)

    real = swap.replacement

    def replacement(original: type[torch.nn.Module], *rest: Any) -> type[torch.nn.Module]:
        return Other if original is torch.nn.RMSNorm else real(original, *rest)

    monkeypatch.setattr(swap, "replacement", replacement)
    monkeypatch.setattr(swap, "mismatch", lambda *_: None)
    before = classes(model)
    with pytest.raises(TypeError, match="layout"):
        fastattn.accelerate(model)
    assert classes(model) == before


class TestRestore:
    def test_a_plain_model_is_not_touched(self, model: torch.nn.Module) -> None:
        before = classes(model)
        fastattn.restore(model)
        assert classes(model) == before

    def test_refuses_a_class_put_over_ours(self, model: torch.nn.Module) -> None:
        fastattn.accelerate(model)
        parametrize.register_parametrization(model.norm, "weight", torch.nn.Softplus())
        before = classes(model)
        with pytest.raises(RuntimeError, match=r"'norm' .* made a ParametrizedFastRMSNorm by an"):
            fastattn.restore(model)
        assert classes(model) == before
        parametrize.remove_parametrizations(model.norm, "weight")
        fastattn.restore(model)
        assert type(model.norm) is torch.nn.RMSNorm


def saved(model: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
        saved,
    ],
    ids=["deep copy", "pickle", "old pickle", "saved"],
)
def test_copies_are_accelerated_and_restorable(
    model: torch.nn.Module, x: torch.Tensor, copied: object
) -> None:
    plain = classes(model)
    fastattn.accelerate(model)
    twin = copied(model.eval())  # type: ignore[operator]
    assert classes(twin) == classes(model)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert twin.norm.weight is not model.norm.weight
    fastattn.restore(twin)
    assert classes(twin) == plain
    assert classes(model) != plain


def test_compiles_in_one_graph(model: torch.nn.Module, x: torch.Tensor) -> None:
    model.eval()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    fastattn.accelerate(compiled)  # through the wrapper, after the first compilation
    assert isinstance(model.norm, fastattn.nn.RMSNorm)
    torch.testing.assert_close(compiled(x), expected)


def test_another_process_without_transformers(tmp_path: Path) -> None:
    """A pickle opens there, accelerate works, and what needs transformers says so."""
    norm = torch.nn.LayerNorm(8)
    fastattn.accelerate(norm)
    (tmp_path / "norm.pickle").write_bytes(pickle.dumps(norm))
    code = f"""
import pickle, sys
sys.modules["transformers"] = None
import fastattn
norm = pickle.load(open({str(tmp_path / "norm.pickle")!r}, "rb"))
print(type(norm).__name__, isinstance(norm, fastattn.nn.LayerNorm))
fastattn.restore(norm)
print(type(norm))
print(len(fastattn.accelerate(norm).swapped))
try:
    import fastattn.integrations.huggingface
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "FastLayerNorm True",
        "<class 'torch.nn.modules.normalization.LayerNorm'>",
        "1",
        "fastattn.integrations.huggingface needs transformers 5 or later: "
        'pip install "fastattn[hf]"',
    ]


ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="of linear layers on a CPU")


def _large_linears() -> torch.nn.Module:
    return random_(torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 8)))


@ON_A_CPU
@pytest.mark.skipif(not mkl_is_slow(), reason="F.linear is not slow on this processor")
def test_large_linear_layers_where_the_library_is_slow() -> None:
    """Decoding takes another path through them; the results are those of torch's."""
    model = _large_linears()
    x = torch.randn(1, 1, 256)
    with torch.no_grad():
        before = model(x)
        assert names(fastattn.accelerate(model).swapped) == ["0"]
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-3)
    fastattn.restore(model)
    assert type(model[0]) is torch.nn.Linear


@ON_A_CPU
def test_large_linear_layers_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.integrations.torch_nn.mkl_is_slow", lambda: False)
    model = _large_linears()
    report = fastattn.accelerate(model)
    assert not report.swapped and type(model[0]) is torch.nn.Linear
    reasons = {entry.name: entry.reason for entry in report.left}
    assert "F.linear is as fast here" in (reasons["0"] or "")


@ON_A_CPU
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("slow", [True, False])
def test_linear_layers_are_quantised_after_all(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    """By tools that look for exactly torch.nn.Linear."""
    monkeypatch.setattr("fastattn.integrations.torch_nn.mkl_is_slow", lambda: slow)
    model = _large_linears()
    expected = torch.ao.quantization.quantize_dynamic(model)
    fastattn.accelerate(model)
    quantised = torch.ao.quantization.quantize_dynamic(model)
    assert [type(part) for part in quantised] == [type(part) for part in expected]
    x = torch.randn(3, 256)
    assert torch.equal(quantised(x), expected(x))


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "computed before each forward"),
        (torch.nn.utils.weight_norm, "computed before each forward"),
        (
            lambda m: setattr(m, "weight", torch.nn.Parameter(m.weight.detach().to_sparse())),
            "weight is not dense",
        ),
    ],
    ids=["pruned", "weight norm", "sparse"],
)
def test_computed_and_sparse_weights_are_left_alone(
    change: Callable[[torch.nn.Module], object], reason: str
) -> None:
    for module in (torch.nn.Linear(256, 512), torch.nn.LayerNorm(16)):
        change(module)
        (left,) = fastattn.accelerate(module).left
        assert left.reason is not None and reason in left.reason
