"""Attention that a module writes out: projections, softmax(q k^T * scale) v by products, a layer.

    att = (q @ k.transpose(-2, -1)) * scale
    att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))      # or a given mask
    y = att.softmax(-1) @ v

Nobody tells which layer is whose, how heads lie, how large the scale is, or what a mask means. So
the module is run on a small random input, in float64, and watched: the layer whose input is not the
module's is the last one, and that input has to be the attention of what the other layers gave, in
one of the ways that `Written` can say. The proof then decides as of any hypothesis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastattn.backends import explanation_of
from fastattn.integrations.hypotheses.feed_forward import sizes
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.ops.attention import attention

PROOF_BATCH, PROOF_SEQLEN = 2, 37

Path = str  # as in `named_modules()`


@dataclass(frozen=True)
class Mask:
    """A form in which a mask is given.

    Attributes:
        dims: how many dimensions it has.
        of_keys: two of them are (batch, keys), else (queries, keys). Three are (batch, queries,
            keys), four are (batch, heads, queries, keys); 1 stands for any.
        seen: True where a key is seen, or where it is not; None for a mask that is added.
        finite: whether a query that sees no key attends to all of them alike, as the score of a
            key that is not seen is a large number. If it is -inf, the result is nan there, and 0
            from ours.
    """

    dims: int
    of_keys: bool
    seen: bool | None
    finite: bool

    def fits(self, mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> bool:
        if mask.dim() != self.dims:
            return False
        if not (mask.dtype is torch.bool if self.seen is not None else mask.is_floating_point()):
            return False
        whole = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
        shape = self.spread(mask).shape
        exact = self.dims > 2 or mask.shape == (whole[0] if self.of_keys else whole[2], whole[3])
        return exact and all(n in (1, full) for n, full in zip(shape, whole, strict=True))

    def spread(self, mask: torch.Tensor) -> torch.Tensor:
        """(batch, heads, queries, keys), or 1 for any of them."""
        if self.dims == 2:
            return mask[:, None, None] if self.of_keys else mask[None, None]
        return mask[:, None] if self.dims == 3 else mask

    def arguments(
        self, mask: torch.Tensor, q: torch.Tensor, length: int, causal: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """q and what says the same to `attention` with so many keys."""
        mask = self.spread(mask)
        if self.seen is None:
            return q, {"bias": mask.to(q.dtype)}
        seen = mask if self.seen else ~mask
        if not self.finite:
            return q, {"mask": seen}
        visible = seen
        if causal:
            visible = seen & torch.ones(length, length, dtype=torch.bool, device=q.device).tril_()
        sees = visible.any(-1, keepdim=True)
        # A query that sees nothing has equal scores everywhere: those of q = 0.
        return q * sees.transpose(1, 2), {"mask": seen | ~sees}


@dataclass(frozen=True)
class Written:
    """Where a module keeps its layers, and what it makes of their outputs.

    Attributes:
        layers: of q, k and v, or one of all three.
        out: the last layer.
        inputs: 1 for module(x), 3 for module(query, key, value).
        order: where q, k and v are in one layer's output.
        by_head: whether these three lie side by side for each head, or for all heads together.
        limit: the longest sequence, by the module's buffer of a causal mask; None for any.
        mask: the name of the argument, "" for none.
        masks: the forms in which it may be given.
    """

    layers: tuple[Path, ...]
    out: Path
    inputs: int
    order: tuple[int, ...]
    by_head: bool
    head_dim: int
    scale: float
    causal: bool
    limit: int | None
    mask: str
    masks: tuple[Mask, ...] = ()

    def __str__(self) -> str:
        of = "causal attention" if self.causal else "attention"
        return (
            f"{of} of {', '.join(self.layers)}, {self.out}, written out, heads of {self.head_dim}"
        )

    def heads(self, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """q, k and v, (batch, seqlen, heads, head_dim)."""
        if len(outputs) == 3:
            return tuple(y.unflatten(-1, (-1, self.head_dim)) for y in outputs)
        shape = (-1, 3, self.head_dim) if self.by_head else (3, -1, self.head_dim)
        parts = outputs[0].unflatten(-1, shape).unbind(3 if self.by_head else 2)
        return tuple(parts[i] for i in self.order)

    def attended(
        self, outputs: Sequence[torch.Tensor], mask: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The attention of the layers' outputs, None where it was not compared."""
        q, k, v = self.heads(outputs)
        options: dict[str, Any] = {"causal": self.causal, "softmax_scale": self.scale}
        if mask is not None:
            form = next((form for form in self.masks if form.fits(mask, q, k)), None)
            if form is None:
                return None
            q, form_options = form.arguments(mask, q, k.shape[1], self.causal)
            options |= form_options
        return attention(q, k, v, **options).flatten(2)


