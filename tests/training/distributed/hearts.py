"""What the processes of test_heartbeat.py do: all meet, one does as its scenario says, all meet again."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

import torch

from fastattn.training.distributed.layout import DistributedConfig
from fastattn.training.distributed.processes import Processes, joined

LIMIT = 3.0  # seconds
LONG = 7.0


def run(rank: int, port: int, scenario: str, said: Path) -> None:
    """End with the exit code of a process; what it says on stderr is in `said`."""
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with joined("cpu", DistributedConfig(lost_seconds=LIMIT)) as processes:
        processes.gathered(None)
        _act(scenario, rank, processes)


def _act(scenario: str, rank: int, processes: Processes) -> None:
    if scenario == f"rank {rank} stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if "leaves" in scenario:
        if scenario != f"rank {rank} leaves":
            time.sleep(LONG)
        return
    if rank == 1:
        _work(scenario, processes)
    processes.gathered(None)


def _work(scenario: str, processes: Processes) -> None:
    end = time.monotonic() + LONG
    while scenario == "computes" and time.monotonic() < end:
        torch.ones(300, 300) @ torch.ones(300, 300)
    if scenario == "keeps Python's lock":
        ctypes.PyDLL(None).sleep(int(LONG))
    if scenario == "is patient":
        with processes.patient(int(LONG * 50e6)):
            ctypes.PyDLL(None).sleep(int(LONG))
