"""Tensor parallelism: two and four processes have the results of one."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import torch
from training.distributed import tensor_tasks as tasks

import fastattn
from fastattn.ops.cross_entropy import cross_entropy
from fastattn.training.distributed.tensor import parallelize, plan
from fastattn.training.distributed.vocabulary import parts_of
from oracle import assert_all_close_to_reference, assert_close_to_reference

CASES: dict[str, dict[str, Any]] = {
    "odd sizes": {"rows": 7, "tokens": 11, "width": 5},
    "in pieces": {"rows": 23, "tokens": 13, "width": 6, "scores": 31},
    "capped": {"rows": 9, "tokens": 21, "width": 8, "softcap": 2.0, "scores": 64},
    "large scores": {"rows": 9, "tokens": 14, "width": 8, "scale": 60.0},
    "bfloat16": {"rows": 40, "tokens": 50, "width": 16, "dtype": torch.bfloat16},
    "nothing counts": {"rows": 4, "tokens": 10, "width": 4, "ignored": 1.0},
}


def loss_case(
    rows: int, tokens: int, width: int, scores: int = 1 << 24, softcap: float = 0.0,
    scale: float = 1.0, dtype: torch.dtype = torch.float32, ignored: float = 0.3,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        (torch.randn(shape, generator=generator) * by).to(dtype).float()
        for shape, by in (((rows, width), scale), ((tokens, width), 1.0), ((tokens,), 1.0))
    )
    targets = torch.randint(tokens, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    return {
        "x": x, "weight": weight, "bias": bias,
        "targets": targets, "dtype": dtype, "scores": scores, "softcap": softcap,
    }  # fmt: skip


LOSSES = {name: loss_case(**case) for name, case in CASES.items()}


SAVED = ("gpt2", "llama")
GENERATED = ("gpt2", "llama", "bart", "t5")


def assert_right(ours: list[dict[str, Any]], eager: Any, reference: Any) -> None:
    """Every process has the results of one, by the numeric rule."""
    for found in ours:
        assert found.keys() == reference.keys()
        assert_all_close_to_reference(
            {name: (found[name], eager[name], reference[name]) for name in found}
        )


def both(results: Any, build: Any, name: str) -> list[Any]:
    """What one process finds in float32 and in float64."""
    return [results(build(name, dtype)) for dtype in (torch.float32, torch.float64)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Any]:
    return {name: tmp_path_factory.mktemp(name) for name in SAVED}


@pytest.fixture(scope="module")
def found(folders: dict[str, Any]) -> dict[str, list[Any]]:
    """What two processes find, by the name of the task: a list of both."""
    jobs: dict[str, tuple[Any, ...]] = {
        "gpts": (tasks.gpts, 2, tuple(tasks.GPTS)),
        "others": (tasks.others, 2, tasks.OTHERS),
        **{name: (tasks.saved, name, str(folder)) for name, folder in folders.items()},
        "generated": (tasks.generated, GENERATED),
        "calls": (tasks.calls,),
        "dropped": (tasks.dropped,),
        "losses": (tasks.losses, 2, LOSSES),
        "refused": (tasks.refused,),
    }
    both = processes.run(2, tasks.several, tuple(jobs.values()))
    return dict(zip(jobs, zip(*both), strict=True))


@pytest.mark.parametrize("name", tasks.GPTS)
def test_a_gpt_has_the_logits_loss_and_gradients_of_one_process(found: Any, name: str) -> None:
    assert_right([each[name] for each in found["gpts"]], *both(tasks.gpt_results, tasks.gpt, name))


@pytest.mark.parametrize("name", tasks.OTHERS)
def test_encoders_and_encoder_decoders_too(found: Any, name: str) -> None:
    ours = [each[name] for each in found["others"]]
    assert_right(ours, *both(tasks.other_results, tasks.other, name))


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_folder_has_the_weights_of_one_process(
    found: Any, folders: dict[str, Any], name: str
) -> None:
    assert all(all(same) for same in found[name])
    read, model = fastattn.GPT.from_pretrained(folders[name]), tasks.gpt(name)
    for key, parameter in model.named_parameters():
        assert torch.equal(read.get_parameter(key), parameter), key


@pytest.mark.parametrize("name", GENERATED)
def test_all_processes_generate_what_one_does(found: Any, name: str) -> None:
    model = (tasks.gpt(name) if name in tasks.GPTS else tasks.other(name)).eval()
    expected = model.generate(tasks.batch()[0], max_new_tokens=9).tolist()
    assert [each[name] for each in found["generated"]] == [expected, expected]


def test_a_loss_gathers_no_logits_and_the_feed_forward_is_fused(found: Any) -> None:
    layers = 2
    for calls in found["calls"]:
        assert calls["gathered"] == 0
        assert calls["gathered for logits"] == 1
        assert calls["fused"] == layers
        # Two of each layer, the embedding, the largest scores, and two sums of each row at once.
        assert calls["forward"] == 2 * layers + 3
        assert calls["backward"] == 2 * layers + 1


def test_dropout_is_one_of_the_stream_and_another_of_other_heads(found: Any) -> None:
    first, second = found["dropped"]
    same = {name: (first[name] == second[name]).all() for name in first}
    assert not same.pop("heads")  # all heads are alike, but for what was dropped
    assert all(same.values()), same  # the loss and the gathered gradients, to the bit
    assert first["plain loss"] == first["recomputed loss"]
    for name in first:
        if name.startswith("recomputed "):
            plain = first[name.replace("recomputed", "plain")]
            assert (first[name] == plain).all(), name


PARTS = ("weight", "bias")  # of which each process has its rows


def assert_losses_right(found: Any) -> None:
    for name, case in LOSSES.items():
        columns = []
        for dtype in (case["dtype"], torch.float64):
            x, weight, bias = (
                case[key].to(dtype, copy=True).requires_grad_() for key in ("x", "weight", "bias")
            )
            logits = torch.nn.functional.linear(x, weight, bias)
            loss = cross_entropy(
                logits, case["targets"], softcap=case["softcap"],
                backend="reference",
            )  # fmt: skip
            loss.backward()
            columns.append((loss.detach(), x.grad, weight.grad, bias.grad))
        if name == "nothing counts":
            assert all(each[name]["loss"].isnan() for each in found)
            assert all(not each[name][key].any() for each in found for key in ("x", "weight"))
            continue
        for each in found:
            parts = [torch.cat([e[name][key] for e in found]) for key in PARTS]
            ours = [each[name]["loss"], each[name]["x"], *parts]
            for what, *triple in zip(("loss", "x", *PARTS), ours, *columns, strict=True):
                assert_close_to_reference(*triple, name=f"{name}: {what}")


def test_the_loss_of_a_divided_vocabulary(found: Any) -> None:
    assert_losses_right(found["losses"])


@pytest.mark.long
def test_four_processes() -> None:
    for name in tasks.GPTS:
        found = processes.run(4, tasks.gpts, 4, (name,))
        assert_right([e[name] for e in found], *both(tasks.gpt_results, tasks.gpt, name))
    for name in tasks.OTHERS:
        found = processes.run(4, tasks.others, 4, (name,))
        assert_right([e[name] for e in found], *both(tasks.other_results, tasks.other, name))
    assert_losses_right(processes.run(4, tasks.losses, 4, LOSSES))


def test_a_model_that_cannot_be_divided_stays_as_it_is(found: Any) -> None:
    for message, same in found["refused"]:
        assert "blocks.0.attention.num_kv_heads is 3, which tensor=2" in message
        assert same


@pytest.mark.parametrize(
    ("changes", "count", "named"),
    [
        ({"n_head": 3, "n_embd": 24}, 2, "blocks.0.attention.num_heads is 3"),
        ({"n_head": 4, "n_kv_head": 2}, 4, "blocks.0.attention.num_kv_heads is 2"),
        ({"n_inner": 33}, 2, "blocks.0.feed_forward.feedforward_dim is 33"),
        ({"vocab_size": 5}, 4, "a vocabulary of 5 tokens leaves the last of tensor=4"),
    ],
)
def test_sizes_that_do_not_divide(changes: dict[str, Any], count: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan(tasks.gpt("gpt2", **changes), count)


def test_modules_of_others_are_named() -> None:
    class Adapter(torch.nn.Linear):
        pass

    model = tasks.gpt("gpt2")
    model.blocks[1].attention.in_proj = Adapter(24, 72)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.in_proj is a .*Adapter, and"):
        plan(model, 2)
    with pytest.raises(ValueError, match=r"the model is a torch\.nn\..*Linear, and"):
        plan(torch.nn.Linear(2, 2), 2)


def test_a_mesh_is_asked_for() -> None:
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got int"):
        parallelize(tasks.gpt("gpt2"), 2)  # type: ignore[arg-type]


def test_parts_of_a_vocabulary_are_those_of_torch() -> None:
    for size in range(1, 40):
        for count in range(1, 7):
            chunks = [len(part) for part in torch.arange(size).chunk(count)]
            if len(chunks) == count:
                assert parts_of(size, count) == chunks
            else:
                with pytest.raises(ValueError, match="take fewer processes"):
                    parts_of(size, count)
