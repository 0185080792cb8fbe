"""Logits that are made when somebody reads them, and not for a loss.

The logits of a language model are the largest tensor of its training step, and mostly the loss is
all that becomes of them. `deferred(x, weight, bias)` is F.linear as a tensor without values: shape,
dtype, device and a place in the autograd graph. Views, casts and scalings of it have none either.
F.cross_entropy of it is `fastattn.linear_cross_entropy`, of the hidden states. Any other operation
makes the values first, by the same operations that would have made them, and goes on with these.
So no model has to be known, nor its forward changed.

Values are made of what the hidden states and the weight are at that time; if one of them was
modified in place since (by an optimiser's step), that is an error, as it is in autograd.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.common import modes
from fastattn.ops.cross_entropy import IGNORED
from fastattn.ops.linear_cross_entropy import linear_cross_entropy

aten = torch.ops.aten

# Methods that look at a tensor's memory, without the dispatcher.
OF_MEMORY = frozenset(
    [
        *("__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "__repr__"),
        *("data_ptr", "is_shared", "numpy", "share_memory_", "storage", "tolist"),
        "untyped_storage",
    ]
)


@dataclass(frozen=True)
class _Formula:
    """scale * x W^T + scale * b, or cap * tanh(of that / cap), by rows.

    Attributes:
        rows: what turns x into the rows whose logits are left: views that keep the last dimension.
        cap: 0 for none.
        added: vectors of a term for each class and what they are divided by, added to the bias.
        detached: from the graph.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    versions: tuple[int, ...]
    rows: tuple[Callable[[Tensor], Tensor], ...] = ()
    scale: float = 1.0
    cap: float = 0.0
    added: tuple[tuple[Tensor, float], ...] = ()
    detached: bool = False

    @property
    def parts(self) -> tuple[Tensor, ...]:
        parts = self.x, self.weight, self.bias, *(vector for vector, _ in self.added)
        return tuple(part for part in parts if part is not None)

    @property
    def unchanged(self) -> bool:
        return tuple(part._version for part in self.parts) == self.versions

    def check(self) -> None:
        """Raise if a part was modified since."""
        if not self.unchanged:
            raise RuntimeError(
                "the logits were not made when the loss was computed, and the hidden states or the "
                "weight they come from have been modified in place since: read the logits before "
                "optimizer.step(), or leave the head alone, fastattn.accelerate(model, exclude=...)"
            )

    def loss(self, targets: Tensor, **options: Any) -> Tensor:
        self.check()
        x, bias = self.x, self.bias
        for view in self.rows:
            x = view(x)
        for vector, divisor in self.added:
            term = (vector.reshape(-1) / divisor).to(x.dtype)
            bias = term if bias is None else bias + term
        options |= {"logit_scale": self.scale, "softcap": self.cap}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            return linear_cross_entropy(x, self.weight, targets, bias, **options)


class DeferredLogits(Tensor):
    """(..., V); see the module. Made by `deferred`."""

    _formula: _Formula
    _parent: DeferredLogits | None  # whence it comes, and how
    _step: Callable[[Tensor], Tensor]
    _children: list[weakref.ref[DeferredLogits]]
    _read: Tensor | None

    @staticmethod
    def of(
        like: Tensor,
        formula: _Formula,
        step: Callable[[Tensor], Tensor],
        parent: DeferredLogits | None = None,
    ) -> DeferredLogits:
        made: DeferredLogits = Tensor._make_wrapper_subclass(
            DeferredLogits,
            like.shape,
            strides=like.stride(),
            dtype=like.dtype,
            device=formula.x.device,
        )
        made._formula, made._step, made._parent = formula, step, parent
        made._children, made._read = [], None
        if parent is not None:
            parent._children.append(weakref.ref(made))
        return made

    def values(self) -> Tensor:
        """The logits, without autograd: the graph is this tensor's own."""
        if self._read is None:
            self._formula.check()
            if self._parent is not None:
                self._parent.values()  # which makes mine
            else:
                device = self._formula.x.device.type
                with (
                    torch.inference_mode(False),
                    torch.no_grad(),
                    torch.autocast(device, enabled=False),
                ):
                    self._make(self._formula.x)
        assert self._read is not None
        return self._read

    def _make(self, source: Tensor) -> None:
        """Its values and those of all that come from it, before anybody writes into them."""
        self._read = self._step(source)
        for reference in self._children:
            child = reference()
            if child is not None and child._formula.unchanged:
                child._make(self._read)
        self._children.clear()

    def deferred_loss(self, target: Any, options: dict[str, Any]) -> Tensor | None:
        """F.cross_entropy of it, None where that is not of rows and classes."""
        rows = self.dim() == 2 and isinstance(target, Tensor) and target.shape == self.shape[:1]
        unknown = options.keys() - {"weight", "ignore_index", "reduction", "label_smoothing"}
        if self._read is not None or not rows or unknown or target.dtype is not torch.int64:
            return None
        if modes.recorded() or modes.transformed():
            return None
        options = {"ignore_index": IGNORED, **options}
        loss = self._formula.loss(target, class_weight=options.pop("weight", None), **options)
        # F.cross_entropy answers in its input's dtype; under autocast its input is float32.
        autocast = modes.autocast_dtype(self.device.type) is not None
        return loss if autocast else loss.to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.cross_entropy:
                loss = _loss(*args, **kwargs)
                if loss is not None:
                    return loss
            if getattr(func, "__name__", "") in OF_MEMORY:
                args = (aten.alias.default(args[0]), *args[1:])
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else None
        if isinstance(source, DeferredLogits) and source._read is None:
            formula = _after(source, func, args[1:], kwargs)
            if formula is not None:
                others = [x.to("meta") if isinstance(x, Tensor) else x for x in args[1:]]
                meta = torch.empty_strided(
                    source.shape, source.stride(), dtype=source.dtype, device="meta"
                )
                like = func(meta, *others, **kwargs)
                return DeferredLogits.of(
                    like, formula, lambda x: func(x, *args[1:], **kwargs), source
                )
        made = torch.utils._pytree.tree_map_only(
            DeferredLogits, DeferredLogits.values, (args, kwargs)
        )
        return func(*made[0], **made[1])


