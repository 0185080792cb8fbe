"""The harness's scores by our adapter and by its own of transformers: the same, at any batch size."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.training import Tokenizer

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.long  # the harness takes 15 seconds to import

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "今天",
    "天气",
    "很好",
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.json}}}}
test_split: test
"""
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: [" the", "o"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def sentence(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three tasks and their data."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = Tokenizer.train([" ".join(WORDS) * 5], vocab_size=300)
    torch.manual_seed(0)
    fastattn.GPT(
        fastattn.GPTConfig(
            vocab_size=tokenizer.vocab_size, n_positions=40, n_embd=32, n_layer=2, n_head=4,
            bos_token_id=tokenizer.end_of_text, eos_token_id=tokenizer.end_of_text,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save(folder)
    draw = random.Random(0)
    choose = [
        {
            "question": sentence(draw, draw.choice([2, 9, 40])),  # the last is cut from the left
            "choices": [sentence(draw, draw.randint(1, 3)) for _ in range(4)],
            "label": draw.randrange(4),
        }
        for _ in range(8)
    ]
    read = [{"text": sentence(draw, n)} for n in (1, 5, 30, 90)]
    write = [{"text": sentence(draw, n)} for n in (1, 3, 5, 8, 60)]
    for name, docs in (("choose", choose), ("read", read), ("write", write)):
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, docs)))
        text = TASK.format(name=name, folder=folder) + TASKS[name]
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def evaluate(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model and batch size to the scores and the answers of all documents."""
    from lm_eval.tasks import TaskManager

    patch = pytest.MonkeyPatch()
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(model: Any, batch_size: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
        given = "pretrained=" + str(folder) if isinstance(model, str) else None
        results = lm_eval.simple_evaluate(
            model, given, tasks=["choose", "read", "write"], batch_size=batch_size,
            task_manager=manager, bootstrap_iters=0, device="cpu",
        )  # fmt: skip
        answers = {
            name: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
            for name, samples in results["samples"].items()
        }
        return results["results"], answers

    yield run
    patch.undo()


@pytest.fixture(scope="module")
def theirs(folder: Path, evaluate: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return evaluate(HFLM(str(folder), dtype="float32", device="cpu", batch_size=1))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_are_the_harness_own(evaluate: Any, theirs: Any, batch_size: int) -> None:
    import fastattn.integrations.lm_eval  # noqa: F401  (registers the model)

    expected, answers = theirs
    scores, found = evaluate("fastattn", batch_size)
    for task, metrics in expected.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert scores[task][name] == pytest.approx(value, rel=1e-5), (task, name)
    for task in ("choose", "read"):
        for ours, wanted in zip(found[task], answers[task], strict=True):
            for (mine,), (other,) in zip(ours, wanted, strict=True):
                assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert found["write"] == answers["write"]
    assert len({text for (((text,)),) in answers["write"]}) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size must be a number of requests, got 'auto'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_length": 41}, "max_length must be at most the model's 40 positions, got 41"),
    ],
)
def test_arguments_out_of_range(folder: Path, arguments: dict[str, Any], message: str) -> None:
    from fastattn.integrations.lm_eval import FastattnLM

    with pytest.raises(ValueError, match=message):
        FastattnLM(str(folder), **arguments)


def test_other_models_are_refused(folder: Path) -> None:
    from fastattn.integrations.lm_eval import FastattnLM

    with pytest.raises(TypeError, match=r"a folder with a decoder or a fastattn.GPT, got Linear"):
        FastattnLM(torch.nn.Linear(1, 1), str(folder))
