"""Parameters that a model has under more than one name, as a head tied to the embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SharedParameters(torch.nn.Module):
    """A base of models whose shared parameters stay one through conversions and loading."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Convert the parameters; a shared one stays one where `fn` makes new ones."""
        shared = _shared_parameters(self)
        super()._apply(fn, recurse)
        for first, *others in shared:
            for name in others:
                owner, _, leaf = name.rpartition(".")
                self.get_submodule(owner)._parameters[leaf] = self.get_parameter(first)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load a shared parameter once: under ``assign=True`` each name would get its own."""
        errors = rest[-1]
        for names in _shared_parameters(self):
            keys = [prefix + name for name in names]
            given = [state_dict[key] for key in keys if key in state_dict]
            if not given:
                continue
            if not all(_equal(given[0], tensor) for tensor in given[1:]):
                errors.append(
                    f"{' and '.join(keys)} are one parameter of this model, and differ in the "
                    "state_dict: build the model with tie_word_embeddings=False, or give the head "
                    "a weight of its own before (lm_head.weight = torch.nn.Parameter(...))"
                )
            value = given[0]
            if not isinstance(value, torch.nn.Parameter):
                value = torch.nn.Parameter(value, self.get_parameter(names[0]).requires_grad)
            state_dict.update(dict.fromkeys(keys, value))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _shared_parameters(model: torch.nn.Module) -> list[list[str]]:
    """The names of each parameter that has more than one."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two entries of a state_dict are the same, as far as they have values."""
    return a is b or a.is_meta or b.is_meta or torch.equal(a, b)
