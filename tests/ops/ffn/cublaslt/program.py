"""ffn's `cuda` backend in a process where the fake of fake.cpp is the cuBLASLt that torch carries.

Prints what the fake was told, for tests/ops/ffn/test_cuda.py, which runs it with preload.cpp loaded
and the environment variable FAKE_CUBLASLT.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import torch

torch.set_num_threads(1)

from emulator import library  # noqa: E402
from ops.ffn.cases import Case, check, output_and_gradients  # noqa: E402

from fastattn import measured  # noqa: E402
from fastattn.ops.ffn import cuda  # noqa: E402

fake = ctypes.CDLL(os.environ["FAKE_CUBLASLT"])
fake.fake_calls.restype = ctypes.c_char_p


def main() -> dict[str, Any]:
    library.load()
    cuda.CUBLASLT_DEVICES.add("cpu")
    told: dict[str, Any] = {"version": cuda.cublaslt_version()}
    for layout in ("linear", "conv1d"):
        for dtype in (torch.float16, torch.bfloat16):
            case = Case((3, 6, 24), 40, 16, dtype, layout=layout)
            name = f"{layout} {str(dtype).removeprefix('torch.')}"
            told[name] = _calls(lambda case=case: check(case, "cuda"))
    case = Case((18, 24), 40, 16, torch.float16)
    for name, changed in {
        "no bias": {"bias1": False, "bias2": False},
        "recompute": {"recompute": True},
        "relu": {"activation": "relu"},
        "gelu": {"activation": "gelu"},
        "odd hidden": {"hidden": 37},
        "no tokens": {"shape": (0, 24)},
    }.items():
        other = dataclasses.replace(case, **changed)  # type: ignore[arg-type]
        told[name] = _calls(lambda other=other: check(other, "cuda"))

    inputs = case.inputs()
    ours = case.ours("cuda")
    told["inference"] = _calls(lambda: ours(**inputs))
    wide = torch.randn(18, 3 * 24).half()[:, 24:48]  # rows that are not dense
    told["strided x"] = _calls(lambda: check(case, "cuda", inputs | {"x": wide}))
    transposed = {name: inputs[name].t().contiguous().t() for name in ("w1", "w2")}
    told["transposed weights"] = _calls(lambda: check(case, "cuda", inputs | transposed))
    strided = inputs["b1"].repeat_interleave(2)[::2]
    told["strided bias"] = _calls(lambda: check(case, "cuda", inputs | {"b1": strided}))

    out, workspace = torch.empty(18, 40).half(), torch.empty(4096, dtype=torch.uint8)
    arguments = (out, None, workspace, inputs["x"], inputs["w1"].t(), None, 0)
    before = fake.fake_heuristics()
    for _ in range(3):
        torch.ops.fastattn_cuda.ffn_cublaslt_product(*arguments)
    told["heuristics of three equal products"] = fake.fake_heuristics() - before
    key = measured.Key(f"{cuda.PRODUCT}activation", "cuda", "float16", None, "cpu")
    measured.TABLE[key] = measured.Faster("cuBLASLt", "2000-01-01", least=18 * 40 * 24)
    told["activation is ours"] = _calls(lambda: ours(**inputs))
    told["activation is ours above"] = _calls(lambda: ours(**inputs | {"x": inputs["x"][:17]}))
    measured.TABLE.clear()

    fake.fake_fail(14)
    told["error of a product"] = _error(lambda: output_and_gradients(ours, inputs, out[:, :16]))
    fake.fake_fail(0)
    for tokens, (name, number) in enumerate({"finds": 1, "supports": 2}.items(), 30):
        fake.fake_heuristic(number)
        few = dataclasses.replace(case, shape=(tokens, 24))
        told[f"{name} nothing"] = _calls(lambda few=few: check(few, "cuda"))
        some = torch.empty(tokens, 40).half(), None, workspace, few.inputs()["x"], *arguments[4:]
        before = fake.fake_heuristics()
        answers = [torch.ops.fastattn_cuda.ffn_cublaslt_product(*some) for _ in range(3)]
        told[f"{name} nothing, asked"] = answers, fake.fake_heuristics() - before
    fake.fake_heuristic(3)
    told["error of a heuristic"] = _error(lambda: ours(**inputs | {"x": inputs["x"][:5]}))
    told["descriptors left alive"] = fake.fake_alive()
    return told


def _calls(function: Callable[[], object]) -> Any:
    fake.fake_reset()
    function()
    return json.loads(fake.fake_calls())


def _error(function: Callable[[], object]) -> str:
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return "none"


print(json.dumps(main()))
