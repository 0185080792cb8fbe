"""The weights that a GPT computes with now, whatever its parts have become.

A user may have wrapped parts of it (torch.compile, DDP, FSDP, checkpointing), sharded or
parametrised its parameters, pruned them, or given the head a weight of its own.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.models.folder.layout import HEAD, layout
from fastattn.nn.plain import refresh

if TYPE_CHECKING:
    from fastattn.models.gpt import GPT

# The one child of torch's wrappers: torch.compile, DDP and DataParallel, FSDP1, checkpointing.
WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@torch.no_grad()
def weights_of(model: GPT) -> tuple[dict[str, Tensor], bool, bool]:
    """The weights by their stored names, whether head and embedding are one, whether any is a part.

    Weights of which the processes hold parts (DTensors) are gathered; the first process has them,
    on the CPU, and the others an empty dict.

    Raises ValueError for a part that is no part of a GPT-2, and for parameters that have no place
    in a folder.
    """
    untied = dataclasses.replace(model.config, tie_word_embeddings=False)
    places = {name: _Place(model, name) for name in layout(untied)}
    known = {id(p) for place in places.values() for p in place.parameters()}
    strangers = [name for name, p in model.named_parameters() if id(p) not in known]
    if strangers:
        raise ValueError(
            f"a GPT-2 folder has no place for the parameters {', '.join(strangers)}: merge "
            "adapters into the weights before saving, save parts of FSDP1 inside "
            "FullyShardedDataParallel.summon_full_params(model), or save model.state_dict()"
        )
    values = {name: place.value() for name, place in places.items()}
    sharded = any(hasattr(value, "full_tensor") for value in values.values())
    first = not sharded or torch.distributed.get_rank() == 0
    head, embedding = values[HEAD], values["wte.weight"]
    one = head is embedding
    if one:
        del values[HEAD]
    weights = {}
    for name, how in layout(untied).items():
        if name not in values:
            continue
        value = _whole(values[name])
        if not first:
            continue
        shape = how.shape[::-1] if how.transposed else how.shape
        if value.shape != shape:
            raise ValueError(
                f"{name} must have the shape {tuple(shape)} by the model's config, got "
                f"{tuple(value.shape)}: a part was replaced, or FSDP1 holds a piece of it (save "
                "inside FullyShardedDataParallel.summon_full_params(model))"
            )
        weights[how.name] = (value.t() if how.transposed else value).contiguous()
    tied = one or (
        first
        and model.config.tie_word_embeddings
        and torch.equal(weights[HEAD], weights["wte.weight"])
    )
    if tied:
        weights.pop(HEAD, None)
    return weights, tied, sharded


class _Place:
    """Where a parameter of `layout` is in a model whose parts may be wrapped."""

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        *path, self.leaf = name.split(".")
        self.name = name
        self.owner = _unwrapped(model)
        for part in path:
            child = self.owner._modules.get(part)
            if child is None:
                raise ValueError(
                    f"the model has no {name}: {type(self.owner).__name__} has no part {part!r}. "
                    "Save the model before its parts are replaced"
                )
            self.owner = _unwrapped(child)

    def parameters(self) -> list[Tensor]:
        """The parameters that make the weight: itself, or those of a parametrisation or a hook."""
        own = self.owner._parameters
        names = (self.leaf, f"{self.leaf}_orig", f"{self.leaf}_g", f"{self.leaf}_v")
        found: list[Tensor] = [own[name] for name in names if own.get(name) is not None]  # type: ignore[misc]
        if torch.nn.utils.parametrize.is_parametrized(self.owner, self.leaf):
            found += self.owner.parametrizations[self.leaf].parameters()  # type: ignore[index, union-attr]
        return found

    def value(self) -> Any:
        """The weight as the next forward has it."""
        refresh(self.owner)
        value = getattr(self.owner, self.leaf, None)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(
                f"{self.name} is no tensor of floating-point numbers in a "
                f"{type(self.owner).__name__}: save the model before it is quantised or its parts "
                "are replaced"
            )
        if value.is_meta:
            raise ValueError(f"{self.name} is on the meta device and has no values to save")
        return value


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside torch's wrappers."""
    while len(module._modules) == 1 and not module._parameters:
        ((name, inner),) = module._modules.items()
        if name not in WRAPPED or inner is None:
            break
        module = inner
    return module


def _whole(value: Any) -> Tensor:
    """The tensor in memory: a DTensor's parts together, a sparse one's zeros too."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor().cpu()
    if value.layout is not torch.strided:
        value = value.to_dense()
    return value.detach()
