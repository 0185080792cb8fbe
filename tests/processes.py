"""Functions on several processes of one process group: gloo, on this machine.

    results = run(2, tasks.gradients, config)       # the function's result on rank 0, rank 1

The function is a module's own (it is pickled by name), and its first argument is the process's
rank. The processes are forked off one that has imported torch and fastattn once, so that a run
costs a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

SECONDS = 120  # after which a run has hung
_context = multiprocessing.get_context("forkserver")
# FSDP2 imports torch._dynamo, which takes seconds, when it first runs.
_context.set_forkserver_preload(
    ["fastattn.training", "torch.distributed.checkpoint", "torch._dynamo"]
)


class Failed(AssertionError):
    """A process raised, died, or did not end."""


def run(
    count: int, function: Callable[..., Any], *args: Any, seconds: float = SECONDS
) -> list[Any]:
    """The results of `function(rank, *args)` on `count` processes, by rank.

    Raises:
        Failed: with the traceback of each rank that raised, and the names of those that died or
            were still running after `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        pipes, processes = [], []
        for rank in range(count):
            here, there = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_process, args=(there, store, rank, count, function, args), daemon=True
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        results, troubles = [], []
        for rank, (pipe, process) in enumerate(zip(pipes, processes)):
            good, value = False, f"was still running after {seconds} s"
            if pipe.poll(5 if troubles else seconds):
                try:
                    good, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    process.join(5)
                    value = f"died with exit code {process.exitcode}"
            if not good:
                troubles.append(f"rank {rank} {value}")
            results.append(value)
        for process in processes:
            process.join(0.1 if troubles else 10)
            if process.is_alive():
                process.kill()
                process.join()
    if troubles:
        raise Failed("\n".join(troubles))
    return results


def start(function: Callable[..., Any], *args: Any) -> Any:
    """A process that calls `function(*args)`, with no process group."""
    process = _context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _process(
    pipe: Any, store: str, rank: int, count: int, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=60),
        )
        result = function(rank, *args)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        outcome: tuple[bool, Any] = (False, f"raised\n{traceback.format_exc()}")
    else:
        outcome = (True, result)
    # Not by the pipe's own pickle, which would share a tensor's memory with a process that ends.
    pipe.send_bytes(pickle.dumps(outcome))
