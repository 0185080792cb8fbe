"""The report: which files it refuses, what it says of results, when it finds a regression."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import facts
import numpy
import pytest
import report
import report_compare
import schema
from checkout import ROOT
from schema import Entry, Results, Row

ROUNDS = 9


# --- results that fit the schema ----------------------------------------------------------------


def spread(values: list[float]) -> dict[str, float]:
    p20, median, p80 = numpy.percentile(values, [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def entry(samples: list[float], ours: list[float] | None = None, **facts: Any) -> Entry:
    """A timed peer; `ours` are our samples, if it is not ours."""
    of = spread(samples)
    timed = {f"{name}_us": value for name, value in of.items()}
    made: Any = {"rounds": len(samples), "calls": 3, "right": True, **timed}
    if ours is not None:
        made["times_ours"] = spread([a / b for a, b in zip(samples, ours)])
    return made | facts


def samples(median: float, noise: float = 0.01, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [median * (1 + noise * draw.uniform(-1, 1)) for _ in range(ROUNDS)]


def row(op: str, peers: dict[str, Entry], axes: dict[str, Any], **facts: Any) -> Row:
    said = {"direction": "forward", "dtype": "bfloat16", "right": True} | facts
    title = f"{op} {said['direction']} {' '.join(f'{n}={v}' for n, v in axes.items())}"
    made: Any = {"title": title, "op": op, "axes": axes, "peers": peers} | said
    return made


def attention_row(seqlen: int, head_dim: int, direction: str, seed: int) -> Row:
    """Like the scripts': a batch that keeps the tokens constant, a ceiling, a peer that refuses."""
    ours = samples(3.0 * seqlen, seed=seed)
    flops = 4.0 * 16384 * seqlen * 2048
    peers = {
        "ours": entry(ours, share=0.7, mfu=0.55, peak_bytes=seqlen << 12, saved_bytes=1 << 20),
        "sdpa": entry(samples(3.9 * seqlen, seed=seed + 1), ours, peak_bytes=seqlen << 12),
        "eager": entry(samples(15.0 * seqlen, seed=seed + 2), ours, peak_bytes=seqlen**2 << 3),
        "gemms": entry(samples(2.1 * seqlen, seed=seed + 3), ours, ceiling=True, share=1.0),
    }
    for each in peers.values():
        each["tflops"] = flops / each["median_us"] / 1e6
    if seqlen > 2048:
        peers["eager"] = {"refused": f"the score matrix would take {seqlen // 1024} GiB"}
    axes = {"batch": 16384 // seqlen, "seqlen": seqlen, "head_dim": head_dim, "causal": True}
    return row("attention", peers, axes, direction=direction, bound="gemms")


def attention_rows() -> list[Row]:
    return [
        attention_row(seqlen, head_dim, direction, 100 * number)
        for number, (direction, head_dim, seqlen) in enumerate(
            (direction, head_dim, seqlen)
            for direction in ("forward", "backward")
            for head_dim in (64, 128)
            for seqlen in (512, 1024, 2048, 4096)
        )
    ]


def overhead_rows() -> list[Row]:
    """Two cells of one promise, the second of which is missed."""
    rows = []
    for number, (above, holds) in enumerate(((3.1, True), (6.25, False))):
        ours = samples(20.0, seed=number)
        aten = entry(samples(20.0 - above, seed=number + 9), ours, above_us=spread([above] * 3))
        target = {"target": "5 us above ATen", "holds": holds, "dtype": "float32"}
        rows.append(row("call", {"ours": entry(ours), "ATen": aten}, {"n": number}, **target))
    return rows


def gpt_rows() -> list[Row]:
    ours = samples(9e5, seed=3)
    peers = {
        "ours": entry(ours, tokens_per_second=71.1, decode_step_us=spread([14000.0] * 3)),
        "transformers": entry(
            samples(1.8e6), ours, tokens_per_second=35.5, decode_step_us=spread([29000.0] * 3)
        ),
    }
    model = {"model": {"n_layer": 12, "n_embd": 768}, "prompts": 1}
    return [row("gpt", peers, model, direction="generation", dtype="float32")]


def results(subject: str, rows: list[Row], kind: str = "cpu", /, **facts: Any) -> Results:
    """A file's data; `facts` of the environment, or of the file where it has them."""
    cuda: Any = None
    if kind == "cuda":
        cuda = {
            "toolkit": "13.0", "cudnn": 91900, "capability": "9.0", "multiprocessors": 132,
            "memory_bytes": 80 << 30, "l2_bytes": 50 << 20, "busy": [],
            "sdpa_order": ["flash", "cudnn", "math"], "nvidia_smi": {"driver_version": "580.1"},
        }  # fmt: skip
    environment: Any = {
        "device": "NVIDIA H100" if kind == "cuda" else "AMD EPYC",
        "date": "2026-12-01T10:00:00+00:00",
        "commit": "0123456789abcdef",
        "modified": False,
        "python": "3.11.7",
        "system": "Linux",
        "packages": {"torch": "2.13.0", "triton": None},
        "processors": 8,
        "threads": 2,
        "affinity": [0, 1],
        "load": 0.25,
        "cuda": cuda,
    }
    data: Any = {
        "schema": schema.SCHEMA,
        "subject": subject,
        "device": kind,
        "preset": "full",
        "command": [f"benchmarks/{subject}.py", "--preset", "full"],
        "environment": environment,
        "method": {"clock": "timeit", "order": "interleaved"},
        "rows": rows,
        "skipped": [],
        "seconds": 61.0,
    }
    for name, value in facts.items():
        (environment if name in environment else data)[name] = value
    return data


def put(folder: Path, *all_results: Results) -> list[Path]:
    paths = []
    for number, data in enumerate(all_results):
        paths.append(folder / f"{data['subject']}-{data['preset']}-{number}.json")
        schema.write(paths[-1], data)
    return paths


class Place:
    """A page and a folder of results: one run of the report on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, folder / "results"
        self.path = folder / "docs" / "performance.md"

    def put(self, *all_results: Results) -> None:
        put(self.results, *all_results)

    def report(self, *options: str | Path) -> int:
        return report.main([*map(str, options or (self.results,)), "--page", str(self.path)])

    @property
    def page(self) -> str:
        return self.path.read_text()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- what it refuses ----------------------------------------------------------------------------


def refusal(place: Place, capsys: pytest.CaptureFixture[str], *options: str | Path) -> str:
    assert place.report(*options) == 2
    assert not place.path.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "facts", "said"),
    [
        ("cpu", {"device": ""}, "results.environment.device is empty"),
        ("cpu", {"packages": {"torch": None}}, "results.environment.packages['torch'] is missing"),
        ("cuda", {"cuda": None}, "results.environment.cuda is missing"),
        ("cpu", {"rows": 2 * gpt_rows()}, "results.rows[1].title is there twice"),
    ],
)
def test_a_place_that_is_not_told_is_refused(
    place: Place, capsys: pytest.CaptureFixture[str], device: str, facts: dict[str, Any], said: str
) -> None:
    data = results("gpt", gpt_rows(), device)
    data["environment"].update({n: x for n, x in facts.items() if n in data["environment"]})
    data["rows"] = facts.get("rows", data["rows"])
    place.put(data)
    message = refusal(place, capsys)
    assert said in message and "gpt-full-0.json" in message


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b"[]"])
def test_what_cannot_be_read_is_refused(
    place: Place, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    if content is not None:
        (place.folder / "x.json").write_bytes(content)
    assert "x.json" in refusal(place, capsys, place.folder / "x.json")


def test_two_commits_of_one_subject_device_and_preset_are_refused(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.put(results("gpt", gpt_rows()), results("gpt", gpt_rows(), commit="fedcba9876543210"))
    message = refusal(place, capsys)
    for said in ("0123456789ab", "fedcba987654", "gpt-full-0.json", "gpt-full-1.json"):
        assert said in message


# --- docs/performance.md ------------------------------------------------------------------------


def test_check_writes_nothing_and_tells_what_differs(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.put(results("gpt", gpt_rows()))
    assert place.report(place.results, "--check") == 1
    assert str(place.path) in capsys.readouterr().out and not place.path.exists()
    assert place.report() == 0
    assert place.report(place.results, "--check") == 0
    place.path.write_text(place.page + "by hand\n")
    assert place.report(place.results, "--check") == 1


def test_the_committed_page_is_as_generated() -> None:
    assert report.main(["--check"]) == 0


def line_with(text: str, *parts: str) -> str:
    """The one table line that has all the parts."""
    found = [x for x in text.splitlines() if x.startswith("|") and all(y in x for y in parts)]
    assert len(found) == 1, (parts, found)
    return found[0]


def test_the_page_says_where_what_and_how(place: Place) -> None:
    peak: Any = {"tflops": 989.0, "of": "bfloat16, dense", "flops": "causal halved"}
    place.put(
        results("gpt", gpt_rows(), method={"clock": "timeit", "tokens": "greedy"}),
        results("attention", attention_rows(), "cuda", peak=peak, modified=True),
    )
    assert place.report() == 0
    page = place.page
    assert "Measured on: NVIDIA H100 (GPU), AMD EPYC (CPU)." in page
    assert report.NO_GPU not in page
    assert page.index("## NVIDIA H100") < page.index("## AMD EPYC")
    gpu = line_with(page, "attention, preset `full`", "580.1", "91900", "flash, cudnn, math")
    assert "2026-12-01T10:00:00+00:00" in gpu and "torch 2.13.0" in gpu and "triton" not in gpu
    assert len(re.findall(r"`0123456789ab` \(modified checkout\)", page)) == 2
    line_with(page, "gpt, preset `full`", "`0123456789ab` |", "2 on 2 processors", "0.2")
    assert "python benchmarks/attention.py --preset full" in page
    assert "MFU is of 989 TFLOP/s (bfloat16, dense); FLOPs: causal halved." in page
    assert page.count("clock: timeit") == 1 and page.count("tokens: greedy") == 1
    line_with(page, "| NVIDIA H100 | attention, preset `full` | 16 cells | sdpa | 16 | 1.30x |")


def test_a_cell_has_time_rate_share_and_ratios() -> None:
    rows = [x for x in attention_rows() if x["direction"] == "forward"]
    text = report.group_tables(rows)
    assert "All with causal=yes." in text
    cell = line_with(text, "| 8 | 2048 | 64 |")
    assert re.fullmatch(
        r"\| 8 \| 2048 \| 64 \| 6\.\d\d ms \| \d\d\.\d \| 55\.0% \| 70% \| 8\.00 MiB \| 1\.00 MiB "
        r"\| 1\.\d\dx \(1\.\d\d-1\.\d\d\), 1\.00x peak "
        r"\| \d\.\d\dx \(\d\.\d\d-\d\.\d\d\), 4\.00x peak \|",
        cell,
    )
    assert line_with(text, "| TFLOP/s | MFU | of gemms | peak | saved | sdpa | eager |")
    assert line_with(text, "| 4 | 4096 | 64 |").endswith("| - |")
    assert "- eager, 2 of 8 rows: the score matrix would take 4 GiB" in text
    assert line_with(text, "| sdpa | 8 | 1.3", "| 8 / 0 / 0 |")


def test_reasons_and_notes_are_counted_and_no_fault_is_hidden() -> None:
    ours, refused = samples(10.0), {"refused": "no | GPU\n<here>"}
    rows = [
        row("norm", {"ours": entry(ours), "a": refused, "b": {"refused": "no time"}}, {"n": 1}),
        row("norm", {"ours": entry(ours), "a": refused}, {"n": 2}),
        row("norm", {"ours": {"error": "RuntimeError: broke"}}, {"n": 3}, right=False),
        row("norm", {}, {"n": 4}, error="stuck", right=False),
        row("norm", {"ours": entry(ours, right=False)}, {"n": 5}, right=False),
        row("norm", {"ours": entry(ours), "a": entry(ours, ours, note="one kernel")}, {"n": 6}),
    ]
    text = report.group_tables(rows)
    assert re.findall("^- (.*)", text, re.M) == [
        "FAILED: norm forward n=3: RuntimeError: broke",
        "FAILED: norm forward n=4: stuck",
        "WRONG: norm forward n=5",
        "a, 2 of 6 rows: no | GPU &lt;here>",
        "b, 1 of 6 rows: no time",
        "a, 1 of 6 rows: one kernel",
    ]
    assert line_with(text, "| n | ours | a |")  # who takes no part has no column
    assert line_with(text, "| 3 | FAILED | - |") and line_with(text, "| 4 | FAILED | - |")
    assert line_with(text, "| 6 |", "1.00x tie (1.00-1.00) |")
    assert facts.tally(rows) == "6 cells, 2 failed, 1 wrong"


def test_means_leave_out_what_is_wrong() -> None:
    ours = [10.0] * ROUNDS
    peers = [
        {"ours": entry(ours), "a": entry([20.0] * ROUNDS, ours)},
        {"ours": entry(ours), "a": entry([5.0] * ROUNDS, ours)},
        {"ours": entry(ours), "a": entry([1.0] * ROUNDS, ours, right=False)},
        {"ours": entry(ours, right=False), "a": entry([1.0] * ROUNDS, ours)},
        {"ours": entry(ours), "a": {"refused": "cannot"}},
    ]
    rows = [row("norm", of, {"n": number}) for number, of in enumerate(peers)]
    text = report.group_tables(rows)
    assert line_with(text, "| a | 2 of 4 | 1.00x | 1 / 0 / 1 | 0.50x n=1 |")
    assert line_with(text, "0.10x slower (0.10-0.10) wrong")


def test_targets_are_counted_and_a_missed_one_is_named() -> None:
    rows = overhead_rows()
    rows.append(row("call", {}, {"n": 2}, error="broke", target="5 us above ATen", right=False))
    text = report.group_tables(rows)
    assert line_with(text, "| 1 |", "slower", "), -6.2 us |")
    assert "- MISSED: call forward n=1: 5 us above ATen" in text
    assert "- 1 of 3 rows hold their target: 5 us above ATen" in text


def test_what_was_not_measured_is_listed(place: Place) -> None:
    skipped = [{"title": "attention seqlen=65536", "why": "out of time"}]
    rows = [*gpt_rows(), row("gpt", {}, {"n": 1}, error="stuck for 90 s", right=False)]
    place.put(results("gpt", rows, skipped=skipped))
    assert place.report() == 0
    assert "2 cells, 1 failed, 1 skipped" in place.page
    assert "- attention seqlen=65536: out of time" in place.page
    assert "stuck for 90 s" in place.page


def test_generation_has_tokens_and_steps() -> None:
    cell = line_with(report.group_tables(gpt_rows()), "n_layer=12 n_embd=768")
    assert "| 71.1 | 14.0 ms |" in cell and ", step 29.0 ms |" in cell


def test_memory_alone_needs_no_times() -> None:
    peers: Any = {"ours": {"peak_bytes": 1 << 20}, "a": {"peak_bytes": 3 << 20, "saved_bytes": 9}}
    rows = [row("attention", peers, {"n": 1})]
    rows.append(row("attention", {**peers, "a": {"refused": "cannot"}}, {"n": 2}))
    text = report.group_tables(rows)
    assert line_with(text, "| 1 | 1.00 MiB | 3.00x peak, 9 B saved |")
    assert line_with(text, "| 2 | 1.00 MiB | - |")
    assert len(re.findall("^[|] ---", text, re.M)) == 1


@pytest.mark.parametrize(
    ("median", "p20", "p80", "said"),
    [
        (1.32, 1.30, 1.34, "1.32x (1.30-1.34)"),
        (1.32, 0.99, 1.50, "1.32x tie (0.99-1.50)"),
        (1.32, 1.00, 1.50, "1.32x tie (1.00-1.50)"),
        (1.015, 1.01, 1.02, "1.01x tie (1.01-1.02)"),
        (1.02, 1.015, 1.03, "1.02x tie (1.01-1.03)"),
        (0.98, 0.97, 0.99, "0.98x tie (0.97-0.99)"),
        (0.80, 0.79, 0.81, "0.80x slower (0.79-0.81)"),
        (0.004, 0.003, 0.005, "0.00400x slower (0.00-0.01)"),
    ],
)
def test_ties(median: float, p20: float, p80: float, said: str) -> None:
    assert facts.spread({"median": median, "p20": p20, "p80": p80}) == said


# --- comparing two runs -------------------------------------------------------------------------


def norm_row(ours: list[float], copy_of: list[float] | None = None, **facts: Any) -> Row:
    peers = {"ours": entry(ours)}
    if copy_of is not None:
        peers["copy"] = entry(copy_of, ours, ceiling=True)
        facts["bound"] = "copy"
    return row("norm", peers, {"n": 1}, **facts)


def verdict(a: Row, b: Row) -> str:
    return report_compare.change_of(a, b).verdict


@pytest.mark.parametrize(
    ("factor", "noise", "said"),
    [
        (1.5, 0.01, report_compare.REGRESSION),
        (1.5, 0.9, report_compare.NOISE),
        (1.04, 0.001, report_compare.NOISE),
        (1.07, 0.001, report_compare.REGRESSION),
        (0.5, 0.01, report_compare.IMPROVEMENT),
    ],
)
def test_a_regression_is_outside_the_noise(factor: float, noise: float, said: str) -> None:
    a, b = samples(10.0, noise, seed=1), samples(10.0 * factor, noise, seed=2)
    assert verdict(norm_row(a), norm_row(b)) == said


def test_drift_of_the_machine_is_divided_out() -> None:
    drift = [1.0 + 0.2 * number for number in range(ROUNDS)]
    steady = norm_row(samples(10.0, seed=1), samples(8.0, seed=2))
    drifting = [
        norm_row(
            [a * b for a, b in zip(samples(factor * 10.0, seed=3), drift)],
            [a * b for a, b in zip(samples(8.0, seed=4), drift)],
        )
        for factor in (1.0, 1.2)
    ]
    assert verdict(steady, drifting[0]) == report_compare.NOISE
    assert verdict(steady, drifting[1]) == report_compare.REGRESSION
    change = report_compare.change_of(steady, drifting[1])
    assert change.before.endswith(" of copy") and float(change.ratio) == pytest.approx(
        1.2, abs=0.03
    )
    del drifting[0]["peers"]["copy"]  # only ours has slowed down, by 1.8
    change = report_compare.change_of(steady, drifting[0])
    assert change.verdict == report_compare.REGRESSION and change.before.endswith(" us")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (True, False, "REGRESSION: right before"),
        (False, True, "right now"),
        (False, False, "right in neither"),
    ],
)
def test_wrong_results_are_not_compared_for_speed(before: bool, after: bool, said: str) -> None:
    a, b = (norm_row(samples(10.0), right=right) for right in (before, after))
    assert verdict(a, b) == said


def test_a_row_without_times_is_not_judged() -> None:
    a, b = norm_row(samples(10.0)), norm_row(samples(10.0))
    del b["peers"]["ours"]["median_us"]
    assert verdict(a, b) == "not timed in both"


def test_compare_prints_and_exits_by_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results("norm", [norm_row(samples(10.0)), *gpt_rows()])
    slower = results("norm", [norm_row(samples(20.0))], threads=1, modified=True)
    slower["skipped"] = [{"title": gpt_rows()[0]["title"], "why": "out of time"}]
    faster = results("norm", [norm_row(samples(5.0)), *gpt_rows()])
    a, b, c = map(str, put(tmp_path, before, slower, faster))
    assert report.main(["--compare", a, b]) == 1
    said = capsys.readouterr().out
    assert re.search(r"norm forward n=1 +\S+ us +\S+ us +2\.000 +REGRESSION", said)
    assert "threads differs: 2 -> 1" in said and "(modified checkout)" in said
    assert f"only in A: {gpt_rows()[0]['title']} (B skipped it: out of time)" in said
    assert "1 rows in both, 1 REGRESSION, 0 improvement, 0 within the noise" in said
    assert report.main(["--compare", a, c]) == 0
    assert (
        "2 rows in both, 0 REGRESSION, 1 improvement, 1 within the noise" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"device": "another"}, "results.environment.device is 'AMD EPYC' and 'another'"),
        ({"subject": "gpt"}, "results.subject is 'norm' and 'gpt'"),
        ({"preset": "quick"}, "results.preset is 'full' and 'quick'"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], facts: dict[str, Any], said: str
) -> None:
    rows = [norm_row(samples(10.0))]
    a, b = put(tmp_path, results("norm", rows), results("norm", rows, **facts))
    assert report.main(["--compare", str(a), str(b)]) == 2
    assert said in capsys.readouterr().err
    assert report.main(["--compare", str(a), str(tmp_path)]) == 2
    assert "two files or two folders" in capsys.readouterr().err


# --- the script ---------------------------------------------------------------------------------


def test_it_runs_alone_and_loads_no_torch(tmp_path: Path) -> None:
    (path,) = put(tmp_path, results("gpt", gpt_rows()))
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import report\n"
        f"code = report.main([{str(path)!r}, '--page', 'p.md'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert (tmp_path / "p.md").exists()