def _loss(input: Any, target: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """`F.cross_entropy`, by its signature; None where it has to make the logits."""
    names = ("weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    options = dict(zip(names, args, strict=False)) | kwargs
    for deprecated in ("size_average", "reduce"):
        if options.get(deprecated) is None:
            options.pop(deprecated, None)
    return input.deferred_loss(target, options) if isinstance(input, DeferredLogits) else None


def _after(
    source: DeferredLogits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Formula | None:
    """The formula of what an operation makes of `source`, None if it is none of those known."""
    formula = source._formula
    scaled = source._formula.cap == 0.0
    if func in (aten.mul.Tensor, aten.div.Tensor) and not kwargs:
        number = args[0]
        if type(number) not in (int, float) or number <= 0:
            return None
        factor = number if func is aten.mul.Tensor else 1.0 / number
        if scaled:
            return replace(formula, scale=formula.scale * factor)
        # f c tanh(s x / c) = f c tanh(f s x / f c)
        return replace(formula, scale=formula.scale * factor, cap=formula.cap * factor)
    if func is aten.add.Tensor and not kwargs and scaled:  # BART
        vector = args[0]
        if (
            not isinstance(vector, Tensor)
            or vector.dtype is not source.dtype
            or vector.device != source.device
            or vector.shape[-1:] != source.shape[-1:]
            or vector.numel() != source.shape[-1]
            or vector.dim() > source.dim()
        ):
            return None
        return replace(
            formula,
            added=(*formula.added, (vector, formula.scale)),
            versions=(*formula.versions, vector._version),
        )
    if func is aten.tanh.default and scaled:
        return replace(formula, cap=1.0)
    if func is aten._to_copy.default:
        same_device = kwargs.keys() <= {"dtype"}
        return formula if same_device and kwargs.get("dtype") is torch.float32 else None
    if func is aten.clone.default:
        return formula
    if func is aten.detach.default:  # also what autograd keeps of tanh
        return replace(formula, detached=True)
    if func in (aten.view.default, aten._unsafe_view.default):
        return _viewed(formula, source, args[0])
    if func is aten.slice.Tensor:
        dim, *bounds = args if args else (0,)
        dim %= source.dim()
        if dim == source.dim() - 1:
            whole = bounds[:1] in ([], [None], [0]) and (
                len(bounds) < 2 or bounds[1] is None or bounds[1] >= source.shape[-1]
            )
            return formula if whole and not kwargs and bounds[2:] in ([], [1]) else None
        return replace(
            formula,
            rows=(*formula.rows, lambda x: aten.slice.Tensor(x, dim, *bounds, **kwargs)),
        )
    return None


def _viewed(formula: _Formula, source: DeferredLogits, shape: Any) -> _Formula | None:
    vocabulary = source.shape[-1]
    leading = [*shape][:-1]
    if not shape or shape[-1] not in (vocabulary, -1) or (shape[-1] == -1 and -1 in leading):
        return None
    if -1 not in leading and math.prod(leading) * vocabulary != source.numel():
        return None
    return replace(formula, rows=(*formula.rows, lambda x: x.reshape(*leading, x.shape[-1])))


class _Placed(torch.autograd.Function):
    """Gives deferred logits their place in the graph, for gradients that reach them as such."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        formula = _Formula(x, weight, bias, ())
        shape = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device="meta")
        return DeferredLogits.of(shape, formula, lambda x: F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            grad @ weight if of_x else None,
            rows.mT @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def deferred(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias) as a `DeferredLogits`.

    Args:
        x: (..., D), the hidden states.
        weight: (V, D). In x's dtype, or under autocast of any.
        bias: (V,).
    """
    dtype = modes.autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    made: DeferredLogits = _Placed.apply(x, weight, bias)
    parts = (x, weight) if bias is None else (x, weight, bias)
    # Of the tensors that have the graph; forward had them without.
    made._formula = _Formula(x, weight, bias, tuple(part._version for part in parts))
    return made
