"""How a family of transformers uses the name of an attention implementation.

transformers takes any registered name for any model, and makes its masks by that name. Families
differ in what follows:

- most hand their attention to the implementation (they dispatch through `AttentionInterface`), and
  declare (`_supports_sdpa`, `_supports_attention_backend`) that their modules say themselves
  whether they are causal, so that a mask may be boolean, and be missing where causality says all;
- some dispatch, but have modules that count on a mask of "eager" (PEGASUS-X, NLLB-MoE, Splinter),
  or parts that never dispatch and add the mask to their own scores (BigBird-Pegasus, Informer, GIT,
  Gemma 4's audio tower): they declare nothing of the kind, and get the masks of "eager";
- some ask for masks and never dispatch (Bloom, MPT, XGLM, RoFormer): with masks other than "eager"
  they would compute nonsense, and with those nothing would run here. They are refused;
- the rest asks for no masks: what of it does not dispatch computes as it always does, and its
  results are right. So such a part may belong to a model that is on fastattn elsewhere.

Beyond our reach are classes that a model picks from a table of its own by the name, while it is
built (SAM's vision tower, GIT, Data2Vec's vision tower, DeepSeek-OCR-2): `KeyError: 'fastattn'`.
Which of its models read the table, only the module's code knows.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

NAME = "fastattn"
NAME_OR_EAGER = "fastattn_or_eager"  # what `accelerate` puts in the place of "eager"


def refusal(model: type[PreTrainedModel]) -> str | None:
    """Why attn_implementation="fastattn" is refused to a class of models, None if it is not."""
    for cls in model.__mro__:
        if not issubclass(cls, PreTrainedModel) or cls is PreTrainedModel:
            continue
        module = sys.modules.get(cls.__module__)
        if module is not None and _keeps_its_attention(module):
            return (
                f"{model.__name__} does not dispatch its attention through transformers' "
                f"AttentionInterface ({module.__name__} computes its own), so that "
                f'attn_implementation="{NAME}" would change its masks and nothing else: use '
                'attn_implementation="eager"; where it is a part of a model, only for this part, '
                f'attn_implementation={{"": "{NAME}", "<name of its config>": "eager"}}'
            )
    return None


def _keeps_its_attention(module: ModuleType) -> bool:
    """Whether a modelling file asks transformers for masks, and none of its attention dispatches.

    A file without a class of attention leaves that to other files, which speak for themselves.
    """
    if not any(map(_makes_masks, vars(module).values())):
        return False
    own = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, torch.nn.Module)
        and not issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and "Attention" in cls.__name__
    ]
    return bool(own) and not any(map(_may_dispatch, own))


def _makes_masks(x: Any) -> bool:
    """Whether x is a function of transformers that makes masks in the implementation's own kind."""
    return (
        isinstance(x, FunctionType)
        and x.__module__ == "transformers.masking_utils"
        and x.__name__.startswith("create_")
        and x.__name__ != "create_recurrent_attention_mask"  # the same for all
    )


def _may_dispatch(cls: type) -> bool:
    """Whether a file that the class or a base of it is written in knows `AttentionInterface`."""
    files = (sys.modules.get(base.__module__) for base in cls.__mro__)
    return any(
        isinstance(x, AttentionInterface)
        for file in files
        if file is not None
        for x in vars(file).values()
    )


# --- by config, which is all that a mask function is told ----------------------------------------

_takes_boolean_masks: dict[type, bool] = {}


@torch.compiler.assume_constant_result
def takes_boolean_masks(config: type) -> bool:
    """Whether the models of a class of configs get by with boolean masks, or none.

    A class of configs that no loaded model names (a part of a larger config) goes with the others
    of its file. In doubt the answer is no, and the masks are those of "eager".

    Raises:
        ValueError: they do not dispatch; with the text of `refusal`.
    """
    if config not in _takes_boolean_masks:
        models = _models_of(config)
        reasons = [refusal(model) for model in models]
        if reasons and None not in reasons:
            raise ValueError(reasons[0])
        _takes_boolean_masks[config] = bool(models) and all(
            model._supports_sdpa or model._supports_attention_backend for model in models
        )
    return _takes_boolean_masks[config]


_replaceable: dict[type, str | None] = {}


def replaceable(config: Any) -> str | None:
    """The implementation in whose place `accelerate` puts ours: "sdpa" where the models have it.

    Else "eager", if they have another that gives no attention weights: nothing counts on them then.
    None if they have not, or no loaded model has this class of configs.
    """
    if type(config) in _replaceable:
        return _replaceable[type(config)]
    models = _models_of(type(config))
    kinds = ("sdpa", "flash_attn", "flex_attn", "attention_backend")
    has = {k: any(getattr(m, f"_supports_{k}", False) for m in models) for k in kinds}
    found = "sdpa" if has["sdpa"] else "eager" if any(has.values()) else None
    if models:
        _replaceable[type(config)] = found
    return found


def _models_of(config: type) -> list[type[PreTrainedModel]]:
    """The loaded classes of models with this class of configs or a base of it, or with its file."""
    models = [m for m in _subclasses(PreTrainedModel) if isinstance(m.config_class, type)]
    bases = config.__mro__[: config.__mro__.index(PreTrainedConfig)]
    for base in bases:
        if found := [m for m in models if m.config_class is base]:
            return found
    files = [base.__module__ for base in bases]
    return [m for m in models if m.config_class.__module__ in files]


def _subclasses(cls: type[PreTrainedModel]) -> Iterator[type[PreTrainedModel]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


# --- by model, when the implementation is chosen -------------------------------------------------


def refuse_when_chosen() -> None:
    """Have transformers raise `refusal` where it takes the name for a model. Harmless if repeated.

    `PreTrainedModel.get_correct_attn_implementation`, which every model asks about every name when
    it is built and when its implementation is changed, is wrapped; other names pass through.
    """
    original: Callable[..., str] = PreTrainedModel.get_correct_attn_implementation
    if hasattr(original, "asks_fastattn"):
        return

    @functools.wraps(original)
    def checked(self: PreTrainedModel, requested_attention: Any, *args: Any, **kwargs: Any) -> str:
        if requested_attention == NAME:
            if (reason := refusal(type(self))) is not None:
                raise ValueError(reason)
            _takes_boolean_masks.pop(type(self.config), None)  # this class may be a new one
        return original(self, requested_attention, *args, **kwargs)

    checked.asks_fastattn = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked
