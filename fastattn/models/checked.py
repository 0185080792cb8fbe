"""The checks that the configs of all models share; each settles fields in one form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from fastattn.nn.checks import check_choice, check_integer, check_number, check_probability
from fastattn.nn.rotary_embedding import check_scaling

LAYER_TYPES = ("full_attention", "sliding_attention")


class Checked:
    """A frozen dataclass that checks its fields when it is made.

    The methods take names of fields. They raise TypeError or ValueError for a value that does not
    fit; the message names the field.
    """

    eos_token_id: Any
    rope_scaling: Any  # not of all, like layer_types
    layer_types: Any

    def _settle(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the class is frozen

    def _settle_integers(
        self, names: Iterable[str], at_least: int | None = None, optional: bool = False
    ) -> None:
        for name in names:
            if (value := getattr(self, name)) is not None or not optional:
                otherwise = " or None" if optional else ""
                self._settle(name, check_integer(name, value, at_least, otherwise))

    def _settle_ends(self) -> None:
        """eos_token_id: an integer, several or None."""
        ends = self.eos_token_id
        if isinstance(ends, (list, tuple)):  # a tuple is hashable
            ends = tuple(check_integer("each eos_token_id", end) for end in ends)
        elif ends is not None:
            ends = check_integer("eos_token_id", ends, otherwise=", several or None")
        self._settle("eos_token_id", ends)

    def _settle_probabilities(self, names: Iterable[str]) -> None:
        for name in names:
            self._settle(name, check_probability(name, getattr(self, name)))

    def _settle_positive(self, names: Iterable[str], optional: Iterable[str]) -> None:
        """Numbers above 0; those that are `optional` may be None."""
        for name in names:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            self._settle(name, check_number(name, value))
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")

    def _check_flags(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be True or False, got {value!r}")

    def _check_divides(self, part: str, whole: str) -> None:
        a, b = getattr(self, part), getattr(self, whole)
        if b % a:
            raise ValueError(f"{part} must divide {whole}, got {part}={a} and {whole}={b}")

    def _check_choices(self, **known: Iterable[Any]) -> None:
        for name, values in known.items():
            check_choice(name, getattr(self, name), values)

    def _settle_scaling(self) -> None:
        """rope_scaling: a mapping becomes pairs, which are hashable."""
        scaling = self.rope_scaling
        if isinstance(scaling, Mapping):
            self._settle("rope_scaling", tuple(check_scaling(scaling).items()) or None)

    def _settle_layer_types(self, layers: int, window: str) -> None:
        """layer_types: None or a kind for each of the `layers`; sliding ones need a `window`."""
        types = self.layer_types
        if types is None:
            return
        if not isinstance(types, (list, tuple)) or any(t not in LAYER_TYPES for t in types):
            raise ValueError(
                f"layer_types must be None or have {' or '.join(map(repr, LAYER_TYPES))} for each "
                f"layer, got {types!r}"
            )
        if len(types) != layers:
            raise ValueError(f"layer_types must have n_layer = {layers} entries, got {len(types)}")
        if "sliding_attention" in types and getattr(self, window) is None:
            raise ValueError(f'layers with "sliding_attention" need a {window}')
        self._settle("layer_types", tuple(types))
