"""The weights that a model computes with now, whatever its parts have become.

A user may have wrapped parts of it (torch.compile, DDP, FSDP, checkpointing), sharded or
parametrised its parameters, pruned them, or given the head a weight of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastattn.models.families import Family
from fastattn.models.folder.layout import Stored, layout, shared_names, skeleton, tensors
from fastattn.nn.plain import refresh

# The one child of torch's wrappers: torch.compile, DDP and DataParallel, FSDP1, checkpointing.
WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@torch.no_grad()
def weights_of(model: Any, family: Family) -> tuple[dict[str, Tensor], bool, bool]:
    """The weights by their stored names, whether those that config.tie_word_embeddings ties are
    one, whether any is a part.

    Weights of which the processes hold parts (DTensors) are gathered; the first process has them,
    on the CPU, and the others an empty dict.

    Raises ValueError for a part that the family does not have, and for parameters that have no
    place in a folder.
    """
    apart, joined = (
        skeleton(type(model), dataclasses.replace(model.config, tie_word_embeddings=tied))
        for tied in (False, True)
    )
    places = {name: _Place(model, name) for name in tensors(apart)}
    known = {id(p) for place in places.values() for p in place.parameters()}
    strangers = [name for name, p in model.named_parameters() if id(p) not in known]
    if strangers:
        raise ValueError(
            f"a folder of {family.title} has no place for the parameters {', '.join(strangers)}: "
            "merge adapters into the weights before saving, save parts of FSDP1 inside "
            "FullyShardedDataParallel.summon_full_params(model), or save model.state_dict()"
        )
    values = {name: place.value() for name, place in places.items()}
    sharded = any(hasattr(value, "full_tensor") for value in values.values())
    first = not sharded or torch.distributed.get_rank() == 0
    # The names that config.tie_word_embeddings makes one: (head, embedding).
    pairs = [(other, name) for other, name in shared_names(joined) if other in values]
    one = bool(pairs) and all(values[other] is values[name] for other, name in pairs)
    if one:
        for other, _ in pairs:
            del values[other]
    shapes = {name: tensor.shape for name, tensor in tensors(apart).items()}
    whole: dict[str, Tensor] = {}
    for name, value in values.items():
        value = places[name].in_order(_whole(value))
        if not first:
            continue
        if value.shape != shapes[name]:
            raise ValueError(
                f"{name} must have the shape {tuple(shapes[name])} by the model's config, got "
                f"{tuple(value.shape)}: a part was replaced, or FSDP1 holds a piece of it (save "
                "inside FullyShardedDataParallel.summon_full_params(model))"
            )
        whole[name] = value
    tied = one or (
        first
        and model.config.tie_word_embeddings
        and all(torch.equal(whole[other], whole[name]) for other, name in pairs)
    )
    if not first:
        return {}, tied, sharded
    stored: dict[str, Tensor] = {}
    for entry in layout(joined if tied else apart, family):
        stored |= _stored(entry, [whole[name] for name in entry.ours])
    return stored, tied, sharded


def _stored(entry: Stored, ours: list[Tensor]) -> dict[str, Tensor]:
    """The tensors of an entry as they lie in a folder."""
    if len(entry.names) > 1:
        parts = ours[0].split(entry.rows)
    else:
        parts = (ours[0] if len(ours) == 1 else torch.cat(ours),)
    return {
        name: (part.t() if entry.transposed else part).contiguous()
        for name, part in zip(entry.names, parts, strict=True)
    }


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

    def in_order(self, whole: Tensor) -> Tensor:
        """The whole weight, whose rows tensor parallelism may have in an order of its own."""
        order = getattr(self.owner, "one_process_order", None)
        return whole if order is None else order(whole)


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
