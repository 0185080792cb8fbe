"""The memory of a process, by a walk through the forward and the backward of a step.

A model has L blocks of U weights each and R others, embeddings and head; with tensor parallelism
these are a rank's own. Its weights lie on S processes, shard x context, in float32 (`parallel.py`).

    weights      4 (L U + R) / S bytes
    states       AdamW twice as much; Muon once for the matrices of blocks
    gathered     FSDP2: U of the block that runs and of the next one, and R, in the products' dtype.
                 DDP: the copies of the weights that autocast makes
    gradients    FSDP2: those of the block that runs, whole, and as a copy in float32 that is
                 scattered; of blocks that are done a part. DDP: all, and its buckets
    activations  of each block until its backward; with activation checkpointing the two inputs of
                 each, and all of the block that runs
    working      gradients of activations, and a chunk of logits

The walk stops at the loss, where the backward of each block begins and ends, and at the embedding.
The largest sum is the peak. Not in it: the CUDA context, NCCL's buffers, fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fastattn.ops.linear_cross_entropy import aten as loss_on_a_cpu
from fastattn.ops.linear_cross_entropy import tiles as loss_on_a_gpu
from fastattn.training.distributed import vocabulary as loss_of_parts
from fastattn.training.distributed.planning.shapes import Shape

FLOAT32 = 4  # bytes


class Split(NamedTuple):
    """How the work of a step is divided.

    Attributes:
        replicate, shard, context, tensor: as `DistributedConfig` has them.
        batch: sequences of a backward.
        recompute: whether only the inputs of blocks are kept (activation checkpointing).
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    batch: int = 1
    recompute: bool = False

    @property
    def devices(self) -> int:
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def readers(self) -> int:
        """Groups of processes that have sequences of their own."""
        return self.replicate * self.shard

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the weights; else each process has all of them, under DDP."""
        return self.shard > 1 or self.tensor > 1

    @property
    def parts(self) -> int:
        """Processes among which the weights of a tensor rank lie."""
        return self.shard * self.context if self.sharded else 1


class Numbers(NamedTuple):
    """The formats of a run, and whether a GPU's kernels run.

    Attributes:
        product: bytes of an element that products read: 2 with precision "bfloat16", else 4.
        muon: whether the optimiser is Muon, else AdamW.
        average: whether there is a moving average of the weights.
        kernels: on a CPU, without them, the feed-forward keeps its activated hidden layer too.
    """

    product: int = 2
    muon: bool = False
    average: bool = False
    kernels: bool = True


class Memory(NamedTuple):
    """Bytes of a process at one moment."""

    weights: float
    states: float
    gathered: float
    gradients: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        return sum(self)


def memory(shape: Shape, split: Split, numbers: Numbers, length: int, backwards: int = 1) -> Memory:
    """The memory at the peak of a step.

    Args:
        length: tokens of a sequence.
        backwards: of the process in a step; the second one finds the gradients of the first.
    """
    moments = _moments(shape, split, numbers, length, backwards > 1)
    return max(moments, key=lambda moment: moment.total)


class _Activations(NamedTuple):
    """Bytes of a backward's tokens.

    Attributes:
        inputs: of a block: its branch and the residual stream.
        block: all that a block keeps.
        working: gradients of activations, at most, in a block's backward.
    """

    inputs: float
    block: float
    working: float


def _activations(shape: Shape, split: Split, numbers: Numbers, length: int) -> _Activations:
    config, product = shape.config, numbers.product
    tokens = split.batch * length / split.context
    # Of embeddings in float32 the stream is float32; FSDP2 gathers them in the products' dtype.
    stream = product if split.sharded else FLOAT32
    width, hidden = config.n_embd, config.feedforward_dim / split.tensor
    norms = 4 if config.norm_placement == "both" else 2
    # q, k, v in one tensor, the attention's result, and the rotated q and k beside the first.
    heads = 2 * shape.query_width + 2 * shape.key_width
    if config.positions == "rotary":
        heads += shape.query_width + shape.key_width
    if not numbers.kernels:  # ATen repeats the keys and values that several heads share
        heads += 2 * (shape.query_width - shape.key_width)
    layers = 2 if config.gated else 1  # of the hidden size
    kept = layers if numbers.kernels else 2 * layers
    statistics = config.n_head / split.tensor + 2 * norms
    block = norms * width * (stream + product) + (heads / split.tensor + kept * hidden) * product
    working = 2 * width * product + (layers + numbers.kernels) * hidden * product
    if split.context > 1:  # keys and values, here and on their way, and gradients in float32
        ring = 4 * shape.key_width * (product + FLOAT32) + shape.query_width * FLOAT32
        working += ring / split.tensor
    return _Activations(
        inputs=tokens * width * (stream + product),
        block=tokens * (block + FLOAT32 * statistics),
        working=tokens * working,
    )


def _loss(shape: Shape, split: Split, numbers: Numbers, length: int) -> float:
    """Bytes that the loss needs beside its input: logits, and the gradient of the head."""
    rank = shape.config.vocab_size / split.tensor
    logits = split.batch * length / split.context * rank
    head = rank * shape.config.n_embd * FLOAT32
    if split.tensor > 1:  # the loss of a divided vocabulary: scores in float32, their gradient
        rounded = numbers.product if numbers.product < FLOAT32 else 0
        return min(logits, loss_of_parts.SCORES) * (2 * FLOAT32 + rounded) + head
    if numbers.kernels:
        return min(logits, loss_on_a_gpu.CHUNK) * numbers.product + head
    if logits < loss_on_a_cpu.LARGE:  # logits, their log-softmax, the gradient; then the head's
        return 3 * logits * numbers.product
    return min(logits, loss_on_a_cpu.CHUNK) * numbers.product + head


def _moments(
    shape: Shape, split: Split, numbers: Numbers, length: int, accumulated: bool
) -> Iterator[Memory]:
    config, product, layers = shape.config, numbers.product, shape.config.n_layer
    block, rest = shape.block.of_rank(split.tensor), shape.rest.of_rank(split.tensor)
    head = config.vocab_size * config.n_embd / split.tensor
    down = config.feedforward_dim * config.n_embd / split.tensor
    own = (layers * block + rest) / split.parts
    states = 2 * own + numbers.average * own
    if numbers.muon:
        states -= layers * shape.matrices / split.tensor / split.parts
    acts = _activations(shape, split, numbers, length)
    kept = acts.inputs if split.recompute else acts.block

    def moment(
        done: int, gathered: float, whole: float, copied: float, activations: float, working: float
    ) -> Memory:
        """
        Args:
            done: blocks whose backward is over.
            gathered: weights that are whole under FSDP2.
            whole: gradients of others than `done`.
            copied: gradients that FSDP2 has also in float32, to scatter them.
        """
        kept_gradients = own if accumulated else done * block / split.parts
        if split.sharded:
            gradients = product * whole + FLOAT32 * (kept_gradients + copied)
            gathered *= product
        else:
            buckets = own if split.devices > 1 else 0
            gradients = FLOAT32 * (whole + kept_gradients + buckets)
            gathered = 0 if product == FLOAT32 else product * own
        return Memory(FLOAT32 * own, FLOAT32 * states, gathered, gradients, activations, working)

    last = acts.inputs  # what the last norm and the head keep
    loss = acts.inputs + _loss(shape, split, numbers, length)
    yield moment(0, rest, 0, 0, layers * kept + last, loss)
    # Between these blocks the sum changes linearly.
    for done in sorted({0, 1, layers - 2, layers - 1} & set(range(layers))):
        left = layers - done - 1
        gathered = rest + (2 if left else 1) * block
        before = block if done else 0
        begun = left * kept + max(kept, acts.block)
        yield moment(done, gathered, head + down, before, begun, acts.working)
        yield moment(done, gathered, head + block, block, left * kept, 2 * acts.inputs)
    # The gradients of head and embedding, which may be one weight, and then their sum.
    tied = head if config.tie_word_embeddings else 0
    yield moment(layers, rest, rest + tied, block, 0, acts.inputs)
    yield moment(layers, 0, rest, rest, 0, 0)
