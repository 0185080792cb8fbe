"""never_slower.py: its grid, how a cell is judged, the table that follows.

Speed itself is not judged here: the rule is set to what always and what never holds.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import never_slower
import never_slower_table
import pytest
import schema
import torch
from never_slower import Judged
from schema import Results, Row

from fastattn import backends
from fastattn import measured as measurements
from fastattn.measured import Faster, Key
from fastattn.ops.attention.problem import describe as describe_attention
from fastattn.ops.ffn.problem import describe as describe_ffn
from fastattn.ops.layer_norm.problem import describe_layer_norm, describe_rms_norm
from fastattn.ops.linear.problem import describe as describe_linear
from fastattn.timing import Sample

OPS = set(never_slower.OPS)
TINY = {
    "layer_norm": {"shape": "3x7"},
    "rms_norm": {"shape": "3x7"},
    "ffn": {"shape": "3x4x8"},
    "linear": {"shape": "3x4x7"},
    "attention": {"shape": "2x5:7x6:3x8", "causal": True},
}


def tiny(op: str = "rms_norm", **values: Any) -> Judged:
    common = {"device": "cpu", "direction": "forward", "dtype": "float32", "backend": "auto"}
    return never_slower.make(op=op, **{**common, "compile": False, **TINY[op], **values})


# --- the grid -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted(OPS))
def test_both_sides_of_a_cell_do_the_same(op: str) -> None:
    """Ours, eager and the definition have one result, and it has one shape."""
    for cell in never_slower.SUBJECT.cells("cpu", "full", {"dtype": ["float32"]}):
        size = sum(x.numel() for x in cell.inputs())
        if cell.op != op or cell.backward or size > 1 << 20:
            continue
        inputs = cell.inputs()
        expected = harness.as_tuple(cell.definition(*inputs))
        assert cell.outputs == len(expected)
        for name in ("ours", "eager"):
            got = harness.as_tuple(cell.against[name](cell).function(*inputs))
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3, msg=cell.title)


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize(
    "cell",
    [
        tiny("layer_norm", residual=True),
        tiny("rms_norm", residual=True, direction="forward+backward"),
        tiny("ffn", layout="conv1d", direction="forward+backward"),
        tiny("linear", direction="forward+backward"),
        tiny("attention"),
        tiny("attention", shape="2x5x6:3x8", causal=False, dtype="bfloat16"),
    ],
    ids=lambda cell: cell.title,
)
def test_a_row(cell: Judged, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(never_slower, "ALLOWANCE", 1.0 if holds else -1.0)
    monkeypatch.setattr(harness, "ATTEMPTS", 2)
    row = cell.measure(0.0)
    schema.check(schema.finite(row), Row)
    assert row["right"]
    assert row["holds"] is holds
    assert row["target"] == never_slower.RULE
    assert set(row["peers"]) == {"ours", "eager"}
    assert row["peers"]["ours"]["note"] == "ran on torch"
    assert row["peers"]["eager"]["times_ours"]["median"] > 0
    assert "bound" not in row


def test_the_rule() -> None:
    """1.05 times and 5 us; the median of the rounds."""

    def excess(*ours: float) -> float:
        eager = Sample((100e-6,) * 3, calls=1)
        return never_slower.excess({"ours": Sample(ours, calls=1), "eager": eager})

    assert excess(9.0, 109e-6, 1e-6) == pytest.approx(-1e-6)
    assert excess(9.0, 111e-6, 1e-6) == pytest.approx(1e-6)


def test_without_eager_nothing_is_kept() -> None:
    def broken(cell: Judged) -> Any:
        raise MemoryError("no room")

    cell = tiny()
    row = dataclasses.replace(cell, against={**cell.against, "eager": broken}).measure(0.0)
    assert row["holds"] is False and row["right"]
    assert "no room" in row["peers"]["eager"]["refused"]


def test_a_backend_can_be_forced() -> None:
    cell = tiny(backend="reference")
    assert cell.title != tiny().title
    row = cell.measure(0.0)
    assert row["peers"]["ours"]["note"] == "ran on reference"
    assert row["axes"]["backend"] == "reference"


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "describe"),
    [
        (tiny("layer_norm"), lambda x, w, b: describe_layer_norm(x, w, b)),
        (tiny("rms_norm", residual=True), lambda x, w, r: describe_rms_norm(x, w, None, r)),
        (tiny("ffn", layout="conv1d"), lambda *inputs: describe_ffn(*inputs, layout="conv1d")),
        (tiny("linear"), lambda *inputs: describe_linear(*inputs, "gelu_tanh")),
        (tiny("attention"), lambda q, k, v: describe_attention(q, k, v, causal=True)),
        (tiny("attention", shape="2x5x6:3x8"), lambda q, k, v: describe_attention(q, k, v)),
    ],
    ids=lambda value: getattr(value, "title", ""),
)
def test_the_size_of_a_row_is_that_of_the_problem(cell: Judged, describe: Callable) -> None:
    assert never_slower_table.elements(cell.row({})) == describe(*cell.inputs()).elements


def measured(cell: Judged, holds: bool, backend: str = "triton", right: bool = True) -> Row:
    row = cell.row({"ours": {"note": f"ran on {backend}"}, "eager": {}})
    return {**row, "right": right, "holds": holds}


def results(*rows: Row, subject: str = "never_slower", date: str = "2026-11-26") -> Results:
    from environment import environment

    return {
        "schema": schema.SCHEMA,
        "subject": subject,
        "device": "cuda",
        "preset": "full",
        "command": [],
        "environment": {
            **environment("cpu"),
            "device": "NVIDIA H200",
            "date": f"{date}T10:00:00+00:00",
        },
        "method": {},
        "rows": list(rows),
        "skipped": [],
        "seconds": 1.0,
    }


def norm(rows: int, holds: bool, **facts: Any) -> Row:
    return measured(tiny(shape=f"{rows}x10"), holds, **facts)


@pytest.mark.parametrize(
    ("held", "least", "most"),
    [
        ("01111", 20, None),
        ("11110", 0, 40),
        ("00111", 30, None),
        ("01110", 20, 40),
        ("10111", 30, None),
        ("11011", 40, None),  # of equals the larger problems
        ("00000", 0, 0),
    ],
)
def test_what_is_left_to_torch(held: str, least: int, most: int | None) -> None:
    """One character for 10, 20, ... elements, 1 where the rule holds."""
    rows = [norm(n, x == "1") for n, x in enumerate(held, 1)]
    key = Key("rms_norm", "triton", "float32", None, "NVIDIA H200")
    expected = Faster("torch", "2026-11-26", least, most)
    assert never_slower_table.table([results(*rows)]) == {key: expected}


def test_nothing_follows_from_what_holds_is_wrong_or_is_no_kernels() -> None:
    rows = [norm(1, True), norm(2, False, backend="torch"), norm(3, False, right=False)]
    assert never_slower_table.table([results(*rows)]) == {}


def test_one_miss_at_a_size_counts() -> None:
    """Here of two files; the later date is the row's."""
    a = results(norm(1, True), norm(2, True), date="2026-11-27")
    b = results(norm(1, False))
    (row,) = never_slower_table.table([a, b]).values()
    assert row == Faster("torch", "2026-11-27", 20, None)


