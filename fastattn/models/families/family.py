"""What a family of models is: how Hugging Face's folders have its config and its weights."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Names = str | tuple[str, ...]
MOST_LAYERS = 2**14


class Transposed(str):
    """The name of a layer whose weight is stored as (in, out): GPT-2's Conv1D."""


@dataclasses.dataclass(frozen=True)
class GGUF:
    """How llama.cpp's files have a family.

    Attributes:
        keys: of the metadata, without the architecture's name -> config.json's.
        names: of layers, with "*" for the number -> those in a folder.
        heads: the layers in a folder whose rows llama.cpp orders for rotations of neighbours -> the
            field of our config with the number of their heads.
    """

    keys: Mapping[str, str]
    names: Mapping[str, str]
    heads: Mapping[str, str]

    def stored(self, name: str) -> str:
        """The name in a folder; a name that is not known is kept."""
        layer, _, leaf = re.sub(r"\.\d+\.", ".*.", name).rpartition(".")
        number = re.search(r"\.(\d+)\.", name)
        stored = self.names.get(layer)
        if stored is None:
            return name
        return stored.replace("*", number[1] if number else "*") + f".{leaf}"

    def permuted(self, name: str, config: Any) -> int | None:
        """The heads of a layer whose rows are in llama.cpp's order, by its name in a folder."""
        layer = re.sub(r"\.\d+\.", ".*.", name).rpartition(".")[0]
        return getattr(config, self.heads[layer]) if layer in self.heads else None


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One `model_type` of transformers, and where a model of ours has its parts, both ways.

    Attributes:
        title: for errors and docs.
        model_type: config.json's.
        classes: config.json's "architectures" -> our class, by its name in `fastattn.models`. The
            first of each of ours is the one that is written.
        config_class: our config.
        fields: config.json's key -> the field of our config, or several that it sets alike.
        defaults: what a silent config.json means, by its keys, where our config means otherwise.
        constants: our fields that all models of the family share.
        fixed: keys of config.json that may have one value only: we compute nothing else.
        read_more: config.json, completed by defaults -> our fields that are no key's value.
        write_more: our config -> keys of config.json, the reverse.
        names: the layers, or single parameters, of our model -> their names in the folder, with "*"
            for the number of a layer. Several names of theirs for one of ours, or of ours for one
            of theirs, are one tensor, the rows of all in this order. What a model does not have
            is passed over.
        prefix: of the names in the folder, which a file may lack (one of the model without a head).
        depths: the beginning of the layers' names, without the prefix -> the key of their number.
        ignored: names, without the prefix, that are no weights (masks that were saved).
        aliases: names that may be there for the tensor of another name, to which they are equal.
        gguf: how llama.cpp's files have it, if they are read.
        spare: names, without the prefix, of weights that are left out where the model that is read
            has no place for them (a pooler).
        renamed: ends of names that old files have -> the ends that the table has.
        more_names: our config -> the part of names that depends on it.
        zeros: names, without the prefix, of tensors that are zero where a file lacks them.
        own_head: names, without the prefix, of the head's weight and of the embedding's where the
            files decide whether they are tied: if there is none, or one that is the same.
    """

    title: str
    model_type: str
    classes: Mapping[str, str]
    config_class: type
    fields: Mapping[str, Names]
    names: Mapping[Names, Names]
    depths: Mapping[str, str]
    prefix: str = ""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read_more: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    write_more: Callable[[Any], dict[str, Any]] | None = None
    ignored: re.Pattern[str] | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf: GGUF | None = None
    spare: re.Pattern[str] | None = None
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    more_names: Callable[[Any], Mapping[Names, Names]] | None = None
    zeros: frozenset[str] = frozenset()
    own_head: tuple[str, str] | None = None

    @property
    def entries(self) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """The table of names, all as tuples."""
        return [(_tuple(ours), _tuple(theirs)) for ours, theirs in self.names.items()]

    def depth(self, config: Any, key: str) -> int:
        """The number of layers that a key of `depths` has in our config."""
        return int(getattr(config, _tuple(self.fields[key])[0]))

    def of(self, config: Any) -> Family:
        """The family with all names of the models of one config of ours."""
        if self.more_names is None:
            return self
        names = {**self.names, **self.more_names(config)}
        return dataclasses.replace(self, names=names, more_names=None)

    def short(self, name: str) -> str:
        """A stored name without the prefix, and as the table has it."""
        for old, new in self.renamed.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return name.removeprefix(self.prefix)

    def architecture(self, cls: type) -> str:
        """The class of transformers that is written for a class of ours, or one made of it."""
        ours = {base.__name__ for base in cls.__mro__}
        for theirs, name in self.classes.items():
            if name in ours:
                return theirs
        raise ValueError(f"{self.title} has no model that is a {cls.__name__}")

    def read_config(self, data: Mapping[str, Any]) -> Any:
        """Our config of a config.json; TypeError or ValueError for one that we do not compute."""
        for key, only in {"quantization_config": None, **self.fixed}.items():
            given = data.get(key, only)
            if given != only and (given or only):  # None and 0 are both off
                raise ValueError(
                    f'"{key}" is {given!r}, and {self.title} has only {only!r} here '
                    "(fastattn.accelerate takes transformers' own model)"
                )
        data = {**self.defaults, **data}
        for key in self.depths.values():  # some families make a list of so many
            if isinstance(data.get(key), int) and data[key] > MOST_LAYERS:
                raise ValueError(f'"{key}" is {data[key]}, more than {MOST_LAYERS}')
        values = dict(self.constants)
        for key, names in self.fields.items():
            if key in data:
                values |= dict.fromkeys(_tuple(names), data[key])
        if self.read_more is not None:
            values |= self.read_more(data)
        return self.config_class(**values)

    def write_config(self, config: Any) -> dict[str, Any]:
        """config.json of a config of ours, but for the class and the dtype.

        Raises ValueError if the family has no place for an option, and names it.
        """
        if lost := self.lost(config):
            raise ValueError(f"{self.title} has no place in its config.json for {', '.join(lost)}")
        return self._written(config)

    def lost(self, config: Any) -> list[str]:
        """The options of ``config`` that would be others after writing and reading it."""
        given, back = config.resolved(), self.read_config(self._written(config)).resolved()
        fields = (field.name for field in dataclasses.fields(given))
        return [
            f"{name}={getattr(given, name)!r}"
            for name in fields
            if not _same(getattr(given, name), getattr(back, name))
        ]

    def _written(self, config: Any) -> dict[str, Any]:
        data: dict[str, Any] = {"model_type": self.model_type}
        silent = self.read_config({})
        for key, names in self.fields.items():
            value = getattr(config, _tuple(names)[0])
            if value is not None or getattr(silent, _tuple(names)[0]) is not None:
                data[key] = list(value) if isinstance(value, tuple) else value
        data |= {key: value for key, value in self.fixed.items() if value is not None}
        return data | (self.write_more(config) if self.write_more is not None else {})


def _tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)
