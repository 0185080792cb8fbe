"""Other people's interfaces: models and modules that were not written for fastattn."""

from __future__ import annotations

from fastattn.integrations.report import Entry, Report
from fastattn.integrations.swap import accelerate, restore, verify

__all__ = ["Entry", "Report", "accelerate", "restore", "verify"]