def test_gradients_are_told_apart_but_for_the_norms() -> None:
    rows = [
        measured(tiny(op, direction=direction), False)
        for op in ("ffn", "layer_norm")
        for direction in ("forward", "forward+backward")
    ]
    keys = never_slower_table.table([results(*rows)])
    assert sorted((key.op, str(key.needs_grad)) for key in keys) == [
        ("ffn", "False"), ("ffn", "True"), ("layer_norm", "None"),
    ]  # fmt: skip


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_printed_row_makes_the_slow_cell_be_declined(
    op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tiny(op)
    axis = "batch" if op == "attention" else "rows"
    large = dataclasses.replace(small, **{axis: 64})
    path = tmp_path / "results.json"
    schema.write(path, results(measured(small, False), measured(large, True)))
    assert never_slower.run(["--table", str(path)]) == 0
    printed = capsys.readouterr().out
    planted = eval("{" + printed + "}", {"Faster": Faster})
    assert len(planted) == 1

    monkeypatch.setattr(measurements, "TABLE", planted)
    monkeypatch.setattr(measurements, "devices", lambda device: ("NVIDIA H200", "sm_90"))
    asked = []
    module = types.ModuleType("kernels")
    triton = backends.Backend("triton", lambda: module)

    def explain(function: Callable, *inputs: Any, **named: Any) -> Any:
        inputs = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs)
        problem, _ = backends.problem_of(function, *inputs, **named)  # on a CPU it declines anyway
        asked.append(triton.declined(problem))
        return types.SimpleNamespace(backend=None)

    monkeypatch.setattr(never_slower, "explanation_of", explain)
    for cell in (small, large):
        cell.runs_on()
    reason, nothing = asked
    size = never_slower_table.elements(large.row({}))
    assert reason == f"not faster than torch below {size} elements (NVIDIA H200, 2026-11-26)"
    assert nothing is None


def against_triton(rows: int, ratio: float, backend: str = "cuda", **facts: Any) -> Row:
    """`ratio`: Triton's time over ours."""
    row = norm(rows, True, backend=backend, **facts)
    spread = {"median": ratio, "p20": ratio, "p80": ratio}
    return {**row, "peers": {**row["peers"], "triton": {"times_ours": spread}}}


@pytest.mark.parametrize(
    ("ratios", "limits"),
    [
        ((1.5, 1.5, 1.5), {}),
        ((0.5, 1.5, 1.5), {"least": 20}),
        ((1.5, 1.5, 1.0), {"most": 20}),  # a tie is not faster
        ((0.5, 1.5, 0.5), {"least": 20, "most": 20}),
        ((0.5, 1.0, 0.5), None),
    ],
)
def test_where_cuda_is_faster(
    ratios: tuple[float, ...], limits: dict[str, int] | None, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One ratio for 10, 20 and 30 elements."""
    path = tmp_path / "results.json"
    schema.write(path, results(*(against_triton(n, x) for n, x in enumerate(ratios, 1))))
    assert never_slower.run(["--faster", str(path)]) == 0
    planted = eval("{" + capsys.readouterr().out + "}", {"Faster": Faster})
    key = Key("rms_norm", "cuda", "float32", None, "NVIDIA H200")
    expected = {} if limits is None else {key: Faster("triton", "2026-11-26", **limits)}
    assert planted == expected


def test_what_ran_on_another_backend_or_is_wrong_is_no_reason_for_cuda() -> None:
    rows = [against_triton(1, 2.0, "triton"), against_triton(2, 2.0, right=False), norm(3, True)]
    assert never_slower_table.faster([results(*rows)]) == {}


def test_triton_takes_part_against_cuda() -> None:
    assert "triton" in tiny(backend="cuda").against
    assert "triton" not in tiny().against


# --- the script ---------------------------------------------------------------------------------


def test_other_options_are_those_of_every_script(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--device cpu --op rms_norm --shape 2x8 --dtype float32 --direction forward --list"
    assert never_slower.run([*options.split(), "--residual", "no"]) == 0
    assert capsys.readouterr().out.startswith("rms_norm forward rows=2 hidden=8")