class WrittenOutSwap(torch.nn.Module):
    """Runs a module's layers as they are, and `fastattn.attention` between them.

    The original runs where elements are dropped, and for calls of another form.
    """

    _fastattn_bound: ClassVar[Written]

    @staticmethod
    def recogniser(bound: Written) -> Recogniser:
        return recogniser(bound)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._fastattn_bound
        given = _call(bound, args, kwargs)
        if given is not None and not drops(self):
            inputs, mask = given
            if len(bound.layers) == 1:
                outputs = [self.get_submodule(bound.layers[0])(inputs[0])]
            else:
                outputs = [
                    self.get_submodule(path)(inputs[i if bound.inputs == 3 else 0])
                    for i, path in enumerate(bound.layers)
                ]
            attended = bound.attended(outputs, mask)
            if attended is not None:
                return self.get_submodule(bound.out)(attended)
        return super().forward(*args, **kwargs)


def _call(
    bound: Written, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None] | None:
    """The inputs and the mask of a call, None of one that was not compared."""
    inputs, rest = args[: bound.inputs], [*args[bound.inputs :]]
    if bound.mask in kwargs and not rest:
        rest, kwargs = [kwargs[bound.mask]], {k: v for k, v in kwargs.items() if k != bound.mask}
    mask = rest[0] if rest else None
    if kwargs or len(rest) > 1 or len(inputs) != bound.inputs:
        return None
    if not all(isinstance(x, torch.Tensor) and x.dim() == 3 for x in inputs):
        return None
    if mask is not None and not (bound.mask and isinstance(mask, torch.Tensor)):
        return None
    lengths = {x.shape[1] for x in inputs}
    if bound.causal and len(lengths) > 1:  # which end of the keys is the queries'?
        return None
    if bound.limit is not None and max(lengths) > bound.limit:
        return None
    return inputs, mask


def drops(module: torch.nn.Module) -> bool:
    """Whether elements are dropped at present."""
    return module.training and any(
        (isinstance(part, torch.nn.modules.dropout._DropoutNd) and part.p > 0)
        or any("drop" in name and type(v) is float and v > 0 for name, v in vars(part).items())
        for part in module.modules()
    )


def recogniser(bound: Written) -> Recogniser:
    def probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
        length = min(PROOF_SEQLEN, bound.limit or PROOF_SEQLEN)
        x = drawn_inputs(module, bound.inputs, draw, PROOF_BATCH, length)
        masks = [drawn_mask(form, draw, PROOF_BATCH, length) for form in bound.masks]
        return [Probe(x), *(Probe((*x, mask)) for mask in masks)]

    def backend(module: torch.nn.Module, probe: Probe) -> str | None:
        x: torch.Tensor = probe.args[0]
        q = x.new_empty(*x.shape[:2], 1, bound.head_dim, requires_grad=True)
        return explanation_of(attention, q, q, q, causal=bound.causal).backend

    return Recogniser(
        words=str(bound),
        mixin=WrittenOutSwap,
        probes=probes,
        backend=backend,
        bound=bound,
        keeps_buffers=True,
    )


def drawn_inputs(
    module: torch.nn.Module, count: int, draw: Draw, batch: int, length: int
) -> tuple[torch.Tensor, ...]:
    width = next(sizes(m)[0] for m in module.modules() if sizes(m))
    return tuple(draw.normal(batch, length, width) for _ in range(count))


def drawn_mask(form: Mask, draw: Draw, batch: int, length: int) -> torch.Tensor:
    """A random one. Its first query sees nothing, or the first key where the result were nan."""
    shape = [(batch, length) if form.of_keys else (length, length), (batch, length, length)]
    shape.append((batch, 1, length, length))
    size = shape[form.dims - 2]
    if form.seen is None:
        return draw.normal(*size)
    seen = draw.coin(*size)
    seen[..., 0] = True
    if form.finite:
        seen[0] = False
    return seen if form.seen else ~seen
