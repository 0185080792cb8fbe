"""A run of `fastattn train` as a whole: model, tokenizer, data, objective, training, output.

    run = Run.of(toml.overridden(toml.read("config.toml"), ["training.steps=1000"]))

Each table of the config is a dataclass, and each field is described in its docstring, which
`fastattn train --help` prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastattn import models
from fastattn.nn.checks import check_integer, check_within
from fastattn.training.contract import Objective
from fastattn.training.data.formats import Documents
from fastattn.training.distributed.layout import DistributedConfig
from fastattn.training.objectives import OBJECTIVES
from fastattn.training.privacy.budget import PrivacyConfig
from fastattn.training.runs.fields import FieldError, converted, filled, names, nearest
from fastattn.training.steps.config import TrainingConfig


@dataclass(frozen=True)
class ModelSettings:
    """The model: one in a folder, to train on, or a new one of the objective's class.

    Attributes:
        folder: with the model to train on, or its name on the Hugging Face Hub; none for a new one.
        library: which reads the folder and runs the model: "fastattn", or "transformers".
        accelerate: whether a model of transformers runs on fastattn's kernels.
        preset: a new model's published size ("gpt2", "transformer-base"), before config's changes.
        config: a new model's fields, in the table [model.config]; the size of the vocabulary and
            the special tokens are the tokenizer's, unless they are here.
        dtype: of the weights; precision in [training] is that of the products.
        device: "auto" is a GPU if there is one; or "cpu", "cuda", "cuda:1".
        lora_rank: of LoRA's adapters (Hu et al. 2021), which are then all that is trained; 0 trains
            the model itself.
        lora_alpha: the adapters' updates are scaled by lora_alpha / lora_rank.
        lora_targets: the ends of the names of the layers that get adapters, or "all-linear".
        lora_dropout: of what an adapter reads.
    """

    folder: str | None = None
    library: Literal["fastattn", "transformers"] = "fastattn"
    accelerate: bool = True
    preset: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_integer("lora_rank", self.lora_rank, at_least=0)
        if self.folder is None and self.library == "transformers":
            raise ValueError(
                'library="transformers" needs a folder with a model: new ones are fastattn\'s'
            )
        if self.folder is not None and (self.preset is not None or self.config):
            raise ValueError("folder excludes preset and config, which are of a new model")


@dataclass(frozen=True)
class TokenizerSettings:
    """The tokenizer: one in a folder, or one that is trained on the training text.

    Attributes:
        folder: with a tokenizer.json; none for the model's folder, or for a trained one.
        vocab_size: trains a tokenizer of so many tokens; its special ones are the objective's.
        characters: how many characters of the training text it is trained on at most.
    """

    folder: str | None = None
    vocab_size: int | None = None
    characters: int = 100_000_000

    def __post_init__(self) -> None:
        check_integer("characters", self.characters, at_least=1)
        if self.folder is not None and self.vocab_size is not None:
            raise ValueError("folder excludes vocab_size, which trains a tokenizer")


@dataclass(frozen=True)
class DataSettings:
    """The data: read once, tokenised into the output folder, and mapped into memory from there.

    Attributes:
        training: files, folders and patterns ("texts/*.txt"), one or several: text, lines of JSON,
            Parquet.
        validation: the same, to evaluate on; none for a part of the training data.
        validation_fraction: how much that part is, of the records, which are taken at even
            distances; 0 for no evaluation.
        documents: of a text file, what a record is: the whole file, a line, or a paragraph, which
            blank lines end.
    """

    training: str | tuple[str, ...]
    validation: str | tuple[str, ...] | None = None
    validation_fraction: float = 0.1
    documents: Documents = "file"

    def __post_init__(self) -> None:
        check_within("validation_fraction", self.validation_fraction, "[0, 1)")
        if not self.training:
            raise ValueError("training must name at least one file or folder")


@dataclass(frozen=True)
class OutputSettings:
    """The folder that a run writes to: checkpoints, metrics, the model.

    Attributes:
        folder: of this run only. The same command goes on where the last checkpoint in it was.
        checkpoint_steps: steps between two checkpoints; none for minutes only.
        checkpoint_minutes: minutes between two checkpoints; none for steps only. There is one in
            the beginning, at the end, and at each validation that is the best so far.
        keep: how many checkpoints to keep, beside the best.
        asynchronous: whether training goes on while a checkpoint is written, from a copy of the
            weights and the optimiser's state in the memory of the CPU.
        best: whether the folder "model" gets the weights with the lowest validation loss, or the
            last ones.
        tensorboard: whether metrics go to TensorBoard's files too, in the folder "tensorboard".
        samples: prompts that a model which generates goes on with at each evaluation.
        sample_tokens: how many tokens it adds to a prompt.
    """

    folder: str
    checkpoint_steps: int | None = None
    checkpoint_minutes: float | None = 10.0
    keep: int = 2
    asynchronous: bool = True
    best: bool = True
    tensorboard: bool = False
    samples: tuple[str, ...] = ()
    sample_tokens: int = 48

    def __post_init__(self) -> None:
        check_integer("sample_tokens", self.sample_tokens, at_least=1)


@dataclass(frozen=True)
class ObjectiveSettings:
    """Which objective, and its own settings, in one table.

    Attributes:
        name: of the objective.
        settings: an instance of its `settings_class`.
    """

    name: str
    settings: Any

    @property
    def cls(self) -> type[Objective]:
        return OBJECTIVES[self.name]


@dataclass(frozen=True)
class Run:
    """All that a run follows from: the same run gives the same weights."""

    model: ModelSettings
    tokenizer: TokenizerSettings
    data: DataSettings
    objective: ObjectiveSettings
    training: TrainingConfig
    distributed: DistributedConfig
    output: OutputSettings
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    @classmethod
    def of(cls, tables: Mapping[str, Any]) -> Run:
        """The run that the tables of a config describe.

        Raises:
            ValueError: an unknown table or key, with the nearest known one; a value of another type
                or out of range; or settings that exclude each other.
        """
        for name, table in tables.items():
            if name not in (*TABLES, "objective"):
                close = nearest(name, (*TABLES, "objective"))
                hint = f"did you mean [{close}]?" if close else "there are " + ", ".join(
                    f"[{known}]" for known in (*TABLES, "objective")
                )  # fmt: skip
                raise FieldError(f"a config has no {name!r}: {hint}")
            if not isinstance(table, Mapping):
                raise FieldError(f"{name} must be a table [{name}], got {table!r}")
        keys = {name: names(table) for name, table in TABLES.items()}
        parts = {
            name: filled(table, tables.get(name, {}), name, keys) for name, table in TABLES.items()
        }
        shared = dict.fromkeys(LENGTHS, parts["training"].context)
        objective = _objective(tables.get("objective", {}), keys, shared)
        model = parts["model"]
        config = converted(config_class(objective.cls), model.config, "model.config", keys)
        parts["model"] = dataclasses.replace(model, config=config)
        if parts["privacy"].enabled and parts["tokenizer"].vocab_size is not None:
            raise FieldError(
                "[tokenizer] vocab_size trains a tokenizer on the training text, whose words it "
                "would disclose: for [privacy] give the folder of one that was trained on others"
            )
        return cls(objective=objective, **parts)

    def tables(self) -> dict[str, dict[str, Any]]:
        """The tables of a config that describes the run, with every field said."""
        return {
            name: {"name": self.objective.name, **vars(self.objective.settings)}
            if name == "objective"
            else dict(vars(getattr(self, name)))
            for name in names(Run)
        }


TABLES: dict[str, Any] = {
    "model": ModelSettings,
    "tokenizer": TokenizerSettings,
    "data": DataSettings,
    "training": TrainingConfig,
    "distributed": DistributedConfig,
    "output": OutputSettings,
    "privacy": PrivacyConfig,
}

# The settings of objectives that say how long a sequence is: the default is [training]'s context.
LENGTHS = ("context", "max_source_length", "max_target_length")


def config_class(objective: type[Objective]) -> Any:
    """The config of the models that an objective trains."""
    return getattr(models, objective.model_class).config_class


def _objective(
    table: Mapping[str, Any], keys: Mapping[str, Sequence[str]], shared: Mapping[str, Any]
) -> ObjectiveSettings:
    """The objective of its table; `shared` has values for fields that it leaves out."""
    name = table.get("name")
    if name not in tuple(OBJECTIVES):
        close = nearest(name, OBJECTIVES) if isinstance(name, str) else None
        raise FieldError(
            f"[objective] name must be one of {', '.join(map(repr, OBJECTIVES))}, "
            f"got {name!r}{f': did you mean {close!r}?' if close else ''}"
        )
    cls = OBJECTIVES[name].settings_class
    known = names(cls)
    values = {key: value for key, value in shared.items() if key in known}
    values |= {key: value for key, value in table.items() if key != "name"}
    return ObjectiveSettings(name, filled(cls, values, "objective", keys))
