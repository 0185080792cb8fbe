"""The predictions of docs/kernels.md: the rule that they scale by, and that they are up to date."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from compile import issue, prediction

A100, H200 = prediction.CHIPS


@pytest.fixture(scope="module")
def emulator() -> Iterator[prediction.Emulator]:
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU the ops run on it, and count nothing")
    with prediction.Emulator() as emulator:
        yield emulator


def test_counts_of_a_long_sequence_follow_from_two_short_ones(
    emulator: prediction.Emulator,
) -> None:
    def count(seqlen: int) -> dict[str, prediction.Counts]:
        return prediction.attention_counts(emulator, seqlen, 64, causal=True)

    small, long = [(n, count(n)) for n in prediction.SAMPLES], 768
    for kernel, counted in count(long).items():
        samples = [((n, n * n), counts[kernel]) for n, counts in small]
        predicted = prediction.scaled(samples, (long, long * long))
        exponentials = predicted.pop("exp2"), counted.pop("exp2")  # some depend on the scores
        assert predicted == counted
        assert exponentials[0] == pytest.approx(exponentials[1], rel=0.02)


@pytest.mark.parametrize(
    ("chip", "registers", "threads", "shared", "expected"),
    [
        (A100, 255, 128, 32768, (2, "registers")),
        (A100, 128, 256, 0, (2, "registers")),
        (A100, 129, 256, 0, (1, "registers")),
        (A100, 32, 128, 80 * 1024, (2, "shared memory")),
        (A100, 32, 128, 82 * 1024, (1, "shared memory")),
        (H200, 32, 128, 82 * 1024, (2, "shared memory")),
        (H200, 32, 1024, 0, (2, "registers")),
        (H200, 16, 32, 0, (32, "blocks")),
    ],
)
def test_blocks_that_a_multiprocessor_holds(
    chip: prediction.Chip, registers: int, threads: int, shared: int, expected: tuple[int, str]
) -> None:
    assert prediction.occupancy(chip, registers, threads, shared) == expected


def test_a_trip_jumps_over_what_it_can_but_not_over_products_and_copies() -> None:
    code = """
        /*0010*/                   MOV R1, R2 ;
        /*0020*/              @!P0 BRA 0x50 ;
        /*0030*/                   FSEL R3, R4, R5, P1 ;
        /*0040*/                   FSEL R3, R4, R5, P1 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/               @P1 BRA 0x80 ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0080*/                   BRA.DIV ~URZ, 0xb0 ;
        /*0090*/               @P2 BRA 0x20 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0x90 ;
    """
    assert issue.trip(code) == {"instructions": 6, "tensor core": 1}
    assert issue.trip(code.replace("HMMA", "FFMA")) is None


def test_the_document_holds_the_predictions(emulator: prediction.Emulator) -> None:
    resources = json.loads(prediction.RESOURCES.read_text())
    text = prediction.text(prediction.launches(emulator), resources)
    mend = "if it is meant: python tests/compile/prediction.py --write"
    assert prediction.written() == text, mend
