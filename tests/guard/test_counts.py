"""No count of the table counts.json changes unnoticed. counts.py says what is counted, and writes it."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from guard import counts

on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="counts on the CPU")
MARKS = {
    "machine code, sm_80": pytest.mark.long,
    "kernels launched": on_the_cpu,
    "operators dispatched": on_the_cpu,
    "bytes saved for backward": on_the_cpu,
}


@pytest.mark.parametrize(
    "section", [pytest.param(x, marks=MARKS.get(x, ())) for x in counts.SECTIONS]
)
def test_nothing_changed(section: str) -> None:
    table = counts.load()
    if (reason := counts.outdated(section, table)) is not None:
        pytest.skip(reason)
    lines = list(counts.differences(table[section], counts.SECTIONS[section](), section))
    if lines:
        pytest.fail(counts.message(lines), pytrace=False)


# A bias's gradient is summed in a second round where the first leaves many sums.
MORE_WHERE_LONG = {"linear, training": 1}


def test_lengths_compile_nothing() -> None:
    kernels = counts.load()["compiled kernels"]
    by_length = {name: x for name, x in kernels.items() if "ten lengths" in x}
    assert len(by_length) >= 6
    for name, numbers in by_length.items():
        more = MORE_WHERE_LONG.get(name, 0)
        assert numbers["ten lengths"] == numbers["one length"] + more, name


@pytest.mark.parametrize("section", [x for x in counts.SECTIONS if x.startswith("machine code")])
def test_no_hot_loop_spills_or_leaves_the_tensor_cores(section: str) -> None:
    """But for a handful, as FlashAttention-2 has them, where a wider tile is worth more."""
    for call, kernels in counts.load()[section].items():
        for name, numbers in kernels.items():
            assert numbers["spill accesses"] <= 0.02 * numbers["instructions"], f"{call}: {name}"
            if not call.startswith(("layer_norm", "cross_entropy", "rotary")):
                assert numbers["tensor core"] > 0, f"{call}: {name}"


# --- the guard's own parts ------------------------------------------------------------------------

OLD: dict[str, Any] = {
    "a step": {"forward": {"kernel": 2, "other": 1, "tile": "64 x 64"}, "backward": {"kernel": 4}}
}


@pytest.mark.parametrize(
    ("section", "changes", "line"),
    [
        ("kernels launched", {"kernel": 3}, "a step / forward / kernel: 2 -> 3 (worse by 50.0%)"),
        ("kernels launched", {"kernel": 1}, "a step / forward / kernel: 2 -> 1 (better by 50.0%)"),
        ("kernels launched", {"copy_": 1}, "a step / forward / copy_: 0 -> 1 (worse)"),
        (
            "kernels launched",
            {"other": None},
            "a step / forward / other: 1 -> 0 (better by 100.0%)",
        ),
        (
            "machine code",
            {"tile": "64 x 32"},
            "a step / forward / tile: 64 x 64 -> 64 x 32 (changed)",
        ),
        ("compiled kernels", {"sink": 6}, "a step / forward / sink: is new: 6"),
        ("compiled kernels", {"other": None}, "a step / forward / other: is gone: 1"),
    ],
)
def test_a_difference(section: str, changes: dict[str, Any], line: str) -> None:
    new = copy.deepcopy(OLD)
    for name, number in changes.items():
        new["a step"]["forward"].pop(name, None)
        if number is not None:
            new["a step"]["forward"][name] = number
    assert list(counts.differences(OLD, new, section)) == [f"{section} / {line}"]


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It says what differs and how to write it; written, nothing differs."""
    numbers = {"a step": {"forward": {"kernel": 2}}}
    monkeypatch.setattr(counts, "SECTIONS", {"kernels launched": lambda: numbers})
    monkeypatch.setattr(counts, "TABLE", tmp_path / "counts.json")
    assert counts.main(["--write"]) == 0
    assert counts.main([]) == 0
    numbers["a step"]["forward"]["kernel"] = 3
    capsys.readouterr()
    assert counts.main([]) == 1
    said = capsys.readouterr().out
    assert "kernels launched / a step / forward / kernel: 2 -> 3 (worse by 50.0%)" in said
    assert "python tests/guard/counts.py --write" in said
    assert counts.main(["--write"]) == 0
    assert counts.main([]) == 0
    assert counts.load()["kernels launched"] == numbers


def test_the_table_is_as_the_program_writes_it() -> None:
    table = counts.load()
    assert list(table) == ["versions", *counts.SECTIONS]
    assert counts.formatted(table) == counts.TABLE.read_text()
    assert json.loads(counts.formatted(table)) == table


def test_sections_of_other_versions_are_skipped() -> None:
    table = counts.load()
    table["versions"] = {"torch": "2.0", "triton": "3.0"}
    for section in counts.SECTIONS:
        reason = counts.outdated(section, table)
        if section in counts.VERSIONED:
            assert reason is not None and counts.COMMAND in reason
        else:
            assert reason is None
    assert all(counts.outdated(x, {"versions": counts.versions()}) is None for x in counts.SECTIONS)


@on_the_cpu
def test_a_launch_and_a_copy_more_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from guard import steps

    one = {"layer_norm": steps.STEPS["layer_norm"]}
    before = {"launches": steps.launches(one), "operators": steps.operators(one)["triton"]}
    kernels = importlib.import_module("fastattn.ops.layer_norm.triton")
    forward = kernels.forward

    def wasteful(x: torch.Tensor, *args: Any) -> Any:
        forward(x, *args)
        return forward(x.clone(), *args)

    monkeypatch.setattr(kernels, "forward", wasteful)
    after = {"launches": steps.launches(one), "operators": steps.operators(one)["triton"]}
    place = "layer_norm / forward"
    assert list(counts.differences(before["launches"], after["launches"], "kernels launched")) == [
        f"kernels launched / {place} / layer_norm._forward_kernel: 1 -> 2 (worse by 100.0%)"
    ]
    lines = list(
        counts.differences(before["operators"], after["operators"], "operators dispatched")
    )
    assert f"operators dispatched / {place} / clone: 0 -> 1 (worse)" in lines


@on_the_cpu
def test_a_storage_is_counted_once_and_inputs_are_not() -> None:
    from guard import steps

    x = torch.zeros(4, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()  # saved: y, by exp and, as its two views, by the product
        return x.sin() + (y[:2] * y[2:]).sum()

    numbers = steps.saved_bytes({"a step": lambda: steps.Step(forward, (x,))})
    assert numbers == {"a step": {"triton": 16, "torch": 16}}
