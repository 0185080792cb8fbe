"""The batches of a step that are one process's."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.training.contract import Batch, Batches
from fastattn.training.distributed.parallel import Parallel
from fastattn.training.steps.config import TrainingConfig


@dataclass(frozen=True)
class Share:
    """This process's batches of a step, and how much each of them counts in it.

    All processes run the same number of batches, since they exchange weights and gradients in each.
    One that has fewer runs one of the step's with a weight of 0.

    Attributes:
        batches: with their numbers, of each sequence this process's part.
        weights: of the mean loss of each; they add up to 1 over all processes.
        tokens: of the whole step.
    """

    batches: list[tuple[int, Batch]]
    weights: list[float]
    tokens: int

    @classmethod
    def of(cls, step: int, training: Batches, config: TrainingConfig, parallel: Parallel) -> Share:
        """The share of a step, counted from 1.

        Raises:
            ValueError: on all processes: none of the step's targets counts.
        """
        numbers = range((step - 1) * config.accumulation, step * config.accumulation)
        whole = [
            (number, training.batch(number))
            for number in numbers[parallel.reader :: parallel.readers]
        ]
        own = [(number, parallel.part(batch)) for number, batch in whole if batch.counted]
        counted, tokens = parallel.summed(
            sum(batch.counted for _, batch in own),
            sum(batch.tokens for _, batch in whole) if parallel.place == 0 else 0,
        )
        if not counted:
            raise ValueError(f"step {step}: none of its targets counts in the loss")
        weights = [batch.counted / counted for _, batch in own]
        slots = 0 if parallel.mesh is None else -(-len(numbers) // parallel.readers)
        if (missing := slots - len(own)) > 0:
            candidates = ((number, training.batch(number)) for number in numbers)
            number, batch = next(pair for pair in candidates if pair[1].counted)
            own += [(number, parallel.part(batch))] * missing
            weights += [0.0] * missing
        return cls(own, weights, int(tokens))
