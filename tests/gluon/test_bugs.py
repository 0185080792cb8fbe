"""Planted bugs and mechanical mutants are found, as many as counts.json says; right kernels pass."""

from __future__ import annotations

import random

import pytest
from gluon import counts, mutants
from gluon.subjects import BACKWARDS, FORWARDS, SUBJECTS

from fastattn.ops.common.gluon import CLUSTERS

BUGS = [(name, bug) for name, subject in SUBJECTS.items() for bug in subject.bugs]


@pytest.mark.parametrize("name", SUBJECTS)
def test_right_kernels_pass(name: str) -> None:
    subject = SUBJECTS[name]
    right = mutants.module(subject.path.read_text(), name)
    for seed in range(2 * subject.shapes):
        subject.run(right, seed)


@pytest.mark.parametrize("name, bug", BUGS)
def test_planted_bug_is_found(name: str, bug: str) -> None:
    subject = SUBJECTS[name]
    seed = mutants.first_seed(subject, mutants.planted(subject)[bug], subject.shapes)
    assert seed is not None, f"{subject.shapes} seeds do not find it"


@pytest.mark.long
@pytest.mark.parametrize("name", [x for x in counts.load() if x in SUBJECTS])
def test_counts(name: str) -> None:
    if name in ("products", "loss forward", "loss backward") and not CLUSTERS:
        pytest.skip("the table has the bugs of clusters, which Triton has from 3.8")
    assert counts.count(name) == counts.load()[name]


@pytest.mark.long
@pytest.mark.parametrize("draw", range(120))
def test_no_false_alarm(draw: int) -> None:
    """Random shapes, and every scheduler."""
    sizes = random.Random(draw)
    sq, sk, d = sizes.randint(1, 400), sizes.randint(1, 400), sizes.choice((64, 128))
    causal, group = sizes.random() < 0.5, sizes.randint(1, 2)
    shapes = {
        "forward": (sizes.randint(1, 2), 2, group, sq, sk, d, causal),
        "backward": (sq, sk, d, causal, draw % 2 == 0),
    }
    for name in shapes.keys() & SUBJECTS.keys():
        subject = SUBJECTS[name]
        subject.run(mutants.module(subject.path.read_text(), name), draw, shapes[name])


def test_shapes_are_those_that_bugs_need() -> None:
    assert any(sk % 64 == 63 for _, _, _, _, sk, _, _ in FORWARDS)
    assert any(causal and sk < sq for _, _, _, sq, sk, _, causal in FORWARDS)
    assert any(h != hk for _, h, hk, *_ in FORWARDS)
    assert any(low for *_, low in BACKWARDS)
    assert any(sk % 64 for _, sk, *_ in BACKWARDS)
