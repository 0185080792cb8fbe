"""What a model learns: an objective a file, each from a record to the loss."""

from __future__ import annotations

from fastattn.training.contract import Objective
from fastattn.training.objectives.causal import Causal

OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in (Causal,)}

__all__ = ["OBJECTIVES", "Causal"]
