"""DP-SGD: each example's gradient, its clip, the noise, the budget, and a run that goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from training.privacy import private as p

from fastattn.models import EncoderConfig, EncoderForSequenceClassification
from fastattn.training import Causal, Checkpoints, History, Tokenizer, train
from fastattn.training.contract import Batch, loss_of
from fastattn.training.data import prepare
from fastattn.training.distributed.share import Share
from fastattn.training.objectives.classification import Classification, ClassificationSettings
from fastattn.training.privacy.budget import PrivacyConfig
from fastattn.training.privacy.gradients import PrivateGradients, example_gradients
from fastattn.training.privacy.membership import attacks
from fastattn.training.privacy.sampling import Key, Sampled
from fastattn.training.runs import adapters
from fastattn.training.runs.settings import ModelSettings
from oracle import assert_all_close_to_reference

pytest.importorskip("opacus")


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: x for name, x in model.named_parameters() if x.requires_grad}


def looped(model: torch.nn.Module, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The gradient of each row by a backward of its own, {name: (B, *shape)}."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in trained(model)}
    for row in rows:
        model.zero_grad()
        loss_of(model(**row)).backward()
        for name, x in trained(model).items():
            found[name].append(torch.zeros_like(x) if x.grad is None else x.grad.clone())
    return {name: torch.stack(each) for name, each in found.items()}


def assert_equal_to_a_loop(
    model: torch.nn.Module, batch: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    model.eval()
    ours, losses = example_gradients(model, trained(model), batch)
    eager = looped(model, rows)
    double = copy.deepcopy(model).double()
    reference = looped(double, rows)
    assert_all_close_to_reference(
        {name: (ours[name], eager[name], reference[name]) for name in reference}
    )
    assert losses.shape == (len(rows),)
    with torch.no_grad():
        wanted = torch.stack([loss_of(double(**row)) for row in rows])
    torch.testing.assert_close(losses.double(), wanted.double(), rtol=1e-5, atol=1e-5)


DECODERS: dict[str, dict[str, Any]] = {
    "GPT-2, tied": {},
    "untied": {"tie_word_embeddings": False},
    "Llama": {
        "positions": "rotary", "norm": "rms_norm", "gated": True, "activation_function": "silu",
        "n_kv_head": 1, "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_of_a_decoder_are_those_of_a_loop(name: str, tmp_path: Path) -> None:
    """Each row has another length; the loop reads it as training without privacy does, packed."""
    model = p.model(**DECODERS[name])
    sampled = p.private(tmp_path).batches
    batch = next(iter(sampled.once()))
    rows = [
        dict(sampled.objective.collate([sampled._piece(i)], None).arguments)  # type: ignore[arg-type]
        for i in range(sampled.batch_size)
    ]
    rows.sort(key=lambda row: row["input_ids"].shape[1])  # as in the batch
    assert rows[0]["input_ids"].shape[1] < rows[-1]["input_ids"].shape[1]
    assert_equal_to_a_loop(model, dict(batch.arguments), rows)


def test_gradients_of_adapters_are_those_of_a_loop(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = p.model()
    adapters.add(model, ModelSettings(lora_rank=3))
    for x in trained(model).values():
        torch.nn.init.normal_(x, std=0.2)
    tokens, targets = torch.randint(257, (2, 4, 11))
    batch = {"input_ids": tokens, "targets": targets, "keep_logits": False}
    rows = [
        {"input_ids": tokens[i : i + 1], "targets": targets[i : i + 1], "keep_logits": False}
        for i in range(4)
    ]
    assert_equal_to_a_loop(model, batch, rows)


def test_gradients_of_a_classifier_are_those_of_a_loop() -> None:
    """Padding is hidden by a mask; the loop has none."""
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=2, n_labels=3
    )
    model = EncoderForSequenceClassification(config)
    tokens, mask = torch.randint(1, 61, (4, 13)), torch.ones(4, 13, dtype=torch.long)
    labels = torch.tensor([0, 2, 1, 2])
    for i, length in enumerate((13, 5, 9, 1)):
        mask[i, length:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    rows = [
        {"input_ids": tokens[i : i + 1, : int(mask[i].sum())], "labels": labels[i : i + 1]}
        for i in range(4)
    ]
    assert_equal_to_a_loop(model, batch, rows)


def sums(privacy: PrivateGradients, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The sum of the clipped gradients, as one vector."""
    privacy.noise_multiplier = 0.0
    privacy.leave(model, Share([(0, batch)], [1.0], batch.tokens))
    whole = torch.cat([x.grad.flatten() for x in trained(model).values() if x.grad is not None])
    return whole * privacy.batches.batch_size


def test_no_example_has_more_than_its_bound(tmp_path: Path) -> None:
    """Alone, and as the difference of two batches that differ in it; a small one keeps its size."""
    model = p.model()
    config = dataclasses.replace(p.CONFIG, max_gradient_norm=1.5)
    privacy = p.private(tmp_path, config)
    batch = next(iter(privacy.batches.once()))

    def part(rows: list[int]) -> Batch:
        tensors = ("input_ids", "targets")
        arguments = {n: v[rows] if n in tensors else v for n, v in batch.arguments.items()}
        return dataclasses.replace(batch, arguments=arguments)

    gradients, _ = example_gradients(model, trained(model), dict(batch.arguments))
    norms = torch.cat([g.flatten(1) for g in gradients.values()], dim=1).norm(dim=1)
    assert norms.min() > 1.5  # so that the bound is felt
    whole = sums(privacy, model, batch)
    for i in range(5):
        assert sums(privacy, model, part([i])).norm() <= 1.5 * (1 + 1e-6)
        without = sums(privacy, model, part([j for j in range(5) if j != i]))
        assert (whole - without).norm() <= 1.5 * (1 + 1e-5)
    loose = p.private(tmp_path, dataclasses.replace(config, max_gradient_norm=1e3))
    alone = torch.cat([g[3].flatten() for g in gradients.values()])
    torch.testing.assert_close(sums(loose, model, part([3])), alone, rtol=1e-5, atol=1e-6)


def test_a_classifier_of_examples_of_files(tmp_path: Path) -> None:
    """Texts of several lengths, in chunks: the sum is that of a loop where no gradient is cut."""
    roles = {role: f"<|{role}|>" for role in Classification.roles}
    tokenizer = Tokenizer.train(["a"], 270, special_tokens=roles)
    objective = Classification(tokenizer, ClassificationSettings(("no", "yes"), context=16))
    file = tmp_path / "texts.jsonl"
    records = [{"text": "ab" * (1 + i % 5), "label": i % 2} for i in range(9)]
    file.write_text("\n".join(map(json.dumps, records)))
    examples = prepare(file, objective, tmp_path / "prepared")
    config = dataclasses.replace(p.CONFIG, batch_size=9, max_gradient_norm=1e4)
    sampled = Sampled(examples, objective, 9, 16, Key(0))
    settings = PrivacyConfig(noise_multiplier=1.0, delta=1e-3, examples_at_once=4)
    privacy = PrivateGradients(settings, sampled, config)
    torch.manual_seed(0)
    model = EncoderForSequenceClassification(
        EncoderConfig(vocab_size=270, n_positions=16, n_embd=24, n_layer=1, n_head=2)
    )
    ours = sums(privacy, model, sampled.batch(0))
    rows = [dict(objective.collate([examples[i]], None).arguments) for i in range(9)]  # type: ignore[arg-type]
    wanted = torch.cat([g.sum(0).flatten() for g in looped(model, rows).values()])
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_the_sum_is_that_of_opacus(tmp_path: Path, at_once: int) -> None:
    """Its optimiser clips the same gradients of examples, in one piece."""
    from opacus.optimizers import DPOptimizer

    model = p.model()
    privacy = p.private(tmp_path, examples_at_once=at_once)
    batch = next(iter(privacy.batches.once()))
    ours = sums(privacy, model, batch)
    gradients, _ = example_gradients(model, trained(model), dict(batch.arguments))
    for name, parameter in trained(model).items():
        parameter.grad_sample = gradients[name]  # type: ignore[attr-defined]
    theirs = DPOptimizer(
        torch.optim.SGD(trained(model).values(), 1.0),
        noise_multiplier=0.0,
        max_grad_norm=p.CONFIG.max_gradient_norm,
        expected_batch_size=5,
    )
    theirs.pre_step()
    wanted = torch.cat([x.grad.flatten() for x in trained(model).values() if x.grad is not None])
    torch.testing.assert_close(ours, wanted * 5, rtol=1e-5, atol=1e-6)


def test_noise_is_normal_of_the_right_size_and_follows_from_key_and_step(tmp_path: Path) -> None:
    """Of a step that no example joined, which has noise like any other."""
    model = p.model(n_embd=64)
    privacy = p.private(tmp_path, noise_multiplier=1.7)
    empty = Batch({}, 0, 0)

    def noise(number: int, subject: PrivateGradients = privacy) -> torch.Tensor:
        loss, norm = subject.leave(model, Share([(number, empty)], [1.0], 0))
        whole = torch.cat([x.grad.flatten() for x in trained(model).values() if x.grad is not None])
        assert loss == 0.0 and norm == pytest.approx(whole.norm().item(), rel=1e-5)
        return whole.double() * 5 / (0.5 * 1.7)  # batch size, bound, multiplier

    first, second = noise(0), noise(1)
    count = len(first)
    assert count > 50_000
    for z in (first, second):  # mean, variance and fourth moment, each within five deviations
        assert abs(z.mean()) < 5 / count**0.5
        assert abs(z.var() - 1) < 5 * (2 / count) ** 0.5
        assert abs((z**4).mean() - 3) < 5 * (96 / count) ** 0.5
    assert abs((first * second).mean()) < 5 / count**0.5
    assert torch.equal(noise(0), first)
    assert not torch.equal(noise(0, p.private(tmp_path, key=2, noise_multiplier=1.7)), first)


