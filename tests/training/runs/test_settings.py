"""The settings of a run: every field is documented, and what is written is the same run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fastattn.cli.train.reference import reference
from fastattn.training.objectives import OBJECTIVES
from fastattn.training.runs import toml
from fastattn.training.runs.fields import FieldError, names, sentences
from fastattn.training.runs.settings import TABLES, Run, config_class

DOCUMENTED = [
    *TABLES.values(),
    *(objective.settings_class for objective in OBJECTIVES.values()),
    *{config_class(objective): None for objective in OBJECTIVES.values()},
]
LEAST: dict[str, dict[str, Any]] = {
    "data": {"training": "texts"},
    "objective": {"name": "causal"},
    "training": {"steps": 10},
    "output": {"folder": "out"},
}


@pytest.mark.parametrize("cls", DOCUMENTED, ids=lambda cls: cls.__name__)
def test_every_field_has_a_sentence(cls: Any) -> None:
    said = sentences(cls)
    assert [name for name in names(cls) if not said.get(name, "").endswith((".", ":"))] == []


def test_help_has_every_field() -> None:
    text = reference()
    for cls in DOCUMENTED:
        for field in dataclasses.fields(cls):
            assert f"\n  {field.name}: " in text
    assert "\n  steps: an integer; must be given\n      optimiser steps.\n" in text
    assert "\n  betas: an array of 2 numbers; default [0.9, 0.95]\n" in text
    assert max(map(len, text.splitlines())) <= 110


def test_what_is_written_is_the_same_run() -> None:
    changes = {
        "model": {"config": {"n_layer": 2, "eos_token_id": "none"}, "lora_targets": ["q", "v"]},
        "data": {"training": ["a.txt", 'b "quoted".txt']},
        "training": {"steps": 1e3, "max_gradient_norm": float("inf"), "betas": [0, 0.5]},
    }
    run = Run.of({**LEAST, **changes})
    assert run.model.config == {"n_layer": 2, "eos_token_id": None}
    assert run.training.steps == 1000 and run.training.betas == (0.0, 0.5)
    assert Run.of(toml.parsed(toml.written(run.tables()))) == run


def test_lengths_of_an_objective_are_those_of_the_training() -> None:
    training = {"steps": 1, "context": 77}
    for objective, field in (("masked", "context"), ("sequence_to_sequence", "max_target_length")):
        run = Run.of({**LEAST, "objective": {"name": objective}, "training": training})
        assert getattr(run.objective.settings, field) == 77
        run = Run.of({**LEAST, "objective": {"name": objective, field: 9}, "training": training})
        assert getattr(run.objective.settings, field) == 9


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"trainig": {}}, r"a config has no 'trainig': did you mean \[training\]"),
        ({"steps": 3}, r"a config has no 'steps': there are \[model\], \[tokenizer\], \[data\]"),
        ({"training": 3}, r"training must be a table \[training\], got 3"),
        ({"training": {}}, r"\[training\] needs steps"),
        ({"data": {"training": []}}, r"\[data\] training must name at least one"),
        ({"data": {"training": "a", "validation_fraction": 1.5}}, "validation_fraction must be in"),
        ({"objective": {}}, r"\[objective\] name must be one of 'causal'.*got None"),
        ({"objective": {"name": "causl"}}, "did you mean 'causal'"),
        ({"objective": {"name": "classification", "lables": []}}, "did you mean 'labels'"),
        ({"objective": {"name": "causal", "steps": 3}}, r"no key 'steps': it is one of \[training\]"),
        ({"model": {"config": {"n_labels": 3}}}, r"\[model.config\] has no key 'n_labels'"),
        ({"model": {"library": "transformers"}}, "needs a folder with a model"),
        ({"model": {"folder": "a", "preset": "gpt2"}}, "folder excludes preset and config"),
        ({"tokenizer": {"folder": "a", "vocab_size": 300}}, "folder excludes vocab_size"),
    ],
)  # fmt: skip
def test_errors(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        Run.of({**LEAST, **tables})
