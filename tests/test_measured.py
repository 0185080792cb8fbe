"""The table of what was measured: it moves the automatic choice, and nothing else."""

from __future__ import annotations

import datetime
import json
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn import backends, measured, user_cache
from fastattn.backends import explanation_of
from fastattn.measured import Faster, Key
from fastattn.ops.attention import interface as attention_interface
from fastattn.ops.attention.cache.problem import describe
from fastattn.ops.attention.problem import describe as describe_attention
from fastattn.ops.ffn import interface as ffn_interface
from fastattn.ops.ffn.cuda import PRODUCT
from fastattn.ops.ffn.problem import describe as describe_ffn
from fastattn.ops.layer_norm import aten, reference
from fastattn.ops.layer_norm import interface as norm_interface
from fastattn.ops.layer_norm.problem import describe_layer_norm, describe_rms_norm

DATE = "2026-11-26"
INTERFACES = (attention_interface, ffn_interface, norm_interface)

Plant = Callable[..., None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts a row of the `torch` backend on a CPU into a table of its own."""
    monkeypatch.setattr(measured, "TABLE", {})
    for interface in INTERFACES:
        interface._dispatch.plans.clear()

    def put(
        op: str, *, grad: bool | None = None, device: str = "cpu", dtype: str = "float32",
        **limits: int,
    ) -> None:  # fmt: skip
        key = Key(op, "torch", dtype, grad, device)
        measured.TABLE[key] = Faster("reference", DATE, **limits)

    return put


def ffn_inputs(grad: bool = False) -> tuple[torch.Tensor, ...]:
    """12 x 8 multiplications."""
    shapes = ((3, 4), (8, 4), (8,), (4, 8), (4,))
    return tuple(torch.randn(shape, requires_grad=grad) for shape in shapes)


def qkv(grad: bool = False) -> tuple[torch.Tensor, ...]:
    """2 * 5 * 3 * 8 * 7 = 1680 multiplications."""
    shapes = ((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8))
    return tuple(torch.randn(shape, requires_grad=grad) for shape in shapes)


def test_rows_name_what_there_is() -> None:
    """Of the real table: a key that nothing has would never be found."""
    for key, row in measured.TABLE.items():
        of = Key(*key)
        assert of.backend in backends.KERNELS
        assert of.op.startswith(PRODUCT) or of.op in (
            "attention", "attention_with_kv_cache", "ffn", "layer_norm", "rms_norm",
        )  # fmt: skip
        assert isinstance(getattr(torch, of.dtype), torch.dtype)
        assert (of.needs_grad is None) == (of.op.endswith("norm") or of.op.startswith(PRODUCT))
        datetime.date.fromisoformat(row.date)


def test_the_automatic_choice_declines_and_explain_says_why(plant: Plant) -> None:
    x = torch.randn(3, 7)
    assert explanation_of(fastattn.layer_norm, x).backend == "torch"
    plant("layer_norm", least=22)
    explanation = explanation_of(fastattn.layer_norm, x)
    assert explanation.backend == "reference"
    reason = f"not faster than reference below 22 elements (cpu, {DATE})"
    assert explanation.reasons["torch"] == reason
    assert reason in str(explanation)


@pytest.mark.parametrize(
    ("rows", "limits", "backend"),
    [
        (2, {"least": 22}, "reference"),
        (3, {"least": 21}, "torch"),  # its 21 elements are not below
        (4, {"least": 22}, "torch"),
        (3, {"most": 21}, "torch"),
        (4, {"most": 21}, "reference"),
        (1, {"least": 8, "most": 21}, "reference"),
        (2, {"least": 8, "most": 21}, "torch"),
        (4, {"least": 8, "most": 21}, "reference"),
    ],
)
def test_limits(rows: int, limits: dict[str, int], backend: str, plant: Plant) -> None:
    plant("layer_norm", **limits)
    assert explanation_of(fastattn.layer_norm, torch.randn(rows, 7)).backend == backend


def test_the_call_runs_what_explain_says(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def spying(name: str, run: Any) -> Any:
        def spy(*inputs: Any) -> Any:
            ran.append(name)
            return run(*inputs)

        return spy

    monkeypatch.setattr(aten, "forward", spying("aten", aten.forward))
    monkeypatch.setattr(reference, "forward", spying("reference", reference.forward))
    plant("rms_norm", dtype="float64", least=22)
    x = torch.randn(3, 7).double()
    fastattn.rms_norm(x)
    fastattn.rms_norm(x)
    fastattn.rms_norm(x, backend="torch")
    with fastattn.use_backend("torch"):
        fastattn.rms_norm(x)
    fastattn.layer_norm(x)
    assert ran == ["reference", "reference", "aten", "aten", "aten"]


def test_other_devices_dtypes_and_ops_are_not_meant(plant: Plant) -> None:
    plant("layer_norm", least=22)
    plant("rms_norm", least=22, device="NVIDIA H200")
    x = torch.randn(3, 7)
    assert explanation_of(fastattn.layer_norm, x.bfloat16()).backend == "torch"
    assert explanation_of(fastattn.rms_norm, x).backend == "torch"
    assert explanation_of(fastattn.ffn, *ffn_inputs()).backend == "torch"


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("op", ["ffn", "attention"])
def test_with_and_without_gradients_are_two_measurements(
    op: str, wanted: bool, plant: Plant
) -> None:
    plant(op, grad=wanted, least=10_000)
    inputs = ffn_inputs if op == "ffn" else qkv
    for grad in (False, True):
        backend = explanation_of(getattr(fastattn, op), *inputs(grad)).backend
        assert backend == ("reference" if grad == wanted else "torch")


def test_sizes() -> None:
    x = torch.randn(3, 7)
    assert describe_layer_norm(x).elements == describe_rms_norm(x).elements == 21
    assert describe_ffn(*ffn_inputs()).elements == 96
    assert describe_ffn(*ffn_inputs(), recompute=True).elements is None
    assert describe_ffn(*ffn_inputs(), gate=torch.randn(8, 4)).elements is None
    assert describe_attention(*qkv()).elements == 1680
    assert describe_attention(*qkv(), causal=True).elements == 1680


@pytest.mark.parametrize(
    "more",
    [
        {"window": (3, 0)},
        {"window": (-1, 2)},
        {"softcap": 3.0},
        {"dropout_p": 0.1},
        {"fp32_precision": "tf32x3"},
        {"return_lse": True},
        {"alibi_slopes": torch.ones(3)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_is_not_measured_has_no_size(more: dict[str, Any], plant: Plant) -> None:
    plant("attention", grad=False, least=10_000)
    assert describe_attention(*qkv(), **more).elements is None
    for reason in explanation_of(fastattn.attention, *qkv(), **more).reasons.values():
        assert "not faster" not in (reason or "")


def test_compiled_graphs_know_no_size(plant: Plant) -> None:
    """One graph for both sides of the limit, and it holds ATen's op."""
    plant("layer_norm", least=30)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(fastattn.layer_norm, backend=keep, dynamic=True, fullgraph=True)
    for rows in (3, 5):
        x = torch.randn(rows, 7)
        torch.testing.assert_close(compiled(x), torch.layer_norm(x, (7,)))
    assert len(graphs) == 1
    assert "torch.layer_norm(" in graphs[0].code


def test_the_backward_of_a_kernel_does_not_ask(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It follows a forward that has kept its own things: there must be a kernel for it."""
    problem = describe_layer_norm(torch.randn(3, 7))
    module = types.ModuleType("kernels")
    module.unsupported = lambda problem: None  # type: ignore[attr-defined]
    monkeypatch.setattr(backends, "triton_unavailable", lambda device: None)
    triton = backends.Backend("triton", lambda: module)
    measured.TABLE[Key("layer_norm", "triton", "float32", None, "cpu")] = Faster("torch", DATE, 22)
    assert measured.declined("triton", problem) is not None
    assert backends.select_backward("layer_norm", (triton,), problem, "triton", False) is module


def test_names_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured.devices(torch.device("cpu")) == ("cpu",)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measured.devices(cuda) == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert measured.devices(cuda) == ("NVIDIA H200", "sm_90")


def test_the_more_precise_name_counts(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "devices", lambda device: ("NVIDIA H200", "sm_90"))
    problem = describe_layer_norm(torch.randn(3, 7))
    plant("layer_norm", device="sm_90", least=22)
    assert measured.declined("torch", problem) is not None
    plant("layer_norm", device="NVIDIA H200", least=3)
    assert measured.declined("torch", problem) is None


# --- kernels that are chosen only where they were measured ----------------------------------------

GPU = "NVIDIA H200"
KEY = Key("ffn", "cuda", "bfloat16", False, GPU)


def problem(elements: Any = 50) -> Any:
    return types.SimpleNamespace(
        op="ffn", dtype=torch.bfloat16, needs_grad=False, elements=elements,
        device=torch.device("cuda", 0),
    )  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "devices", lambda device: (GPU, "sm_90"))
    monkeypatch.setattr(measured, "TABLE", {})


def test_what_nobody_measured_is_not_chosen(gpu: None) -> None:
    reason = "not measured on this GPU: name backend='cuda' to use it"
    assert measured.declined("cuda", problem()) == reason
    measured.TABLE[KEY._replace(dtype="float16")] = Faster("triton", DATE)
    assert measured.declined("cuda", problem()) == reason
    assert measured.declined("triton", problem()) is None


def test_features_that_are_not_measured(gpu: None) -> None:
    measured.TABLE[KEY] = Faster("triton", DATE)
    assert "not measured with these features" in str(measured.declined("cuda", problem(None)))


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({}, None),
        ({"least": 50, "most": 50}, None),
        ({"least": 51}, "not faster than triton below 51 elements (NVIDIA H200, 2026-11-26)"),
        ({"most": 49}, "not faster than triton above 49 elements (NVIDIA H200, 2026-11-26)"),
    ],
)
def test_limits_of_cuda(
    limits: dict[str, int], reason: str | None, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.TABLE[KEY] = Faster("triton", DATE, **limits)
    assert measured.declined("cuda", problem()) == reason
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert measured.declined("cuda", problem()) is None  # whatever the size


def test_the_size_of_a_step_of_decoding() -> None:
    q, cache = torch.randn(2, 3, 4, 8), torch.randn(2, 16, 2, 8)
    described = describe(q, cache, cache, torch.tensor([3, 4]))
    assert (described.op, described.needs_grad) == ("attention_with_kv_cache", False)
    assert (described.dtype, described.elements) == (torch.float32, 2 * 3 * 4 * 8)


# --- the user's table -----------------------------------------------------------------------------

MINE = Faster("triton", "2026-11-30", 10, 60)


@pytest.fixture
def cache(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder, of nobody yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.of_user.cache_clear()
    yield tmp_path / "fastattn" / "measured"
    measured.of_user.cache_clear()


def note(**changes: Any) -> dict[str, Any]:
    row = KEY._asdict() | MINE._asdict()
    named = {name: changes.pop(name) for name in changes.keys() & row.keys()}
    return {"device": GPU, "kernels": measured.state(), "rows": [row | named]} | changes


def leave(cache: Path, text: str) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    path = measured.path_of(GPU)
    assert path is not None and path.parent == cache
    path.write_text(text)


def test_what_is_written_counts_in_the_next_process(cache: Path) -> None:
    assert measured.declined("cuda", problem()) is not None
    path = measured.write(GPU, {KEY: MINE})
    measured.of_user.cache_clear()
    assert list(cache.iterdir()) == [path]  # and no temporary file
    assert measured.declined("cuda", problem()) is None
    assert measured.found("cuda", problem())
    assert "above 60 elements" in str(measured.declined("cuda", problem(61)))
    measured.TABLE[KEY] = Faster("torch", DATE)  # what is shipped comes after it
    assert "above 60 elements" in str(measured.declined("cuda", problem(61)))
    other = KEY._replace(dtype="float16")
    measured.write(GPU, {other: Faster("torch", DATE)})
    assert measured.of_user(GPU) == {KEY: MINE, other: Faster("torch", DATE)}
    assert measured.of_user("another GPU") == {}


def test_never_counts_while_compiling_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = KEY._replace(backend="triton")
    measured.write(GPU, {triton: Faster("torch", DATE, 0, 0)})
    reason = f"not faster than torch at any number of elements ({GPU}, {DATE})"
    assert measured.declined("triton", problem()) == reason
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert measured.declined("triton", problem()) == reason


def test_other_kernels_are_not_meant(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        before.setattr(user_cache, "sources", lambda: "older")
        measured.write(GPU, {KEY: MINE})
    measured.of_user.cache_clear()
    assert measured.of_user(GPU) == {}  # without a warning
    other = KEY._replace(dtype="float16")
    measured.write(GPU, {other: MINE})
    assert measured.of_user(GPU) == {other: MINE}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "[1]", "\0", '{"device": 1}', '"' + "x" * measured.LARGEST + '"',
        *(
            json.dumps(note(**changes))
            for changes in (
                {"backend": "torch"}, {"backend": ["cuda"]}, {"op": "a\x1b[2J"}, {"op": "a" * 999},
                {"dtype": None}, {"needs_grad": 1}, {"device": "another"}, {"than": 3},
                {"date": "today"}, {"least": -1}, {"least": 1.5}, {"least": True}, {"most": "9"},
                {"rows": None}, {"rows": "ab"}, {"rows": [[]]}, {"rows": [{}]},
                {"rows": [{**KEY._asdict(), **MINE._asdict(), "more": 1}]},
                {"rows": [1] * (measured.MOST_ROWS + 1)},
            )
        ),
        json.dumps(note()).replace('"least"', '"most"'),  # a key that is there twice
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_ignored_with_one_warning(text: str, cache: Path) -> None:
    leave(cache, text)
    with pytest.warns(RuntimeWarning, match="is ignored, .*`fastattn tune` measures again") as told:
        assert measured.declined("cuda", problem()) is not None
        assert measured.declined("cuda", problem()) is not None
    assert len(told) == 1
    measured.write(GPU, {KEY: MINE})
    assert measured.declined("cuda", problem()) is None


def test_neither_a_pipe_nor_a_folder_is_waited_for(cache: Path) -> None:
    cache.mkdir(parents=True)
    path = measured.path_of(GPU)
    assert path is not None
    os.mkfifo(path)
    with pytest.warns(RuntimeWarning, match="must be a regular file"):
        assert measured.of_user(GPU) == {}


def test_no_home(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert measured.of_user(GPU) == {}
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        measured.write(GPU, {KEY: MINE})


def test_a_cpu_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "of_user", lambda name: pytest.fail(name))
    for interface in INTERFACES:
        interface._dispatch.plans.clear()
    x = torch.randn(3, 7)
    fastattn.layer_norm(x, residual=x)
    assert explanation_of(fastattn.layer_norm, x).backend == "torch"


@pytest.mark.parametrize(
    ("good", "limits"),
    [
        ({}, None),
        ({1: False, 2: False}, None),
        ({1: True, 2: True}, (0, None)),
        ({1: False, 2: True, 3: True}, (2, None)),
        ({3: False, 1: True, 2: True}, (0, 2)),
        ({1: True, 2: False, 3: True, 4: True, 5: False}, (3, 4)),
        ({1: True, 2: False, 3: True}, (3, None)),
    ],
)
def test_limits_of_the_longest_series(good: dict[int, bool], limits: Any) -> None:
    assert measured.limits(good) == limits
