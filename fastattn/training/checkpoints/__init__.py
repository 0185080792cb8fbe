"""Checkpoints of a run: a folder of them, whole whenever the process or the machine dies."""

from __future__ import annotations

from fastattn.training.checkpoints.folder import Checkpoints
from fastattn.training.checkpoints.model import save_model

__all__ = ["Checkpoints", "save_model"]
