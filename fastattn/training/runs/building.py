"""A run's model and tokenizer, as its settings ask for them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

import fastattn
from fastattn import models
from fastattn.files import local_path
from fastattn.models.drawing import drawn
from fastattn.models.families.family import MOST_LAYERS
from fastattn.models.folder.layout import CONFIG, Weights, skeleton
from fastattn.models.folder.sources import read_json
from fastattn.models.loading import class_in
from fastattn.training.contract import Objective, Record
from fastattn.training.optional import require
from fastattn.training.runs import adapters
from fastattn.training.runs.settings import ModelSettings, TokenizerSettings
from fastattn.training.sizes import longest_sequence, text_config
from fastattn.training.tokenizer import Tokenizer


def device_named(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU if there is one.

    Raises:
        ValueError: another kind of device, or one that torch does not see here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; "
            "fastattn doctor says more"
        )
    return device


def trained_tokenizer(
    records: Iterable[Record], settings: TokenizerSettings, objective: type[Objective]
) -> Tokenizer:
    """A tokenizer trained on all texts of the records, with the objective's special tokens."""
    assert settings.vocab_size is not None
    return Tokenizer.train(
        _first_characters(records, settings.characters),
        settings.vocab_size,
        special_tokens={role: f"<|{role}|>" for role in objective.roles},
        extra_tokens=objective.extra_tokens,
    )


def model(settings: ModelSettings, objective: Objective, device: torch.device) -> torch.nn.Module:
    """The model to train, on the device.

    New weights are drawn from torch's global generator.

    Raises:
        ValueError: a folder with a model of another class than the objective trains, a vocabulary
            smaller than the tokenizer's, or sequences longer than the model's positions.
    """
    dtype = getattr(torch, settings.dtype)
    fresh: set[str] = set()
    if settings.folder is None:
        cls, config = getattr(models, objective.model_class), _config(settings, objective)
        _check_size(cls, config)
        made = cls(config).to(device, dtype)
    elif settings.library == "transformers":
        made, fresh = _of_transformers(settings, objective, dtype)
        made.to(device)
        if settings.accelerate:
            fastattn.accelerate(made)
    else:
        made, fresh = _of_folder(settings.folder, objective, dtype, device)
    _check_vocabulary(made, objective)
    if (end := getattr(objective, "end_of_turn", None)) is not None:
        _stop_at(made, end)
    if settings.lora_rank:
        adapters.add(made, settings)
        for name, parameter in made.named_parameters():
            if name in fresh:
                parameter.requires_grad_(True)
    return made


def deferred(
    settings: ModelSettings, objective: Objective
) -> tuple[torch.nn.Module, Weights] | None:
    """`model` on the meta device, and its weights, which are the same.

    None where it has to be made whole: a model of transformers, one with adapters or with a new
    head, a new one that is no GPT, and one in a GGUF file or of 8 bits.

    Raises:
        ValueError: as `model`.
    """
    if settings.library == "transformers" or settings.lora_rank:
        return None
    cls, dtype = getattr(models, objective.model_class), getattr(torch, settings.dtype)
    if settings.folder is None:
        if cls is not models.GPT:
            return None
        config = _config(settings, objective)
        _check_size(cls, config, whole=False)
        made, weights = drawn(config, dtype)
    else:
        folder = local_path("folder", settings.folder)
        if not folder.is_dir() or class_in(folder) is not cls:
            return None
        if read_json(folder / CONFIG).get("quantization_config"):
            return None
        made, weights = cls.deferred(folder, dtype=dtype)
        if not _labelled(made, objective):
            return None
    _check_vocabulary(made, objective)
    if (end := getattr(objective, "end_of_turn", None)) is not None:
        _stop_at(made, end)
    return made, weights


def _config(settings: ModelSettings, objective: Objective) -> Any:
    """The config of a new model."""
    cls = getattr(models, objective.model_class)
    values = {**_tokens(objective, cls.config_class), **settings.config}
    if settings.preset is None:
        return cls.config_class(**values)
    if hasattr(cls.config_class, "preset"):
        return cls.config_class.preset(settings.preset, **values)
    raise ValueError(f"preset: {cls.config_class.__name__} has none; give its fields in config")


def _check_size(cls: Any, config: Any, whole: bool = True) -> None:
    """Raise ValueError for a new model that this machine's memory cannot hold, before it is made.

    Its weights are drawn in float32 on the CPU; one after another where it is not `whole`.
    """
    for name in ("n_layer", "encoder_layers", "decoder_layers"):
        if (layers := getattr(config, name, 0)) > MOST_LAYERS:
            raise ValueError(f"config: {name} is {layers}, more than {MOST_LAYERS}")
    try:
        sizes = [4 * parameter.numel() for parameter in skeleton(cls, config).parameters()]
    except (RuntimeError, OverflowError) as error:  # numbers that torch cannot count to
        raise ValueError(f"config: no model has these sizes ({str(error)[:80]})") from error
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = sum(sizes) if whole else max(sizes)
    if size > memory:
        weights = "weights take" if whole else "largest weight takes"
        raise ValueError(
            f"config: the new model's {weights} {size / 2**30:.1f} GiB, and this machine has "
            f"{memory / 2**30:.1f} GiB of memory: make it smaller"
        )


