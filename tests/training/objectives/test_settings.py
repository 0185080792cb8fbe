"""Settings of objectives that are out of range."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastattn.training.objectives.distillation import DistillationSettings
from fastattn.training.objectives.masked import MaskedSettings
from fastattn.training.objectives.sequence_to_sequence import SequenceToSequenceSettings
from fastattn.training.objectives.span_corruption import SpanCorruptionSettings


@pytest.mark.parametrize(
    ("cls", "settings", "error", "message"),
    [
        (DistillationSettings, {}, ValueError, "teacher must be the folder of a model, got ''"),
        (DistillationSettings, {"teacher": "x", "temperature": 0.0}, ValueError, "temperature must be positive"),
        (DistillationSettings, {"teacher": "x", "temperature": math.nan}, ValueError, "temperature must be positive"),
        (DistillationSettings, {"teacher": "x", "alpha": 1.1}, ValueError, r"alpha must be in \[0, 1\], got 1.1"),
        (DistillationSettings, {"teacher": "x", "alpha": "1"}, TypeError, "alpha must be a number"),
        (MaskedSettings, {"probability": 0.0}, ValueError, r"probability must be in \(0, 1\], got 0.0"),
        (MaskedSettings, {"probability": 1.5}, ValueError, "probability must be in"),
        (MaskedSettings, {"probability": float("nan")}, ValueError, "probability must be in"),
        (MaskedSettings, {"probability": "0.1"}, TypeError, "probability must be a number"),
        (MaskedSettings, {"context": 2}, ValueError, "context must be at least 3, got 2"),
        (MaskedSettings, {"whole_words": 1}, TypeError, "whole_words must be True or False, got 1"),
        (SpanCorruptionSettings, {"noise_density": 0.0}, ValueError, r"noise_density must be in \(0, 1\), got 0.0"),
        (SpanCorruptionSettings, {"noise_density": 1.0}, ValueError, "noise_density must be in"),
        (SpanCorruptionSettings, {"noise_density": None}, TypeError, "noise_density must be a number"),
        (SpanCorruptionSettings, {"mean_span_length": 0.5}, ValueError, "mean_span_length must be finite and at least 1"),
        (SpanCorruptionSettings, {"mean_span_length": float("nan")}, ValueError, "mean_span_length must be finite"),
        (SpanCorruptionSettings, {"context": 2}, ValueError, "context must be at least 3, got 2"),
        (SequenceToSequenceSettings, {"max_source_length": 2}, ValueError, "max_source_length must be at least 3, got 2"),
        (SequenceToSequenceSettings, {"max_target_length": 2}, ValueError, "max_target_length must be at least 3, got 2"),
    ],
)  # fmt: skip
def test_bad_settings(
    cls: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cls(**settings)
