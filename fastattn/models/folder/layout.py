"""Where a model's parameters are in a Hugging Face folder, by the table of names of its family.

A folder holds either ``model.safetensors`` or ``model.safetensors.index.json``, which says in which
of several files each tensor is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastattn.models.families import Family, Transposed
from fastattn.nn import Attention

# How `torch.nn.init` fills a weight.
DRAWS = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_")

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


# Each parameter and stored buffer of a model once, by name and whole, when it is asked for.
Weights = Callable[[], Iterator[tuple[str, torch.Tensor]]]


@dataclasses.dataclass(frozen=True)
class Stored:
    """How parameters lie in a folder: the rows of ``ours``, in order, are those of ``names``.

    One of the two is a single tensor. ``rows`` are how many each of the several has. The names are
    full ones; ``shapes`` are those in the folder.
    """

    ours: tuple[str, ...]
    names: tuple[str, ...]
    rows: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool = False


def skeleton(cls: Any, config: Any) -> Any:
    """A model of a config with shapes and no weights, on the meta device."""
    with _Undrawn():
        return cls(config, device="meta")


def laid_out(folder: Path, cls: type, config: Any) -> Any:
    """`skeleton` of a config that a folder has, whose layers are known to be in its files.

    Raises:
        ValueError: the config describes no model; the message has the folder.
    """
    try:
        return skeleton(cls, config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        message = str(error).splitlines()[0]  # torch adds its C++ stack
        raise ValueError(f"{folder}: its config describes no model: {message}") from error


class _Undrawn(TorchFunctionMode):
    """New weights are left as they are: drawing them has torch import its compiler, even where
    there is nothing to draw.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def layout(model: torch.nn.Module, family: Family) -> list[Stored]:
    """All tensors of a model's ``state_dict`` as the family stores them; a shared one once.

    The model may be on the meta device. Raises ValueError for tensors that have no place in the
    family's table.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(model).items()}
    entries: list[Stored] = []
    strangers = dict.fromkeys(shapes)
    for name in shapes:
        if name in strangers and (found := _entry(family, name)) is not None:
            ours, theirs, transposed = found
            if all(one in shapes for one in ours):
                entries.append(_stored(model, ours, theirs, shapes, transposed))
                for one in ours:
                    del strangers[one]
    if strangers:
        raise ValueError(f"a folder of {family.title} has no place for {', '.join(strangers)}")
    return entries


def stored_name(family: Family, name: str) -> str | None:
    """The name in the folder of one tensor of ours that is stored as one; else None."""
    found = _entry(family, name)
    return None if found is None or len(found[0]) + len(found[1]) > 2 else found[1][0]


def _entry(family: Family, name: str) -> tuple[tuple[str, ...], tuple[str, ...], bool] | None:
    """The entry of the table that the tensor ``name`` of ours is in, with its layer and its leaf:
    our names, theirs, and whether the weight is stored transposed.
    """
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
    module, _, leaf = pattern.rpartition(".")
    for ours, theirs in family.entries:
        for whole, suffix in ((pattern, ""), (module, f".{leaf}")):
            if whole in ours:
                layer = numbers[0] if numbers else "*"
                first, second = (
                    tuple(name.replace("*", layer) + suffix for name in names)
                    for names in (ours, theirs)
                )
                return first, second, isinstance(theirs[0], Transposed)
    return None


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; one with several names by the first."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    return {
        name: tensor for name, tensor in state.items() if first.setdefault(id(tensor), name) == name
    }


def _stored(
    model: torch.nn.Module,
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    transposed: bool,
) -> Stored:
    shape = shapes[ours[0]]
    if len(theirs) > 1:
        rows = _projections(model, ours[0])
        return Stored(ours, theirs, rows, tuple((n, *shape[1:]) for n in rows))
    rows = tuple(shapes[name][0] for name in ours)
    whole = (sum(rows), *shape[1:])
    transposed = transposed and len(shape) == 2
    return Stored(ours, theirs, rows, (whole[::-1] if transposed else whole,), transposed)


def _projections(model: torch.nn.Module, name: str) -> tuple[int, ...]:
    """How many rows of an attention's packed projection are those of q, k and v."""
    owner, projection, _ = name.rsplit(".", 2)
    attention = model.get_submodule(owner)
    assert isinstance(attention, Attention)
    q, kv = (n * attention.head_dim for n in (attention.num_heads, attention.num_kv_heads))
    return (q, kv, kv) if projection == "in_proj" else (kv, kv)


def shared_names(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """(other name, first name) of each tensor of the ``state_dict`` that has several."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            yield name, first[id(tensor)]