def _tokens(objective: Objective, config_class: Any) -> dict[str, Any]:
    """The fields of a new model's config that the tokenizer and the objective's labels decide."""
    tokenizer = objective.tokenizer
    roles = {role: tokenizer.token(role) for role in tokenizer.roles}
    values = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": roles.get("bos"),
        "eos_token_id": roles.get("eos", roles.get("sep")),
        "pad_token_id": roles.get("pad"),
        "decoder_start_token_id": roles.get("pad"),
        **_labels(objective),
    }
    known = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in values.items() if name in known}


def _labels(objective: Objective) -> dict[str, Any]:
    """The fields of an `EncoderConfig` for an objective that has labels, in their ids' order."""
    names = getattr(objective, "labels", ())
    return {"n_labels": len(names), "label_names": tuple(names)} if names else {}


def _labelled(model: Any, objective: Objective) -> bool:
    """Whether a model's labels are the objective's."""
    labels = _labels(objective)
    return all(getattr(model.config, name) == value for name, value in labels.items())


def _of_folder(
    folder: str, objective: Objective, dtype: torch.dtype, device: torch.device
) -> tuple[torch.nn.Module, set[str]]:
    """The model of a folder, and the names of its parameters that are new: of another head."""
    cls = getattr(models, objective.model_class)
    loaded = models.load(folder, dtype=dtype, device=device)
    if type(loaded) is cls and _labelled(loaded, objective):
        return loaded, set()
    encoder = loaded if isinstance(loaded, models.Encoder) else getattr(loaded, "encoder", None)
    if not (isinstance(encoder, models.Encoder) and cls.config_class is models.EncoderConfig):
        raise ValueError(
            f"the objective {objective.name!r} trains a model of class {cls.__name__}, and "
            f"{folder} holds a {type(loaded).__name__}"
        )
    config = dataclasses.replace(loaded.config, **_labels(objective))
    made = cls(config, device=device, dtype=dtype)
    known = encoder.state_dict()
    made.encoder.load_state_dict(known, strict=False)
    made.family = loaded.family
    fresh = {
        name
        for name, _ in made.named_parameters()
        if not (name.startswith("encoder.") and name.removeprefix("encoder.") in known)
    }
    return made, fresh


def _of_transformers(
    settings: ModelSettings, objective: Objective, dtype: torch.dtype
) -> tuple[Any, set[str]]:
    transformers = require("transformers", "hf", 'library = "transformers"')
    names = getattr(objective, "labels", ())
    labels: dict[str, Any] = {}
    if names:
        labels = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "ignore_mismatched_sizes": True,
        }
    cls = getattr(transformers, objective.auto_class)
    made, info = cls.from_pretrained(
        settings.folder,
        dtype=dtype,
        output_loading_info=True,
        trust_remote_code=False,
        use_safetensors=True,
        **labels,
    )
    missing = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    return made, missing


def check_length(model: Any, name: str, length: int) -> None:
    """Raise ValueError where the setting `name` allows sequences longer than the model's."""
    longest = longest_sequence(model)
    if longest is not None and length > longest:
        raise ValueError(
            f"{name} is {length}, and the model has {longest} positions (n_positions): give a "
            "shorter one, or a new model more positions"
        )


def _stop_at(model: Any, token: int) -> None:
    """Let generation end at a token, beside those at which it ends already."""
    former = model.config.eos_token_id
    ends = [former] if isinstance(former, int) else former or []
    if isinstance(model, models.GPT):
        ends = tuple(dict.fromkeys([*ends, token]))
        model.config = dataclasses.replace(model.config, eos_token_id=ends)
    else:
        ends = list(dict.fromkeys([*ends, token]))
        model.config.eos_token_id = model.generation_config.eos_token_id = ends


def _check_vocabulary(model: Any, objective: Objective) -> None:
    size = text_config(model).vocab_size
    if size < objective.tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer has {objective.tokenizer.vocab_size} tokens, and the model's "
            f"vocab_size is {size}: give the tokenizer of the model, or a larger one"
        )


def _first_characters(records: Iterable[Record], count: int) -> Iterator[str]:
    """The texts of the records, as far as they have so many characters."""
    for record in records:
        for text in _texts(record):
            yield text[:count]
            count -= len(text)
            if count <= 0:
                return


def _texts(value: Any) -> Iterator[str]:
    """All strings in a record's fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)
