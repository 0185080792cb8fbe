"""What a run on many devices would take, by a stated model: memory, messages, time, a split.

    job = Job(Shape(config_for("7B")), devices=64, chip="H100")
    best = plans(job)[0]

Nothing here has been measured on a GPU. `docs/scaling.md` has the equations, and predictions
against what processes on a CPU really allocate and send.
"""

from fastattn.training.distributed.planning.memory import Memory, Numbers, Split, memory
from fastattn.training.distributed.planning.search import Job, Plan, plans
from fastattn.training.distributed.planning.shapes import Shape, config_for
from fastattn.training.distributed.planning.traffic import Message, Seconds, messages, seconds

__all__ = [
    "Job",
    "Memory",
    "Message",
    "Numbers",
    "Plan",
    "Seconds",
    "Shape",
    "Split",
    "config_for",
    "memory",
    "messages",
    "plans",
    "seconds",
]
