"""A generation_config.json: how a model's authors would have it generate.

The fields of `GenerationConfig` are the settings of `generate`, by the names of transformers, where
None is silence. Where the caller is silent too, the model's config speaks, then the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fastattn.files import read_json
from fastattn.generation.sampling import SHAPING, Processor, Sampling
from fastattn.nn.checks import check_integer, check_number

FILE = "generation_config.json"

# Settings that change the tokens and that `generate` does not have, with the values that do
# nothing, as None does in any of them.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "num_beam_groups": (1,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "sequence_bias": (),
    "token_healing": (False,),
    "watermarking_config": (),
}
# The same, of sampling only.
UNSUPPORTED_SAMPLING: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
}

# Settings that say nothing without another one.
BEAMS_ONLY = ("length_penalty", "early_stopping")
LOOKUP_ONLY = ("max_matching_ngram_size",)
DRAFT_ONLY = ("num_assistant_tokens",)

OTHER_NAMES = {"assistant_model": "draft_model", "seeds": "seed", "streamers": "streamer"}


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of `generate`; None leaves a setting to the model's config, then to the default.

        model.generation_config = GenerationConfig.from_folder(path)
        model.generate(ids)                          # as its authors would have it
        model.generate(ids, do_sample=False)         # but greedily

    Attributes:
        max_new_tokens: tokens to add at most.
        max_length: the same with the longest prompt counted; max_new_tokens goes before it.
        eos_token_id: the tokens that end a sequence; ``()`` none.
        pad_token_id: what fills a sequence after its end.
        decoder_start_token_id: an encoder-decoder's first token; bos_token_id else.
        stop_strings: texts that end a sequence.
        num_beams, length_penalty, early_stopping: see `fastattn.generation.beams`.
        num_return_sequences: answers to each prompt.
        penalty_alpha: see `fastattn.generation.contrastive`; goes with top_k.
        prompt_lookup_num_tokens, max_matching_ngram_size, num_assistant_tokens: see
            `fastattn.generation.speculative`.
        unsupported: what a file asks for beyond all these, (name, value) pairs; `generate` refuses.
        (all others): see `fastattn.generation.sampling.Sampling`.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    logits_processor: Processor | Sequence[Processor] | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    num_return_sequences: int | None = None
    penalty_alpha: float | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    num_assistant_tokens: int | None = None
    unsupported: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "max_length": 1, "num_beams": 1, "num_return_sequences": 1}
        least |= {"prompt_lookup_num_tokens": 1, "max_matching_ngram_size": 1}
        least |= {"num_assistant_tokens": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, at_least=low)
        for name in ("length_penalty", "penalty_alpha"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value)
        if self.penalty_alpha is not None and not 0 <= self.penalty_alpha <= 1:
            raise ValueError(f"penalty_alpha must be in [0, 1], got {self.penalty_alpha}")
        if self.early_stopping not in (None, True, False, "never"):
            raise ValueError(
                f'early_stopping must be True, False or "never", got {self.early_stopping!r}'
            )
        if self.do_sample not in (None, True, False):
            raise TypeError(f"do_sample must be True or False, got {self.do_sample!r}")
        for name in ("decoder_start_token_id", "bos_token_id"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))

    @classmethod
    def from_folder(cls, path: str | PathLike[str]) -> GenerationConfig:
        """The generation_config.json in a folder; a silent one if it has none.

        Settings that do not change the tokens, or that nobody knows, are passed over. Those that do
        and that `generate` does not have are kept in ``unsupported``.

        Raises ValueError, naming the file, if it is not JSON or a value says nothing.
        """
        file = Path(path) / FILE
        try:
            data = read_json(file)
        except FileNotFoundError:
            if not Path(path).is_dir():
                raise FileNotFoundError(errno.ENOENT, "path must be a folder", str(path)) from None
            return cls()
        if not isinstance(data, dict):
            raise ValueError(f"{file}: must hold a JSON object, got a {type(data).__name__}")
        beyond = tuple(
            (name, data[name])
            for name, nothing in {**UNSUPPORTED, **UNSUPPORTED_SAMPLING}.items()
            if data.get(name) is not None and data[name] not in nothing
        )
        known = {name: data[name] for name in NAMES if name in data}
        try:
            config = cls(**known, unsupported=beyond)
            config.sampling()
            return config
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the generation_config.json of a folder, as `from_folder` and transformers read it.

        Raises ValueError with a logits_processor, which is code.
        """
        if self.logits_processor:
            raise ValueError("logits_processor is code, which generation_config.json cannot hold")
        said = {name: v for name in NAMES if (v := getattr(self, name)) is not None}
        text = json.dumps({**said, **dict(self.unsupported)}, indent=2, sort_keys=True)
        (Path(path) / FILE).write_text(text + "\n", encoding="utf-8")

    def over(self, other: GenerationConfig | None) -> GenerationConfig:
        """This config, and ``other``'s settings where it is silent."""
        if other is None:
            return self
        said = {name: v for name in NAMES if (v := getattr(self, name)) is not None}
        if "max_length" in said and "max_new_tokens" not in said:
            other = dataclasses.replace(other, max_new_tokens=None)
        return dataclasses.replace(other, **said, unsupported=self.unsupported + other.unsupported)

    def sampling(self) -> Sampling:
        """The part that says how a token follows from the logits.

        Where nothing is drawn, settings that only shape the distribution are left out.
        """
        fields = [field.name for field in dataclasses.fields(Sampling)]
        said = {name: v for name in fields if (v := getattr(self, name)) is not None}
        return Sampling(**{k: v for k, v in said.items() if self.do_sample or k not in SHAPING})


