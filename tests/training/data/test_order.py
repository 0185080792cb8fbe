"""The order of the data: each example or token once an epoch, each batch from its number alone."""

from __future__ import annotations

import itertools
import pickle
import random
import tempfile
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training.data.counted import Numbers, Pairs, numbered, write_records

from fastattn.training.contract import Batch
from fastattn.training.data import Packed, Shuffled, prepare

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=12)
few = settings(max_examples=30, deadline=None, derandomize=True)


def pieces(batch: Batch) -> list[list[int]]:
    return list(batch.arguments["pieces"])


def chunks(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def naive_rows(documents: list[list[int]], tokens: int, context: int) -> list[list[list[int]]]:
    """The documents joined, cut to rows, each row cut at its documents' ends and at the context."""
    stream = [(i, number) for i, document in enumerate(documents) for number in document]
    rows = []
    for start in range(0, len(stream), tokens):
        row = stream[start : start + tokens]
        groups = (
            [n for _, n in group] for _, group in itertools.groupby(row, lambda pair: pair[0])
        )
        rows.append([piece for group in groups for piece in chunks(group, context)])
    return rows


@given(LENGTHS, st.data(), st.integers(0, 2**64 - 1))
@few
def test_packed_rows_are_the_documents_joined_and_cut(
    lengths: list[int], data: st.DataObject, seed: int
) -> None:
    total = sum(lengths)
    tokens = data.draw(st.integers(1, total))
    context = data.draw(st.integers(1, 15))
    with tempfile.TemporaryDirectory() as folder:
        examples, documents = numbered(Path(folder), lengths)
        packed = Packed(examples, Numbers(), tokens, context, seed)
        epochs = 3
        rows = [pieces(packed.batch(k)) for k in range(-(-epochs * total // tokens))]
        evaluated = [pieces(batch) for batch in packed.once()]
    assert packed.per_epoch == total / tokens

    # Read were in each epoch all documents, whole and in some order.
    of_number = {n: i for i, document in enumerate(documents) for n in document}
    stream = [n for row in rows for piece in row for n in piece]
    order: list[int] = []
    for epoch in chunks(stream, total)[:epochs]:
        this = list(dict.fromkeys(of_number[n] for n in epoch))
        assert sorted(this) == list(range(len(documents)))
        assert epoch == [n for i in this for n in documents[i]]
        order += this

    # How it was cut: as by the definition.
    expected = naive_rows([documents[i] for i in order], tokens, context)
    whole = epochs * total // tokens
    assert rows[:whole] == expected[:whole]
    assert all(sum(map(len, row)) == tokens for row in rows)
    assert evaluated == naive_rows(documents, tokens, context)


@given(st.integers(1, 20), st.data(), st.integers(0, 2**64 - 1))
@few
def test_shuffled_batches_have_each_example_once_an_epoch(
    count: int, data: st.DataObject, seed: int
) -> None:
    batch_size = data.draw(st.integers(1, count))
    examples = [{"ids": numpy.array([i])} for i in range(count)]
    shuffled = Shuffled(examples, Numbers(), batch_size, seed)
    batches = [pieces(shuffled.batch(k)) for k in range(-(-3 * count // batch_size))]
    assert all(len(batch) == batch_size for batch in batches)
    read = [i for batch in batches for (i,) in batch]
    for epoch in chunks(read, count)[:3]:
        assert sorted(epoch) == list(range(count))
    assert [pieces(batch) for batch in shuffled.once()] == chunks(
        [[i] for i in range(count)], batch_size
    )
    assert shuffled.per_epoch == count / batch_size


@pytest.mark.parametrize("kind", ["packed", "shuffled"])
def test_a_batch_follows_from_its_number_whatever_came_before(kind: str, tmp_path: Path) -> None:
    examples, _ = numbered(tmp_path, [5, 1, 9, 2, 7, 3])

    def fresh(seed: int = 3) -> Packed | Shuffled:
        if kind == "packed":
            return Packed(examples, Numbers(), 10, 4, seed)
        return Shuffled(examples, Numbers(), 4, seed)

    expected = [fresh().batch(k) for k in range(30)]
    used = fresh()
    draw = random.Random(0)
    for _ in range(100):
        k = draw.randrange(30)
        assert used.batch(k) == expected[k]
        if draw.random() < 0.1:
            list(used.once())
            used = pickle.loads(pickle.dumps(used))
    assert list(used.once()) == list(fresh().once())

    batches = [fresh(seed).batch(k) for seed in (3, 4) for k in range(30)]
    batches += fresh().once()
    assert len({batch.arguments["drawn"] for batch in batches}) == len(batches)
    assert pieces(fresh(4).batch(0)) != pieces(expected[0])
    assert fresh(-3).batch(7) == fresh(2**64 - 3).batch(7)  # one seed, as torch takes it


def test_an_epoch_has_an_order_of_its_own() -> None:
    examples = [{"ids": numpy.array([i])} for i in range(50)]
    shuffled = Shuffled(examples, Numbers(), 50, 0)
    orders = {str(pieces(shuffled.batch(k))) for k in range(20)}
    assert len(orders) == 20
    # Each place of an epoch has each example equally often: chi-squared, 9 degrees of freedom.
    shuffled = Shuffled(examples[:10], Numbers(), 10, 1)
    first = [pieces(shuffled.batch(k))[0][0] for k in range(2000)]
    counts = numpy.bincount(first, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # exceeded once in 1,000 seeds


def test_the_order_is_that_of_every_version() -> None:
    """Runs go on after an update: these numbers must not change."""
    examples = [{"ids": numpy.array([i])} for i in range(8)]
    batch = Shuffled(examples, Numbers(), 8, 1234).batch(0)
    assert pieces(batch) == [[7], [3], [0], [1], [4], [2], [5], [6]]


def test_what_cannot_be_batched_is_refused(tmp_path: Path) -> None:
    examples, _ = numbered(tmp_path, [5, 1])
    with pytest.raises(ValueError, match=r"there are 2 examples, fewer than batch_size \(3\)"):
        Shuffled(examples, Numbers(), 3, 0)
    with pytest.raises(ValueError, match=r"there are 6 tokens, fewer than a batch has \(7\)"):
        Packed(examples, Numbers(), 7, 7, 0)
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(ValueError, match="seed must be"):
            Shuffled(examples, Numbers(), 2, seed)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        Shuffled(examples, Numbers(), 0, 0)
    with pytest.raises(ValueError, match="context must be positive, got 0"):
        Packed(examples, Numbers(), 5, 0, 0)
    uneven = Pairs()
    path = write_records(tmp_path / "pairs.jsonl", [{"pairs": [([1, 2], [3])]}])
    with pytest.raises(ValueError, match="the fields source, target of an example that is packed"):
        Packed(prepare(path, uneven, tmp_path / "pairs"), uneven, 1, 1, 0)
    whole = Numbers()
    whole.packs = False
    with pytest.raises(ValueError, match="the objective 'numbers' needs whole examples"):
        Packed(examples, whole, 5, 5, 0)