def run(
    folder: Path, model: torch.nn.Module, stop: int | None = None, key: int = 1, **changes: Any
) -> History:
    """Train; `stop` ends it after that step as a crash would."""
    config = dataclasses.replace(p.CONFIG, **changes)
    privacy = p.private(folder, config, key)

    def crash(history: History) -> None:
        if stop is not None and len(history.steps) == stop:
            raise RuntimeError("crash")

    return train(
        model,
        Causal(p.TOKENIZER),
        privacy.batches,
        config,
        validation=privacy.batches,
        checkpoints=Checkpoints(folder / "checkpoints", every_steps=2),
        privacy=privacy,
        on_progress=crash,
    )


def test_a_run_that_crashed_goes_on_to_the_same_bits(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Weights, dropout, noise, epsilon."""
    dropout = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
    whole = p.model(**dropout)
    history = run(tmp_path_factory.mktemp("whole"), whole)
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, p.model(**dropout), stop=5)
    with pytest.raises(ValueError, match=r"privacy\.key"):
        run(tmp_path, p.model(**dropout), key=2)
    resumed = p.model(**dropout)
    assert run(tmp_path, resumed) == history
    for name, x in whole.state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name
    spent = [evaluation.scores["epsilon"] for evaluation in history.evaluations]
    assert spent == [p.private(tmp_path).epsilon(steps) for steps in (0, 3, 6)]
    assert spent[0] == 0 < spent[1] < spent[2]


def test_bfloat16_keeps_the_bound(tmp_path: Path) -> None:
    privacy = p.private(tmp_path, dataclasses.replace(p.CONFIG, precision="bfloat16"))
    batch = privacy.batches.batch(0)
    count = len(batch.arguments["input_ids"])
    assert 0 < sums(privacy, p.model(), batch).norm() <= count * 0.5 * (1 + 1e-5)


@pytest.mark.long
def test_an_attack_finds_whom_a_run_has_learned_by_heart_unless_it_is_private(
    tmp_path: Path,
) -> None:
    """The same texts, model and steps: the noise is the difference. Both learn which letters occur."""
    random = numpy.random.default_rng(0)
    texts = ["".join(random.choice(list("abcdefghij"), 16)) for _ in range(80)]
    config = dataclasses.replace(p.CONFIG, steps=120, batch_size=40, evaluation_interval=120)
    objective, examples = Causal(p.TOKENIZER), p.examples(tmp_path, texts=texts[:40])
    sampled = Sampled(examples, objective, 40, 24, Key(7))
    settings = PrivacyConfig(noise_multiplier=25.0, delta=1e-3)
    found = {}
    for name, privacy in (
        ("plain", None),
        ("private", PrivateGradients(settings, sampled, config)),
    ):
        model = p.model()
        history = train(model, objective, sampled, config, privacy=privacy)
        assert history.steps[-1].loss < history.steps[0].loss - 0.5
        found[name] = attacks(model, p.TOKENIZER, texts[:40], texts[40:])["loss"]
    assert found["plain"].auc_interval[0] > 0.95
    low, high = found["private"].auc_interval
    assert low < 0.55 and high < 0.8, found


def _other_batches(folder: Path) -> History:
    privacy, other = p.private(folder), p.private(folder).batches
    return train(p.model(), Causal(p.TOKENIZER), other, p.CONFIG, privacy=privacy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: p.private(f, dataclasses.replace(p.CONFIG, accumulation=2)), "accumulation"),
        (lambda f: p.private(f, dataclasses.replace(p.CONFIG, activation_checkpointing=True)), "activ"),
        (lambda f: p.private(f, dataclasses.replace(p.CONFIG, max_gradient_norm=math.inf)), "finite"),
        (lambda f: p.private(f, dataclasses.replace(p.CONFIG, precision="float16")), "float16"),
        (lambda f: p.private(f, delta=0.05), "1 / examples"),
        (lambda f: p.private(f, noise_multiplier=0.05, accountant="prv"), "too large"),
        (_other_batches, "other batches"),
    ],
)  # fmt: skip
def test_what_excludes_privacy_says_so(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    """A gradient that is no number has no norm to be clipped to."""
    model = p.model()
    with torch.no_grad():
        model.blocks[0].feed_forward.linear1.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="step 1"):
        run(tmp_path, model)
