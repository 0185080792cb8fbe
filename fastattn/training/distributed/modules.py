"""What the modules of our models compute where each process has a part of their weights.

A module of tensor parallelism is an ordinary one whose class is changed to one of these, mixed with
its own (`parallel_class`). Its parameters are DTensors; its forward puts their local parts in their
places while the ordinary forward runs, so that our ops see plain tensors, of fewer heads, columns
or tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fastattn.models import Encoder
from fastattn.nn import Attention, FeedForward, Linear, RMSNorm
from fastattn.ops.common import modes
from fastattn.ops.linear import product
from fastattn.training.distributed import vocabulary
from fastattn.training.distributed.collectives import Group, entering, joined, leaving


class Parallel(torch.nn.Module):
    """Every process has the same parameters and computes the same with them: norms, positions."""

    mesh: DeviceMesh  # of one dimension

    @property
    def group(self) -> Group:
        return self.mesh.get_group()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with local(self):
            return super().forward(*args, **kwargs)


@functools.cache
def parallel_class(mixin: Any, cls: Any) -> type[torch.nn.Module]:
    """The class to which modules of `cls` are changed.

    It counts as `cls` for `fastattn.nn.plain.is_plain`: it reads its DTensors itself.
    """
    bases = (mixin,) if issubclass(mixin, cls) else (mixin, cls)
    names = {
        "_fastattn_original": cls,
        "_fastattn_reads_dtensors": True,
        "__module__": mixin.__module__,
        "__doc__": mixin.__doc__,
    }
    name = mixin.__name__ if bases == (mixin,) else f"Parallel{cls.__name__}"
    return type(name, bases, names)


@contextlib.contextmanager
def local(*modules: torch.nn.Module) -> Iterator[None]:
    """Inside, the parameters of these modules themselves are the local parts of their DTensors."""
    kept = [module._parameters for module in modules]
    for module, parameters in zip(modules, kept):
        parts = {name: local_part(parameter) for name, parameter in parameters.items()}
        module._parameters = parts  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, parameters in zip(modules, kept):
            module._parameters = parameters


def local_part(parameter: Tensor | None) -> Tensor | None:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Columns(Parallel, Linear):
    """A linear layer of which each process computes some columns of the output.

    Attributes:
        sections: the rows of the weight in one process' order, as q, k and v: each process has its
            part of each section. Their sum is the number of rows.
    """

    sections: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(entering(input, self.group))

    def one_process_order(self, rows: Tensor) -> Tensor:
        """All rows, those of process 0 first, in the order of one process."""
        return rows[torch.argsort(self._order(rows.device))]

    def parallel_order(self, rows: Tensor) -> Tensor:
        """All rows of one process, those that process 0 has first."""
        return rows[self._order(rows.device)]

    def _order(self, device: torch.device) -> Tensor:
        numbers = torch.arange(sum(self.sections), device=device).split(self.sections)
        parts = [section.chunk(self.mesh.size()) for section in numbers]
        return torch.cat([part for of_rank in zip(*parts) for part in of_rank])


class Rows(Parallel, Linear):
    """A linear layer of which each process has some columns of the input; the results are added."""

    def forward(self, input: Tensor) -> Tensor:
        with local(self):
            out = leaving(product(input, self.weight), self.group)
            return out if self.bias is None else out + self.bias.to(out.dtype)


class ParallelAttention(Parallel, Attention):
    """Attention of some of the heads; `in_proj` and `out_proj` are Columns and Rows.

    Of dropout each process draws a mask of its own.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        draws: Any = contextlib.nullcontext()
        if self.training and self.dropout:
            draws = own_draws(self.out_proj.weight.device, self.mesh.get_local_rank())
        with self._norms(), draws:
            return super().forward(*args, **kwargs)

    @contextlib.contextmanager
    def _norms(self) -> Iterator[None]:
        """Norms of a head each are the same on all processes, which see different heads."""
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        if self.qk_norm == "all":
            norms = []
        with local(*norms):
            for norm in norms:
                norm._parameters["weight"] = entering(norm.weight, self.group)  # type: ignore[assignment]
            yield


class ParallelFeedForward(Parallel, FeedForward):
    """A feed-forward of which each process has some columns of the hidden layer."""

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.linear1, self.linear2, *(() if self.gate is None else (self.gate,))]
        draws: Any = contextlib.nullcontext()
        if self.training and self.activation_dropout:
            draws = own_draws(x.device, self.mesh.get_local_rank())
        with local(*layers), draws:
            bias = self.linear2.bias
            self.linear2._parameters["bias"] = None  # is added once, after the sum
            out = leaving(self.branch(entering(x, self.group)), self.group)
        if bias is not None:
            out = out + bias.to(out.dtype)
        return self.dropout(out)


class VectorNorm(Parallel, RMSNorm):
    """An RMSNorm of a vector of which each process has a part; autocast's dtype is the op's."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        with local(self):
            wide = x.to(modes.at_least_float32(x.dtype))
            squares = wide.square().sum(-1, keepdim=True)
            squares = entering(leaving(squares, self.group), self.group)
            (size,) = self.normalized_shape
            factor = torch.rsqrt(squares / size + self.eps)
            weight: Any = self._factor()
            normed = wide * factor * weight
            autocast = x.device.type != "cpu" and modes.autocast_enabled(x.device.type)
            return normed if autocast else normed.to(x.dtype)


class TokenTypes(Parallel, Encoder):
    """An encoder, which reads the weight of its token types itself."""

    def _states(self, *args: Any) -> Tensor:
        with contextlib.nullcontext() if self.wtt is None else local(self.wtt):
            return super()._states(*args)


class Tokens(Parallel, torch.nn.Embedding):
    """The token embedding, of which each process has the rows of some tokens."""

    def forward(self, input: Tensor) -> Tensor:
        with local(self):
            first = self.mesh.get_local_rank() * -(-self.num_embeddings // self.mesh.size())
            return vocabulary.embedding(input, self.weight, first, self.group, self.padding_idx)


class Head(Parallel):
    """A head, of which each process has the rows of some tokens.

    A call gathers the logits of all tokens; `loss` does not.
    """

    out_features: int

    def forward(self, input: Tensor) -> Tensor:
        parts = vocabulary.parts_of(self.out_features, self.mesh.size())
        return joined(super().forward(entering(input, self.group)), parts, self.group)

    def loss(self, input: Tensor, targets: Tensor) -> Tensor:
        with local(self):
            loss: Tensor = super().loss(input, targets)  # type: ignore[misc]
        return loss

    def cross_entropy(self, input: Tensor, *args: Any, **options: Any) -> Tensor:
        parts = vocabulary.parts_of(self.out_features, self.mesh.size())
        first = sum(parts[: self.mesh.get_local_rank()])
        return vocabulary.linear_cross_entropy(
            input, *args, first=first, group=self.group, **options
        )


@contextlib.contextmanager
def own_draws(device: torch.device, rank: int) -> Iterator[None]:
    """Inside, the processes of a group draw different random numbers; after it the same again.

    They have drawn the same before, for their generators were seeded alike.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    if device.type == "cpu":
        generator = torch.default_generator
    else:
        generator = torch.get_device_module(device).default_generators[device.index]
    state = generator.get_state()
    generator.manual_seed(seed + rank)
    try:
        yield
    finally:
        generator.set_state(state)
