"""Accelerated models under DDP and FSDP2: two processes on gloo, beside one plain process.

The two run all cases, since most of their time goes into starting.
"""

from __future__ import annotations

import copy
import itertools
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
LIMIT = 150  # seconds, for two ranks on a loaded machine: above gloo's own 60
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="of models on a CPU"),
]


def worker(rank: int, store: str) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    for how, order in itertools.product(["ddp", "fsdp2"], ["before", "after"]):
        print(how, order, flush=True)  # where it has come to
        compare(how, order, rank)
    dist.destroy_process_group()


def compare(how: str, order: str, rank: int) -> None:
    """A step of training on half of the batch; the weights are those of the whole batch's step."""
    from integrations import tiny
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    import fastattn

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


@pytest.mark.long
def test_a_step_is_that_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1",
        # Not the interface that the machine's name leads to, which may be none.
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }  # fmt: skip
    command = [sys.executable, "-X", "faulthandler", __file__]
    # Files: a pipe that nobody reads would stop the rank that fills it.
    said = [tmp_path / f"rank {rank}" for rank in range(2)]
    processes = []
    for rank, file in enumerate(said):
        with file.open("w") as out:
            arguments = [*command, str(rank), str(tmp_path / "store")]
            processes.append(
                subprocess.Popen(arguments, env=environment, stdout=out, stderr=subprocess.STDOUT)
            )
    try:
        ended = _first_failure_or_end(processes, time.monotonic() + LIMIT)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert ended is None, f"{ended}\n" + "\n".join(f"{f.name}:\n{f.read_text()}" for f in said)


def _first_failure_or_end(processes: list[subprocess.Popen[bytes]], limit: float) -> str | None:
    """None when all have ended well; else who failed first: the others may wait for it."""
    while time.monotonic() < limit:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return f"rank {rank} failed first, with {code}"
        if None not in codes:
            return None
        time.sleep(0.05)
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGABRT)  # faulthandler writes where it is
    for process in running:
        process.wait(timeout=10)
    return f"{len(running)} of {len(processes)} ranks have not ended in {LIMIT} s"


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
