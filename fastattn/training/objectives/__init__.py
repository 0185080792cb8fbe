"""What a model learns: an objective a file, each from a record to the loss."""

from __future__ import annotations

from fastattn.training.contract import Objective
from fastattn.training.objectives.causal import Causal
from fastattn.training.objectives.distillation import Distillation
from fastattn.training.objectives.masked import Masked
from fastattn.training.objectives.sequence_to_sequence import SequenceToSequence
from fastattn.training.objectives.span_corruption import SpanCorruption

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (Causal, Distillation, Masked, SequenceToSequence, SpanCorruption)
}

__all__ = [
    "OBJECTIVES",
    "Causal",
    "Distillation",
    "Masked",
    "SequenceToSequence",
    "SpanCorruption",
]