NAMES = [f.name for f in dataclasses.fields(GenerationConfig) if f.name != "unsupported"]


def settle(
    given: Mapping[str, Any],
    config: GenerationConfig | None,
    models: GenerationConfig | None,
    *,
    drafted: bool = False,
) -> GenerationConfig:
    """The settings of a call: the arguments, then ``config``, then the model's; ``drafted`` says
    whether the call has a draft model.

    Raises:
        TypeError: an argument that is none, or a config of another type.
        ValueError: an argument that would have no effect, or a config that asks for more than
            `generate` has.
    """
    for name in given:
        if name not in NAMES:
            close = OTHER_NAMES.get(name) or next(
                iter(difflib.get_close_matches(name, NAMES)), None
            )
            raise TypeError(
                f"generate has no argument {name!r}"
                + (f": did you mean {close!r}?" if close else "")
            )
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(
            "generation_config must be a fastattn.generation.GenerationConfig, got "
            f"{type(config).__name__}"
        )
    call = GenerationConfig(**given).over(config)
    settings = call.over(models)
    _refuse_without_effect(given, settings, drafted=drafted)
    beyond = [
        f"{name}={value!r}"
        for name, value in settings.unsupported
        if settings.do_sample or name not in UNSUPPORTED_SAMPLING
    ]
    if beyond:
        raise ValueError(
            f"the model's generation config asks for {', '.join(beyond)}, which generate does not "
            "have: to do without, model.generation_config = "
            "dataclasses.replace(model.generation_config, unsupported=())"
        )
    return settings


def _refuse_without_effect(
    given: Mapping[str, Any], settings: GenerationConfig, *, drafted: bool
) -> None:
    """Raise ValueError for an argument of the call itself that the others leave without effect."""
    said = {name for name, value in given.items() if value is not None}
    contrastive = {"top_k"} if settings.penalty_alpha else set()
    if not settings.do_sample:
        shaping = [n for n in SHAPING if n in said - contrastive and given[n] != SHAPING[n]]
        if shaping:
            raise ValueError(
                f"{' and '.join(shaping)} would have no effect: they shape the distribution that "
                "do_sample=True draws from"
            )
    for names, needed, there in (
        (BEAMS_ONLY, "num_beams", (settings.num_beams or 1) > 1),
        (LOOKUP_ONLY, "prompt_lookup_num_tokens", settings.prompt_lookup_num_tokens is not None),
        (DRAFT_ONLY, "draft_model", drafted),
    ):
        if idle := [name for name in names if name in said and not there]:
            raise ValueError(f"{' and '.join(idle)} would have no effect: give {needed} too")
