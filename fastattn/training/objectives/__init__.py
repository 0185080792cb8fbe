"""The tasks that a model can learn: an objective a file, each from a record to the loss."""

from __future__ import annotations

from fastattn.training.contract import Objective
from fastattn.training.objectives.causal import Causal
from fastattn.training.objectives.chat import Chat
from fastattn.training.objectives.classification import Classification
from fastattn.training.objectives.distillation import Distillation
from fastattn.training.objectives.masked import Masked
from fastattn.training.objectives.question_answering import QuestionAnswering
from fastattn.training.objectives.sequence_to_sequence import SequenceToSequence
from fastattn.training.objectives.span_corruption import SpanCorruption
from fastattn.training.objectives.token_classification import TokenClassification

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        Causal,
        Chat,
        Classification,
        Distillation,
        Masked,
        QuestionAnswering,
        SequenceToSequence,
        SpanCorruption,
        TokenClassification,
    )
}

__all__ = [
    "OBJECTIVES",
    "Causal",
    "Chat",
    "Classification",
    "Distillation",
    "Masked",
    "QuestionAnswering",
    "SequenceToSequence",
    "SpanCorruption",
    "TokenClassification",
]
