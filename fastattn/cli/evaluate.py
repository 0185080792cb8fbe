"""Measure a model on data that it has not seen.

    fastattn evaluate FOLDER --data held_out.txt                perplexity, bits per byte; of a
                                                                masked model pseudo-perplexity
    fastattn evaluate FOLDER --data reviews.jsonl               accuracy, F1, of a classifier
    fastattn evaluate FOLDER --data squad.jsonl                 exact match, F1, of answers
    fastattn evaluate FOLDER --data pairs.jsonl source=en target=zh --beams 4
                                                                BLEU, chrF, of translations
    fastattn evaluate FOLDER --data held_out.txt --members training.txt
                                                                can it be told from the model which
                                                                texts it was trained on?

The model's class decides the measures. One of transformers, --library transformers, is read by
transformers and runs on fastattn's kernels. Data is text, JSON lines or Parquet, files, folders or
patterns; key=value says which fields of a record are read, as a config of `fastattn train` does in
[objective]. The scores are the same at any batch size, but for the last digits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

import fastattn
from fastattn import models
from fastattn.cli import answers
from fastattn.nn.mode import in_mode
from fastattn.training.contract import Batch, Example, Objective
from fastattn.training.data.formats import Documents, Sourced
from fastattn.training.data.order import Shuffled
from fastattn.training.data.sources import read_records
from fastattn.training.evaluation import metrics
from fastattn.training.evaluation.perplexity import perplexity
from fastattn.training.evaluation.translation import translations
from fastattn.training.objectives.causal import Causal
from fastattn.training.objectives.classification import Classification
from fastattn.training.objectives.masked import Masked
from fastattn.training.objectives.pseudo_perplexity import pseudo_perplexity
from fastattn.training.objectives.question_answering import QuestionAnswering
from fastattn.training.objectives.sequence_to_sequence import SequenceToSequence
from fastattn.training.objectives.token_classification import TokenClassification
from fastattn.training.optional import require
from fastattn.training.privacy.membership import attacks
from fastattn.training.runs import toml
from fastattn.training.runs.fields import filled
from fastattn.training.sizes import longest_sequence
from fastattn.training.tokenizer import Tokenizer

Scores = Mapping[str, float]
# Of our models the class, of transformers' the end of the architecture's name in config.json.
MEASURED: tuple[type[Objective], ...] = (
    Causal, SequenceToSequence, Masked, Classification, TokenClassification, QuestionAnswering,
)  # fmt: skip
OBJECTIVES = {objective.model_class: objective for objective in MEASURED}
ARCHITECTURES: Mapping[str, type[Objective]] = {
    "ForCausalLM": Causal,
    "LMHeadModel": Causal,
    "ForConditionalGeneration": SequenceToSequence,
    "MarianMTModel": SequenceToSequence,
    "ForMaskedLM": Masked,
    "ForSequenceClassification": Classification,
    "ForTokenClassification": TokenClassification,
    "ForQuestionAnswering": QuestionAnswering,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="with the model and its tokenizer")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the objective")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="to measure on")
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--batch-size", type=int, default=8, help="default: 8")
    parser.add_argument(
        "--library",
        choices=("fastattn", "transformers"),
        default="fastattn",
        help="which reads the folder (default: fastattn)",
    )
    parser.add_argument(
        "--documents",
        choices=get_args(Documents),
        default="file",
        help="what of a text file is read by itself (default: file, all of it)",
    )
    text = parser.add_argument_group("language models")
    text.add_argument("--context", type=int, help="tokens that are read (default: all positions)")
    text.add_argument("--stride", type=int, help="of the sliding window (default: half of it)")
    text.add_argument(
        "--members",
        nargs="+",
        metavar="PATH",
        help="training data, which an attack tries to tell from --data (membership inference)",
    )
    text.add_argument("--reference", metavar="FOLDER", help="a model that --members did not train")
    translation = parser.add_argument_group("translation")
    translation.add_argument("--beams", type=int, default=4, help="1 is greedy (default: 4)")
    translation.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    answers.add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    answers.check_least(arguments, "batch_size")
    folder = answers.existing(arguments.folder)
    load = _of_transformers if arguments.library == "transformers" else _of_ours
    model, cls = load(folder, arguments)
    objective = _objective(model, cls, Tokenizer.load(folder), arguments)
    records = list(read_records(arguments.data, arguments.documents))
    if arguments.members is not None and not isinstance(objective, Causal):
        raise ValueError(f"--members is for language models, and this is a {type(model).__name__}")
    if arguments.reference is not None and arguments.members is None:
        raise ValueError("--reference needs --members: it is a part of that evaluation")
    if arguments.members is not None:
        scores = _of_membership(model, objective, records, arguments)
    elif isinstance(objective, Causal):
        scores = _of_texts(model, objective, records, arguments)
    elif isinstance(objective, Masked):
        scores = _of_masked(model, objective, records, arguments)
    elif isinstance(objective, SequenceToSequence):
        scores = _of_translations(model, objective, records, arguments)
    else:
        scores = _of_answers(model, objective, records, arguments)
    if objective.truncated:
        print(f"fastattn: {objective.truncated} texts were cut to the context", file=sys.stderr)
    _show(_chosen(scores, arguments.metric), len(records), arguments)
    return 0


def _of_ours(folder: Path, arguments: argparse.Namespace) -> tuple[Any, type[Objective]]:
    dtype = getattr(torch, arguments.dtype)
    model = models.load(folder, dtype=dtype, device=arguments.device)
    name = type(model).__name__
    if name not in OBJECTIVES:
        raise ValueError(
            f"fastattn evaluate has no measure for a {name}; it has some for "
            f"{', '.join(OBJECTIVES)}"
        )
    return model, OBJECTIVES[name]


def _of_transformers(folder: Path, arguments: argparse.Namespace) -> tuple[Any, type[Objective]]:
    transformers = require("transformers", "hf", "--library transformers")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    name = (config.architectures or ["no class"])[0]
    ends = [end for end in ARCHITECTURES if name.endswith(end)]
    if not ends:
        raise ValueError(
            f"{folder} holds {name}, for which fastattn evaluate has no measure; it has some for "
            f"classes that end in {', '.join(ARCHITECTURES)}"
        )
    cls = ARCHITECTURES[ends[0]]
    auto = getattr(transformers, cls.auto_class)
    model = auto.from_pretrained(
        folder,
        dtype=getattr(torch, arguments.dtype),
        trust_remote_code=False,
        use_safetensors=True,
    )
    fastattn.accelerate(model.to(arguments.device).eval())
    return model, cls


def _objective(
    model: Any, cls: type[Objective], tokenizer: Tokenizer, arguments: argparse.Namespace
) -> Objective:
    """The model's objective; labels and context are the model's unless given."""
    table = toml.overridden({}, arguments.settings)
    defaults = {field.name: field.default for field in dataclasses.fields(cls.settings_class)}
    if "labels" in defaults:
        table.setdefault("labels", _labels(model))
    if "context" in defaults:
        usual: Any = defaults["context"]
        table.setdefault("context", min(usual, longest_sequence(model) or usual))
    return cls(tokenizer, filled(cls.settings_class, table, "objective"), arguments.library)


def _labels(model: Any) -> list[str]:
    """The names of a model's classes, in the order of their numbers."""
    named = getattr(model.config, "id2label", None)
    if named is not None:
        return [named[i] for i in sorted(named)]
    return answers.labels(model.config)


