"""GPT-2 by transformers (sdpa), the same model accelerated, and fastattn.GPT, by turns in one run.

Trains (forward, backward, AdamW) and generates (greedy, with a cache) on random weights in float32
on the CPU, all three from the same weights. Speed-ups are of pairs inside a round: the time of
transformers over the other's. "No slower" holds where the spread of the speed-ups reaches 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from environment import environment
from gpt import ACCELERATED, GPT2, PEER, Job, build, generation, quiet, training_step
from harness import OURS
from results import table, write_json
from timing import Candidate, Spread, interleave, ratio

SMALL = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "n_positions": 512}
FULL_JOB = Job(GPT2, batch=2, seqlen=256, prompts=1, prompt=32, new_tokens=64)
QUICK_JOB = Job(SMALL, batch=2, seqlen=128, prompts=1, prompt=16, new_tokens=32)


@dataclass(frozen=True)
class Target:
    """The speed-up wanted of a model at some work, and whether a tie within noise will do."""

    speedup: float
    tie_will_do: bool

    def holds(self, reached: Spread) -> bool:
        return (reached.p80 if self.tie_will_do else reached.median) >= self.speedup


TARGETS = {
    ("training step", ACCELERATED): Target(1.0, tie_will_do=True),
    ("generation", ACCELERATED): Target(1.0, tie_will_do=True),
    ("generation", OURS): Target(1.2, tie_will_do=False),
}


def compare(
    work: str, calls: dict[str, Callable[[], object]], tokens: int, rounds: int
) -> list[dict]:
    """Time the calls by turns; one row each."""
    samples = interleave(
        [Candidate(name, call) for name, call in calls.items()], rounds=rounds, batch_seconds=0.0
    )
    rows = []
    for name, sample in samples.items():
        speedup = ratio(samples[PEER], sample)
        target = TARGETS.get((work, name))
        rows.append(
            {
                "work": work,
                "model": "fastattn.GPT" if name == OURS else name,
                "tokens_per_second": tokens / sample.median,
                "time": sample.as_dict(),
                "speedup": speedup.as_dict(),
                "target": None if target is None else target.speedup,
                "holds": target is None or target.holds(speedup),
            }
        )
    return rows


def shown(row: dict) -> list[str]:
    spread = row["speedup"]
    target = "" if row["target"] is None else f">= {row['target']}"
    return [
        f"{row['work']}, {row['model']}",
        f"{row['time']['median_us'] / 1e3:.1f}",
        f"{row['tokens_per_second']:.1f}",
        f"{spread['median']:.3f}",
        f"{spread['p20']:.2f}-{spread['p80']:.2f}",
        target + ("" if row["holds"] else " MISSED"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model, some seconds")
    parser.add_argument("--rounds", type=int, default=7, help="values to take of each (default 7)")
    parser.add_argument("--work", choices=["training", "generation"], help="only this work")
    parser.add_argument("--dropout", type=float, default=0.0, help="of all three (default 0)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    job = QUICK_JOB if arguments.quick else FULL_JOB
    vocabulary = job.model["vocab_size"]

    rows: list[dict] = []
    same_tokens = None
    with quiet():
        models = build(job, dropout=arguments.dropout)
        if arguments.work != "training":
            prompt = torch.randint(vocabulary, (job.prompts, job.prompt))
            calls = {n: generation(m, prompt, job.new_tokens) for n, m in models.items()}
            outputs = [call() for call in calls.values()]
            same_tokens = all(torch.equal(out, outputs[0]) for out in outputs)
            rows += compare("generation", calls, job.prompts * job.new_tokens, arguments.rounds)
        if arguments.work != "generation":
            ids = torch.randint(vocabulary, (job.batch, job.seqlen + 1))
            steps = {n: training_step(m, ids) for n, m in models.items()}
            rows += compare("training step", steps, job.batch * job.seqlen, arguments.rounds)

    headers = ("", "ms", "tokens/s", "speed-up", "20-80%", "target")
    print(table(headers, [shown(row) for row in rows]))
    if same_tokens is not None:
        print(f"\ngreedy tokens of all three: {'equal' if same_tokens else 'NOT EQUAL'}")
    if arguments.json:
        data = {"script": "huggingface", "environment": environment("cpu"), "rows": rows}
        data |= {"job": vars(job), "dropout": arguments.dropout, "same_tokens": same_tokens}
        write_json(arguments.json, data)
    return 0 if same_tokens is not False and all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
