"""Accelerated models of transformers on two processes, beside one plain process.

The two run all cases, since most of their time goes into importing transformers.
"""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch

from oracle import assert_all_close_to_reference

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.is_available(), reason="of models on a CPU"),
]


def test_a_step_is_that_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from integrations import distribution, tiny

    tiny.make("llama").save_pretrained(tmp_path)
    eager, reference = distribution.plain(torch.float32), distribution.plain(torch.float64)
    for found in processes.run(2, distribution.all_of, str(tmp_path), seconds=400):
        for case, ours in found.items():
            assert ours.keys() == reference.keys(), case
            assert_all_close_to_reference(
                {f"{case}: {n}": (ours[n], eager[n], reference[n]) for n in ours}
            )