def _of_texts(
    model: Any, objective: Causal, records: Sequence[Sourced], arguments: argparse.Namespace
) -> Scores:
    field = objective.settings.field
    texts = list(_placed(records, lambda record: [objective.text(record, field)]))
    with _Counter("windows") as counter:
        found = perplexity(
            model,
            objective.tokenizer,
            texts,
            context=arguments.context,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            on_progress=counter.add,
        )
    names = ("perplexity", "bits_per_byte", "nats_per_token", "tokens")
    return {name: getattr(found, name) for name in names}


def _of_membership(
    model: Any, objective: Objective, records: Sequence[Sourced], arguments: argparse.Namespace
) -> Scores:
    """Each attack's area and true positives, with the ends of their intervals."""
    field = objective.settings.field
    if arguments.stride is not None:
        raise ValueError("--stride and --members exclude each other")
    members = read_records(arguments.members, arguments.documents)
    texts = [
        list(_placed(each, lambda record: [objective.text(record, field)]))
        for each in (members, records)
    ]
    reference = None
    if arguments.reference is not None:
        dtype = getattr(torch, arguments.dtype)
        other = models.load(arguments.reference, dtype=dtype, device=arguments.device)
        reference = other, Tokenizer.load(arguments.reference)
    with _Counter("windows") as counter:
        found = attacks(
            model,
            objective.tokenizer,
            *texts,
            reference=reference,
            context=arguments.context,
            batch_size=arguments.batch_size,
            on_progress=counter.add,
        )
    return {
        f"{attack}_{name}": value
        for attack, figures in found.items()
        for name, value in (
            ("auc", figures.auc),
            ("auc_low", figures.auc_interval[0]),
            ("auc_high", figures.auc_interval[1]),
            ("tpr", figures.true_positives),
            ("tpr_low", figures.true_positives_interval[0]),
            ("tpr_high", figures.true_positives_interval[1]),
        )
    }


