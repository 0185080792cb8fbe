"""New weights one after another: those of a model that is never there as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastattn.models.folder.layout import DRAWS, Weights
from fastattn.models.gpt import GPT

FILLS = ("zero_", "fill_", "zeros_", "ones_", "constant_")


class _Fill(NamedTuple):
    """How a parameter was filled last: `function(parameter, *args, **kwargs)`."""

    state: Tensor | None  # of torch's generator before it drew
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        whole = torch.empty_like(like, device="cpu")
        former = torch.get_rng_state()
        if self.state is not None:
            torch.set_rng_state(self.state)
        self.function(whole, *self.args, **self.kwargs)
        torch.set_rng_state(former)
        return whole.to(dtype)


class _Recorded(TorchFunctionMode):
    """Notes how each tensor on the meta device is filled. What is drawn for it is drawn, and let
    go, so that torch's generator is afterwards where it is after an ordinary model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fills: dict[int, _Fill] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name not in DRAWS and name not in FILLS:
            return func(*args, **kwargs)
        tensor, *rest = args if args else (kwargs.pop("tensor"),)
        if not tensor.is_meta:
            return func(tensor, *rest, **kwargs)
        state = torch.get_rng_state() if name in DRAWS else None
        self.fills[id(tensor)] = _Fill(state, func, tuple(rest), kwargs)
        if state is not None:
            func(torch.empty_like(tensor, device="cpu"), *rest, **kwargs)
        return tensor


def drawn(config: Any, dtype: torch.dtype) -> tuple[GPT, Weights]:
    """A new GPT on the meta device, and its weights: the bits of ``GPT(config).to(dtype)``, drawn
    from torch's generator as it is now, whenever they are asked for.
    """
    with _Recorded() as recorded:
        model = GPT(config, device="meta")
    # Detached: `to` changes the dtype of the parameter itself.
    fills = {name: (p.detach(), recorded.fills[id(p)]) for name, p in model.named_parameters()}

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, (like, fill) in fills.items():
            with torch.no_grad():
                whole = fill(like, dtype)
            yield name, whole

    return model.to(dtype), weights
