"""Accelerated models under DDP and FSDP2: two processes on gloo, beside one plain process."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="of models on a CPU"),
]


def worker(how: str, order: str, rank: int, store: str) -> None:
    """A step of training on half of the batch; the weights are those of the whole batch's step."""
    import torch.distributed as dist
    from integrations import tiny
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    import fastattn

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = tiny.make("llama").train()
    ids = tiny.tokens(4, 12)

    def step(model: torch.nn.Module, ids: torch.Tensor) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    expected = copy.deepcopy(model)
    step(expected, ids)

    if order == "before":
        assert fastattn.accelerate(model).swapped
    state = torch.get_rng_state()
    if how == "ddp":
        wrapped: torch.nn.Module = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    if order == "after":
        report = fastattn.accelerate(wrapped)
        if how == "ddp":
            assert report.swapped
        else:
            assert not report.swapped
            reasons = [e.reason or "" for e in report.left if "Norm" in e.class_name]
            assert reasons and all("sharded" in reason for reason in reasons), reasons
    assert torch.equal(torch.get_rng_state(), state)
    step(wrapped, ids[2 * rank : 2 * rank + 2])
    for (name, weight), wanted in zip(model.named_parameters(), expected.parameters()):
        full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        torch.testing.assert_close(
            full, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    fastattn.restore(wrapped)
    assert type(model.model.norm).__name__ == "LlamaRMSNorm"
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_step_is_that_of_one_process(how: str, order: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, how, order]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