def _of_masked(
    model: Any, objective: Masked, records: Sequence[Sourced], arguments: argparse.Namespace
) -> Scores:
    with _Counter("tokens") as counter:
        value, tokens = pseudo_perplexity(
            model,
            objective,
            _placed(records, objective.encode),
            batch_size=arguments.batch_size,
            on_progress=counter.add,
        )
    return {"pseudo_perplexity": value, "tokens": tokens}


def _of_translations(
    model: Any,
    objective: SequenceToSequence,
    records: Sequence[Sourced],
    arguments: argparse.Namespace,
) -> Scores:
    examples = list(_placed(records, objective.encode))
    references = [[objective.text(record, objective.settings.target)] for _, record in records]
    with _Counter("sentences") as counter:
        written = translations(
            model,
            objective.tokenizer,
            [example["input_ids"].tolist() for example in examples],
            num_beams=arguments.beams,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            on_progress=counter.add,
        )
    # Chinese has no spaces between words: sacrebleu then counts n-grams of characters.
    chinese = any("\u4e00" <= character <= "\u9fff" for (text,) in references for character in text)
    name, tokenize = ("bleu_zh", "zh") if chinese else ("bleu", "13a")
    return {
        name: metrics.bleu(written, references, tokenize),
        "chrf": metrics.chrf(written, references),
    }


def _of_answers(
    model: torch.nn.Module,
    objective: Objective,
    records: Sequence[Sourced],
    arguments: argparse.Namespace,
) -> Scores:
    """The objective's measures: of classes, of words, of answers in passages."""
    examples: list[Example] = list(_placed(records, objective.encode))
    batches = Shuffled(examples, objective, min(arguments.batch_size, len(examples)), seed=0)
    device = next(model.parameters()).device
    with _Counter("examples") as counter, torch.inference_mode(), in_mode(model, training=False):

        def moved() -> Iterator[Batch]:
            for batch in batches.once():
                yield batch.to(device)
                counter.add(batch.counted)

        measured = objective.measure(model, moved())
    # The loss of answers depends on a batch's padding, among whose places it finds the right ones.
    return {name: value for name, value in measured.items() if name != "loss"}


def _placed(records: Iterable[Sourced], made: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    """Whatever is made of each record; an error begins with the record's place."""
    for place, record in records:
        try:
            yield from made(record)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _chosen(scores: Scores, names: Sequence[str] | None) -> Scores:
    if unknown := set(names or ()) - scores.keys():
        raise ValueError(
            f"--metric {sorted(unknown)[0]!r} is none of this model's: {', '.join(scores)}"
        )
    return {name: scores[name] for name in names or scores}


def _show(scores: Scores, records: int, arguments: argparse.Namespace) -> None:
    if arguments.json:
        result = {"model": arguments.folder, "data": arguments.data, "records": records}
        print(json.dumps({**result, "scores": scores}, ensure_ascii=False))
        return
    print(f"{records} records")
    width = max(map(len, scores))
    for name, value in scores.items():
        print(f"{name:<{width}}  {value:{',' if isinstance(value, int) else '.4f'}}")


class _Counter:
    """A line on stderr that counts, where that is a terminal."""

    def __init__(self, of: str) -> None:
        self._of, self._count, self._live = of, 0, sys.stderr.isatty()

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def add(self, count: int) -> None:
        self._count += count
        if self._live:
            print(f"\r{self._count} {self._of}", end="", file=sys.stderr, flush=True)
